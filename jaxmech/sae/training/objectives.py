"""What each kind of dictionary minimises: one pure function per kind, for one layer's batch.

`B` denotes the batch, `D` the width at the site, `F` dictionary features.

x [B,D] is centred and scaled to a mean square of 1 over its entries, so that the mean square of the error is the
papers' |x - y|^2 for activations whose mean squared norm is 1. Lengths (an L1 norm, a bandwidth) are divided by
sqrt(D) for the same reason. Parameters are in float32; products run in `config.compute_dtype` and add up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmech.sae.module import matmul
from jaxmech.sae.topk import largest
from jaxmech.sae.training import sparse
from jaxmech.sae.training.config import SAETrainConfig, largest_k

Params = Mapping[str, jax.Array]
"""E [F,D] the encoder in rows, W_dec [F,D], b_dec [D]; b_enc [F], in place of which a gated dictionary has b_gate,
b_mag and r_mag [F]; a JumpReLU one has log_threshold [F] too."""


class Terms(NamedTuple):
    """loss: what is minimised, a scalar; error: x - y, [B,D]; and of the code: which features fired, [F], how many
    entries are active, and the smallest of them (inf if there is none)."""

    loss: jax.Array | float
    error: jax.Array
    fired: jax.Array
    active: jax.Array
    smallest: jax.Array


def _terms(loss: jax.Array | float, error: jax.Array, code: jax.Array) -> Terms:
    """For a code [B,F]."""
    fires = code > 0
    return Terms(loss, error, fires.any(0), fires.sum(dtype=jnp.int32), jnp.min(jnp.where(fires, code, jnp.inf)))


@jax.custom_vjp
def _half_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [M,K] @ b [K,N] in bfloat16, summed in float32, in the forward and the backward pass."""

    def rounded(a, b):  # XLA has no kernel for some of these products on a CPU; this gives the same numbers
        return matmul(*(jax.lax.reduce_precision(m, exponent_bits=8, mantissa_bits=7) for m in (a, b)))

    def half(a, b):
        return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=rounded, default=half)


def _half_backward(operands, g):
    a, b = operands
    return _half_matmul(g, b.T), _half_matmul(a.T, g)


_half_matmul.defvjp(lambda a, b: (_half_matmul(a, b), (a, b)), _half_backward)


