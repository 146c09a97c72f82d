"""What is collected from runs: residuals at all tokens or for donors, and feature moments folded layer by layer.

`B` denotes prompts (or pairs), `T` their tokens, `W` their last ones, `P` those of worked examples before them, `L`
layers, `L'` those with a dictionary, `D` the width at the site, `F` features, `K` families, `C` cells.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices, score
from jaxmech.contrast.moments import Moments, Positions, batch_moments, merge_moments
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward
from jaxmech.sae.module import SAE
from jaxmech.sae.totals import feature_totals as feature_totals  # offered here as well

AnyMoments = TypeVar("AnyMoments", Moments, Positions)


class Run(NamedTuple):
    """choices: exact answers; resid [L,B,D] at `site` of the decision token."""

    choices: Choices
    resid: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


@partial(jax.jit, static_argnames=("config", "site"))
def run_decision(config: ModelConfig, params: Params, prompts: Prompts, *, site: str = "resid_post") -> Run:
    """Scores the prompts and keeps `site` at the decision token."""
    choices, x = _last_tokens(config, params, prompts, site, 1)
    return Run(choices, x[:, :, -1])


def _last_tokens(config, params: Params, prompts: Prompts, site: str, W: int) -> tuple[Choices, jax.Array]:
    """Scores the prompts and keeps `site` at their last W tokens [L,B,W,D]."""
    T = prompts.tokens.shape[1]
    choices, out = score(config, params, prompts, taps={"resid": Tap(site, lambda _, x: x[:, T - W : T])})
    return choices, out.taps["resid"]


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
    moments: AnyMoments,
    cell: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> tuple[AnyMoments, Run]:
    """Folds a batch of pairs into the moments: one pass of the model, then one over the dictionaries.

    Args:
      saes: a stack over layers, or one dictionary.
      prompts: 2B prompts, those of plus first, then their twins of minus.
      values: [2B,N] scores for each choice; member: [B,K], 1 where a pair belongs to a family.
      moments: [.., L', ..] over the layers of `saes`; its buffers are reused.
      cell: [B,C], 1 where a pair belongs to a cell, if the moments have cells.
      weight: [2B,W], the weights of the mean over a prompt's last W tokens that `Positions` are about.

    Returns:
      The new moments, and the batch's `Run` of 2B prompts.
    """
    W = 1 if weight is None else weight.shape[1]
    choices, x = _last_tokens(config, params, prompts, saes.config.site, W)
    g = choices.expected(values).reshape(2, -1)
    x_own = x[np.asarray(saes.config.layers)]
    folded = fold_moments(saes, x_own, g=g, member=member, moments=moments, cell=cell, weight=weight)
    return folded, Run(choices, x[:, :, -1])


def fold_moments(
    saes: SAE,
    x: jax.Array,
    *,
    g: jax.Array,
    member: jax.Array,
    moments: AnyMoments,
    cell: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> AnyMoments:
    """Folds another batch of pairs into the moments.

    The co-moments of features and scores need the share given, known only after the model's own scan over
    layers. The residuals at the last tokens are few and kept anyway, so the dictionaries have a scan of their own:
    codes exist for one layer at a time, and nothing is spent on layers without a dictionary.

    Args:
      x: [L',2B,W,D] at the last tokens, those of plus first; g: [2,B] scores; member, cell, weight: as above.
    """
    saes = saes.as_stack()
    old = moments if isinstance(moments, Positions) else (moments,)

    def layer(carry, inputs):
        row, sae, x = inputs
        codes = [sae.encode(x[:, -1])]
        if weight is not None:
            codes.append(_mean_code(sae, x, weight))
        new = []
        for kept, part, z in zip(old, carry, codes, strict=True):
            # Every layer reads the shared n, mean_g and m2_g as they were before the batch: all give the same result.
            so_far = {f: v if f in _SHARED else _layer(v, row) for f, v in (kept._asdict() | part).items()}
            batch = batch_moments(z.reshape(2, 1, -1, sae.config.d_sae), g, member, cell)
            new.append(merge_moments(Moments(**so_far), batch)._asdict())
        # In the carry, not stacked: a loop updates its carry in place, and the donated buffers are that carry.
        carry = [
            {f: jax.lax.dynamic_update_slice_in_dim(v, folded[f], row, v.ndim - 3) for f, v in part.items()}
            for part, folded in zip(carry, new, strict=True)
        ]
        return carry, [{f: folded[f] for f in _SHARED} for folded in new]

    start = [{f: v for f, v in kept._asdict().items() if f not in _SHARED} for kept in old]
    parts, shared = jax.lax.scan(layer, start, (jnp.arange(len(x)), saes, x))
    folded = [Moments(**part, **{f: v[-1] for f, v in last.items()}) for part, last in zip(parts, shared, strict=True)]
    return Positions(*folded) if isinstance(moments, Positions) else folded[0]


def _mean_code(sae: SAE, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted means [2B,F] of the codes of x [2B,W,D], a token at a time."""

    def add(total, inputs):
        x, weight = inputs
        weight = weight[:, None]
        return total + jnp.where(weight > 0, weight * sae.encode(x), 0.0), None

    empty = jnp.zeros((len(x), sae.config.d_sae), jnp.float32)
    return jax.lax.scan(add, empty, (jnp.swapaxes(x, 0, 1), weight.T))[0]


_SHARED = ("n", "mean_g", "m2_g")


def _layer(v: jax.Array, row: jax.Array) -> jax.Array:
    """One layer of moments [..,L',K,F], its axis kept."""
    return jax.lax.dynamic_slice_in_dim(v, row, 1, v.ndim - 3)
