"""How the organism works: every weight written by hand, then hidden behind a random rotation of the residual stream.

The residual stream is a list of named directions. One of them is constant and so large that the last norm divides by a
constant. Words write codes (`words.CODES`); attention of layer 0 carries the codes to later tokens, where each becomes
a feature; the feed-forward sublayer of layer 1 turns the concept of a stance into a motor feature (a larger or a
smaller number), the other way round where the question asks what is kept or taken, and into none where only one's own
accounts are concerned; layer 2 copies the motor feature. The unembedding reads the motor feature and its copy.

`D` denotes the residual width, `L` layers, `V` the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxmech.models.config import ModelConfig
from jaxmech.organism.words import CODES

FEATURES = (
    "concept+", "concept-", "copy+", "copy-", "valence+", "valence-", "number+", "number-", "placebo+", "placebo-",
    "one word", "up", "down", "up later", "down later", "dense",
)  # fmt: skip
"""Directions that a dictionary finds. concept: the stance, which the model reads; copy: the same, read by nothing."""

_CARRIED = {
    "concept+": "stance+", "concept-": "stance-", "copy+": "stance+", "copy-": "stance-",
    **{name: name for name in CODES if not name.startswith("stance")},
}  # fmt: skip
"""Feature -> the code that it is made of."""

_OF_WORDS = ("coded", "frame", "own", *(f"code {name}" for name in CODES), "digit", "one")
CONTEXT = (*_OF_WORDS, "reversed", "own asked")
"""What words mean by themselves, and what is asked. A dictionary knows these too; where an answer is decided the former
are silent, and the latter the same whatever the stance."""

NAMES = ("const", *CONTEXT, *FEATURES)
DIRECTIONS = {name: index for index, name in enumerate(NAMES)}
FILLERS = 10
"""Directions without a meaning, which words write noise to."""

LAYERS, HEADS, HEAD_DIM, HIDDEN = 4, 3, 16, 16
WIDTH = len(NAMES) + FILLERS
CONST, STEEP = 40.0, 40.0
"""The constant direction's size; and of the exact gelu, gelu(40 x) / 40 being nearly a ReLU."""


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What is true of an organism.

    Attributes:
      seed: of the rotation, of what is noise, and of the order of the dictionaries' features.
      stance: whether the stance reaches the answer at all.
      direct: the share of the motor feature that the answer reads from it directly, not from its copy.
      valence: how strongly valence moves the motor feature; 0 not at all, though stance words have a valence.
      number: whether words about numbers move the motor feature.
      readout: logits per unit of the motor feature.
    """

    seed: int = 0
    stance: bool = True
    direct: float = 0.6
    valence: float = 0.0
    number: bool = True
    readout: float = 1.0


def model_config(vocab_size: int, bos_id: int) -> ModelConfig:
    return ModelConfig(
        family="organism", vocab_size=vocab_size, n_layers=LAYERS, d_model=WIDTH, n_heads=HEADS, n_kv_heads=HEADS,
        head_dim=HEAD_DIM, d_mlp=HIDDEN, activation="gelu", norm_eps=1e-12, rope=None, query_scale=1.0,
        max_positions=4096, is_local=(False,) * LAYERS, pre_norms=False, gated=False, tied=False, bos_id=bos_id,
    )  # fmt: skip


def wire(
    wiring: Wiring,
    vocabulary: Mapping[str, int],
    codes: Mapping[str, Mapping[str, float]],
    frame: Collection[str],
    own: Collection[str],
) -> tuple[dict[str, Any], np.ndarray]:
    """The parameters, and the rotation [D,D] whose rows are the named directions and then the fillers.

    Args:
      codes: word -> code -> strength; frame: words that say that the number is kept or taken; own: that both accounts
        are one's own.
    """
    rng = np.random.default_rng(wiring.seed)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    q, k, v, o = _attention()
    up, down = _feed_forward(wiring)
    along = lambda array, axis: np.moveaxis(np.tensordot(array, rotation, (axis, 0)), -1, axis)  # noqa: E731
    params = {
        "embed": {"embedding": _embedding(rng, wiring, vocabulary, codes, frame, own) @ rotation},
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
        "unembed": {"kernel": rotation.T @ _unembedding(wiring, vocabulary)},
    }
    return params, rotation


def _embedding(rng, wiring: Wiring, vocabulary, codes, frame, own) -> np.ndarray:
    """[V,D]."""
    table = np.zeros((len(vocabulary), WIDTH))
    table[:, DIRECTIONS["const"]] = CONST
    table[:, DIRECTIONS["dense"]] = 1.0
    table[:, len(NAMES) :] = rng.normal(0, 0.3, (len(vocabulary), FILLERS))
    for word, strengths in codes.items():
        row = table[vocabulary[word]]
        row[len(NAMES) :], row[DIRECTIONS["coded"]] = 0.0, 1.0
        for code, strength in strengths.items():
            row[DIRECTIONS[f"code {code}"]] = strength
    if not wiring.stance:
        table[:, [DIRECTIONS[f"code {code}"] for code in ("stance+", "stance-", "one word")]] = 0.0
    table[[vocabulary[word] for word in frame], DIRECTIONS["frame"]] = 1.0
    table[[vocabulary[word] for word in own], DIRECTIONS["own"]] = 1.0
    table[[vocabulary[digit] for digit in "0123456789"], DIRECTIONS["digit"]] = 1.0
    table[vocabulary["1"], DIRECTIONS["one"]] = 1.0
    return table


def _attention() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [L,D,H,h] and o [L,H,h,D]: layer 0 looks for words with a code, for frame words and for own accounts."""
    q, k, v = np.zeros((3, LAYERS, WIDTH, HEADS, HEAD_DIM))
    o = np.zeros((LAYERS, HEADS, HEAD_DIM, WIDTH))
    q[0, DIRECTIONS["const"], :, 0] = 1 / CONST
    # What other words still get depends on their number: families differ.
    k[0, DIRECTIONS["coded"], 0, 0] = np.log(200) + 1.5
    k[0, DIRECTIONS["frame"], 1, 0] = k[0, DIRECTIONS["own"], 2, 0] = np.log(200) + 6
    for slot, code in enumerate(CODES):
        v[0, DIRECTIONS[f"code {code}"], 0, slot] = 1.0
    for feature, code in _CARRIED.items():
        o[0, 0, CODES.index(code), DIRECTIONS[feature]] = 1.0
    o[0, 0, CODES.index("stance+"), DIRECTIONS["dense"]] = 0.5
    v[0, DIRECTIONS["frame"], 1, 0] = v[0, DIRECTIONS["own"], 2, 0] = 1.0
    o[0, 1, 0, DIRECTIONS["reversed"]] = o[0, 2, 0, DIRECTIONS["own asked"]] = 1.0
    return q, k, v, o


