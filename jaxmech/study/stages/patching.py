"""Stage patching: do the selected features carry the behaviour, both ways, more than anything of the same norm?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.behavior.behavior import poles
from jaxmech.contrast.statistics import Effect, holm, mean_effect, p_from_null, ratio_of_sums
from jaxmech.interventions import controls, edits, patching
from jaxmech.interventions.sweep import sweep
from jaxmech.io.progress import progress
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome

LEAST_SHARE = 0.1
"""Of an equal share of the gap: a feature that moves less by itself is a passenger, however surely it does."""


class Patch(NamedTuple):
    """Base takes the donor's values. gap [K] by family; norm [L,B] of what the selection adds."""

    name: str
    base: effects.Side
    donor: effects.Side
    gap: np.ndarray
    norm: jax.Array


def run(ctx: Context) -> Outcome:
    """Recovered share of the gap for the selection, bars of reference, and controls of the same norm, both ways."""
    sides = {name: effects.side(ctx, name) for name in poles()}
    sets = control_sets(ctx)
    tables: dict[str, list[pd.DataFrame]] = {"bars": [], "null": []}
    results: dict[str, Any] = {}
    moved = []
    for direction, (base, donor) in effects.DIRECTIONS.items():
        patch = make_patch(ctx, direction, sides[base], sides[donor])
        bars, change = bars_of(ctx, patch, sets["control_selected"])
        null, ratio = null_of(ctx, patch, sets["random"])
        tables["bars"].append(bars)
        tables["null"].append(null)
        moved.append((1 if direction == "to_plus" else -1) * change)
        results |= direction_results(direction, bars, null, ratio)
    # Both directions have to beat their own random sets, so the larger p counts for the stage.
    results["p_random"] = max(results[f"p_random_{d}"] for d in effects.DIRECTIONS)
    results["random_directions"] = effects.random_ones(ctx, ctx.config.patching.random_directions)
    results["random_sets"], results["families"] = len(sets["random"]), len(set(sides["plus"].families))
    own, *alone = np.mean(moved, axis=0).T
    single = singles(ctx, alone, sides)
    results["passengers"] = int(single["passenger"].sum())
    results["movers"] = int((~single["passenger"]).sum())
    other = other_words(ctx, sides, own)
    results["held_out"], results["cross"] = other["moves"], other["confounds"]
    return Outcome(results, {name: pd.concat(t, ignore_index=True) for name, t in tables.items()} | {"singles": single})


def make_patch(ctx: Context, name: str, base: effects.Side, donor: effects.Side) -> Patch:
    spans = edits.at_last(ctx.lm.config.n_layers, base.prompts.tokens.shape[1])
    edit = patching.patch_edit(ctx.saes, ctx.selection(), donor=donor.resid, spans=spans)[ctx.saes.config.site_out][0]
    norm = jnp.linalg.norm(controls.added(ctx.lm.config, ctx.lm.params, base.prompts, edit), axis=-1)
    return Patch(name, base, donor, effects.by_family(donor.g - base.g, base), norm)


def recovered(patch: Patch, g: np.ndarray) -> Effect:
    """Share of the gap that patched outcomes g [B] recover."""
    return ratio_of_sums(effects.by_family(g - patch.base.g, patch.base), patch.gap)


def bar(patch: Patch, name: str, kind: str, g: np.ndarray) -> dict:
    effect = recovered(patch, g)
    change = 100 * float((g - patch.base.g).mean())
    return dict(
        direction=patch.name, name=name, kind=kind, recovered=effect.value, low=effect.low, high=effect.high,
        change_pp=change,
    )  # fmt: skip


def bars_of(ctx: Context, patch: Patch, control: list[effects.Pairs]) -> tuple[pd.DataFrame, np.ndarray]:
    """Bars of the selection and of reference, and the change [K,1+n] that it and each of its features alone make."""
    singles = [[pair] for pair in effects.pairs_of(single_features(ctx))]
    g = patched(ctx, patch, [effects.pairs_of(ctx.selected), *control, *singles], what=f"patching {patch.name}")
    rows = [bar(patch, "selected features", "effect", g[0])]
    rows += [bar(patch, "control-selected features", "control", row) for row in g[1 : 1 + len(control)]]
    moved = [g[0], *g[1 + len(control) :]]
    change = np.stack([effects.by_family(row - patch.base.g, patch.base) for row in moved], axis=1)
    return pd.DataFrame(rows + references(ctx, patch)), change


def patched(ctx: Context, patch: Patch, sets: list[effects.Pairs], *, what: str) -> np.ndarray:
    """Expected scores [S,B] with each set at the donor's values."""
    run = partial(
        patching.patch_features, ctx.lm.config, ctx.lm.params, patch.base.prompts, saes=ctx.saes,
        donor=patch.donor.resid,
    )  # fmt: skip
    return effects.sweep_sets(run, effects.stack_selections(ctx, sets), patch.base.values, what=what)


