"""Attribution: what each feature of each layer would do to the expected amount, from one backward pass (per step).

`B` denotes prompts, `L` layers, `L'` those that have a dictionary, `T` prompt tokens, `P` tokens of worked examples
before them, `D` the residual width, `F` features.

To first order, moving a feature by dz moves the outcome m by dz * <dm/dx, D_j>, with the gradient taken at the
unedited run (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). Gradients with respect to a zero vector added at the
decision token of every layer give all of them at once. Integrated gradients (Sundararajan et al. 2017) use the mean
gradient along the path from the base's features to the donor's instead (Marks et al. 2024, arXiv 2403.19647; Hanna
et al. 2024, arXiv 2403.17806).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmech.answers.prompts import Prefix, Prompts
from jaxmech.answers.score import before_last, score
from jaxmech.interventions.edits import Add, Edit, Edits, Spans, at_last
from jaxmech.io.progress import progress
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import KV, Params, forward
from jaxmech.sae.module import SAE, matmul, normalise


@struct.dataclass
class _Nudge(Edit):
    """x + vector, one for each prompt token: what gradients at all positions are taken with respect to [L,B,T,D]."""

    vector: jax.Array
    BY_ROW = BY_TOKEN = ("vector",)

    def change(self, x):
        return self.vector


@struct.dataclass
class _Hold(Edit):
    """x takes the value `target` where `held`, yet gradients pass as if only `vector` were added; both [L,B,D]."""

    vector: jax.Array
    target: jax.Array
    held: jax.Array
    BY_ROW = ("vector", "target", "held")

    def change(self, x):
        jump = jnp.where(self.held, self.target[:, None] - x, 0.0)
        return self.vector[:, None] + jax.lax.stop_gradient(jump)


def residual_gradient(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    values: jax.Array,
    *,
    site: str = "resid_post",
    everywhere: bool = False,
    remat: bool = False,
    chunk: int = 4,
) -> jax.Array:
    """The gradient of each prompt's expected value with respect to `site` of every layer.

    Worked examples that prompts share (`Prompts.prefix`) are run forward once for all of them; only the
    backward pass is per prompt.

    Args:
      values: [N] or [B,N], what each choice is worth.
      everywhere: at every prompt token instead of the decision token alone. Tokens in a cache are constants.
      remat: whether to recompute each layer in the backward pass, for models whose activations do not fit.
      chunk: with `everywhere`, prefixes in one call of the program, and the prompts that follow them; prefixes of
        similar length go together.

    Returns:
      [L,B,D], or with `everywhere` [L,B,T,D], float32. Where there is a prefix it is [L,B,P+T,D], the prefix's tokens
      first; padding has zeros.

    Raises:
      ValueError: a `chunk` below one, values of another number of prompts.
    """
    if jnp.ndim(values) == 2 and len(values) != len(prompts.tokens):
        raise ValueError(f"values: expected [N] or [B,N] for {len(prompts.tokens)} prompts, got {list(values.shape)}")
    if not everywhere:
        return decision_gradient(config, params, prompts, values, site=site, remat=remat)
    if prompts.prefix is None:
        return _own_gradients(config, params, prompts, values, site, remat)[0]
    if chunk < 1:
        raise ValueError(f"chunk: expected at least one prefix at a time, got {chunk}")
    tokens, mask, rows = (np.asarray(a) for a in prompts.prefix)
    read = np.unique(rows)
    followers = [np.flatnonzero(rows == g) for g in read]
    by_length, turns = np.argsort(mask[read].sum(1), kind="stable"), max(map(len, followers))
    pieces, kept = [], []
    with progress("gradients", len(read), unit="prefixes") as advance:
        for start in range(0, len(read), chunk):
            # [G] prefixes, and the i-th prompt after each [turns,G]; both are padded by repetition, so that all chunks
            # share a program, or a few of different lengths.
            group = np.resize(by_length[start : start + chunk], min(chunk, len(read)))
            following = np.stack([np.resize(followers[g], turns) for g in group], axis=1).ravel()
            padding = mask[read[group]].any(0).argmax() // _BUCKET * _BUCKET
            early, real = (jnp.asarray(a[read[group], padding:]) for a in (tokens, mask))
            prefix = Prefix(early, real, jnp.asarray(np.tile(np.arange(len(group)), turns)))
            part = prompts.of(following)._replace(prefix=prefix)
            worth = values if jnp.ndim(values) == 1 else values[following]
            pieces.append(_shared_gradients(config, params, part, worth, site, remat))
            kept.append(following)
            advance(len(by_length[start : start + chunk]))
    order = np.unique(np.concatenate(kept), return_index=True)[1]
    return _put_together(tuple(pieces), order, mask.shape[1] + prompts.tokens.shape[1])


_BUCKET = 32
"""Tokens. Padding is cut off prefixes in multiples of this."""


@partial(jax.jit, static_argnums=2)
def _put_together(pieces: tuple[jax.Array, ...], order: jax.Array, length: int) -> jax.Array:
    """Pieces [L,.,.,D] side by side, padded with zeros on the left to `length` tokens, prompts in `order`."""
    longer = [jnp.pad(a, ((0, 0), (0, 0), (length - a.shape[2], 0), (0, 0))) for a in pieces]
    return jnp.concatenate(longer, axis=1)[:, order]


@partial(jax.jit, static_argnums=0, static_argnames=("site", "remat"))
def decision_gradient(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    values: jax.Array,
    *,
    site: str = "resid_post",
    remat: bool = False,
) -> jax.Array:
    """`residual_gradient` at the decision token [L,B,D], jitted. No gradient passes through the tokens before it."""
    prompts = before_last(config, params, prompts)
    spans = at_last(config.n_layers, 1)

    def outcome(vector):
        edits: Edits = {site: (Add(vector=vector, spans=spans),)}
        return score(config, params, prompts, edits=edits, remat=remat)[0].expected(values).sum()

    return jax.grad(outcome)(jnp.zeros((config.n_layers, len(prompts.tokens), config.width(site)), jnp.float32))


@partial(jax.jit, static_argnums=(0, 4, 5))
def _own_gradients(config, params, prompts, values, site, remat):
    """Gradients [L,B,T,D] at the prompts' own tokens, and with respect to the keys and values of each cache."""
    zeros = jnp.zeros((config.n_layers, *prompts.tokens.shape, config.width(site)), jnp.float32)

    def outcome(vector, cached):
        cache = tuple(s._replace(k=k, v=v) for s, (k, v) in zip(prompts.cache, cached, strict=True))
        choices, _ = score(config, params, prompts._replace(cache=cache), edits={site: (_nudge(vector),)}, remat=remat)
        return choices.expected(values).sum()

    return jax.grad(outcome, argnums=(0, 1))(zeros, [(s.k, s.v) for s in prompts.cache])


