"""From activations on dual-process items to an index per feature and five classes.

`m` denotes prompts, `n` items, each asked in the two conditions of an arm, `C` covariates, `K` features, `A` families.
A family is a generator: its wordings share the task, the answers' format and the worked examples.

Two arms: demand (conflict minus no-conflict twins) and instruction ("think it through" minus "first instinct" on the
same item). An arm's index is the standardised difference per family after regressing out covariates, pooled over
families by random effects (DerSimonian & Laird 1986) with Student's t (Knapp & Hartung 2003, doi:10.1002/sim.1482). The
S2 index is the mean of the arms that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.behavior.dual_process.prompts import ARMS
from jaxmech.contrast.statistics import benjamini_hochberg
from jaxmech.io.reprs import short_repr

CLASSES = ("s2", "s1", "mixed", "silent", "neither")

COVARIATES = ("digits", "tokens", "log_likelihood", "option")
"""Fixed before the model answers: digits, tokens and mean log-likelihood of the query, place of the right option."""

ANCHOR, GRADED = "anchor", "arithmetic"
"""The generator of System 1's anchors, and the one whose items are graded by their steps."""


class Arm(NamedTuple):
    """index, se [K], pooled over families; families [A,K], their own differences."""

    index: np.ndarray  # type: ignore[assignment]  # a tuple has a method of that name
    se: np.ndarray
    families: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def low(self) -> np.ndarray:
        return self.index - self._quantile * self.se

    @property
    def high(self) -> np.ndarray:
        return self.index + self._quantile * self.se

    @property
    def _quantile(self) -> float:
        return float(stats.t.ppf(0.975, max(len(self.families) - 1, 1)))


def dual_index(
    items: pd.DataFrame, z: np.ndarray, *, cut: float = 0.3, arms: Sequence[str] = tuple(ARMS)
) -> pd.DataFrame:
    """Index and class of every feature.

    Args:
      items: m prompts as `build_items` gives them, with tokens and log_likelihood.
      z: [m,K], what each feature does on each prompt.
      arms: those that count; demand always does.

    Returns:
      A row per feature: class, index, silent_share (of the prompts), for each arm its index and 95 % interval (demand,
      demand_low, demand_high, instruction, ...), anchor (the demand arm in the anchors' family alone), and
      arithmetic_slope with its interval (standard deviations per step).
    """
    pairs = {name: _pairs(items, name) for name in ARMS}
    covariates = items[list(COVARIATES)].to_numpy(float)
    families = {name: items["generator"].to_numpy()[first] for name, (first, _) in pairs.items()}
    differences = {
        name: standardised(z[a], z[b], (covariates[a], covariates[b]), families[name]) for name, (a, b) in pairs.items()
    }
    found = {name: pool_families(differences[name], families[name]) for name in ARMS}
    anchor = differences["demand"][families["demand"] == ANCHOR].mean(0)
    fires = (z > 0).mean(0)
    instruction = found["instruction"] if "instruction" in arms else None
    out = {
        "class": classify(found["demand"], instruction, fires, anchor=anchor, cut=cut),
        "index": mean_of_arms(found["demand"], instruction)[0],
        "silent_share": 1 - fires,
    }
    for name, arm in found.items():
        out |= {name: arm.index, f"{name}_low": arm.low, f"{name}_high": arm.high}
    graded = families["demand"] == GRADED
    more_steps = items["level"].to_numpy()[pairs["demand"][0][graded]] - 1
    slope, half = _slope(more_steps, differences["demand"][graded])
    out |= {"anchor": anchor, "arithmetic_slope": slope}
    return pd.DataFrame(out | {"arithmetic_slope_low": slope - half, "arithmetic_slope_high": slope + half})


