"""Screens: many small interventions as one sweep, to see which feature, layer, pair or position carries an effect.

`B` denotes prompts, `T` their tokens, `L` layers, `D` the width at a site, `K` features per layer, `N` choices, `S`
sets.

A screen is a list of feature sets, each a list of (layer, feature): `each_feature`, `each_layer`, `each_pair`, or the
random sets of `controls.matched_sets`. `screen` patches all of them in one sweep; `patch_positions` does the same for
whole activations at every layer and position, `each_layer_alone` makes a steering vector's points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices
from jaxmech.interventions import edits
from jaxmech.interventions.patching import patch_features
from jaxmech.interventions.sweep import sweep
from jaxmech.io.arguments import as_indices
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params
from jaxmech.sae.module import SAE

Feature = tuple[int, int]
"""Layer and index in its dictionary."""


def each_feature(features: Sequence[Feature]) -> list[list[Feature]]:
    """Every feature alone."""
    return [[feature] for feature in features]


def each_layer(features: Sequence[Feature]) -> list[list[Feature]]:
    """The features of one layer at a time, layers in ascending order."""
    return [[f for f in features if f[0] == layer] for layer in sorted({layer for layer, _ in features})]


def each_pair(features: Sequence[Feature]) -> list[list[Feature]]:
    """Every two features together: against the sum of each alone, this shows what they do jointly."""
    return [list(pair) for pair in combinations(features, 2)]


def twins(resid: jax.Array) -> jax.Array:
    """Donors for both directions at once: residuals [L,2B,D] of B prompts and then of their B twins, swapped."""
    if resid.shape[1] % 2:
        raise ValueError(f"resid: expected an even number of prompts, B and then their B twins, got {resid.shape[1]}")
    return jnp.roll(resid, resid.shape[1] // 2, axis=1)


def screen(
    config: ModelConfig, params: Params, prompts: Prompts,
    sets: Sequence[Sequence[Feature]], *, saes: SAE, donor: jax.Array,
    **options: Any,
) -> Choices:  # fmt: skip
    """Every prompt's choices, logprobs [S,B,N], with each feature set patched in from donors with residuals [L,B,D].

    For both directions give B prompts and then their twins, and `twins(resid)`.

    Args:
      options: as for `sweep`.

    Raises:
      ValueError: no sets, a feature that does not exist or is listed twice in a set, donors of another shape.
    """
    selections = edits.select_sets(sets, config.n_layers)
    return patch_features(config, params, prompts, selections, saes=saes, donor=donor, **options)


def patch_positions(
    config: ModelConfig, params: Params, prompts: Prompts, *, donor: jax.Array, site: str = "resid_post",
    layers: Sequence[int] | None = None, positions: Sequence[int] | None = None, **options: Any,
) -> Choices:  # fmt: skip
    """Activation patching over a grid: each layer and each position alone takes the donor's whole activation.

    Args:
      donor: [L,B,T,D] at `site`, at the tokens of `prompts`.
      layers, positions: of the grid, indices or masks; all of them by default. Positions count slots of
        `prompts.tokens`.
      options: as for `sweep`.

    Returns:
      logprobs [layers,positions,B,N].

    Raises:
      ValueError: a donor of another shape, a layer or a position that does not exist.
    """
    (B, T), L = prompts.tokens.shape, config.n_layers
    rows = np.arange(L) if layers is None else as_indices("layers", layers, L)
    slots = np.arange(T) if positions is None else as_indices("positions", positions, T)
    if not rows.size or not slots.size:
        raise ValueError("layers, positions: expected at least one of each, or there is nothing to patch")
    if donor.ndim != 4 or donor.shape[:3] != (L, B, T):
        raise ValueError(f"donor: expected [L,B,T,D] with L, B, T = {L}, {B}, {T}, got shape {donor.shape}")
    grid = np.array([(layer, slot) for layer in rows for slot in slots], np.int32)
    logprobs = sweep(config, params, prompts, ReplaceAt(donor, site), grid, **options).logprobs
    return Choices(logprobs.reshape(len(rows), len(slots), *logprobs.shape[1:]))


@struct.dataclass
class ReplaceAt:
    """Edits for a sweep over points (layer, slot): the donor [L,B,T,D] replaces `site` there alone."""

    donor: jax.Array
    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, point: jax.Array) -> edits.Edits:
        L, _, T, _ = self.donor.shape
        exists = (point >= 0).all() & (point < jnp.array([L, T])).all()
        at = jnp.where(exists, point, 0)  # a place that does not exist gives NaN, rather than no change
        spans = edits.at_positions(L, jnp.arange(T) == at[1], jnp.arange(L) == at[0])
        return {self.site: (edits.Replace(donor=jnp.where(exists, self.donor, jnp.nan), spans=spans),)}


def each_layer_alone(vector: jax.Array) -> jax.Array:
    """A steering vector [L,D] as points of a sweep: each of its layers alone, [S,L,D] with S = L."""
    return jnp.eye(len(vector), dtype=vector.dtype)[:, :, None] * vector