@partial(jax.jit, static_argnums=(0, 4, 5))
def _shared_gradients(config, params, prompts, values, site, remat):
    """Gradients [L,B,P+T,D] of prompts that follow the prefixes in turns, one prompt per prefix and turn."""
    prefix = prompts.prefix

    def examples(vector):
        out = forward(
            config, params, prefix.tokens, mask=prefix.mask, edits={site: (_nudge(vector),)}, logits="none",
            return_cache=True, remat=remat, ends_apart=True,
        )  # fmt: skip
        assert out.cache is not None
        return (out.cache.k, out.cache.v), out.cache

    zeros = jnp.zeros((config.n_layers, *prefix.tokens.shape, config.width(site)), jnp.float32)
    (k, v), pullback, cache = jax.vjp(examples, zeros, has_aux=True)
    rows = prefix.rows
    separate = KV(k[:, rows], v[:, rows], cache.positions[rows], cache.mask[rows])  # a prompt's gradient is its own
    own, [cotangents] = _own_gradients(
        config, params, prompts._replace(prefix=None, cache=(separate,)), values, site, remat
    )
    # One backward pass through the shared forward pass per turn of prompts.
    turn = (-1, len(prefix.tokens))
    by_turn = tuple(jnp.moveaxis(c.reshape(len(c), *turn, *c.shape[2:]), 1, 0) for c in cotangents)
    (early,) = jax.vmap(pullback)(by_turn)  # [turns,L,G,P,D]
    early = jnp.moveaxis(early, 0, 1)
    return jnp.concatenate([early.reshape(len(early), -1, *early.shape[3:]), own], axis=2)


def _nudge(vector: jax.Array) -> _Nudge:
    L = len(vector)
    return _Nudge(vector=vector, spans=Spans(None, jnp.ones((L, 1, 1), bool), jnp.zeros((L, 1), bool)))


