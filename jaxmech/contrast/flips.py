"""Sign flips of families: exact p-values of every feature, many flips in one pass.

`K` denotes families, `m` features, `R` flips asked for.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def permutation_p(difference: np.ndarray, *, key: jax.Array, R: int) -> np.ndarray:
    """Sign-flip permutation p-values [m] of the family differences [K,m]: the share of `sign_flips` under which |t| is
    at least as large as observed. 1 for features that are not finite.

    Under sign flips the sum of squares does not change, so comparing |mean| is comparing |t|: sums are enough.
    """
    K, m = difference.shape
    bits, together, low, high = _flip_codes(key, K, R)
    signs = _signs(2 ** (bits - together), high)
    cores = os.cpu_count() or 1
    width = min(max(1 << (-(-m // cores) - 1).bit_length(), _LEAST), _BLOCK)  # a few programs serve any m
    tile = _TILE if jax.default_backend() == "cpu" else width
    if m < width:
        difference = np.pad(difference, ((0, 0), (0, width - m)))
    columns = difference.shape[1]
    starts = np.minimum(np.arange(0, columns, width), columns - width)  # the last block overlaps the one before
    beaten = np.empty(columns, np.int32)

    def block(start: int) -> None:
        span = slice(start, start + width)
        part = difference[:, span].astype(np.float32)
        beaten[span] = _count_as_large(signs, part, low=low, bits=together, tile=tile)

    with ThreadPoolExecutor(cores) as threads:  # a loop inside a program runs on one core
        list(threads.map(block, starts))
    return np.maximum(beaten[:m], 1) / 2**bits  # flipping nothing counts, whatever the rounding


def sign_flips(key: jax.Array, K: int, R: int) -> np.ndarray:
    """Sign flips of K families, [2^r,K] of 1 and -1: the smallest power of two that is at least R, or all 2^K.

    They are a group, the first of which flips nothing, so p-values are exact, and not just close to those of all 2^K
    (Hemerik & Goeman 2018, doi:10.1007/s11749-017-0571-1; Koning & Hemerik 2023, doi:10.1093/biomet/asad050): all
    products of r flips, each of which turns a family that the other r - 1 leave alone, and other families at random.
    """
    bits, together, low, high = _flip_codes(key, K, R)
    return _signs(2**bits, np.array(low, np.uint32) | high << np.uint32(together))


def _flip_codes(key: jax.Array, K: int, R: int) -> tuple[int, int, tuple[int, ...], np.ndarray]:
    """r, how many of them are low, and the r bits of each family, the low ones apart from the high ones [K]: flip j
    turns a family whose bits have an odd number in common with those of j.

    The low bits are part of a program, so they are the same whatever the key.
    """
    bits = min(max(R - 1, 0).bit_length(), K)
    together = min(bits, _TOGETHER)
    low = np.random.default_rng(0).integers(0, 2**together, K, np.uint32)
    high = np.asarray(jax.random.bits(key, (K,), jnp.uint32)) % np.uint32(2 ** (bits - together))
    own = 2 ** np.arange(bits, dtype=np.uint32)  # so that no two flips are equal
    low[:bits], high[:bits] = own % 2**together, own >> together
    return bits, together, tuple(low.tolist()), high


def _signs(flips: int, codes: np.ndarray) -> np.ndarray:
    """[flips,K] float32 of families' bits [K]."""
    common = np.arange(flips, dtype=np.uint32)[:, None] & codes
    return 1 - 2 * (np.bitwise_count(common) % 2).astype(np.float32)


_TOGETHER = 7  # bits whose flips are summed at a time


_LEAST, _BLOCK = 512, 32768
"""Powers of two that bound the number of features of a call."""


_TILE = 64
"""Features at a time on a CPU: their differences stay in a core's nearest cache, and XLA, which splits only
what it thinks worth it, leaves a tile to one thread: a second one would slow down such short work (jaxlib 0.10)."""


@partial(jax.jit, static_argnames=("low", "bits", "tile"))
def _count_as_large(
    signs: jax.Array, difference: jax.Array, *, low: tuple[int, ...], bits: int, tile: int
) -> jax.Array:
    """How many flips give a sum of differences [K,n] as large as the observed one, [n]; `tile` divides n.

    Every row of `signs` [.,K], which stands for the high bits of a flip, goes with all values of its low `bits`. The
    sums under all of these are a Walsh-Hadamard transform, one addition per flip and bit.
    """

    def one_tile(start):
        d = jax.lax.dynamic_slice(difference, (jnp.zeros_like(start), start), (len(low), tile))
        # A flip that leaves the sum as it is must count, whatever the rounding.
        observed = jnp.abs(d.sum(0)) - 1e-6 * jnp.abs(d).sum(0)

        def flips(count, sign):
            sums = [jnp.zeros((1, tile))] * 2**bits  # rows, never reshaped: so all of it is one loop for XLA
            for k, code in enumerate(low):
                sums[code] += sign[k] * d[k : k + 1]
            for total in _walsh_hadamard(sums):
                count += ~(jnp.abs(total) < observed)  # counts a NaN
            return count, None

        return jax.lax.scan(flips, jnp.zeros((1, tile), jnp.int32), signs)[0][0]

    return jax.lax.map(one_tile, jnp.arange(0, difference.shape[1], tile)).reshape(-1)


def _walsh_hadamard(x: list[jax.Array]) -> list[jax.Array]:
    """sum_i (-1)^popcount(i & j) x_i for every j."""
    if len(x) == 1:
        return x
    first, second = x[: len(x) // 2], x[len(x) // 2 :]
    both = list(zip(first, second, strict=True))
    return _walsh_hadamard([a + b for a, b in both]) + _walsh_hadamard([a - b for a, b in both])
