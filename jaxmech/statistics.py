"""Inference over families: the family, not the prompt, is the unit.

`K` denotes families, `F` features, `R` resamples. NumPy in, NumPy out; nothing here runs on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special, stats


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


def resample(K: int, R: int, seed: int) -> np.ndarray:
    """[R,K] indices of families drawn with replacement."""
    return np.random.default_rng(seed).integers(0, K, (R, K))


def mean_effect(means: np.ndarray, *, seed: int, R: int = 4000) -> Effect:
    """The mean of family means [K], a cluster-bootstrap interval and the Wilcoxon signed-rank p (two-sided)."""
    draws = means[resample(len(means), R, seed)].mean(1)
    p = stats.wilcoxon(means).pvalue if np.any(means != 0) else 1.0
    return Effect(float(means.mean()), *map(float, np.percentile(draws, [2.5, 97.5])), float(p))


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, *, seed: int, R: int = 4000) -> Effect:
    """Sum of `numerator` over sum of `denominator` (family means [K]), families resampled together; p is NaN.

    Pairs whose total effect is small weigh little, where a mean of ratios would let them explode. Resamples whose
    denominator is exactly 0 have no ratio and are left out; all is NaN where the families' own sum is 0.
    """
    if denominator.sum() == 0:
        return Effect(*[float("nan")] * 4)
    draws = resample(len(numerator), R, seed)
    above, below = numerator[draws].sum(1), denominator[draws].sum(1)
    low, high = np.percentile(above[below != 0] / below[below != 0], [2.5, 97.5])
    return Effect(float(numerator.sum() / denominator.sum()), float(low), float(high), float("nan"))


def p_from_null(observed: float, null: np.ndarray) -> float:
    """(1 + #{null >= observed}) / (B + 1), one-sided (Phipson & Smyth 2010); NaN in the null counts as beating it."""
    null = np.asarray(null, float)
    return float((1 + np.sum(~(null < observed))) / (1 + len(null)))


def p_from_normal_null(observed: float, null: np.ndarray) -> float:
    """One-sided p of `observed` as one more draw from the normal distribution that gave `null` [R]: t with R - 1 df.

    For nulls too small to count in, where a rank-based p could not get below 1 / (R + 1).
    """
    null = np.asarray(null, float)
    spread = null.std(ddof=1) * np.sqrt(1 + 1 / len(null))
    if not spread > 0:
        return 1.0
    return float(stats.t.sf((observed - null.mean()) / spread, len(null) - 1))


def paired_t(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, two-sided p and d_z = mean / sd over the leading axis of differences [K, ...]; p = 1 where all are 0."""
    K = len(differences)
    mean, sd = differences.mean(0), differences.std(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        d_z = np.where(sd > 0, mean / sd, np.where(mean == 0, 0.0, np.inf * np.sign(mean)))
    t = d_z * np.sqrt(K)
    return t, 2 * special.stdtr(K - 1, -np.abs(t)), d_z


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values (q) of the family of tests p [m] (Benjamini & Hochberg 1995)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(scaled)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def auroc(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """P(high > low) + P(tie) / 2 over all pairs of the leading axes: high [K, F], low [K', F] -> [F]."""
    wins = np.zeros(high.shape[1:])
    for row in high:
        wins += (row > low).sum(0) + 0.5 * (row == low).sum(0)
    return wins / (len(high) * len(low))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Holm 1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    out = np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return out
