"""What is collected from runs: residuals at all tokens or for donors, and feature moments folded layer by layer.

`B` denotes prompts (or pairs), `T` their tokens, `P` those of worked examples before them, `L` layers, `L'` those with
a dictionary, `D` the width at the site, `F` features, `K` families.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices, score
from jaxmech.contrast.moments import Moments, batch_moments, merge_moments
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward
from jaxmech.sae.module import SAE
from jaxmech.sae.totals import feature_totals as feature_totals  # offered here as well


class Run(NamedTuple):
    """choices: exact answers; resid [L,B,D] at `site` of the decision token."""

    choices: Choices
    resid: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


@partial(jax.jit, static_argnames=("config", "site"))
def run_decision(config: ModelConfig, params: Params, prompts: Prompts, *, site: str = "resid_post") -> Run:
    """Scores the prompts and keeps `site` at the decision token."""
    slot = prompts.tokens.shape[1] - 1
    choices, out = score(config, params, prompts, taps={"resid": Tap(site, partial(_at_slot, slot))})
    return Run(choices, out.taps["resid"])


def _at_slot(slot: int, _, x):
    return x[:, slot]


@partial(jax.jit, static_argnames=("config", "site"))
def residuals(config: ModelConfig, params: Params, prompts: Prompts, *, site: str = "resid_post") -> jax.Array:
    """`site` of every layer at every prompt token [L,B,T,D], answers excluded.

    Worked examples that prompts share (`Prompts.prefix`) are run once for all of them, and come first:
    [L,B,P+T,D], as in `residual_gradient`. Values at padding are arbitrary.
    """
    early, own = _read(config, params, prompts, site)
    if early is None or prompts.prefix is None:
        return own
    return jnp.concatenate([early[:, prompts.prefix.rows], own], axis=2)


@partial(jax.jit, static_argnames=("config", "site"))
def distinct_residuals(
    config: ModelConfig, params: Params, prompts: Prompts, *, site: str = "resid_post"
) -> tuple[jax.Array, jax.Array]:
    """`site` of every layer, with the tokens of worked examples that prompts share only once.

    Returns:
      [L,n,D], the prefixes' tokens and then the prompts' own; and count [n] int32, in how many prompts each occurs, 0
      for padding (which `x[:, count > 0]` drops, outside of jit). As `feature_totals` takes them.
    """
    early, own = _read(config, params, prompts, site)
    parts = [(own, prompts.mask.astype(jnp.int32))]
    if early is not None and prompts.prefix is not None:
        followers = jnp.bincount(prompts.prefix.rows, length=early.shape[1])
        parts.insert(0, (early, prompts.prefix.mask * followers[:, None]))
    x = jnp.concatenate([a.reshape(len(a), -1, a.shape[-1]) for a, _ in parts], axis=1)
    return x, jnp.concatenate([count.reshape(-1) for _, count in parts])


def _read(config, params: Params, prompts: Prompts, site: str) -> tuple[jax.Array | None, jax.Array]:
    """`site` at the tokens of the prefixes [L,G,P,D], None without any, and at the prompts' own tokens [L,B,T,D]."""
    run = partial(forward, config, params, taps=(site,), logits="none")
    if (prefix := prompts.prefix) is None:
        return None, run(prompts.tokens, mask=prompts.mask, cache=prompts.cache).taps[site]
    early = run(prefix.tokens, mask=prefix.mask, return_cache=True)
    assert early.cache is not None
    cache = (early.cache._replace(rows=prefix.rows),)
    return early.taps[site], run(prompts.tokens, mask=prompts.mask, cache=cache).taps[site]


@partial(jax.jit, static_argnames=("config",), donate_argnames=("moments",))
def update_moments(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    *,
    saes: SAE,
    values: jax.Array,
    member: jax.Array,
    moments: Moments,
) -> tuple[Moments, Run]:
    """Folds a batch of pairs into the moments: one pass of the model, then one over the dictionaries.

    Args:
      saes: a stack over layers, or one dictionary.
      prompts: 2B prompts, those of plus first, then their twins of minus.
      values: [2B,N] scores for each choice; member: [B,K], 1 where a pair belongs to a family.
      moments: [.., L', ..] over the layers of `saes`; its buffers are reused.

    Returns:
      The new moments, and the batch's `Run` of 2B prompts.
    """
    run = run_decision(config, params, prompts, site=saes.config.site)
    x = run.resid[np.asarray(saes.config.layers)]
    return fold_moments(saes, x, g=run.choices.expected(values).reshape(2, -1), member=member, moments=moments), run


def fold_moments(saes: SAE, x: jax.Array, *, g: jax.Array, member: jax.Array, moments: Moments) -> Moments:
    """Folds another batch of pairs into the moments.

    The co-moments of features and scores need the share given, known only after the model's own scan over
    layers. The residuals at the decision token are few and kept anyway, so the dictionaries have a scan of their own:
    codes exist for one layer at a time, and nothing is spent on layers without a dictionary.

    Args:
      x: [L',2B,D] at the decision token, those of plus first; g: [2,B] scores; member: [B,K].
    """
    saes = saes.as_stack()

    def layer(carry, inputs):
        row, sae, x = inputs
        z = sae.encode(x).reshape(2, 1, -1, sae.config.d_sae)
        # Every layer reads the shared n, mean_g and m2_g as they were before the batch, so all give the same result.
        old = {f: v if f in _SHARED else _layer(v, row) for f, v in (moments._asdict() | carry).items()}
        new = merge_moments(Moments(**old), batch_moments(z, g, member))._asdict()
        # In the carry, not stacked: a loop updates its carry in place, and the donated buffers are that carry.
        carry = {f: jax.lax.dynamic_update_slice_in_dim(v, new[f], row, v.ndim - 3) for f, v in carry.items()}
        return carry, {f: new[f] for f in _SHARED}

    carry = {f: v for f, v in moments._asdict().items() if f not in _SHARED}
    folded, shared = jax.lax.scan(layer, carry, (jnp.arange(len(x)), saes, x))
    return Moments(**folded, **{f: v[-1] for f, v in shared.items()})


_SHARED = ("n", "mean_g", "m2_g")


def _layer(v: jax.Array, row: jax.Array) -> jax.Array:
    """One layer of moments [..,L',K,F], its axis kept."""
    return jax.lax.dynamic_slice_in_dim(v, row, 1, v.ndim - 3)