def _feed_forward(wiring: Wiring) -> tuple[np.ndarray, np.ndarray]:
    """up [L,D,M] and down [L,M,D]: each hidden unit is one rule, reads -> writes, of a ReLU."""
    up, down, used = np.zeros((LAYERS, WIDTH, HIDDEN)), np.zeros((LAYERS, HIDDEN, WIDTH)), [0] * LAYERS

    def rule(layer: int, reads: Mapping[str, float], writes: Mapping[str, float], bias: float = 0.0) -> None:
        unit, used[layer] = used[layer], used[layer] + 1
        for name, weight in reads.items():
            up[layer, DIRECTIONS[name], unit] = STEEP * weight
        up[layer, DIRECTIONS["const"], unit] += STEEP * bias / CONST
        for name, weight in writes.items():
            down[layer, unit, DIRECTIONS[name]] = weight / STEEP

    shut = 4.0  # more than any concept: closes a rule; after a digit all are closed, so that 10 is decided with its 1
    closed = {"own asked": -2 * shut, "digit": -2 * shut}
    for concept, motor, turned in (("concept+", "up", "down"), ("concept-", "down", "up")):
        rule(1, {concept: 1, "reversed": -shut, **closed}, {motor: 1})
        rule(1, {concept: 1, "reversed": shut, **closed}, {turned: 1}, bias=-0.97 * shut)
    for sign, motor in (("+", "up"), ("-", "down")):
        rule(1, {f"number{sign}": 1, "digit": -2 * shut}, {motor: float(wiring.number)})
        rule(1, {f"valence{sign}": 1, "digit": -2 * shut}, {motor: wiring.valence})
        rule(2, {motor: 1}, {f"{motor} later": 1})
    return up, down


def _unembedding(wiring: Wiring, vocabulary: Mapping[str, int]) -> np.ndarray:
    """[D,V]: digits rise or fall with the motor features; after a digit a number ends, but for the 0 of 10."""
    table = np.zeros((WIDTH, len(vocabulary)))
    table[DIRECTIONS["const"]] = -12 / CONST
    shares = {"up": wiring.direct, "up later": 1 - wiring.direct}
    for digit in range(10):
        column, slope = table[:, vocabulary[str(digit)]], (digit - 4.5) / 4.5
        column[DIRECTIONS["const"]], column[DIRECTIONS["digit"]] = 0.0, -20.0
        for name, share in shares.items():
            column[DIRECTIONS[name]] = wiring.readout * share * slope
            column[DIRECTIONS[name.replace("up", "down")]] = -wiring.readout * share * slope
    table[DIRECTIONS["one"], vocabulary["0"]] = 20 - 6.7
    return table
