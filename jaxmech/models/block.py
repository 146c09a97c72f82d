"""One layer of the decoder, as Flax modules: what is computed, and the sites where edits act and taps read.

`B` denotes the batch, `T` tokens, `D` the residual width, `H` query heads, `G` key/value heads, `h` the head width, `M`
the hidden width of the feed-forward sublayer, `S` keys of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmech.models.config import ModelConfig
from jaxmech.models.rope import apply_rope

SITES = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_normed", "mlp_in", "mlp_out", "resid_post")
"""Where an edit may act and a tap may read, in the order in which a block computes them.

`attn_z` is the input of the attention's output projection, heads flattened `[B,T,H*h]`; `mlp_in` the input of the
feed-forward sublayer, normed where the model norms it, and `mlp_normed` the same before that norm's gain and bias, and
before it is rounded to the model's dtype; `attn_out` and `mlp_out` are what is added to the residual stream, that is,
after post-norms. Where both sublayers read the layer's input (GPT-NeoX), `resid_mid` is still
`resid_pre + attn_out`, and the feed-forward sublayer does not see it.
"""

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
}


def precision(dtype: Any) -> jax.lax.Precision:
    # TPU and TF32 defaults round float32 operands, which is enough to flip the gates of a sparse autoencoder.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


_RUN = 16


def _by_runs(x, kernel):
    """The product of a single token x [1,1,...] with a kernel whose first axes are x's, summed over runs of rows first.

    For a CPU, which copies a layer's kernel out of the stack before it multiplies: that takes longer than the product.
    Sums over few rows are compiled into loops that read the stack itself, on all cores: half the time, measured by
    `scripts/benchmarks/bench_generation.py`. Runs of 8 and of 16 rows are equally fast; of 2 or 32, half as fast.
    """
    ins, out = kernel.shape[: x.ndim - 2], kernel.shape[x.ndim - 2 :]
    run = math.gcd(math.prod(ins), _RUN)
    rows = x.astype(jnp.float32).reshape(-1, run, *(1 for _ in out))
    parts = (rows * kernel.astype(jnp.float32).reshape(-1, run, *out)).sum(1)
    return jax.lax.optimization_barrier(parts).sum(0).astype(x.dtype)[None, None]


def _named(init, axes: tuple[str, ...]) -> Any:
    """An initializer whose parameter keeps its axes' names; Any, because `self.param` returns it unboxed."""
    return nn.with_logical_partitioning(init, axes)


