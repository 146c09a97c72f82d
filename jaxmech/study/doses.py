"""Doses of the selected features, and directions of the norm that they write: what steering and transfer share.

`S` denotes sweep points, `L` layers, `B` prompts, `D` the residual width, `K` selected features per layer or, in means,
families.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.answers.score import Choices
from jaxmech.interventions import controls, edits, steering
from jaxmech.io.progress import progress
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.effects import Side, chunk_of, expected


def gap_of(ctx: Context, features: pd.DataFrame) -> tuple[edits.Selection, np.ndarray]:
    """The features as a selection, and each one's mean difference between the poles [L,K]."""
    selection = ctx.selection(features)
    return selection, ctx.per_feature(selection, features, "dz")


def dose(ctx: Context, side: Side, alphas: np.ndarray, *, what: str, features: pd.DataFrame | None = None) -> Choices:
    """Choices, logprobs [S,B,N], with the selected features (or some) of the side set to each of the doses."""
    selection, gap = gap_of(ctx, ctx.selected if features is None else features)
    with progress(what, len(alphas), unit="points") as advance:
        return steering.set_to_dose(
            ctx.lm.config, ctx.lm.params, side.prompts, alphas, saes=ctx.saes, selection=selection, gap=gap,
            base=side.resid, chunk=chunk_of(len(alphas)), advance=advance,
        )  # fmt: skip


def written_at_one(ctx: Context, side: Side) -> tuple[jax.Array, jax.Array]:
    """What coefficients 1 and -1 add at the decision token, [L,B,D] each."""
    selection, gap = gap_of(ctx, ctx.selected)
    build = steering.dose_at_last(
        ctx.lm.config, side.prompts, saes=ctx.saes, selection=selection, gap=gap, base=side.resid
    )
    add = partial(controls.added, ctx.lm.config, ctx.lm.params, side.prompts)
    plus, minus = (add(build(jnp.float32(alpha))[ctx.saes.config.site_out][0]) for alpha in (1.0, -1.0))
    return plus, minus


def mean_norms(written: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The mean norm at each layer, [L], of what either sign adds."""
    up, down = (jnp.linalg.norm(part, axis=-1).mean(1) for part in written)
    return up, down


def antisymmetric(ctx: Context, side: Side, directions: np.ndarray, norms: tuple[Any, ...], *, what: str) -> np.ndarray:
    """(g(+v) - g(-v)) / 2 by family [S,K], for directions [S,L,D] of the norm [L], or [S,L], that either sign has."""
    up, down = (np.asarray(controls.with_norm(directions, norm)) for norm in norms)
    vectors = np.concatenate([up, -down])
    with progress(what, len(vectors), unit="points") as advance:
        choices = steering.steer(
            ctx.lm.config, ctx.lm.params, side.prompts, vectors, site=ctx.saes.config.site_out,
            chunk=chunk_of(len(vectors)), advance=advance,
        )  # fmt: skip
    g = expected(choices, side.values)
    plus, minus = np.split(g, 2)
    return np.stack([effects.by_family(row, side) for row in (plus - minus) / 2])
