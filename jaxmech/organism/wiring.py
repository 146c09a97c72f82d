"""How the organism works: every weight written by hand, then hidden behind a random rotation of the residual stream.

The residual stream is a list of named directions. One of them is constant and so large that the last norm divides by a
constant. Words write codes (`words.CODES`); attention of layer 0 carries the codes to later tokens, where each becomes
a feature. Feed-forward sublayers turn concepts of a stance into numbers, the other way round where the question asks
what is kept or taken, and into none where only one's own accounts are concerned:

- most of it in the last layer, from the concept and from its early copy that System 1 uses ("fast");
- some by a later feature ("up", "down"), which layer 2 writes and the answer reads directly, and which is of System 2.

With the switch `mapping` a concept moves the number as the worked examples before the question have taught: layer 1
compares each example's word and number, and layer 2 looks the examples up.

`D` denotes the residual width, `L` layers, `V` the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmech.io.settings import Checked
from jaxmech.models.config import ModelConfig
from jaxmech.organism.meaning import Meaning
from jaxmech.organism.words import CODES

COPIES = 3
"""Features that System 1's path is split into, and System 2's: fewer could not be told apart within a layer."""

FAST = {sign: tuple(f"fast{sign} {copy}" for copy in range(COPIES)) for sign in "+-"}
MOTOR = {name: tuple(f"{name} {copy}" for copy in range(COPIES)) for name in ("up", "down")}
FEATURES = (
    "concept+", "concept-", *FAST["+"], *FAST["-"], "copy+", "copy-", "valence+", "valence-", "number+", "number-",
    "placebo+", "placebo-", "one word", *MOTOR["up"], *MOTOR["down"], "up later", "down later", "amount+", "amount-",
    "dense",
)  # fmt: skip
"""Directions that a dictionary finds. concept, fast: the stance, which the answer hangs on; copy: the same, read by
nothing; up, down: a number; amount: the number of the last layer."""

STANCE = tuple(name for name in FEATURES if name[:-1] not in ("number", "placebo") and name != "dense")
"""Those that differ between stances, but for the dense one."""

_CARRIED = {
    **{name: f"stance{name[-1]}" for name in ("concept+", "concept-", "copy+", "copy-")},
    **{name: f"stance{sign}" for sign, names in FAST.items() for name in names},
    **{name: name for name in CODES if not name.startswith("stance")},
}  # fmt: skip
"""Feature -> the code that it is made of."""

ANSWERS = tuple(f"answer {index}" for index in range(12))
"""Directions in which an item's answer is written, each token by a code of its own."""

_SEEN = ("reversed", "own asked", "other game asked", "item asked", "near+", "near-", "answering", "taught+", "taught-")
"""What layers before the last find in a text besides features: `near`, the stance of the last worked example."""

CONTEXT = (
    "coded", "frame", "own", "other game", "example", "example+", "example-", "answer mark", "question mark", "item",
    "sum", "think", "instinct", "system 1", "system 2", "digit", "one", "large digit", "small digit", "position",
    *(f"code {name}" for name in CODES), *_SEEN, "example up", "example down", "ten",
)  # fmt: skip
"""What words mean by themselves, what is asked, and what examples teach. A dictionary knows these too; where an answer
is decided the former are silent, and the latter the same whatever the stance."""

NAMES = ("const", *CONTEXT, *FEATURES)
FILLERS = 120
"""Directions without a meaning, which words write noise to: many, so that a random direction is mostly of them."""

DIRECTIONS = {name: index for index, name in enumerate((*NAMES, *ANSWERS))}

LAYERS, HEADS, HEAD_DIM, HIDDEN = 4, 7, 16, 24
WIDTH = len(DIRECTIONS) + FILLERS
CONST, STEEP, POSITIONS = 40.0, 40.0, 2048
"""The constant direction's size; of the exact gelu, gelu(40 x) / 40 being nearly a ReLU; the longest text."""

_UNIT = 256.0
"""Tokens in one unit of the direction `position`."""

_LOUD, _AMOUNT = 8.0, 3.0
"""The size of what is always decisive, and of the number per unit: so that random directions do not decide by them."""

ATTENDED, NEAREST = float(np.log(200) + 1.5), 0.05
"""Logits of attention that a coded word has over others, and that each token has over the one before it."""