@partial(jax.jit, static_argnames="by_prompt")
def attribute(
    saes: SAE, gradient: jax.Array, *, base: jax.Array, donor: jax.Array | None = None, by_prompt: bool = False
) -> jax.Array:
    """First-order effect of setting each feature of `saes` to its donor's value, [L',F]: the mean over prompts.

    Args:
      gradient, base, donor: [L',B,D] over the layers of `saes`, at the decision token. Without a donor, features go
        from zero to their values in the base.
      by_prompt: [L',B,F] instead.
    """

    _check_shapes(saes, gradient=gradient, base=base, donor=donor)

    def layer(_, inputs):
        sae, slope, base, donor = inputs
        effect = _change(sae, base, donor) * matmul(slope * _scale(sae, base), sae.params["W_dec"].T)
        return None, effect if by_prompt else effect.mean(0)

    return jax.lax.scan(layer, None, (saes.as_stack(), gradient, base, donor))[1]


@partial(jax.jit, static_argnums=0, static_argnames="remat")
def path_gradient(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    values: jax.Array,
    *,
    saes: SAE,
    base: jax.Array,
    donor: jax.Array | None,
    points: jax.Array,
    remat: bool = False,
) -> jax.Array:
    """The mean gradient [L',B,D] along the path of all features, one backward pass per point for all layers at once.

    At a point a in [0, 1] every layer of `saes` is at a on its own path at the decision token: each feature is
    z + a * (z_donor - z), with the dictionary's error kept; without a donor the path leads from no features to the
    base's. Each layer's gradient is its total effect downstream, taken at that point (all layers move at once, as in
    EAP-IG; Marks et al. move one layer at a time). With a dictionary at one layer only, its features' attributions sum
    to the change of the outcome along the path, up to the error of the integral; those of several layers each
    include what they pass on to one another.

    Args:
      base, donor: [L',B,D], as for `attribute`, which turns the result into integrated gradients.
      points: [n], such as `midpoints(n)`; [0.] gives the gradient of plain attribution.
    """
    _check_shapes(saes, base=base, donor=donor)
    prompts = before_last(config, params, prompts)
    stack, layers, site = saes.as_stack(), jnp.asarray(saes.config.layers), saes.config.site
    points = jnp.asarray(points, jnp.float32)

    def spread(a):
        return jnp.zeros((config.n_layers, *a.shape[1:]), a.dtype).at[layers].set(a)

    def displacement(_, inputs):
        sae, base, donor = inputs
        return None, matmul(_change(sae, base, donor), sae.params["W_dec"]) * _scale(sae, base)

    _, path = jax.lax.scan(displacement, None, (stack, base, donor))
    held = spread(jnp.ones((len(stack.config.layers), 1, 1, 1), bool))
    zeros = jnp.zeros((config.n_layers, len(prompts.tokens), base.shape[-1]), jnp.float32)

    def gradient(total, point):
        target = spread(base + (point if donor is not None else point - 1.0) * path)

        def outcome(vector):
            edit = _Hold(vector=vector, target=target, held=held, spans=at_last(config.n_layers, 1))
            return score(config, params, prompts, edits={site: (edit,)}, remat=remat)[0].expected(values).sum()

        return total + jax.grad(outcome)(zeros)[layers], None

    return jax.lax.scan(gradient, jnp.zeros_like(base), points)[0] / len(points)


def midpoints(n: int) -> jax.Array:
    """The points at which the integral over a path is taken: the midpoints of n equal steps."""
    return (jnp.arange(n, dtype=jnp.float32) + 0.5) / n


def _check_shapes(saes: SAE, **arrays: jax.Array | None) -> None:
    """Refuses arrays that are not [L',B,D] over the layers of `saes`, or not all of the same prompts."""
    L, D = len(saes.config.layers), saes.config.d_in
    shapes = {name: a.shape for name, a in arrays.items() if a is not None}
    if len(set(shapes.values())) > 1 or any(len(s) != 3 or (s[0], s[2]) != (L, D) for s in shapes.values()):
        raise ValueError(
            f"{', '.join(shapes)}: expected [L',B,D] of the same prompts, with D = {D} and L' = {L}, layers "
            f"{', '.join(map(str, saes.config.layers))}, got {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}"
        )


def _change(sae: SAE, base: jax.Array, donor: jax.Array | None) -> jax.Array:
    z = sae.encode(base)
    return z if donor is None else sae.encode(donor) - z


def _scale(sae: SAE, x: jax.Array) -> jax.Array | float:
    """What a decoder's row is worth in x, where a dictionary normalises each token."""
    _, scale, _ = normalise(sae.config.normalize, x)
    return 1.0 if scale is None else scale
