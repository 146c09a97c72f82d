"""Activation patching at the decision token, in delta form: chosen features take the donor's values.

`B` denotes prompts, `L` layers, `D` the residual width, `K` selected features per layer, `N` choices, `S` feature sets.

x' = x + sum_j (z_j(donor) - z_j(x')) D_j: the donor's values are set, and the current ones are read after the patches
upstream have acted, so that nothing is counted twice and what the dictionary does not explain is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices
from jaxmech.interventions import edits
from jaxmech.interventions.sweep import sweep
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params
from jaxmech.sae.module import SAE


def donor_values(encoder: edits.Gathered | edits.Full, donor: jax.Array) -> jax.Array:
    """The chosen features' values [L,B,K] at residuals [L,B,D]."""
    return jax.vmap(lambda e, x: e.encode(x[:, None])[:, 0])(encoder, donor)


def check_donors(config: ModelConfig, prompts: Prompts, donor: jax.Array, site: str) -> None:
    """Refuses donors' residuals that are not [L,B,D], as `collect.run_decision` gives them for as many prompts."""
    expected = (config.n_layers, len(prompts.tokens), config.width(site))
    if jnp.shape(donor) != expected:
        raise ValueError(
            f"donor: expected the donors' [L,B,D] = {list(expected)} at {site}, got shape {list(jnp.shape(donor))}"
        )


def patch_edit(saes: SAE, selection: edits.Selection, *, donor: jax.Array, spans: edits.Spans) -> edits.Edits:
    """Sets the selection to its values at the donor's residuals [L,B,D], at `spans`, such as `edits.at_last`."""
    edit = edits.features(saes, selection, gain=0.0, shift=0.0, spans=spans)
    edit = edit.replace(shift=donor_values(edit.encoder, donor))
    return {saes.config.site_out: (edit.replace(gain=jnp.zeros_like(edit.shift)),)}


@struct.dataclass
class PatchFeatures:
    """Edits for a sweep over selections: each takes the values it has at the donors' residuals [L,B,D]."""

    saes: SAE
    donor: jax.Array
    spans: edits.Spans

    __repr__ = short_repr

    def __call__(self, selection: edits.Selection) -> edits.Edits:
        return patch_edit(self.saes, selection, donor=self.donor, spans=self.spans)


def patch_features(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    selections: edits.Selection,
    *,
    saes: SAE,
    donor: jax.Array,
    **options: Any,
) -> Choices:
    """Choices, logprobs [S,B,N], of every prompt with each feature set [S,L,K] patched in.

    Args:
      donor: the donors' residuals [L,B,D].
      options: as for `sweep`.
    """
    check_donors(config, prompts, donor, saes.config.site)
    spans = edits.at_last(config.n_layers, prompts.tokens.shape[1])
    return sweep(config, params, prompts, PatchFeatures(saes, donor, spans), selections, **options)


def patch_vectors(
    config: ModelConfig, params: Params, prompts: Prompts,
    directions: jax.Array, *, donor: jax.Array, layers: jax.Array,
    site: str = "resid_post", **options: Any,
) -> Choices:  # fmt: skip
    """Choices, logprobs [S,B,N], with the component along unit directions [S,L,D] set to the donor's, at layers [L]."""
    check_donors(config, prompts, donor, site)
    spans = edits.at_last(config.n_layers, prompts.tokens.shape[1], layers)
    return sweep(config, params, prompts, PatchDirection(donor, spans, site), directions, **options)


@struct.dataclass
class PatchDirection:
    """Edits for a sweep over unit directions [L,D]: the component along each takes the donor's value."""

    donor: jax.Array
    spans: edits.Spans
    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, direction: jax.Array) -> edits.Edits:
        shift = jnp.einsum("lbd,ld->lb", self.donor, direction, precision=jax.lax.Precision.HIGHEST)
        return {self.site: (edits.project(direction, shift=shift, spans=self.spans),)}


def patch_parts(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    parts: jax.Array,
    *,
    saes: SAE,
    donor: jax.Array,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Choices:
    """Choices, logprobs [S,B,N], with parts of the residual taken from the donor.

    Args:
      parts: [S,2], the shares of the whole and of what the dictionary explains; see `edits.PatchParts`.
      layers: where; by default every layer that has a dictionary.
    """
    check_donors(config, prompts, donor, saes.config.site)
    layers = saes.config.layers if layers is None else layers
    spans = edits.at_last(config.n_layers, prompts.tokens.shape[1], layers)
    return sweep(config, params, prompts, PatchShares(saes, donor, spans), parts, **options)


@struct.dataclass
class PatchShares:
    """Edits for a sweep over shares [2], of the donor's whole residual and of what the dictionary explains of it."""

    saes: SAE
    donor: jax.Array
    spans: edits.Spans

    __repr__ = short_repr

    def __call__(self, shares: jax.Array) -> edits.Edits:
        whole, explained = jnp.broadcast_to(shares[:, None], (2, len(self.donor)))
        edit = edits.patch_parts(self.saes, self.donor, whole=whole, explained=explained, spans=self.spans)
        return {self.saes.config.site: (edit,)}
