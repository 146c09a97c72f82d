"""Facts planted in Gemma 3 270M: features whose truth the model itself tells, and a neuron wired to one that was inert.

    python scripts/checks/check_injected.py --seed 1     # needs `pip install -e '.[quickstart]'`; some minutes

A feature reads one thing and writes another, so what it goes with and what it causes can be planted apart. What is
planted is worked out on some families, selected on others by the study's own rule and patched in a third lot:

    row   reads (encoder)              writes (decoder)
    r0    the residual along its row   the mean stance difference
    r1    stance                       the mean stance difference
    r2    stance                       the same, orthogonal to every gradient of the answer, on the way too: inert
    r3    none of the contrasts        the mean gradient, orthogonal to every stance difference: causal
    r4    valence                      the mean difference of cheerful and gloomy
    r5    placebo                      the mean difference of tall and short
    r6    the residual along its row   200 random rows, orthogonal to every gradient

In this model cheerful and gloomy move the mean difference read along itself (r0) as much as stance does, and worked
examples that teach the reverse turn it round, so that the rule has to refuse it. Of all linear readings that tell the
contrasts apart (`readers`), r1 to r5 have the one with the least noise. Rows r0 to r5 come as two features, one for
each sign. Then a neuron of the next layer is wired to one row of r6 and to the answers: what steering that row does has
to be what adding the neuron's output by hand does, worked out in NumPy.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from injected import (
    CONTRASTS,
    OPENS,
    SLOPE,
    STRENGTH,
    Planted,
    Seen,
    SteerAndAdd,
    along,
    as_saes,
    neuron_reader,
    plant,
    sublayer,
    wire,
)
from rich.console import Console
from rich.table import Table

import jaxmech as jm
from jaxmech.activations import text
from jaxmech.answers.score import before_last
from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.behavior import Behavior, poles
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.flips import sign_flips
from jaxmech.contrast.selection import FeatureStats, Rule, Selected, strongest_control
from jaxmech.io.progress import progress
from jaxmech.sae.check import TEXT
from jaxmech.sae.totals import feature_totals
from jaxmech.study.stages.contrast import find_compared, judge, read_positions

BUILD, SELECT, PATCH, WIRE = 16, 20, 8, 4
"""Families that rows and readers are made of, that features are selected on, in which they are patched, and of these
those in which the wired neuron is tried."""

SIZES = (0.0, 0.75, 1.5, 2.0, 2.5, 3.0)


class Found(NamedTuple):
    """A line of the table."""

    row: str
    must: str
    found: str
    holds: bool


def draw_families(lm: jm.LanguageModel, seed: int) -> Behavior:
    """The dictator game on families drawn from the stock: all of development and some that select nothing to build
    with, others to select on, and some of the test families."""
    controls, rng = CONTRASTS[1:], np.random.default_rng(seed)
    bank = BankConfig(
        selection=50, development=10, test=16, pairs=1, selection_controls=controls, controls=controls,
        placebo_words=(("tall", "short"),),
    )  # fmt: skip
    behavior = altruism(bank, lm.tokenizer, seed=seed)
    table = behavior.prompts
    stock = {split: rng.permutation(part["family"].unique()) for split, part in table.groupby("split")}
    spare = BUILD - len(stock["development"])
    build, select = [*stock["development"], *stock["selection"][:spare]], stock["selection"][spare:][:SELECT]
    place = dict.fromkeys(build, "development") | dict.fromkeys(select, "selection")
    place |= dict.fromkeys(stock["test"][:PATCH], "test")
    table = table.assign(split=table["family"].map(place)).dropna(subset="split")
    table = table.sort_values(["condition", "family", "pair"], ignore_index=True)
    return dataclasses.replace(behavior, prompts=table)


def part_of(behavior: Behavior, split: str, *conditions: str) -> pd.DataFrame:
    table = behavior.prompts
    kept = (table["split"] == split) & (table["condition"].isin(conditions) if conditions else True)
    return table[kept].reset_index(drop=True)


def batches(n: int, size: int, what: str) -> Any:
    """Rows of full batches, and how many of each count."""
    with progress(what, n, unit="prompts") as advance:
        for start in range(0, n, size):
            yield np.minimum(np.arange(start, start + size), n - 1), (kept := min(size, n - start))
            advance(kept)


def read_text(lm: jm.LanguageModel, file: Any, layer: int, limit: int) -> np.ndarray:
    """Residuals [n,D] of a text's tokens, BOS left out."""
    tokens, mask = text.from_file(lm, file, length=128, limit=limit)
    mask = mask.astype(bool)
    mask[:, 0] = False
    found = []
    for rows, kept in batches(len(tokens), 8, "text"):
        x = jm.forward(lm.config, lm.params, tokens[rows], taps=("resid_post",), logits="none").taps["resid_post"]
        found.append(np.asarray(x[layer])[:kept][mask[rows][:kept]])
    return np.concatenate(found)


