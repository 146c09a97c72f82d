"""Inference over families: the family, not the prompt, is the unit.

`K` denotes families, `F` features, `R` resamples. NumPy in, NumPy out; nothing here runs on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special, stats

_COLUMNS = 2**16
"""Features taken at a time: float64 copies of all of them need not fit into memory."""


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


def mean_effect(means: np.ndarray) -> Effect:
    """The mean of family means [K], with Student's t interval and its two-sided p; NaN where K is 1 or a mean is no
    number.

    A percentile bootstrap of 4 to 8 families covers 78 to 90 %, not 95.
    """
    means = np.asarray(means, float)
    value, K = means.mean(), len(means)
    if K < 2:
        return Effect(float(value), *[float("nan")] * 3)
    if not np.isfinite(value):
        return Effect(float(value), *[float("nan")] * 3)
    error = means.std(ddof=1) / np.sqrt(K)
    half = stats.t.ppf(0.975, K - 1) * error
    p = 2 * stats.t.sf(abs(value) / error, K - 1) if error > 0 else float(value == 0)
    return Effect(float(value), float(value - half), float(value + half), float(p))


def detectable(means: np.ndarray, *, power: float = 0.8) -> float:
    """The smallest true mean that family means [K] like these would show, in their unit: (t_{.975} + t_{power}) sd /
    sqrt(K) with K - 1 degrees of freedom, two-sided at 5 % (Bloom 1995, doi:10.1177/0193841X9501900504); NaN where K
    is 1.
    """
    means = np.asarray(means, float)
    if (K := len(means)) < 2:
        return float("nan")
    return float(stats.t.ppf([0.975, power], K - 1).sum() * means.std(ddof=1) / np.sqrt(K))


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Effect:
    """Sum of `numerator` over sum of `denominator` (family means [K]), with Fieller's 95 % interval (Fieller 1954,
    doi:10.1111/j.2517-6161.1954.tb00159.x); p is NaN.

    Pairs whose total effect is small weigh little, where a mean of ratios would let them explode. Where the
    denominator's own interval holds 0 nothing is excluded: from -inf to inf. All is NaN where its sum is 0 or K is 1.
    """
    n, d, K = np.asarray(numerator, float), np.asarray(denominator, float), len(denominator)
    if K < 2 or d.sum() == 0:
        return Effect(*[float("nan")] * 4)
    ratio, below = n.sum() / d.sum(), d.mean()
    (var_n, both), (_, var_d) = np.cov(n, d) / K
    t = stats.t.ppf(0.975, K - 1)
    g = t**2 * var_d / below**2
    if g >= 1:
        return Effect(float(ratio), float("-inf"), float("inf"), float("nan"))
    slack = var_n - 2 * ratio * both + ratio**2 * var_d - g * (var_n - both**2 / var_d if var_d > 0 else 0.0)
    half = t / abs(below) * np.sqrt(max(slack, 0.0))
    centre = ratio - (g * both / var_d if var_d > 0 else 0.0)
    return Effect(float(ratio), float((centre - half) / (1 - g)), float((centre + half) / (1 - g)), float("nan"))


def p_from_null(observed: float, null: np.ndarray) -> float:
    """(1 + #{null >= observed}) / (B + 1), one-sided (Phipson & Smyth 2010); NaN, in the null or observed,
    counts as null >= observed."""
    null = np.asarray(null, float)
    return float((1 + np.sum(~(null < observed))) / (1 + len(null)))


def p_from_normal_null(observed: float, null: np.ndarray) -> float:
    """Two-sided p of `observed` as one more draw from the normal distribution that gave `null` [R]: t with R - 1 df.

    For nulls too small to count in, where a rank-based p could not get below 1 / (R + 1). NaN if any of them is.
    """
    null = np.asarray(null, float)
    if np.isnan(observed) or np.isnan(null).any():
        return float("nan")
    spread = null.std(ddof=1) * np.sqrt(1 + 1 / len(null))
    if not spread > 0:
        return 1.0
    return float(2 * stats.t.sf(abs(observed - null.mean()) / spread, len(null) - 1))


def paired_t(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, two-sided p and d_z = mean / sd over the leading axis of differences [K, ...], in float64; p = 1 where all
    differences are 0."""
    differences = np.asarray(differences)
    K, shape = len(differences), differences.shape[1:]
    flat = differences.reshape(K, -1)
    d_z = np.empty(flat.shape[1])
    for start in range(0, flat.shape[1], _COLUMNS):
        block = flat[:, start : start + _COLUMNS].astype(np.float64)
        mean, sd = block.mean(0), block.std(0, ddof=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            d_z[start : start + _COLUMNS] = np.where(sd > 0, mean / sd, np.where(mean == 0, 0.0, mean * np.inf))
    t = d_z * np.sqrt(K)
    p = 2 * special.stdtr(K - 1, -np.abs(t))
    return t.reshape(shape), p.reshape(shape), d_z.reshape(shape)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values (q) of the family of tests p [m] (Benjamini & Hochberg 1995). A test without a p (NaN) does not
    count: its q is NaN, and the others are adjusted for their own number."""
    return _adjusted(p, stats.false_discovery_control)


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
