"""Inference over families: the family, not the prompt, is the unit.

`K` denotes families, `F` features, `R` resamples. NumPy in, NumPy out; nothing here runs on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from scipy import special, stats

from jaxmech.io.arguments import rng_of

_COLUMNS = 16384  # features per block: few enough for the cache at some dozens of families, many enough for threads


class Effect(NamedTuple):
    """An estimate with its 95 % interval and p-value."""

    value: float
    low: float
    high: float
    p: float


def family_means(values: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Means of `values` [N, ...] within each family, [K, ...], families in ascending order."""
    _, index = np.unique(families, return_inverse=True)
    sums = np.zeros((index.max() + 1, *np.shape(values)[1:]))
    np.add.at(sums, index, values)
    return sums / np.bincount(index).reshape(-1, *[1] * (sums.ndim - 1))


def resample(K: int, R: int, key: jax.Array) -> np.ndarray:
    """[R,K] indices of families drawn with replacement."""
    return rng_of(key).integers(0, K, (R, K))


def mean_effect(means: np.ndarray, *, key: jax.Array, R: int = 4000) -> Effect:
    """The mean of family means [K], a cluster-bootstrap interval and the Wilcoxon signed-rank p (two-sided)."""
    draws = means[resample(len(means), R, key)].mean(1)
    p = stats.wilcoxon(means).pvalue if np.any(means != 0) else 1.0
    low, high = np.percentile(draws, [2.5, 97.5])
    return Effect(float(means.mean()), float(low), float(high), float(p))


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, *, key: jax.Array, R: int = 4000) -> Effect:
    """Sum of `numerator` over sum of `denominator` (family means [K]), families resampled together; p is NaN.

    Pairs whose total effect is small weigh little, where a mean of ratios would let them explode. Resamples whose
    denominator is exactly 0 have no ratio and are left out; all is NaN where the families' own sum is 0.
    """
    if denominator.sum() == 0:
        return Effect(*[float("nan")] * 4)
    draws = resample(len(numerator), R, key)
    above, below = numerator[draws].sum(1), denominator[draws].sum(1)
    low, high = np.percentile(above[below != 0] / below[below != 0], [2.5, 97.5])
    return Effect(float(numerator.sum() / denominator.sum()), float(low), float(high), float("nan"))


def p_from_null(observed: float, null: np.ndarray) -> float:
    """(1 + #{null >= observed}) / (B + 1), one-sided (Phipson & Smyth 2010); a NaN, in the null or
    observed, counts as null >= observed."""
    null = np.asarray(null, float)
    return float((1 + np.sum(~(null < observed))) / (1 + len(null)))


def p_from_normal_null(observed: float, null: np.ndarray) -> float:
    """One-sided p of `observed` as one more draw from the normal distribution that gave `null` [R]: t with R - 1 df.

    For nulls too small to count in, where a rank-based p could not get below 1 / (R + 1). NaN if any of them is.
    """
    null = np.asarray(null, float)
    if np.isnan(observed) or np.isnan(null).any():
        return float("nan")
    spread = null.std(ddof=1) * np.sqrt(1 + 1 / len(null))
    if not spread > 0:
        return 1.0
    return float(stats.t.sf((observed - null.mean()) / spread, len(null) - 1))