def _pairs(items: pd.DataFrame, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [n] of the two prompts of each item."""
    rows = items.assign(row=np.arange(len(items)))[(items["arm"] == arm).to_numpy()]
    wide = rows.pivot(index="item", columns="condition", values="row")
    first, second = (wide[condition].to_numpy(int) for condition in ARMS[arm])
    return first, second


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares slope [K] of y [n,K] on x [n] through the origin, and half its 95 % interval; NaN where n is 1."""
    slope = x @ y / (x @ x)
    degrees = len(x) - 1
    if not degrees:
        return slope, np.full_like(slope, np.nan)
    error = np.sqrt(((y - x[:, None] * slope) ** 2).sum(0) / degrees / (x @ x))
    return slope, stats.t.ppf(0.975, degrees) * error


def standardised(
    high: np.ndarray, low: np.ndarray, covariates: tuple[np.ndarray, np.ndarray], family: np.ndarray
) -> np.ndarray:
    """Differences of matched items [n,K] after regression, in standard deviations within family and condition.

    Differences are regressed on the differences in covariates, with an intercept: what a family's items have in common
    cancels, and the arm's own effect is not taken out.

    Args:
      high, low: [n,K] activations in either condition of the same item; covariates: those in either, [n,C].
      family: [n], any labels.
    """
    moved = covariates[0] - covariates[1]
    spread = moved.std(0)
    varies = spread > 0
    design = np.column_stack([np.ones(len(moved)), moved[:, varies] / spread[varies]])
    slopes = np.linalg.lstsq(design, high - low, rcond=None)[0][1:] / spread[varies, None]
    high, low = (z - c[:, varies] @ slopes for z, c in zip((high, low), covariates, strict=True))
    labels, index = np.unique(family, return_inverse=True)
    centred = [z[index == a] - z[index == a].mean(0) for z in (high, low) for a in range(len(labels))]
    squares = sum((z**2).sum(0) for z in centred)
    scale = np.sqrt(squares / max(2 * (len(high) - len(labels)), 1))
    return (high - low) / np.where(scale > 0, scale, 1.0)


def pool_families(difference: np.ndarray, family: np.ndarray) -> Arm:
    """The arm's index from standardised differences [n,K] and their families [n]."""
    labels, index = np.unique(family, return_inverse=True)
    count = np.bincount(index)
    means = np.stack([difference[index == a].mean(0) for a in range(len(labels))])
    within = ((difference - means[index]) ** 2).sum(0)
    variance = within / max(len(difference) - len(labels), 1)  # pooled, since a family has few items
    return Arm(*pool_random_effects(means, variance / count[:, None]), means)


def arm_index(high: np.ndarray, low: np.ndarray, covariates: tuple[np.ndarray, np.ndarray], family: np.ndarray) -> Arm:
    """An arm's index from matched items; arguments as for `standardised`."""
    return pool_families(standardised(high, low, covariates, family), family)


def pool_random_effects(means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DerSimonian-Laird mean over the leading axis of means, variances [A,K], and its standard error: Knapp and
    Hartung's where that is larger."""
    variances = np.maximum(variances, 1e-12)
    w = 1 / variances
    fixed = (w * means).sum(0) / w.sum(0)
    spread = (w * (means - fixed) ** 2).sum(0)
    tau2 = np.maximum(0.0, (spread - (len(means) - 1)) / (w.sum(0) - (w**2).sum(0) / w.sum(0)))
    w = 1 / (variances + tau2)
    mean = (w * means).sum(0) / w.sum(0)
    spread = (w * (means - mean) ** 2).sum(0) / max(len(means) - 1, 1)
    return mean, np.sqrt(np.maximum(spread, 1.0) / w.sum(0))


def mean_of_arms(demand: Arm, instruction: Arm | None) -> tuple[np.ndarray, np.ndarray]:
    """The S2 index and its standard error, [K]: of the demand arm alone where the other does not count."""
    if instruction is None:
        return demand.index, demand.se
    return (demand.index + instruction.index) / 2, np.sqrt(demand.se**2 + instruction.se**2) / 2


def classify(
    demand: Arm,
    instruction: Arm | None,
    fires: np.ndarray,
    *,
    anchor: np.ndarray | None = None,
    cut: float = 0.3,
    q: float = 0.05,
    agree: float = 0.75,
    silent: float = 0.05,
) -> np.ndarray:
    """One of `CLASSES` for each feature, [K].

    s2: both arms' intervals above 0, index >= cut, BH q below `q`, and `agree` of all families on its side. s1: the
    mirror, and more active on the anchors than on their twins. mixed: the arms' intervals lie on opposite sides.
    silent: fires on fewer than `silent` of the prompts.

    Args:
      instruction: None where it does not count, so that the demand arm decides alone.
      fires: [K], share of prompts on which the feature is active.
      anchor: [K], the demand arm in the anchors' family, where there is one.
    """
    arms = [demand] if instruction is None else [demand, instruction]
    index, se = mean_of_arms(demand, instruction)
    degrees = max(min(len(arm.families) for arm in arms) - 1, 1)
    adjusted = benjamini_hochberg(2 * stats.t.sf(np.abs(index) / se, degrees))
    families = np.concatenate([arm.families for arm in arms])
    out = np.full(len(index), "neither", dtype=object)
    for name, sign in (("s2", 1.0), ("s1", -1.0)):
        bound = np.min([arm.low if sign > 0 else -arm.high for arm in arms], axis=0)
        holds = (bound > 0) & (sign * index >= cut) & (adjusted < q) & ((sign * families > 0).mean(0) >= agree)
        out[holds & (True if name == "s2" or anchor is None else anchor < 0)] = name
    above, below = np.any([arm.low > 0 for arm in arms], axis=0), np.any([arm.high < 0 for arm in arms], axis=0)
    out[above & below] = "mixed"
    out[fires < silent] = "silent"
    return out
