"""Stage attribution: every feature's effect by gradients, plain and integrated, audited against true patching."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.interventions import patching
from jaxmech.interventions.attribution import attribute, midpoints, path_gradient, residual_gradient
from jaxmech.io.arguments import rng_of
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Attributes plus donors' features on minus prompts; patches the top and some random features one by one."""
    saes = ctx.saes
    base, donor = (effects.side(ctx, name) for name in ("minus", "plus"))
    layers, model = jnp.asarray(saes.config.layers), (ctx.lm.config, ctx.lm.params, base.prompts, base.values)
    resid = {"base": base.resid[layers], "donor": donor.resid[layers]}
    gradients = {
        "attribution": residual_gradient(*model, site=saes.config.site)[layers],
        "integrated": path_gradient(*model, saes=saes, **resid, points=midpoints(ctx.config.attribution.steps)),
    }
    features = ctx.folder.table("contrast", "features")
    frame = features[["layer", "feature", "selected", "live"]].assign(
        **{name: np.asarray(attribute(saes, slope, **resid)).reshape(-1) for name, slope in gradients.items()}
    )
    audit = audited(ctx, frame, base, donor)
    sizes = {name: audit[audit["group"] == name] for name in ("top", "random")}
    results = {
        "audited": {name: len(part) for name, part in sizes.items()},
        "spearman": {name: rank_correlation(part) for name, part in sizes.items()} | {"all": rank_correlation(audit)},
        "spearman_integrated": {name: rank_correlation(part, "integrated") for name, part in sizes.items()},
        "sign_agreement": {name: sign_agreement(part) for name, part in sizes.items()},
        "families": len(base.rows),
        "selected_share_of_top": float(sizes["top"]["selected"].mean()),
    }
    return Outcome(results, {"attribution": frame, "audit": audit})


def audited(ctx: Context, frame: pd.DataFrame, base: effects.Side, donor: effects.Side) -> pd.DataFrame:
    """The strongest features and random ones of the rest that move at all, with the effect of truly patching each."""
    n = ctx.config.attribution.audited
    moving = frame[frame["attribution"] != 0.0]
    top = moving.reindex(moving["attribution"].abs().sort_values(ascending=False, kind="stable").index).head(n)
    remaining = moving.drop(top.index)
    random = remaining.sample(min(n, len(remaining)), random_state=rng_of(ctx.key("attribution.audit")))
    audit = pd.concat([top.assign(group="top"), random.assign(group="random")], ignore_index=True)
    points = effects.stack_selections(ctx, [[pair] for pair in effects.pairs_of(audit)])
    model = (ctx.lm.config, ctx.lm.params, base.prompts)
    patch = partial(patching.patch_features, *model, saes=ctx.saes, donor=donor.resid)
    g = effects.sweep_sets(patch, points, base.values, what="attribution audit")
    return audit.assign(patched=(g - base.g).mean(1))


def rank_correlation(audit: pd.DataFrame, by: str = "attribution") -> float:
    """Spearman correlation of attribution with true patching; NaN under three features."""
    if len(audit) < 3 or audit[by].nunique() < 2 or audit["patched"].nunique() < 2:
        return float("nan")
    return float(stats.spearmanr(audit[by], audit["patched"]).statistic)


def sign_agreement(audit: pd.DataFrame) -> float:
    return float((np.sign(audit["attribution"]) == np.sign(audit["patched"])).mean()) if len(audit) else float("nan")