def product(config: SAETrainConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Matrix product of two float32 matrices, as `config.compute_dtype` says."""
    return _half_matmul if config.compute_dtype == "bfloat16" else matmul


def encode(config: SAETrainConfig, p: Params, x: jax.Array) -> jax.Array:
    """Pre-activations [B,F]; a gated dictionary's without a bias."""
    return product(config)(x, p["E"].T) + shift(p)


def shift(p: Params) -> jax.Array:
    """What is added to the product of x with the encoder, [F].

    With x - b_dec in the product itself, the gradient of b_dec would take another product of B*D*F terms.
    """
    return p.get("b_enc", 0.0) - matmul(p["E"], p["b_dec"])


def decode(config: SAETrainConfig, p: Params, code: jax.Array) -> jax.Array:
    """The reconstruction [B,D]."""
    return product(config)(code, p["W_dec"]) + p["b_dec"]


def kept(config: SAETrainConfig, pre: jax.Array, k: jax.Array, guess: jax.Array | float = 1.0) -> jax.Array:
    """Which pre-activations [B,F] a selecting kind keeps: the k largest of each token, or the k*B largest of the batch.

    `guess`, a value near the smallest one kept, affects speed only.
    """
    if config.kind == "topk":
        # k is traced, so that one program serves several: as many are sorted as any lane needs.
        sorted_ = jax.lax.top_k(pre, largest_k(config))[0]
        lowest = jnp.take(sorted_, jnp.round(k).astype(jnp.int32) - 1, axis=-1)[:, None]
        return (pre >= lowest) & (pre > 0)
    return largest(pre, jnp.round(k * pre.shape[0]).astype(jnp.int32), guess)


def selecting(config: SAETrainConfig, p: Params, x: jax.Array, k: jax.Array, guess: jax.Array) -> Terms:
    """TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): |x - y|^2."""
    pre = encode(config, p, x)
    code = jnp.where(kept(config, jax.lax.stop_gradient(pre), k, guess), pre, 0.0)
    error = x - decode(config, p, code)
    return _terms(jnp.mean(error**2), error, code)


def sparsely(config: SAETrainConfig, p: Params, x: jax.Array, k: jax.Array, guess: jax.Array) -> Terms:
    """`selecting`, with products over the kept entries alone."""
    y, *code = sparse.reconstruct(config.kind, largest_k(config), p["E"], shift(p), p["W_dec"], x, k, guess)
    error = x - y - p["b_dec"]
    return Terms(jnp.mean(error**2), error, *code)


def matryoshka(config: SAETrainConfig, p: Params, x: jax.Array, k: jax.Array, guess: jax.Array) -> Terms:
    """BatchTopK whose first m features reconstruct x on their own, for every m of `config.widths`.

    Bussmann et al. 2025, arXiv 2503.17547: the sum of |x - y_m|^2 over m, features chosen once among all.
    """
    pre = encode(config, p, x)
    code = jnp.where(kept(config, jax.lax.stop_gradient(pre), k, guess), pre, 0.0)
    loss: jax.Array | float = 0.0
    error, start = x - p["b_dec"], 0
    for width in config.widths:
        error -= product(config)(code[:, start:width], p["W_dec"][start:width])
        loss, start = loss + jnp.mean(error**2), width
    return _terms(loss, error, code)


def jumprelu(config: SAETrainConfig, p: Params, x: jax.Array, coefficient: jax.Array, _) -> Terms:
    """|x - y|^2 + coefficient * L0, with thresholds learnt by straight-through estimates.

    Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435.
    """
    pre, threshold = encode(config, p, x), jnp.exp(p["log_threshold"])
    bandwidth = config.bandwidth * x.shape[-1] ** 0.5
    code = jump(pre, threshold, bandwidth)
    error = x - decode(config, p, code)
    l0 = jnp.sum(step(pre, threshold, bandwidth), axis=-1)
    return _terms(jnp.mean(error**2) + coefficient * jnp.mean(l0), error, code)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1 where pre [B,F] > threshold [F], else 0. Gradient by equation 12 of the paper: that of the threshold alone,
    -K((pre - threshold) / bandwidth) / bandwidth, with K the rectangle of width and area 1."""
    return (pre > threshold).astype(pre.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(pre: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """pre where it exceeds the threshold, else 0. Gradient by equation 11 of the paper: to pre where it passes, to the
    threshold -threshold * K((pre - threshold) / bandwidth) / bandwidth."""
    return jnp.where(pre > threshold, pre, 0.0)


def _near(pre, threshold, bandwidth):
    return jnp.abs(pre - threshold) < bandwidth / 2


def _step_backward(bandwidth, operands, g):
    pre, threshold = operands
    slope = jnp.sum(jnp.where(_near(pre, threshold, bandwidth), g, 0.0), axis=0)
    return jnp.zeros_like(pre), -slope / bandwidth


def _jump_backward(bandwidth, operands, g):
    pre, threshold = operands
    slope = jnp.sum(jnp.where(_near(pre, threshold, bandwidth), g, 0.0), axis=0)
    return jnp.where(pre > threshold, g, 0.0), -slope * threshold / bandwidth


step.defvjp(lambda pre, threshold, b: (step(pre, threshold, b), (pre, threshold)), _step_backward)
jump.defvjp(lambda pre, threshold, b: (jump(pre, threshold, b), (pre, threshold)), _jump_backward)


def gated(config: SAETrainConfig, p: Params, x: jax.Array, coefficient: jax.Array, _) -> Terms:
    """|x - y|^2 + coefficient * |relu(gate)|_1 + |x - y'|^2, where y' decodes relu(gate) with a frozen decoder.

    Rajamanoharan et al. 2024, arXiv 2404.16014. A feature's gate opens above 0 and its magnitude shares the gate's
    direction, exp(r_mag) times as long.
    """
    raw = encode(config, p, x)
    gate = raw + p["b_gate"]
    code = jnp.where(gate > 0, jax.nn.relu(raw * jnp.exp(p["r_mag"]) + p["b_mag"]), 0.0)
    error = x - decode(config, p, code)
    opened, frozen = jax.nn.relu(gate), {**p, **jax.lax.stop_gradient({n: p[n] for n in ("W_dec", "b_dec")})}
    by_gate = x - decode(config, frozen, opened)
    penalty = jnp.mean(jnp.sum(opened, axis=-1)) / x.shape[-1] ** 0.5
    return _terms(jnp.mean(error**2) + coefficient * penalty + jnp.mean(by_gate**2), error, code)


def standard(config: SAETrainConfig, p: Params, x: jax.Array, coefficient: jax.Array, _) -> Terms:
    """|x - y|^2 + coefficient * sum_j f_j |W_dec_j|, with decoder rows of any length.

    Conerly et al. 2024, "Update on how we train SAEs", transformer-circuits.pub/2024/april-update.
    """
    code = jax.nn.relu(encode(config, p, x))
    error = x - decode(config, p, code)
    lengths = jnp.linalg.norm(p["W_dec"], axis=-1)
    penalty = jnp.mean(jnp.sum(code * lengths, axis=-1)) / x.shape[-1] ** 0.5
    return _terms(jnp.mean(error**2) + coefficient * penalty, error, code)


OBJECTIVES: Mapping[str, Callable[..., Terms]] = {
    "topk": selecting,
    "batchtopk": selecting,
    "matryoshka": matryoshka,
    "jumprelu": jumprelu,
    "gated": gated,
    "standard": standard,
}


def revival(
    config: SAETrainConfig, p: Params, x: jax.Array, error: jax.Array, helpers: jax.Array, dead: jax.Array
) -> jax.Array:
    """AuxK (Gao et al. 2024): how badly dead features reconstruct what the others left over, as a share of it.

    Where a ReLU silences features (gated, standard), even their largest pre-activation is negative and has no gradient:
    they are taken relative to the batch's mean.

    Args:
      error: [B,D]; helpers: [n] features; dead: [n] which of them count.
    """
    chosen = {"E": p["E"][helpers], "W_dec": p["W_dec"][helpers], "bias": p[bias_name(config)][helpers]}
    left = jax.lax.stop_gradient(error)
    # A pool of fixed size keeps AuxK a small product of fixed shape, however many features are dead.
    pre = product(config)(jax.lax.stop_gradient(x - p["b_dec"]), chosen["E"].T) + chosen["bias"]
    if config.kind in ("gated", "standard"):
        pre -= jax.lax.stop_gradient(jnp.mean(pre, axis=0))
    y = product(config)(jax.nn.relu(pre) * dead, chosen["W_dec"])
    aux = jnp.mean((left - y) ** 2) / (jnp.mean(left**2) + 1e-8)
    return jnp.where(dead.any(), aux, 0.0)


def bias_name(config: SAETrainConfig) -> str:
    """The bias by which a feature becomes active."""
    return "b_gate" if config.kind == "gated" else "b_enc"
