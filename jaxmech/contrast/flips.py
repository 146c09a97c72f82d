"""Sign flips of families: exact p-values of every feature, and of the largest |t| of all of them.

`K` denotes families, `m` features, `R` flips asked for, `S` flips taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.reprs import short_repr

_SUMS = 2**20
"""Sums of family differences held at a time, one per flip and feature: few enough for a processor's cache."""


class FlipTests(NamedTuple):
    """What sign flips say of m features.

    p [m]: the share of flips under which a feature's |t| is as large as it is. p_max [m]: the share under which the
    largest |t| of all features is, which keeps the probability of any false discovery below it (max-T; Westfall & Young
    1993). Both are 1 for features that are not finite. largest [S]: that largest value under each flip, |sum of d| /
    |d|, in ascending order. signs [S,K]: the flips.
    """

    p: np.ndarray
    p_max: np.ndarray
    largest: np.ndarray
    signs: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def flip_tests(difference: np.ndarray, signs: np.ndarray, *, live: np.ndarray | None = None) -> FlipTests:
    """Tests of the family differences [K,m] by the sign flips `signs` [S,K], one matrix product per block of features.

    Under sign flips a feature's sum of squares stays what it is, and |t| rises with |sum of d| / |d|: sums are enough.

    Args:
      live: [m], the features whose |t| may be the largest; all by default. The others have a p_max of 1.
    """
    counts, observed, most = [np.zeros(0)], [np.zeros(0, np.float32)], np.zeros(len(signs), np.float32)
    alive = np.ones(difference.shape[1], bool) if live is None else live
    for start, block in _blocks(difference, len(signs)):
        part = alive[start : start + block.shape[1]]
        size = len(part)
        count, value, largest = _of_block(signs, block, np.pad(part, (0, block.shape[1] - size)))
        counts.append(np.asarray(count)[:size])
        observed.append(np.asarray(value)[:size])
        most = np.maximum(most, np.asarray(largest))
    most.sort()
    u, flips = np.concatenate(observed), len(signs)
    larger = flips - np.searchsorted(most, u)  # NaN sorts last, and is seen to below
    p_max = np.where(alive & np.isfinite(u), np.maximum(larger, 1), flips) / flips
    return FlipTests(np.maximum(np.concatenate(counts), 1) / flips, p_max, most, signs)  # flipping nothing counts


def permutation_p(difference: np.ndarray, *, key: jax.Array, R: int) -> np.ndarray:
    """Sign-flip permutation p-values [m] of the family differences [K,m]: `FlipTests.p` under `sign_flips`."""
    return flip_tests(difference, sign_flips(len(difference), key=key, R=R)).p


def as_large_under(
    tests: FlipTests, difference: np.ndarray, flips: np.ndarray, *, most: float, among: np.ndarray
) -> list[np.ndarray]:
    """The features whose p_max is at most `most` when the families are relabelled by each of some flips: a list of
    indices per flip.

    Flips are a group: relabelled by one of them, data have the same sums under all of them, in another order. So
    `tests.largest` is the null of every relabelling, and only the observed sums are new.

    Args:
      difference: [K,m], what was tested. flips: rows of `tests.signs`. among: [m], the features to look at.
    """
    allowed = int(most * len(tests.largest) + 1e-9)
    above = -np.inf if allowed >= len(tests.largest) else tests.largest[-1 - allowed]
    found: list[list[np.ndarray]] = [[] for _ in flips]
    for start, block in _blocks(difference, len(flips)):
        values = np.asarray(_observed(tests.signs[flips], block))[:, : len(among) - start]
        for row, column in zip(found, (values > above) & among[start : start + block.shape[1]], strict=True):
            row.append(start + np.flatnonzero(column))
    return [np.concatenate(row) if row else np.zeros(0, int) for row in found]


def _blocks(difference: np.ndarray, sums: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first feature, float32 block [K,width]) of family differences, the last one filled up with zeros."""
    m = difference.shape[1]
    width = max(1, min(_SUMS // sums, 1 << max(m - 1, 0).bit_length()))  # a few programs serve all numbers
    for start in range(0, m, width):
        block = difference[:, start : start + width].astype(np.float32)
        yield start, np.pad(block, ((0, 0), (0, width - block.shape[1])))


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
def _of_block(signs: jax.Array, difference: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of differences [K,n]: how many flips give a sum as large as the observed one [n], that one [n], and the largest
    sum of all live features under each flip [S]; sums are of differences of length 1."""
    unit, slack = _units(difference)
    sums = jnp.abs(jnp.matmul(signs, unit, precision=jax.lax.Precision.HIGHEST))
    observed = jnp.abs(unit.sum(0)) - slack
    finite = jnp.isfinite(observed)
    largest = jnp.max(jnp.where(live & finite, sums, 0.0), axis=1)
    return jnp.sum(~(sums < observed), axis=0), observed, largest  # ~(<) counts a NaN


@jax.jit
def _observed(signs: jax.Array, difference: jax.Array) -> jax.Array:
    """What is observed [S,n] of differences [K,n] relabelled by each flip."""
    unit, slack = _units(difference)
    return jnp.abs(jnp.matmul(signs, unit, precision=jax.lax.Precision.HIGHEST)) - slack


def _units(difference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Differences [K,n] scaled to length 1, or 0 where all are; and how far [n] rounding may move their sum: a flip
    that leaves it as it is must count as as large."""
    scaled = difference / jnp.maximum(jnp.abs(difference).max(0), jnp.finfo(jnp.float32).tiny)  # squares in range
    unit = scaled / jnp.maximum(jnp.linalg.norm(scaled, axis=0), 1.0)
    return unit, 1e-6 * jnp.abs(unit).sum(0)