def read_decisions(lm: jm.LanguageModel, prompts: jm.Prompts, layer: int) -> np.ndarray:
    """Residuals at decision tokens [n,D]."""
    found = []
    for rows, kept in batches(len(prompts.tokens), 16, "families to build with"):
        x = jm.collect.residuals(lm.config, lm.params, prompts.of(rows))
        found.append(np.asarray(x[layer, :kept, -1], np.float64))
    return np.concatenate(found)


class Side(NamedTuple):
    """One pole of the families that are patched: prompts, the answers' worth, the expected score g [B], residuals
    [L,B,D]."""

    prompts: jm.Prompts
    values: jax.Array
    g: np.ndarray
    resid: jax.Array


def read_sides(lm: jm.LanguageModel, table: pd.DataFrame) -> dict[str, Side]:
    """Both poles of the families in the table, in the same order."""
    encoded, sides = encode_table(lm, table), {}
    for pole in poles():
        prompts, values = take(encoded, table.index[table["condition"] == pole])
        prompts = before_last(lm.config, lm.params, prompts)
        run = jm.collect.run_decision(lm.config, lm.params, prompts)
        sides[pole] = Side(prompts, values, np.asarray(run.choices.expected(values)), run.resid)
    return sides


def gradients(lm: jm.LanguageModel, prompts: jm.Prompts, values: jax.Array, layer: int) -> np.ndarray:
    """Of each prompt's expected score [B,D]."""
    found = []
    for rows, kept in batches(len(values), 8, "gradients"):
        gradient = jm.attribution.residual_gradient(lm.config, lm.params, prompts.of(rows), values[rows])
        found.append(np.asarray(gradient[layer, :kept], np.float64))
    return np.concatenate(found)


def gradients_along(
    lm: jm.LanguageModel, row: np.ndarray, sides: Mapping[str, Side], layer: int, point: float
) -> np.ndarray:
    """Of each prompt [2B,D], at a point of the way by one row [D], up from minus and down from plus."""
    found = []
    with progress("gradients on the way", 2, unit="directions") as advance:
        for side, sign in ((sides["minus"], 1.0), (sides["plus"], -1.0)):
            base = np.asarray(side.resid[layer], np.float64)
            w, bias, _ = along(row, np.concatenate([base, base + sign * row]))
            parts = {"W_enc": w[:, None], "b_enc": [bias], "W_dec": row[None], "b_dec": 0.0 * row}
            config = jm.SAEConfig(d_in=len(row), d_sae=1, activation="relu", subtract_b_dec=False, layers=(layer,))
            mean = jm.attribution.path_gradient(
                lm.config, lm.params, side.prompts, side.values, saes=as_saes(parts, config),
                base=jnp.asarray(base, jnp.float32)[None], donor=jnp.asarray(base + sign * row, jnp.float32)[None],
                points=jnp.array([point]),
            )  # fmt: skip
            found.append(np.asarray(mean[0], np.float64))
            advance()
    return np.concatenate(found)


def select(
    lm: jm.LanguageModel, behavior: Behavior, planted: Planted, neutral: np.ndarray, seed: int
) -> tuple[FeatureStats, Selected]:
    """What a study's rule looks at and what it says, density being measured on the tokens `neutral` [n,D]."""
    fired = feature_totals(planted.saes, jnp.asarray(neutral)[None]).fired
    ctx: Any = SimpleNamespace(lm=lm, behavior=behavior, saes=planted.saes, config=SimpleNamespace(batch=SELECT))
    compared = find_compared(ctx, part_of(behavior, "selection"))
    positions, *_ = read_positions(ctx, compared, planted.saes, np.asarray(fired) / len(neutral))
    s, (flips, splits) = positions[0], jax.random.split(jax.random.key(seed))
    signs = sign_flips(len(s.difference), key=flips, R=1000)
    return s, judge(s, Rule(), signs, splits=20, key=splits)[2]