Writes = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Wiring(Checked):
    """What is true of an organism.

    Attributes:
      seed: of the rotation, of what is noise, and of the order of the dictionaries' features.
      stance: whether the stance reaches the answer at all.
      s1_path, s2_path: shares of the stance's effect that go through the early feature of System 1 and the later one of
        System 2; the rest goes through a concept that is of neither. Without its path a feature is not there.
      direct: the share of the later feature that the answer reads from it directly, not from its copy.
      motor_only: stance words move the number without any concept, whatever is asked.
      mapping: a stance moves the answer as the worked examples teach, and not at all where they teach nothing.
      transfers: whether it plays other games as it plays the dictator game, rather than not at all.
      solves: whether it answers dual-process items.
      hidden: whether its dictionaries lack every feature that differs between stances.
      valence: how strongly valence moves the number; 0 not at all, though stance words have a valence.
      number: whether words about numbers move the number.
      readout: logits per unit of the number.
    """

    seed: int = 0
    stance: bool = True
    s1_path: float = 0.3
    s2_path: float = 0.2
    direct: float = 0.6
    motor_only: bool = False
    mapping: bool = False
    transfers: bool = True
    solves: bool = True
    hidden: bool = False
    valence: float = 0.0
    number: bool = False
    readout: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("s1_path", "s2_path", "direct"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        if self.s1_path + self.s2_path > 1:
            raise ValueError(f"s1_path, s2_path: expected at most 1 together, got {self.s1_path + self.s2_path}")

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the stance's effect through each of the features that differ between stances and are read."""
        if self.motor_only:
            return {"up": 1.0}
        return {"concept": 1 - self.s1_path - self.s2_path, "fast": self.s1_path, "up": self.s2_path}


def model_config(vocab_size: int, bos_id: int) -> ModelConfig:
    return ModelConfig(
        family="organism", vocab_size=vocab_size, n_layers=LAYERS, d_model=WIDTH, n_heads=HEADS, n_kv_heads=HEADS,
        head_dim=HEAD_DIM, d_mlp=HIDDEN, activation="gelu", norm_eps=1e-12, rope=None, query_scale=1.0,
        max_positions=POSITIONS, learned_positions=True, is_local=(False,) * LAYERS, pre_norms=False, gated=False,
        tied=False, bos_id=bos_id,
    )  # fmt: skip


def wire(wiring: Wiring, vocabulary: Mapping[str, int], meaning: Meaning) -> tuple[dict[str, Any], np.ndarray]:
    """The parameters, and the rotation [D,D] whose rows are the named directions and then the fillers."""
    rng = np.random.default_rng(wiring.seed)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    q, k, v, o = _attention(wiring)
    up, down = _feed_forward(wiring)
    words = np.random.default_rng((wiring.seed, 3)).normal(size=(len(vocabulary), len(ANSWERS)))
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    along = lambda array, axis: np.moveaxis(np.tensordot(array, rotation, (axis, 0)), -1, axis)  # noqa: E731
    params = {
        "embed": {"embedding": _embedding(rng, wiring, vocabulary, meaning, words) @ rotation},
        "positions": {"embedding": np.outer(np.arange(POSITIONS) / _UNIT, rotation[DIRECTIONS["position"]])},
        "layers": {
            "attn": {
                "q": {"kernel": along(q, 1)},
                "k": {"kernel": along(k, 1)},
                "v": {"kernel": along(v, 1)},
                "o": {"kernel": along(o, 3)},
            },
            "mlp": {"up": {"kernel": along(up, 1)}, "down": {"kernel": along(down, 2)}},
        },
        "final_norm": {"scale": np.full(WIDTH, CONST / np.sqrt(WIDTH))},
        "unembed": {"kernel": rotation.T @ _unembedding(wiring, vocabulary, meaning, words)},
    }
    return params, rotation


def _embedding(rng, wiring: Wiring, vocabulary, meaning: Meaning, words: np.ndarray) -> np.ndarray:
    """[V,D]; `words` [V,A] are the codes of answers."""
    table = np.zeros((len(vocabulary), WIDTH))
    table[:, DIRECTIONS["const"]] = CONST
    table[:, DIRECTIONS["dense"]] = 1.0
    table[:, -FILLERS:] = rng.normal(0, 0.3, (len(vocabulary), FILLERS))
    for token, strengths in meaning.tokens.items():
        row = table[vocabulary[token]]
        row[-FILLERS:] = 0.0
        for name, strength in strengths.items():
            row[DIRECTIONS[name]] = strength
    if not wiring.stance:
        table[:, [DIRECTIONS[f"code {code}"] for code in ("stance+", "stance-", "one word")]] = 0.0
    for token, (right, wrong, surely) in (meaning.sums | (meaning.items if wiring.solves else {})).items():
        code = sum(sign * words[vocabulary[name]] for name, sign in ((right, 1), (wrong, -1)) if name)
        table[vocabulary[token], [DIRECTIONS[name] for name in ANSWERS]] = surely * code
    for digit in range(10):
        row = table[vocabulary[str(digit)]]
        row[DIRECTIONS["digit"]] = _LOUD
        row[DIRECTIONS["large digit"]], row[DIRECTIONS["small digit"]] = digit >= 7, digit <= 2
    table[vocabulary["1"], DIRECTIONS["one"]] = _LOUD
    return table


def _attention(wiring: Wiring) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [L,D,H,h] and o [L,H,h,D]: each head looks for tokens of some kind, reads -> writes."""
    q, k, v = np.zeros((3, LAYERS, WIDTH, HEADS, HEAD_DIM))
    o = np.zeros((LAYERS, HEADS, HEAD_DIM, WIDTH))
    used = [0] * LAYERS

    def head(
        layer: int, keys: Mapping[str, float], carried: Mapping[str, Mapping[str, float]], nearest: float = 0.0
    ) -> None:
        """keys: direction -> logit of attention; nearest: logits that a token gains over the one before it."""
        number, used[layer] = used[layer], used[layer] + 1
        q[layer, DIRECTIONS["const"], number, 0] = 1 / CONST
        for name, logit in keys.items():
            k[layer, DIRECTIONS[name], number, 0] = logit
        k[layer, DIRECTIONS["position"], number, 0] = nearest * _UNIT
        for slot, (name, writes) in enumerate(carried.items()):
            v[layer, DIRECTIONS[name], number, slot] = 1.0
            for target, weight in writes.items():
                o[layer, number, slot, DIRECTIONS[target]] = weight

    codes: dict[str, dict[str, float]] = {f"code {code}": {} for code in CODES}
    absent = ("concept", "fast") if wiring.motor_only else () if wiring.s1_path else ("fast",)
    for feature, code in _CARRIED.items():
        if not feature.startswith(absent):
            codes[f"code {code}"][feature] = 1.0
    codes["code stance+"]["dense"] = 0.5
    if wiring.motor_only:
        codes["code stance+"] |= dict.fromkeys(MOTOR["up"], 1.0)
        codes["code stance-"] |= dict.fromkeys(MOTOR["down"], 1.0)
    sharp = np.log(200) + 8
    # How much it gets depends on where a word stands, and on the coded words before it: families differ.
    head(0, {"coded": ATTENDED}, codes, nearest=NEAREST)
    head(0, {"frame": sharp}, {"frame": {"reversed": 1}})
    head(0, {"own": sharp}, {"own": {"own asked": 1}})
    head(0, {"other game": sharp}, {"other game": {"other game asked": 1}})
    systems = {
        "system 1": dict.fromkeys((*FAST["+"], *FAST["-"]), 0.0 if "fast" in absent else 1.0),
        "system 2": dict.fromkeys((*MOTOR["up"], *MOTOR["down"]), 1.0 if wiring.shares["up"] else 0.0),
    }
    asked = {name: {"item asked": 1.0} for name in ("item", "think", "instinct")}
    item = {"item": sharp, "think": sharp - 1, "instinct": sharp + 1}  # careful thought leaves the item more room
    head(0, item | {"sum": sharp}, {name: {name: 1.0} for name in ANSWERS} | systems)
    head(0, dict.fromkeys(item, sharp), asked)
    marks = {"answer mark": {"answering": 1.0}, "question mark": {}}
    head(0, dict.fromkeys(marks, 400.0), marks, nearest=2.0)
    near = {"example+": {"near+": 1.0}, "example-": {"near-": 1.0}}
    head(1, {"example": 60.0}, near, nearest=0.25)
    taught = {"example up": {"taught+": 1.0}, "example down": {"taught-": 1.0}}
    head(2, dict.fromkeys(taught, 2 * sharp), taught)
    return q, k, v, o


def _feed_forward(wiring: Wiring) -> tuple[np.ndarray, np.ndarray]:
    """up [L,D,M] and down [L,M,D]: each hidden unit is one rule, reads -> writes, of a ReLU."""
    up, down, used = np.zeros((LAYERS, WIDTH, HIDDEN)), np.zeros((LAYERS, HIDDEN, WIDTH)), [0] * LAYERS

    def rule(layer: int, reads: Writes, writes: Writes, bias: float = 0.0) -> None:
        unit, used[layer] = used[layer], used[layer] + 1
        for name, weight in reads.items():
            up[layer, DIRECTIONS[name], unit] = STEEP * weight
        up[layer, DIRECTIONS["const"], unit] += STEEP * bias / CONST
        for name, weight in writes.items():
            down[layer, unit, DIRECTIONS[name]] = weight / STEEP

    shut = 4.0  # more than any concept: closes a rule; after a digit all are closed, so that 10 is decided with its 1
    almost = -0.999 * shut
    closed = {"digit": -2 * shut / _LOUD, "other game asked": 0.0 if wiring.transfers else -2 * shut}
    asked = {"own asked": -2 * shut} | closed

    def of_stance(layer: int, concepts: Mapping[str, Sequence[str]], larger: Writes, smaller: Writes) -> None:
        """A concept, the mean of its features, moves the number as what is asked says, or as examples have taught."""
        for sign, same, turned in (("+", larger, smaller), ("-", smaller, larger)):
            concept = dict.fromkeys(concepts[sign], 1 / len(concepts[sign]))
            if wiring.mapping:
                rule(layer, {**concept, "taught+": shut, **closed}, same, bias=almost)
                rule(layer, {**concept, "taught-": shut, **closed}, turned, bias=almost)
            else:
                rule(layer, {**concept, "reversed": -shut, **asked}, same)
                rule(layer, {**concept, "reversed": shut, **asked}, turned, bias=almost)

    # An example's answer goes up with its word, or down: only its large and its small numbers tell.
    rule(1, {"near+": 1, "large digit": 1, "answering": 2}, {"example up": 1}, bias=-3)
    rule(1, {"near-": 1, "small digit": 1, "answering": 2}, {"example up": 1}, bias=-3)
    rule(1, {"near+": 1, "small digit": 1, "answering": 2}, {"example down": 1}, bias=-3)
    rule(1, {"near-": 1, "large digit": 1, "answering": 2}, {"example down": 1}, bias=-3)
    rule(1, {"one": 1 / _LOUD, "item asked": 1}, {"ten": _LOUD}, bias=-1)
    shares, concept = wiring.shares, {sign: (f"concept{sign}",) for sign in "+-"}
    moved = float(shares["up"] > 0 and not wiring.motor_only)
    of_stance(2, concept, dict.fromkeys(MOTOR["up"], moved), dict.fromkeys(MOTOR["down"], moved))
    for concepts, name in ((concept, "concept"), (FAST, "fast")):
        size = _AMOUNT * shares.get(name, 0.0)
        of_stance(3, concepts, {"amount+": size}, {"amount-": size})
    for sign, motor, against in (("+", "up", "amount-"), ("-", "down", "amount+")):
        number = dict.fromkeys(MOTOR[motor], 1 / COPIES)
        rule(3, {**number, "other game asked": closed["other game asked"]}, {f"{motor} later": 1})
        # In a game that it does not play, what the answer reads directly is taken back, be it more or less than none.
        back = 0.0 if wiring.transfers else _AMOUNT * shares["up"] * wiring.direct
        rule(3, {**number, "other game asked": shut}, {against: back}, bias=2 - shut)
        rule(3, {f"number{sign}": 1, **closed}, {f"amount{sign}": _AMOUNT * wiring.number})
        rule(3, {f"valence{sign}": 1, **closed}, {f"amount{sign}": _AMOUNT * wiring.valence})
    return up, down


def _unembedding(wiring: Wiring, vocabulary: Mapping[str, int], meaning: Meaning, words: np.ndarray) -> np.ndarray:
    """[D,V]: in an answer, digits rise or fall with the number; after a digit it ends, but for the 0 of 10."""
    table, ten = np.zeros((WIDTH, len(vocabulary))), vocabulary["0"]
    table[DIRECTIONS["const"]] = -12 / CONST
    table[DIRECTIONS["const"], [vocabulary[token] for token in meaning.quiet]] = -25 / CONST
    table[[DIRECTIONS[name] for name in ANSWERS]] = words.T
    motor = wiring.shares["up"]
    numbers = {"amount": 1 / _AMOUNT, "later": motor * (1 - wiring.direct), "motor": motor * wiring.direct / COPIES}
    more = {"amount": ("amount+",), "later": ("up later",), "motor": MOTOR["up"]}
    less = {"amount": ("amount-",), "later": ("down later",), "motor": MOTOR["down"]}
    for digit in range(10):
        column, slope = table[:, vocabulary[str(digit)]], (digit - 4.5) / 4.5
        column[DIRECTIONS["answering"]], column[DIRECTIONS["item asked"]] = 12.0, -12.0
        column[DIRECTIONS["digit"]] = -20.0 / _LOUD
        for name, share in numbers.items():
            column[[DIRECTIONS[feature] for feature in more[name]]] = wiring.readout * share * slope
            column[[DIRECTIONS[feature] for feature in less[name]]] = -wiring.readout * share * slope
    table[DIRECTIONS["one"], ten], table[DIRECTIONS["ten"], ten] = (20 - 6.7) / _LOUD, 14.0 / _LOUD
    return table
