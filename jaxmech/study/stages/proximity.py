"""Stage proximity: how directly the selected features act, and whether S2 is nearer to the output than S1."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd

from jaxmech.contrast.statistics import mean_effect, ratio_of_sums
from jaxmech.interventions import patching, proximity
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Total and direct effects of the selection, of the classes, and single features; mediation; layer-matched test."""
    classes = ctx.folder.table("dual_process", "classes")
    base, donor = effects.side(ctx, "minus"), effects.side(ctx, "plus")
    sublayers = proximity.base_sublayers(ctx.lm.config, ctx.lm.params, base.prompts)
    groups = {"all": ctx.selected} | {
        name: classes[classes["class"] == name] for name in ("s1", "s2") if (classes["class"] == name).any()
    }
    singles = classes.head(ctx.config.proximity.features)
    points = effects.stack_selections(
        ctx, [effects.pairs_of(g) for g in groups.values()] + [[pair] for pair in effects.pairs_of(singles)]
    )
    model = (ctx.lm.config, ctx.lm.params, base.prompts)
    patch, patch_frozen = (
        partial(run, *model, saes=ctx.saes, donor=donor.resid)
        for run in (patching.patch_features, proximity.direct_effects)
    )
    total = effects.sweep_sets(patch, points, base.values, what="total effects")
    direct = effects.sweep_sets(partial(patch_frozen, base=sublayers), points, base.values, what="direct effects")
    total, direct = total - base.g, direct - base.g
    table = pd.DataFrame(
        [
            dict(set=name, features=len(groups[name])) | effect_row(te, de, base)
            for name, te, de in zip(groups, total, direct, strict=False)
        ]
    )
    n = len(groups)
    features = singles[["layer", "feature", "class"]].assign(total=total[n:].mean(1), direct=direct[n:].mean(1))
    # As for the sets: only where the total effect's interval excludes 0, as a ratio to almost nothing would dominate.
    rows = [effect_row(te, de, base) for te, de in zip(total[n:], direct[n:], strict=True)]
    features["proximity"] = pd.to_numeric(pd.Series([row["pi"] for row in rows], index=features.index))
    results: dict[str, Any] = {
        "sets": {row["set"]: {k: v for k, v in row.items() if k != "set"} for row in table.to_dict("records")}
    }
    results |= {key: results["sets"]["all"][key] for key in ("total_pp", "direct_pp", "pi")}
    results["effect_weighted_depth"] = weighted_depth(features)
    results["s2_minus_s1_within_layers"] = layer_matched(features, ctx.key("proximity.permutations"))
    results["mediation"] = mediation(ctx, groups, base, donor, total)
    return Outcome(results, {"sets": table, "features": features})


def effect_row(total: np.ndarray, direct: np.ndarray, base: effects.Side) -> dict:
    """TE, DE and proximity of one set from per-prompt effects [B]; pi only where TE's interval excludes 0."""
    te, de = effects.by_family(total, base), effects.by_family(direct, base)
    effect, straight = mean_effect(te), mean_effect(de)
    row = dict(
        total_pp=100 * effect.value, total_low=100 * effect.low, total_high=100 * effect.high,
        direct_pp=100 * straight.value, indirect_pp=100 * (effect.value - straight.value),
    )  # fmt: skip
    if effect.low > 0 or effect.high < 0:
        ratio = ratio_of_sums(de, te)
        return row | dict(pi=ratio.value, pi_low=ratio.low, pi_high=ratio.high)
    return row | dict(pi=None, pi_low=None, pi_high=None)


def weighted_depth(features: pd.DataFrame) -> dict[str, float]:
    """Mean layer of each class, weighted by |total effect|."""
    out: dict[str, float] = {}
    for name, part in features.groupby("class"):
        weight = part["total"].abs()
        out[str(name)] = float((part["layer"] * weight).sum() / weight.sum()) if weight.sum() > 0 else float("nan")
    return out


def layer_matched(features: pd.DataFrame, key: jax.Array) -> dict:
    """S2 minus S1 within layers, or the plain statement that depth and class cannot be told apart."""
    both = features[features["class"].isin(["s1", "s2"])].dropna(subset=["proximity"])
    difference, p, layers = (float("nan"), float("nan"), 0)
    if len(both):
        difference, p, layers = proximity.within_layer_difference(
            both["proximity"].to_numpy(), both["layer"].to_numpy(), (both["class"] == "s2").to_numpy(),
            permutations=2000, key=key,
        )  # fmt: skip
    verdict = "identified within layers" if layers else "not identifiable beyond depth: no layer holds both classes"
    return {"difference": difference, "p": p, "layers": layers, "verdict": verdict}


def mediation(ctx: Context, groups: dict, base: effects.Side, donor: effects.Side, total: np.ndarray) -> dict | None:
    """1 - TE(a | b held at base) / TE(a) for S1 through S2 and the reverse; None unless both classes exist."""
    if not {"s1", "s2"} <= set(groups):
        return None
    order, out = list(groups), {}
    for name, mediator in (("s1", "s2"), ("s2", "s1")):
        choices = proximity.mediated_effect(
            ctx.lm.config,
            ctx.lm.params,
            base.prompts,
            saes=ctx.saes,
            patched=ctx.selection(groups[name]),
            held=ctx.selection(groups[mediator]),
            donor=donor.resid,
            base_donor=base.resid,
        )
        held = effects.by_family(effects.expected(choices, base.values) - base.g, base)
        ratio = ratio_of_sums(held, effects.by_family(total[order.index(name)], base))
        out[f"{name}_through_{mediator}"] = {"share": 1 - ratio.value, "ci": [1 - ratio.high, 1 - ratio.low]}
    return out
