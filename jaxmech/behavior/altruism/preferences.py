"""Social preferences read from several choices: the slider's angle, CES utility, and consistency with any utility.

`N` denotes choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ALTRUIST, PROSOCIAL, INDIVIDUALIST = 57.15, 22.45, -12.04
"""Degrees above which a slider's angle counts as that; below all, competitive (Murphy, Ackermann & Handgraaf 2011)."""


def svo_angle(payoffs: Any) -> float:
    """The slider measure's angle in degrees, arctan((mean other - 50) / (mean own - 50)).

    Args:
      payoffs: [N,2], (own, other's) points of the option chosen, or expected, in each item; all six for the measure.

    Reference: Murphy, Ackermann & Handgraaf (2011), Judgment and Decision Making 6, 771.
    """
    own, other = np.asarray(payoffs, float).mean(0) - 50
    return float(np.degrees(np.arctan2(other, own)))


def ces_share(price: float, *, weight: float, rho: float) -> float:
    """The share of a budget given by who maximises (weight own^rho + (1 - weight) other^rho)^(1 / rho).

    Args:
      price: of the other's point in own points: what a token is worth when held, over when passed.
      weight: of the own payoff, between 0 and 1. rho: below 1.

    Reference: Andreoni & Miller (2002), Econometrica 70, 737.

    Raises:
      ValueError: parameters out of range.
    """
    if not (price > 0 and 0 < weight < 1 and rho < 1):
        raise ValueError(f"ces_share: expected price > 0, 0 < weight < 1 and rho < 1, got {price}, {weight} and {rho}")
    elasticity = 1 / (1 - rho)
    return float(1 / (1 + (weight / (1 - weight)) ** elasticity * price ** (elasticity - 1)))


class CES(NamedTuple):
    """weight: of the own payoff. rho: 1 for perfect substitutes, towards -inf for equal payoffs."""

    weight: float
    rho: float


def fit_ces(prices: Sequence[float], shares: Sequence[float]) -> CES:
    """The utility whose `ces_share` is nearest to shares of budgets [N] in log odds, which are linear in log price.

    Raises:
      ValueError: fewer than two prices, a share that is not between 0 and 1, or shares that rise with the price more
        than any such utility's.
    """
    x, share = np.log(np.asarray(prices, float)), np.asarray(shares, float)
    if len(np.unique(x)) < 2 or not ((share > 0) & (share < 1)).all():
        raise ValueError(f"fit_ces: expected shares between 0 and 1 at two prices or more, got {shares} at {prices}")
    slope, level = np.polyfit(x, np.log(share / (1 - share)), 1)
    if (elasticity := 1 - slope) <= 0:
        raise ValueError(f"fit_ces: no CES utility gives more where giving is dearer so strongly, got {shares}")
    return CES(float(1 / (1 + np.exp(level / elasticity))), float(1 - 1 / elasticity))


def efficiency_index(prices: Any, chosen: Any) -> float:
    """Afriat's critical cost efficiency index: 1 if some utility explains all choices, less the more money was wasted.

    The largest e such that no cycle of choices costs, at each step, less than e times the budget it was preferred in.
    Between the ratios of costs nothing changes, so that these are all that is tried.

    Args:
      prices: [N,2] of own and other's points in each budget. chosen: [N,2], the payoffs chosen.

    Reference: Afriat (1973), International Economic Review 14, 460; Andreoni & Miller (2002).
    """
    cost = np.asarray(prices, float) @ np.asarray(chosen, float).T  # [N,N]: of bundle j in budget i
    ratio = cost / np.diag(cost)[:, None]
    return float(max(e for e in np.unique(np.minimum(ratio, 1)) if not _cyclic(ratio < e)))


def _cyclic(steps: np.ndarray) -> bool:
    """Whether a graph [N,N] has a cycle (Warshall's closure)."""
    reached = steps.copy()
    for through in range(len(reached)):
        reached |= reached[:, through, None] & reached[through]
    return bool(reached.diagonal().any())
