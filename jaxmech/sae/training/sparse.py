"""TopK and BatchTopK on a CPU: encoding and decoding in one, with products over the kept entries alone.

`B` denotes a batch of activations, `D` the width at the site, `F` dictionary features, `C` slots for kept entries.

A training step has five products of B*D*F terms. Where k of F features are kept, decoding and the gradients of both
weights need k / F of theirs; only the pre-activations and the code's gradient stay dense. Plain XLA gains nothing from
that on a CPU, where gathering a row costs what multiplying it does, but the kernel behind
`jax.experimental.sparse.BCSR` there is some 20 times as fast as the dense product. It does not support vmap: lanes go
through `jax.lax.map`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from jaxmech.sae.module import matmul
from jaxmech.sae.topk import cut

SLACK = 1.5
"""Slots, as a multiple of the entries that BatchTopK keeps: a rough cut leaves candidates, the exact one chooses."""
_WORD = 32


class Entries(NamedTuple):
    """Positions in a matrix [B,F] in row order: the j-th is (row[j], col[j]), and those of row r end before ends[r+1].

    row, col: [C] int32, (B, 0) in slots without an entry. ends: [B+1] int32, from 0. low: scalar or [B,1], what a
    pre-activation must reach to be kept; entries that do not are kept with a value of 0.
    """

    row: jax.Array
    col: jax.Array
    ends: jax.Array
    low: jax.Array


def fits(B: int, F: int) -> bool:
    """Whether `reconstruct` can index a batch of this size."""
    return F % _WORD == 0 and F * B < 2**31


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def reconstruct(
    kind: str,
    k_max: float,
    E: jax.Array,
    bias: jax.Array,
    W_dec: jax.Array,
    x: jax.Array,
    k: jax.Array,
    guess: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The product of the code with the decoder, and statistics of the code.

    Args:
      kind: "topk" keeps the k largest of each token, "batchtopk" the k*B largest of the batch; positive ones only.
      k_max: no less than k, which is traced.
      E, W_dec: [F,D]; bias: [F]; x: [B,D], which is not differentiated.
      guess: a value near the smallest one kept; affects speed only.

    Returns:
      y [B,D]; which features fired, [F]; how many entries are kept; the smallest of them (inf if there is none).
    """
    return _forward(kind, k_max, E, bias, W_dec, x, k, guess)[0]


def _forward(kind, k_max, E, bias, W_dec, x, k, guess):
    pre = matmul(x, E.T) + bias
    entries = of_rows(pre, k, int(k_max)) if kind == "topk" else of_batch(pre, k, k_max, guess)
    values = _values(pre, entries)
    fired = jnp.zeros(len(E), bool).at[jnp.where(values > 0, entries.col, len(E))].set(True, mode="drop")
    smallest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    y = _product(values, entries.col, entries.ends, W_dec)
    return (y, fired, jnp.sum(values > 0, dtype=jnp.int32), smallest), (pre, entries, W_dec, x)


def _backward(kind, k_max, saved, gradients):
    (pre, entries, W_dec, x), g = saved, gradients[0]
    (B, F), g_code = pre.shape, matmul(g, W_dec.T)
    # In order of features. Sorting integers is several times faster than a sort that carries the values along.
    order = jnp.sort(jnp.where(entries.row < B, entries.col * B + entries.row, F * B))
    entries = entries._replace(row=jnp.where(order < F * B, order % B, B), col=order // B)
    ends = jnp.searchsorted(order, jnp.arange(F + 1, dtype=jnp.int32) * B).astype(jnp.int32)
    values = _values(pre, entries)
    g_pre = jnp.where(values > 0, g_code.at[entries.row, entries.col].get(mode="clip"), 0.0)
    g_bias = jax.ops.segment_sum(g_pre, entries.col, F, indices_are_sorted=True)
    g_E, g_W = _product(g_pre, entries.row, ends, x), _product(values, entries.row, ends, g)
    return g_E, g_bias, g_W, None, None, None


reconstruct.defvjp(_forward, _backward)


def of_rows(pre: jax.Array, k: jax.Array, k_max: int) -> Entries:
    """The k largest of each row, k <= k_max."""
    low = jnp.take(jax.lax.top_k(pre, k_max)[0], jnp.round(k).astype(jnp.int32) - 1, axis=1)[:, None]
    return _places((pre >= low) & (pre > 0), (k_max + 1) * len(pre), low)


def of_batch(pre: jax.Array, k: jax.Array, k_max: float, guess: jax.Array) -> Entries:
    """The k*B largest of the batch, k <= k_max."""
    n, slots = jnp.round(k * len(pre)).astype(jnp.int32), int(SLACK * k_max * len(pre))
    low, high = cut(pre, n, slots, 0.97 * guess)
    entries = _places((pre >= low) & (pre > 0), slots, low)
    # Positive floats are ordered as their bits are, and integers are sorted several times as fast.
    ordered = jnp.sort(jax.lax.bitcast_convert_type(_values(pre, entries), jnp.int32))
    return entries._replace(low=jax.lax.bitcast_convert_type(ordered[slots - n], jnp.float32))


def _values(pre: jax.Array, entries: Entries) -> jax.Array:
    """Pre-activations at the entries, [C]; 0 where one is not kept."""
    low = jnp.broadcast_to(entries.low, (len(pre), 1))[:, 0]
    value = pre.at[entries.row, entries.col].get(mode="fill", fill_value=0.0)
    return jnp.where((value > 0) & (value >= low.at[entries.row].get(mode="clip")), value, 0.0)


def _product(values: jax.Array, col: jax.Array, ends: jax.Array, dense: jax.Array) -> jax.Array:
    """The product of a sparse matrix [R,N], given by rows, with a dense one [N,D]."""
    return sparse.BCSR((values, col, ends), shape=(len(ends) - 1, len(dense))) @ dense


def _places(mask: jax.Array, slots: int, low: jax.Array) -> Entries:
    """The first `slots` entries where mask [B,F] is true.

    `jnp.nonzero` takes longer than a product. Here a row's mask is packed into words, and each slot looks for its
    word among the row's running counts, then for its bit within the word.
    """
    B, words = len(mask), mask.shape[1] // _WORD
    bits = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    packed = jnp.sum(jnp.where(mask.reshape(B, words, _WORD), bits, 0), axis=-1, dtype=jnp.uint32)
    counts = jax.lax.population_count(packed).astype(jnp.int32)
    within = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(within[:, -1], dtype=jnp.int32)])
    slot = jnp.arange(slots, dtype=jnp.int32)
    row = jnp.searchsorted(ends[1:], slot, side="right").astype(jnp.int32)
    rank = slot - ends[row]
    word, size = jnp.zeros_like(slot), words
    while size > 1:
        size, half = size - size // 2, size // 2
        word += jnp.where(within[row, word + half - 1] <= rank, half, 0)
    rank -= within[row, word] - counts[row, word]
    left, bit = packed[row, word], jnp.zeros_like(slot)
    for width in (16, 8, 4, 2, 1):
        lower = jax.lax.population_count(left & jnp.uint32(2**width - 1)).astype(jnp.int32)
        beyond = lower <= rank
        rank, bit = rank - jnp.where(beyond, lower, 0), bit + jnp.where(beyond, width, 0)
        left = jnp.where(beyond, left >> width, left)
    col = jnp.where(row < B, word * _WORD + bit, 0)
    return Entries(row, col.astype(jnp.int32), jnp.minimum(ends, slots), low)
