"""Sign flips of families: exact p-values of every feature.

`K` denotes families, `m` features, `R` flips asked for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_SUMS = 2**20
"""Sums of family differences held at a time, one per flip and feature: few enough for a processor's cache."""


def permutation_p(difference: np.ndarray, *, key: jax.Array, R: int) -> np.ndarray:
    """Sign-flip permutation p-values [m] of the family differences [K,m]: the share of `sign_flips` under which |t| is
    as large as it is. 1 for features that are not finite.

    Under sign flips the sum of squares does not change, so comparing |mean| is comparing |t|: sums are enough.
    """
    K, m = difference.shape
    signs = sign_flips(K, key=key, R=R)
    width = max(1, min(_SUMS // len(signs), 1 << max(m - 1, 0).bit_length()))  # a few programs serve all numbers
    counts = []
    for start in range(0, m, width):
        block = difference[:, start : start + width].astype(np.float32)
        padded = np.pad(block, ((0, 0), (0, width - block.shape[1])))
        counts.append(np.asarray(_count_as_large(signs, padded))[: block.shape[1]])
    as_large = np.concatenate(counts) if counts else np.zeros(0)
    return np.maximum(as_large, 1) / len(signs)  # flipping nothing counts, whatever the rounding


def sign_flips(K: int, *, key: jax.Array, R: int) -> np.ndarray:
    """Sign flips of K families, float32 [2^r,K] of 1 and -1: the smallest power of two that is at least R, or all 2^K.

    They are a group, the first of which flips nothing, so p-values are exact, and not just close to those of all 2^K
    (Hemerik & Goeman 2018, doi:10.1007/s11749-017-0571-1; Koning & Hemerik 2023, doi:10.1093/biomet/asad050): all
    products of r flips, each of which turns one family that the other r - 1 leave alone, and other families at random.
    """
    r = min(max(R - 1, 0).bit_length(), K)
    turned_by = np.asarray(jax.random.bits(key, (K,), jnp.uint32)) % np.uint32(2**r)  # bit i: flip i turns the family
    turned_by[:r] = 2 ** np.arange(r, dtype=np.uint32)  # so that no two flips are the same
    turns = np.bitwise_count(np.arange(2**r, dtype=np.uint32)[:, None] & turned_by)
    return 1 - 2 * (turns % 2).astype(np.float32)


@jax.jit
def _count_as_large(signs: jax.Array, difference: jax.Array) -> jax.Array:
    """How many flips give a sum of differences [K,n] as large as the observed one, [n]."""
    # A flip that leaves the sum as it is must count, whatever the rounding.
    observed = jnp.abs(difference.sum(0)) - 1e-6 * jnp.abs(difference).sum(0)
    sums = jnp.matmul(signs, difference, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(~(jnp.abs(sums) < observed), axis=0)  # counts a NaN