def references(ctx: Context, patch: Patch) -> list[dict]:
    """At the selection's own layers: the whole residual, all features, the error, the mean difference; a sham donor."""
    config, params, saes = ctx.lm.config, ctx.lm.params, ctx.saes
    base, layers = patch.base, sorted({int(layer) for layer in ctx.selected["layer"]})
    parts = {"whole residual": (1.0, 0.0), "all features": (0.0, 1.0), "reconstruction error only": (1.0, -1.0)}
    choices = patching.patch_parts(
        config, params, base.prompts, jnp.array(list(parts.values())), saes=saes, donor=patch.donor.resid,
        layers=layers,
    )  # fmt: skip
    rows = [
        bar(patch, name, "reference", g) for name, g in zip(parts, effects.expected(choices, base.values), strict=True)
    ]
    direction = jnp.asarray(ctx.folder.arrays("contrast")["mean_difference"])
    unit = controls.with_norm(direction, 1.0)
    mask = jnp.zeros(config.n_layers, bool).at[jnp.asarray(layers)].set(True)
    choices = patching.patch_vectors(
        config, params, base.prompts, unit[None], donor=patch.donor.resid, layers=mask, site=saes.config.site
    )
    rows.append(bar(patch, "mean-difference direction", "reference", effects.expected(choices, base.values)[0]))
    sham = patch._replace(donor=base._replace(resid=jnp.roll(base.resid, 1, axis=1)))  # the next family's, same pole
    g = patched(ctx, sham, [effects.pairs_of(ctx.selected)], what="sham donor")
    return [*rows, bar(patch, "sham donor, same pole", "control", g[0])]


def null_of(ctx: Context, patch: Patch, random: list[effects.Pairs]) -> tuple[pd.DataFrame, float]:
    """What matched sets and random directions recover at the selection's norm, and the norm that the sets achieve."""
    config, params, base = ctx.lm.config, ctx.lm.params, patch.base
    spans = edits.at_last(config.n_layers, base.prompts.tokens.shape[1])
    matched = controls.AddMatched(ctx.saes, patch.donor.resid, base.resid, patch.norm, spans)
    sets = effects.stack_selections(ctx, random)
    key = ctx.key(f"patching.directions.{patch.name}")
    count = effects.random_ones(ctx, ctx.config.patching.random_directions)
    like = jnp.ones((config.n_layers, config.width(ctx.saes.config.site_out)))
    noise = controls.random_directions(like, key=key, count=count)
    direction = controls.AddDirection(patch.norm, spans, ctx.saes.config.site_out)
    rows = []
    for name, build, points in (("matched sets", matched, sets), ("random directions", direction, noise)):
        total = len(jax.tree.leaves(points)[0])
        with progress(f"{name}, {patch.name}", total, unit="points") as advance:
            choices = sweep(config, params, base.prompts, build, points, chunk=effects.chunk_of(total), advance=advance)
        for g in effects.expected(choices, base.values):
            share = float(effects.by_family(g - base.g, base).sum() / patch.gap.sum())
            rows.append(dict(direction=patch.name, null=name, recovered=share))
    return pd.DataFrame(rows), float(np.median(matched.achieved(sets)))


def direction_results(direction: str, bars: pd.DataFrame, null: pd.DataFrame, ratio: float) -> dict[str, Any]:
    """The numbers of results.json for one direction."""
    by: Any = bars.set_index("name")
    drawn = {name: part["recovered"].to_numpy() for name, part in null.groupby("null")}
    value = float(by.loc["selected features", "recovered"])
    p = p_from_null(value, drawn["matched sets"]) if ratio >= effects.LEAST_RATIO else float("nan")
    return {
        f"recovered_{direction}": value,
        f"recovered_{direction}_ci": [float(by.loc["selected features", side]) for side in ("low", "high")],
        f"p_random_{direction}": p,
        f"random_{direction}": float(drawn["matched sets"].mean()),
        f"random_ratio_{direction}": ratio,
        f"p_directions_{direction}": p_from_null(value, drawn["random directions"]),
        f"bars_{direction}": {
            name: float(by.loc[name, "recovered"])
            for name in ("whole residual", "all features", "reconstruction error only", "mean-difference direction")
        },
    }


def single_features(ctx: Context) -> pd.DataFrame:
    return ctx.selected.head(ctx.config.patching.singles)