class _Linear(nn.Module):
    """An einsum with a kernel of `shape` whose logical axes are `axes`; the bias spans its last `bias_dims` axes."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_dims: int = 0

    @nn.compact
    def __call__(self, x):
        init, zeros, n = nn.initializers.normal(0.02), nn.initializers.zeros_init(), self.bias_dims
        kernel = self.param("kernel", _named(init, self.axes), self.shape)
        product = partial(jnp.einsum, self.equation, precision=precision(x.dtype))
        if x.shape[0] * x.shape[1] > 1:
            y = product(x, kernel)
        else:
            y = jax.lax.platform_dependent(x, kernel, cpu=_by_runs, default=product)
        if n:
            y += self.param("bias", _named(zeros, self.axes[-n:]), self.shape[-n:])
        return y


class Norm(nn.Module):
    """RMSNorm, x / rms(x) * (offset + scale), or LayerNorm, over the last axes; in float32 whatever x is."""

    config: ModelConfig
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: jax.Array, visit: Callable[[jax.Array], jax.Array] = lambda normed: normed) -> jax.Array:
        """`visit` receives the normed x, before gain and bias, and returns it, edited."""
        c, over, shape = self.config, tuple(range(-len(self.axes), 0)), x.shape[-len(self.axes) :]
        init = _named(nn.initializers.constant(1.0 - c.norm_offset), self.axes)
        scale = c.norm_offset + self.param("scale", init, shape).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        if c.norm == "layer":
            wide = wide - jnp.mean(wide, over, keepdims=True)
        wide = visit(wide * jax.lax.rsqrt(jnp.mean(wide**2, over, keepdims=True) + c.norm_eps)) * scale
        if c.norm == "layer":
            zeros = _named(nn.initializers.zeros_init(), self.axes)
            wide = wide + self.param("bias", zeros, shape).astype(jnp.float32)
        return wide.astype(x.dtype)


_BLOCK = 104
"""Causal attention takes about this many queries at a time, or a quarter of all where there are more than four times as
many, and skips the keys after them. Shorter blocks cost a CPU more than they save."""


def _attend(config: ModelConfig, q, segments, masks, causal: bool, scale=None) -> jax.Array:
    """Grouped attention over several segments of keys, whose arrays are never joined.

    Args:
      q: [B,T,H,h].
      segments: pairs of k, v [B,S,G,h]; the last pair is the call's own tokens.
      masks: for each segment [B,T,S], True where the query may look.
      causal: whether no query looks at own tokens in later slots.
      scale: the layer's own factor on scores besides the model's, if any.

    Returns:
      [B,T,H,h]. A query that may look nowhere (padding) gets the mean of the values, which is never read.
    """
    T = q.shape[1]
    if not causal or T < 2 * _BLOCK:
        return _attend_at_once(config, q, segments, masks, scale)
    (*earlier, (k, v)), (*earlier_masks, mask) = segments, masks
    step = -(-T // min(T // _BLOCK, 4))
    blocks = []
    for start in range(0, T, step):
        queries, stop = slice(start, start + step), min(start + step, T)
        seen = [*earlier, (k[:, :stop], v[:, :stop])]
        looks = [*(m[:, queries] for m in earlier_masks), mask[:, queries, :stop]]
        blocks.append(_attend_at_once(config, q[:, queries], seen, looks, scale))
    return jnp.concatenate(blocks, axis=1)


def _attend_at_once(config: ModelConfig, q, segments, masks, scale) -> jax.Array:
    B, T, H, h = q.shape
    groups = config.n_kv_heads
    product = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    q = q.reshape(B, T, groups, H // groups, h)
    scores = []
    for (k, _), mask in zip(segments, masks, strict=True):
        s = product("btgrh,bsgh->bgrts", q, k)
        s *= config.query_scale  # in float32: in bfloat16 the rounded factor would sharpen or flatten every head
        s = s if scale is None else s * scale
        if config.attn_softcap is not None:
            s = config.attn_softcap * jnp.tanh(s / config.attn_softcap)
        scores.append(jnp.where(mask[:, None, None], s, jnp.finfo(jnp.float32).min))
    top = jax.lax.stop_gradient(jnp.stack([s.max(-1) for s in scores]).max(0))[..., None]
    weights = [jnp.exp(s - top) for s in scores]
    mixed = sum(product("bgrts,bsgh->btgrh", w.astype(q.dtype), v) for w, (_, v) in zip(weights, segments, strict=True))
    total = jnp.moveaxis(sum(w.sum(-1) for w in weights), 3, 1)[..., None]  # [B,T,G,R,1]
    return (mixed / total).astype(q.dtype).reshape(B, T, H, h)


class _Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x, cached, cos_sin, masks, causal, visit, scale=None):
        c = self.config

        def project(name, heads, axis):
            shape, axes = (c.d_model, heads, c.head_dim), ("embed", axis, "head_dim")
            return _Linear("btd,dnh->btnh", shape, axes, 2 * c.attention_bias, name=name)(x)

        q, k, v = project("q", c.n_heads, "heads"), project("k", c.n_kv_heads, "kv"), project("v", c.n_kv_heads, "kv")
        if c.qk_norm is not None:
            normed = [("head_dim",)] * 2 if c.qk_norm == "head" else [("heads", "head_dim"), ("kv", "head_dim")]
            q, k = Norm(c, normed[0], name="q_norm")(q), Norm(c, normed[1], name="k_norm")(k)
        if c.rope is not None:
            q, k = apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)
        z = _attend(c, q, [*cached, (k, v)], masks, causal, scale)
        z = visit("attn_z", z.reshape(*z.shape[:2], -1)).reshape(z.shape)
        shape, axes = (c.n_heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed")
        return _Linear("btnh,nhd->btd", shape, axes, int(c.output_bias), name="o")(z), (k, v)


class _MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c, bias = self.config, int(self.config.mlp_bias)
        up = partial(_Linear, "btd,dm->btm", (c.d_model, c.d_mlp), ("embed", "mlp"), bias)
        act = _ACTIVATIONS[c.activation]
        hidden = act(up(name="gate")(x)) * up(name="up")(x) if c.gated else act(up(name="up")(x))
        return _Linear("btm,md->btd", (c.d_mlp, c.d_model), ("mlp", "embed"), bias, name="down")(hidden)


class Block(nn.Module):
    """One layer. `visit(site, x)` is called at every site and returns x, edited; the caller decides what it does."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: Sequence[tuple[jax.Array, jax.Array]], cos_sin: Any, masks: Sequence[jax.Array],
        causal: bool, visit: Callable[[str, jax.Array], jax.Array], scale: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
        c = self.config

        def norm(name, x, present, visit=lambda normed: normed):
            return Norm(c, name=name)(x, visit) if present else visit(x)

        x = visit("resid_pre", x)
        read = norm("attn_norm", x, c.pre_norms)
        out, kv = _Attention(c, name="attn")(read, cached, cos_sin, masks, causal, visit, scale)
        mid = visit("resid_mid", x + visit("attn_out", norm("attn_post_norm", out, c.post_norms)))
        read = norm("mlp_norm", x if c.parallel else mid, c.pre_norms, partial(visit, "mlp_normed"))
        read = visit("mlp_in", read)
        out = _MLP(c, name="mlp")(read)
        return visit("resid_post", mid + visit("mlp_out", norm("mlp_post_norm", out, c.post_norms))), kv
