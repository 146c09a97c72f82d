"""From activations on dual-process items to an index per feature and five classes.

`n` denotes items, `K` features, `A` families (a generator in one wording). Two arms: demand (conflict minus no-conflict
twins) and instruction ("think it through" minus "first instinct" on the same item). An arm's index is the standardised
difference per family after regressing out covariates, pooled over families by random effects (DerSimonian & Laird
1986). The S2 index is the mean of the arms.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from jaxmech.contrast.statistics import benjamini_hochberg
from jaxmech.io.reprs import short_repr

CLASSES = ("s2", "s1", "mixed", "silent", "neither")


class Arm(NamedTuple):
    """index, se [K], pooled over families; families [A,K], their own differences."""

    index: np.ndarray  # type: ignore[assignment]  # a tuple has a method of that name
    se: np.ndarray
    families: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def low(self) -> np.ndarray:
        return self.index - 1.96 * self.se

    @property
    def high(self) -> np.ndarray:
        return self.index + 1.96 * self.se


def residualise(z: np.ndarray, covariates: np.ndarray) -> np.ndarray:
    """z [m,K] less its least-squares fit on covariates [m,C]; the mean is kept."""
    centred = covariates - covariates.mean(0)
    spread = centred.std(0)
    centred = centred[:, spread > 0] / spread[spread > 0]
    if not centred.shape[1]:
        return z
    return z - centred @ np.linalg.lstsq(centred, z - z.mean(0), rcond=None)[0]


def arm_index(high: np.ndarray, low: np.ndarray, covariates: tuple[np.ndarray, np.ndarray], family: np.ndarray) -> Arm:
    """An arm's index from matched items.

    Args:
      high, low: [n,K] activations under either condition of the same item; covariates: those of either, [n,C].
      family: [n], any labels.
    """
    n = len(high)
    both = residualise(np.concatenate([high, low]), np.concatenate(covariates))
    difference = both[:n] - both[n:]
    scale = both.std(0, ddof=1)
    scale = np.where(scale > 0, scale, 1.0)
    labels, index = np.unique(family, return_inverse=True)
    count = np.bincount(index)
    means = np.stack([difference[index == a].mean(0) for a in range(len(labels))]) / scale
    within = sum(((difference[index == a] / scale - means[a]) ** 2).sum(0) for a in range(len(labels)))
    variance = within / max(n - len(labels), 1)  # pooled, since a family has few items
    return Arm(*pool_random_effects(means, variance / count[:, None]), means)


def pool_random_effects(means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DerSimonian-Laird mean and standard error over the leading axis of means, variances [A,K]."""
    variances = np.maximum(variances, 1e-12)
    w = 1 / variances
    fixed = (w * means).sum(0) / w.sum(0)
    spread = (w * (means - fixed) ** 2).sum(0)
    tau2 = np.maximum(0.0, (spread - (len(means) - 1)) / (w.sum(0) - (w**2).sum(0) / w.sum(0)))
    w = 1 / (variances + tau2)
    return (w * means).sum(0) / w.sum(0), 1 / np.sqrt(w.sum(0))


def classify(
    demand: Arm,
    instruction: Arm,
    fires: np.ndarray,
    *,
    cut: float = 0.3,
    q: float = 0.05,
    agree: float = 0.75,
    silent: float = 0.05,
) -> np.ndarray:
    """One of `CLASSES` for each feature, [K].

    s2: both arms' intervals above 0, index >= cut, BH q below `q`, and `agree` of all families on its side. s1: the
    mirror. mixed: the arms' intervals lie on opposite sides. silent: fires on fewer than `silent` of the items.

    Args:
      fires: [K], share of items on which the feature is active.
    """
    index = (demand.index + instruction.index) / 2
    se = np.sqrt(demand.se**2 + instruction.se**2) / 2
    adjusted = benjamini_hochberg(2 * stats.norm.sf(np.abs(index) / se))
    families = np.concatenate([demand.families, instruction.families])
    out = np.full(len(index), "neither", dtype=object)
    for name, sign in (("s2", 1.0), ("s1", -1.0)):
        bound = np.minimum(*(a.low if sign > 0 else -a.high for a in (demand, instruction)))
        holds = (bound > 0) & (sign * index >= cut) & (adjusted < q) & ((sign * families > 0).mean(0) >= agree)
        out[holds] = name
    opposite = ((demand.low > 0) & (instruction.high < 0)) | ((demand.high < 0) & (instruction.low > 0))
    out[opposite] = "mixed"
    out[fires < silent] = "silent"
    return out