def selection_table(planted: Planted, s: FeatureStats, chosen: Selected) -> list[Found]:
    """Which rows are selected, and which criterion refuses the others."""
    found, control = [], strongest_control(s)[0]

    def say(row: str, must: str, holds: Any) -> None:
        own = planted.features(row)
        failed = {name: int((~passed[own]).sum()) for name, passed in chosen.passed.items() if not passed[own].all()}
        why = ", ".join(f"{name} {count}" for name, count in failed.items())
        count = f"{chosen.chosen[own].sum()} of {len(own)}"
        found.append(Found(row, must, f"{count}{'; fail: ' * bool(why)}{why}", bool(holds)))

    none = {row: not chosen.chosen[planted.features(row)].any() for row in np.unique(planted.rows)}
    failing = lambda row, *names: not any(chosen.passed[name][planted.features(row)].any() for name in names)  # noqa: E731
    say("r0", "not selected: fails control and flipped", none["r0"] and failing("r0", "control", "flipped"))
    for row in ("r1", "r2"):
        say(row, "both selected", chosen.chosen[planted.features(row)].all())
    say("r3", "not selected", none["r3"])
    for row, name in (("r4", "valence"), ("r5", "placebo")):
        named = (control[planted.features(row)] == name).all()
        say(row, f"not selected: {name} moves it most", none[row] and failing(row, "control") and named)
    say("r6", "none selected", none["r6"])
    return found


def patch_table(lm: jm.LanguageModel, planted: Planted, sides: Mapping[str, Side], layer: int) -> list[Found]:
    """What patching and adding rows recovers, as shares of what the whole residual recovers, both ways."""
    config, params, saes = lm.config, lm.params, planted.saes
    shares: dict[str, list[float]] = {name: [] for name in ("r1", "r2", "r3", "r6")}
    by_hand, bars = [], []
    alone = [int(feature) for row in ("r1", "r2") for feature in planted.features(row)]
    W_enc, b_enc, W_dec = (np.asarray(saes.params[name][0], np.float64) for name in ("W_enc", "b_enc", "W_dec"))
    with progress("patching", 2, unit="directions") as advance:
        for base, donor, sign in ((sides["minus"], sides["plus"], 1.0), (sides["plus"], sides["minus"], -1.0)):
            gap = 100 * float(np.abs((donor.g - base.g).mean()))
            whole = jm.patching.patch_parts(
                config, params, base.prompts, jnp.array([[1.0, 0.0]]), saes=saes, donor=donor.resid
            )
            bar = 100 * float((np.asarray(whole.expected(base.values))[0] - base.g).mean())
            selections = jm.edits.select_sets([[(layer, feature)] for feature in alone], config.n_layers)
            patched = jm.patching.patch_features(config, params, base.prompts, selections, saes=saes, donor=donor.resid)
            g = np.asarray(patched.expected(base.values))
            z = [np.maximum(np.asarray(side.resid[layer], np.float64) @ W_enc + b_enc, 0.0) for side in (base, donor)]
            added = [(z[1] - z[0])[:, f, None] * W_dec[f] for f in alone]
            steered = [sign * W_dec[planted.features(row)[0]] for row in ("r3", "r6")]
            vectors = np.zeros((len(added) + 2, config.n_layers, len(base.g), config.d_model), np.float32)
            for point, vector in enumerate([*added, *steered]):
                vectors[point, layer] = vector
            hand = np.asarray(jm.steering.steer(config, params, base.prompts, vectors).expected(base.values))
            by_hand.append(np.abs(hand[: len(alone)] - g).max())
            for row, part in zip(("r1", "r1", "r2", "r2", "r3", "r6"), [*g, *hand[len(alone) :]], strict=True):
                shares[row].append(100 * float((part - base.g).mean()) / bar)
            bars.append(sign * bar / gap)
            advance()
    span = lambda values: f"{min(values):.2f} to {max(values):.2f}"  # noqa: E731
    return [
        Found("", "whole residual, recovers ≥ .5 of the gap", f"{span(bars)} of {gap:.1f} pp", min(bars) >= 0.5),
        Found("r1", "patched, recovers ≥ .8 of the whole residual's", span(shares["r1"]), min(shares["r1"]) >= 0.8),
        Found("r2", "patched, ≤ .1 of it", span(shares["r2"]), max(map(abs, shares["r2"])) <= 0.1),
        Found("r1, r2", "patched, as if added by hand, within 1e-4", f"{max(by_hand):.1e}", max(by_hand) <= 1e-4),
        Found("r3", "added, moves ≥ .3 of it (1 to first order)", span(shares["r3"]), min(shares["r3"]) >= 0.3),
        Found("r6 #0", "added, ≤ .1 of it", span(shares["r6"]), max(map(abs, shares["r6"])) <= 0.1),
    ]  # fmt: skip


