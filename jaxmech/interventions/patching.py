"""Activation patching at the decision token, in delta form: chosen features take the donor's values.

`B` denotes prompts, `L` layers, `D` the residual width, `K` selected features a layer, `N` choices, `S` feature sets.

x' = x + sum_j (z_j(donor) - z_j(x')) D_j: the donor's values are set, and the present ones are read after the patches
upstream have acted, so that nothing is counted twice and what the dictionary does not explain is kept.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxmech.answers.prompts import Prompts
from jaxmech.interventions import edits as ed
from jaxmech.interventions.sweep import sweep
from jaxmech.models.decoder import Params
from jaxmech.sae.module import SAE


def donor_values(encoder: ed.Gathered | ed.Full, resid: jax.Array) -> jax.Array:
    """The chosen features' values [L,B,K] at residuals [L,B,D]."""
    return jax.vmap(lambda e, x: e.encode(x[:, None])[:, 0])(encoder, resid)


def check_donors(config, prompts: Prompts, resid: jax.Array, site: str) -> None:
    """Refuses donors' residuals that are not [L,B,D], as `collect.run_decision` gives them for as many prompts."""
    expected = (config.n_layers, len(prompts.tokens), config.width(site))
    if jnp.shape(resid) != expected:
        raise ValueError(
            f"resid: expected the donors' [L,B,D] = {list(expected)} at {site}, got shape {list(jnp.shape(resid))}"
        )


def patch_edit(selection: ed.Selection, saes: SAE, resid: jax.Array, spans: dict[str, jax.Array]) -> ed.Edits:
    """Sets the selection to its values at the donor's residuals [L,B,D], where `spans` says: `edits.at_last`."""
    edit = ed.features(saes, selection, gain=0.0, shift=0.0, **spans)
    edit = edit.replace(shift=donor_values(edit.encoder, resid))
    return {saes.config.site_out: (edit.replace(gain=jnp.zeros_like(edit.shift)),)}


def patch_features(
    config, params: Params, prompts: Prompts, saes: SAE, selections: ed.Selection, resid: jax.Array, **options
) -> np.ndarray:
    """log s(a) [S,B,N] of every prompt with each feature set [S,L,K] patched in from donors with residuals [L,B,D].

    `options` as for `sweep`.
    """
    check_donors(config, prompts, resid, saes.config.site)
    spans = ed.at_last(config.n_layers, prompts.tokens.shape[1])
    build = Partial(patch_edit, saes=saes, resid=resid, spans=spans)
    return sweep(config, params, prompts, build, selections, **options).logprobs


def patch_vectors(
    config, params: Params, prompts: Prompts, directions: jax.Array, resid: jax.Array, layers: jax.Array, *,
    site: str = "resid_post", **options,
) -> np.ndarray:  # fmt: skip
    """log s(a) [S,B,N] with the component along unit directions [S,L,D] set to the donor's, at layers [L] bool."""
    check_donors(config, prompts, resid, site)
    spans = ed.at_last(config.n_layers, prompts.tokens.shape[1], layers)
    build = Partial(_project_at(site), resid=resid, spans=spans)
    return sweep(config, params, prompts, build, directions, **options).logprobs


@lru_cache
def _project_at(site: str):
    def build(direction, resid, spans):
        shift = jnp.einsum("lbd,ld->lb", resid, direction, precision=jax.lax.Precision.HIGHEST)
        return {site: (ed.project(direction, shift=shift, **spans),)}

    return build


def patch_parts(
    config, params: Params, prompts: Prompts, saes: SAE, resid: jax.Array, parts: jax.Array, **options
) -> np.ndarray:
    """log s(a) [S,B,N] with parts of the residual taken from the donor, at every layer that has a dictionary.

    Args:
      parts: [S,2], the shares of the whole and of what the dictionary explains; see `edits.PatchParts`.
    """
    check_donors(config, prompts, resid, saes.config.site)
    spans = ed.at_last(config.n_layers, prompts.tokens.shape[1], saes.config.layers)
    build = Partial(_patch_parts, saes=saes, resid=resid, spans=spans)
    return sweep(config, params, prompts, build, parts, **options).logprobs


def _patch_parts(part, saes, resid, spans):
    whole, explained = jnp.broadcast_to(part[:, None], (2, len(resid)))
    return {saes.config.site: (ed.patch_parts(saes, resid, whole=whole, explained=explained, **spans),)}