def singles(ctx: Context, moved: Sequence[np.ndarray], sides: dict[str, effects.Side]) -> pd.DataFrame:
    """Each selected feature alone: the mean over both directions of what it moves towards the donor, Holm over all.

    Args:
      moved: [K] by family, of each feature.
    """
    frame = single_features(ctx)[["layer", "feature"]].copy()
    each = [mean_effect(change) for change in moved]
    gap = 100 * abs(float(effects.by_family(sides["plus"].g - sides["minus"].g, sides["plus"]).mean()))
    frame["change_pp"] = [100 * effect.value for effect in each]
    frame["low_pp"] = [100 * effect.low for effect in each]
    frame["high_pp"] = [100 * effect.high for effect in each]
    frame["p"] = [effect.p for effect in each]
    frame["p_holm"] = holm(frame["p"].to_numpy())
    least = LEAST_SHARE * gap / len(ctx.selected)
    frame["passenger"] = ~((frame["p_holm"] < 0.05) & (frame["change_pp"] >= least))
    return frame.reset_index(drop=True)


def other_words(ctx: Context, sides: dict[str, effects.Side], own: np.ndarray) -> dict[str, dict]:
    """The selection patched between other pairs: of words that should move as well, and of what it may be instead.

    Args:
      own: what the behaviour's own donors move, both ways taken together, by family [K].

    Returns:
      moves: control -> recovered share of its own gap, both ways taken together. confounds: control -> recovered share
      of the control's own gap (`own`), and of the behaviour's gap from the control's donors (`poles`, minus taking the
      control's plus and the reverse); `excess`: by family, what the behaviour's own donors move beyond the control's.
    """
    out: dict[str, dict] = {"moves": {}, "confounds": {}}
    for name in ctx.behavior.paired("test"):
        control = ctx.behavior.controls[name]
        if control.flips:
            continue
        pair = {pole: effects.side(ctx, condition) for pole, condition in zip(poles(), poles(name), strict=True)}
        between = both_ways(ctx, pair, pair, what=name)
        if control.moves:
            out["moves"][name] = between["recovered"]
        elif control.gate and control.oriented:
            families = pair["plus"].families
            kept = {pole: effects.of_families(side, families) for pole, side in sides.items()}
            crossed = both_ways(ctx, kept, pair, what=f"from {name}")
            excess = mean_effect(own[np.isin(np.unique(sides["plus"].families), families)] - crossed["moved"])
            out["confounds"][name] = {
                "own": between["recovered"], "poles": crossed["recovered"],
                "excess_pp": 100 * excess.value, "excess_ci": [100 * excess.low, 100 * excess.high],
            }  # fmt: skip
    return out


def both_ways(ctx: Context, base: dict[str, effects.Side], donor: dict[str, effects.Side], *, what: str) -> dict:
    """Minus prompts with the donors' plus values, plus prompts with their minus values: recovered share of the bases'
    gap, and the change by family towards the donor [K]."""
    gap = effects.by_family(base["plus"].g - base["minus"].g, base["plus"])
    moved = []
    for pole, other, sign in (("minus", "plus", 1), ("plus", "minus", -1)):
        patch = Patch(what, base[pole], donor[other], gap, jnp.zeros(()))
        g = patched(ctx, patch, [effects.pairs_of(ctx.selected)], what=f"patching {what}")[0]
        moved.append(sign * effects.by_family(g - base[pole].g, base[pole]))
    change = np.mean(moved, axis=0)
    share = ratio_of_sums(change, gap)
    return {"moved": change, "recovered": {"value": share.value, "ci": [share.low, share.high]}}


def control_sets(ctx: Context) -> dict[str, list[effects.Pairs]]:
    """Random sets matched to the selection, and the features that a control would have selected at the same layers."""
    features = ctx.folder.table("contrast", "features")
    layers, F = ctx.saes.config.layers, ctx.saes.config.d_sae
    grid = lambda column: features[column].to_numpy().reshape(len(layers), F)  # noqa: E731
    chosen = effects.pairs_of(ctx.selected)
    random = controls.matched_sets(
        chosen,
        fires=np.maximum(grid("fires_plus"), grid("fires_minus")),
        strength=grid("strength"),
        layers=layers,
        sets=effects.random_ones(ctx, ctx.config.patching.random_sets),
        key=ctx.key("patching.sets"),
    )
    if not features["control_d_z"].any():  # there is no control to select by
        return {"random": random, "control_selected": []}
    control, taken = [], set(chosen)
    ranked = features[features["live"]].sort_values("control_d_z", key=np.abs, ascending=False, kind="stable")
    for layer, count in ctx.selected["layer"].value_counts().sort_index().items():
        untaken = [pair for pair in effects.pairs_of(ranked[ranked["layer"] == layer]) if pair not in taken]
        control += untaken[:count]
    return {"random": random, "control_selected": [control]}