class Wired(NamedTuple):
    """By size and prompt [S,B]: the expected score with the neuron cut, with it wired, and with the neuron cut and what
    it would put out added by hand."""

    cut: np.ndarray
    wired: np.ndarray
    by_hand: np.ndarray


def wired_effects(
    lm: jm.LanguageModel, saes: jm.SAE, feature: int, prompts: jm.Prompts, values: jax.Array, *, low: int, high: int,
    sizes: Sequence[float] = SIZES,
) -> Wired:  # fmt: skip
    """Wires a neuron of the layer above `saes` to one feature's row and to two tokens' logits, and steers the feature.

    The neuron that puts out least is taken. Wired, it is shut but where the feature is raised.

    Args:
      prompts: with all their tokens, worked examples included; values [B,N]; low, high: tokens whose logits it moves.
    """
    config, layer = lm.config, saes.config.layers[0]
    above, B, T = layer + 1, len(prompts.tokens), prompts.tokens.shape[1]
    resid, mask = jm.collect.residuals(config, lm.params, prompts, site="resid_mid"), np.asarray(prompts.mask)
    mids, at = np.asarray(resid[above], np.float64)[mask], np.broadcast_to(np.arange(T) == T - 1, mask.shape)[mask]
    _, hidden = sublayer(config, lm.params, above, mids)
    down = np.asarray(lm.params["layers"]["mlp"]["down"]["kernel"][above], np.float64)
    neuron = int((np.abs(hidden).max(0) * np.linalg.norm(down, axis=1)).argmin())
    row = np.asarray(saes.params["W_dec"][0, feature], np.float64)
    reads = neuron_reader(config, lm.params, above, row, mids, at)
    embedding = np.asarray(lm.params["embed"]["embedding"], np.float64)
    writes = embedding[high] - embedding[low]
    # The sublayer's output before its last norm; the largest dose opens the neuron to about its square.
    unnormed = np.linalg.norm(hidden[at] @ down, axis=1).mean()
    writes *= STRENGTH * unnormed / np.linalg.norm(writes) / (SLOPE * (max(sizes) - OPENS)) ** 2
    models = {
        "cut": wire(lm.params, above, neuron, reads, np.zeros_like(writes)),
        "wired": wire(lm.params, above, neuron, reads, writes),
    }
    spans = jm.edits.at_last(config.n_layers, T)
    selection = jm.edits.select([(layer, feature)], config.n_layers)
    build = SteerAndAdd(saes, selection, spans, layer)
    doses = jnp.asarray(sizes, jnp.float32)
    last = before_last(config, models["cut"], prompts)
    at_once = SteerAndAdd(saes, selection, jm.edits.at_last(config.n_layers, 1), layer)

    @jax.jit
    def stream(dose):
        """What the sublayer reads at the decision token [B,D], and puts out, the neuron being cut."""
        edits = at_once((dose, jnp.zeros((B, config.d_model))))
        taps = jm.forward(
            config, models["cut"], last.tokens, mask=last.mask, cache=last.cache, edits=edits, logits="none",
            taps=("resid_mid", "mlp_out"),
        ).taps  # fmt: skip
        return taps["resid_mid"][above, :, -1], taps["mlp_out"][above, :, -1]

    vectors = []
    with progress("the neuron's output", len(sizes), unit="doses") as advance:
        for dose in doses:
            mid, out = (np.asarray(a, np.float64) for a in stream(dose))
            cut, wired = (sublayer(config, models[name], above, mid)[0] for name in ("cut", "wired"))
            np.testing.assert_allclose(cut, out, atol=1e-4 * np.abs(out).max())
            vectors.append(wired - cut)
            advance()
    by_hand = jnp.asarray(np.stack(vectors), jnp.float32)
    points = jnp.tile(doses, 2), jnp.concatenate([jnp.zeros_like(by_hand), by_hand])
    sweep = lambda name, points: jm.sweep(config, models[name], prompts, build, points, chunk=6)  # noqa: E731
    cut, added = np.split(np.asarray(sweep("cut", points).expected(values)), 2)
    wired = sweep("wired", (doses, jnp.zeros_like(by_hand))).expected(values)
    return Wired(cut, np.asarray(wired), added)