def paired_t(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, two-sided p and d_z = mean / sd over the leading axis of differences [K, ...]; p = 1 where all are 0.

    In float64 whatever the input's dtype; in blocks of columns that stay in cache, in parallel on all cores.
    """
    differences = np.asarray(differences)
    K, shape = len(differences), differences.shape[1:]
    flat = differences.reshape(K, -1)
    t, p, d_z = out = np.empty((3, flat.shape[1]))

    def block(start: int) -> None:
        span = slice(start, start + _COLUMNS)
        off = flat[:, span].astype(np.float64)
        mean = off.mean(0)
        off -= mean
        with np.errstate(divide="ignore", invalid="ignore"):
            sd = np.sqrt(np.einsum("kf,kf->f", off, off) / (K - 1))
            d_z[span] = np.where(sd > 0, mean / sd, np.where(mean == 0, 0.0, np.inf * np.sign(mean)))
        t[span] = d_z[span] * np.sqrt(K)
        p[span] = two_sided_p(t[span], K - 1)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(block, range(0, flat.shape[1], _COLUMNS)))
    shaped: list[np.ndarray] = [a.reshape(shape) if shape else a[0] for a in out]
    return shaped[0], shaped[1], shaped[2]


def two_sided_p(t: np.ndarray, df: int) -> np.ndarray:
    """P(|T| >= |t|) of Student's t with a whole number of degrees of freedom, accurate to about 1e-11 of itself.

    The finite sums of Abramowitz & Stegun (1964), 26.7.3 and 26.7.4, which are many times as fast as the incomplete
    beta function. One minus them has no digits left where p is small, so SciPy computes those.
    """
    if not 0 < df <= 200:
        return 2 * special.stdtr(df, -np.abs(t))
    ratio = np.minimum(np.abs(t) / np.sqrt(df), 1e150)  # tan of the angle; an infinite t would give inf * 0
    square = 1 / (1 + ratio**2)  # of its cosine
    odd = df % 2
    j = np.arange(1, (df - odd) // 2)
    *terms, last = np.cumprod([1.0, *(2 * j - 1 + odd) / (2 * j + odd)])
    series = np.full_like(square, last)
    for term in reversed(terms):  # in place: NumPy's polynomials allocate two arrays per term
        series *= square
        series += term
    inside = ratio * (square if odd else np.sqrt(square)) * series
    if odd:
        inside = 2 / np.pi * (np.arctan(ratio) + (inside if df > 1 else 0.0))
    p = np.asarray(1 - inside)
    small = ~(p > 1e-4)
    p[small] = 2 * special.stdtr(df, -np.abs(t[small]))
    return p


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values (q) of the family of tests p [m] (Benjamini & Hochberg 1995). A test without a p (NaN) does not
    count: its q is NaN, and the others are adjusted for their own number."""
    return _adjusted(p, _step_up)


def _step_up(p: np.ndarray) -> np.ndarray:
    order, ascending = _sorted(p)
    scaled = ascending * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(scaled)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def _adjusted(p: np.ndarray, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`adjust` of the p-values that are numbers, NaN for the others."""
    p = np.asarray(p, float)
    if np.any((p < 0) | (p > 1)):
        raise ValueError(f"p: expected p-values from 0 to 1, got {p[(p < 0) | (p > 1)][0]}")
    if not (missing := np.isnan(p)).any():
        return adjust(p)
    out = np.full_like(p, np.nan)
    out[~missing] = adjust(p[~missing])
    return out


def _sorted(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stable order of p [m] >= 0, and p in that order, several times as fast as `argsort`.

    The bits of floats that are not negative sort as integers do. With the index in place of the lowest bits, a few
    plain sorts in parallel leave next to nothing for NumPy's stable sort, which merges sorted runs.
    """
    index = np.arange(len(p), dtype=np.uint64)
    low = np.uint64((1 << len(p).bit_length()) - 1)
    rough = ((p + 0.0).view(np.uint64) & ~low) | index  # + 0.0 makes -0.0 a 0.0
    runs = min(os.cpu_count() or 1, 4, 1 + len(p) // _COLUMNS)  # merging more would take longer than sorting them saves
    with ThreadPoolExecutor(runs) as threads:
        list(threads.map(np.ndarray.sort, np.array_split(rough, runs)))
    rough.sort(kind="stable")
    rough &= low
    order = rough.astype(np.intp)
    ascending = p[order]
    if not np.all(ascending[1:] >= ascending[:-1]):
        repair = np.argsort(ascending, kind="stable")
        order, ascending = order[repair], ascending[repair]
    return order, ascending


def auroc(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """P(high > low) + P(tie) / 2 over all pairs of the leading axes: high [K, F], low [K', F] -> [F]; NaN where any of
    them is."""
    high, low = np.asarray(high), np.asarray(low)
    wins = np.zeros(high.shape[1:])
    for row in high:
        wins += (row > low).sum(0) + 0.5 * (row == low).sum(0)
    return np.where(np.isnan(high).any(0) | np.isnan(low).any(0), np.nan, wins / (len(high) * len(low)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979); NaN as for `benjamini_hochberg`."""
    return _adjusted(p, _step_down)


def _step_down(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    out = np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return out