def wiring_table(effects: Wired) -> list[Found]:
    moved, predicted = (100 * (arm - effects.cut).mean(1) for arm in (effects.wired, effects.by_hand))
    shut, off = (
        100 * np.abs(a - b).max() for a, b in ((effects.wired[0], effects.cut[0]), (effects.wired, effects.by_hand))
    )
    told = ", ".join(f"{size:g}: {a:+.1f}/{b:+.1f}" for size, a, b in zip(SIZES, moved, predicted, strict=True))
    grows = bool(moved[-1] >= 5 and (np.diff(moved) > -0.05).all())  # shut, it is not exactly 0
    name = "r6 #0"
    return [
        Found(name, "wired, changes nothing until it is steered: ≤ .1 pp", f"{shut:.4f} pp", shut <= 0.1),
        Found(name, "wired and steered, moves more at every dose, ≥ 5 pp at the last (wired/by hand)", told, grows),
        Found(name, "each prompt and dose as by hand, within .1 pp", f"{off:.4f} pp", off <= 0.1),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------


def check(lm: jm.LanguageModel, layer: int, seed: int) -> list[Found]:
    behavior = draw_families(lm, seed)
    conditions = [pole for name in CONTRASTS for pole in poles(name * (name != "stance"))]
    built = part_of(behavior, "development", *conditions)
    encoded = encode_table(lm, built)
    seen = Seen(built, read_decisions(lm, encoded.prompts, layer), read_text(lm, TEXT, layer, 10))
    half = built["family"].unique()[::2]
    rows = built.index[built["condition"].isin(poles()) & built["family"].isin(half)]
    gradient = gradients(lm, *take(encoded, rows), layer)
    sides = read_sides(lm, part_of(behavior, "test", *poles()))
    tested = [gradients(lm, side.prompts, side.values, layer) for side in sides.values()]
    everywhere = np.concatenate([gradient, *tested])
    planted = plant(seen, gradient, everywhere, layer=layer, seed=seed)
    # Inert beyond first order, too: once more, with the gradients on the way along these rows as they were.
    W_dec = np.asarray(planted.saes.params["W_dec"][0], np.float64)
    asked = (("r2", 0.5), ("r2", 1.0), ("r2", 1.5), ("r6", 0.5))  # some pairs are read as more than one gap
    ways = [gradients_along(lm, W_dec[planted.features(name)[0]], sides, layer, point) for name, point in asked]
    planted = plant(seen, gradient, np.concatenate([everywhere, *ways]), layer=layer, seed=seed)
    readme = next(parent for parent in TEXT.parents if (parent / "README.md").is_file()) / "README.md"
    s, chosen = select(lm, behavior, planted, read_text(lm, readme, layer, 40), seed)
    found = selection_table(planted, s, chosen) + patch_table(lm, planted, sides, layer)
    low, high = (lm.tokenizer(digit, add_special_tokens=False).input_ids[-1] for digit in "09")
    table = part_of(behavior, "test", "minus").head(WIRE)
    whole = jm.make_prompts(lm, list(table["prefix"] + table["query"]), table["answers"].iloc[0])
    feature = int(planted.features("r6")[0])
    effects = wired_effects(lm, planted.saes, feature, whole, jnp.asarray(np.stack(table["score"])), low=low, high=high)
    return found + wiring_table(effects)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="draws families, worked examples and random rows")
    parser.add_argument("--layer", type=int, default=11, help="11 to 16: below, no stance has come to the answer")
    options = parser.parse_args()
    lm = jm.load_model("gemma-3-270m")
    if not 0 <= options.layer < lm.config.n_layers - 1:
        parser.error(f"--layer: expected one with a layer above it, 0 to {lm.config.n_layers - 2}")
    found = check(lm, options.layer, options.seed)
    table = Table("row", "must", "found", "", title=f"layer {options.layer}, seed {options.seed}")
    for line in found:
        table.add_row(line.row, line.must, line.found, "[green]✓[/]" if line.holds else "[red]✗[/]")
    Console(width=120).print(table)
    return int(not all(line.holds for line in found))


if __name__ == "__main__":
    sys.exit(main())
