"""Which features carry the contrast: what each must show to be selected, and how many would by chance.

`K` denotes families, `L` layers, `F` features per layer, `m` all features, `R` relabelings. A pair has a plus (+) and a
minus (-) prompt; d = z+ - z- is a feature's difference at the decision token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxmech.contrast.moments import Moments
from jaxmech.contrast.statistics import auroc, benjamini_hochberg, paired_t
from jaxmech.io.arguments import rng_of
from jaxmech.io.reprs import short_repr
from jaxmech.io.settings import Checked


@dataclasses.dataclass(frozen=True)
class Rule(Checked):
    """What a feature must show to be selected; all must hold. See `FeatureStats` for the quantities."""

    q: float = 0.01
    d_z: float = 0.8
    sign: float = 0.9
    sign_sparse: float = 0.75
    sparse_below: float = 0.9  # a feature that fires in fewer pairs than this, at either pole, counts as sparse
    auroc: float = 0.85
    fires: float = 0.25
    density: float = 0.2
    control_ratio: float = 3.0
    half_splits: float = 0.8
    half_split_p: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), 1 if field.name not in ("d_z", "control_ratio") else float("inf")
            if not 0 <= value <= most:
                what = "a share from 0 to 1" if most == 1 else "a number that is not negative"
                raise ValueError(f"{field.name}: expected {what}, got {value}")


class FeatureStats(NamedTuple):
    """What the rule looks at, features flattened to m = L * F.

    difference, plus, minus [K,m] family means of d, z+ and z-; positive, negative [K,m], pairs with d > 0 and d < 0;
    pairs, their number; fires [2,m], share of pairs in which z+, z- is active; density [m], share of neutral
    text tokens on which it fires; control_d_z [m], of the control that moves it most.
    """

    difference: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    pairs: float
    fires: np.ndarray
    density: np.ndarray
    control_d_z: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def feature_stats(m: Moments, controls: Sequence[Moments], density: np.ndarray) -> FeatureStats:
    """Flattens moments [L,K,F] of the contrast and of controls (none: nothing to compare with), and density [L,F]."""
    flat = lambda a: np.moveaxis(np.asarray(a, np.float64), -3, -2).reshape(*a.shape[:-3], a.shape[-2], -1)  # noqa: E731
    pairs = float(m.n.sum())
    fires = flat(m.active).sum(1) / pairs
    density = np.asarray(density).reshape(-1)
    d_z = np.stack([paired_t(flat(control.mean_d))[2] for control in controls] or [np.zeros_like(density, np.float64)])
    strongest = np.nan_to_num(np.abs(d_z), nan=np.inf).argmax(0)  # what is undefined stays so, and fails the rule
    control_d_z = np.take_along_axis(d_z, strongest[None], 0)[0]
    return FeatureStats(
        flat(m.mean_d), flat(m.mean)[0], flat(m.mean)[1], flat(m.positive), flat(m.negative), pairs, fires,
        density, control_d_z,
    )  # fmt: skip


class FamilyTests(NamedTuple):
    """Over family means, each [m]: paired t, its p, BH q over live features, paired d_z; and the sign consistency."""

    t: np.ndarray
    p: np.ndarray
    q: np.ndarray
    d_z: np.ndarray
    sign: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def family_tests(s: FeatureStats) -> FamilyTests:
    t, p, d_z = paired_t(s.difference)
    live = s.fires.max(0) > 0
    q = np.ones_like(p)
    q[live] = benjamini_hochberg(p[live])
    return FamilyTests(t, p, q, d_z, np.maximum(s.positive.sum(0), s.negative.sum(0)) / s.pairs)


def criteria(s: FeatureStats, rule: Rule) -> dict[str, np.ndarray]:
    """Each criterion's verdict [m], except half-splits and permutation."""
    _, _, q, d_z, consistent = family_tests(s)
    needed = np.where(s.fires.max(0) < rule.sparse_below, rule.sign_sparse, rule.sign)
    passed = {
        "q": q < rule.q,
        "d_z": np.abs(d_z) >= rule.d_z,
        "sign": consistent >= needed,
        "fires": s.fires.max(0) >= rule.fires,
        "density": s.density <= rule.density,
        "control": np.abs(d_z) >= rule.control_ratio * np.abs(s.control_d_z),
    }
    left = _pass_all(passed)
    area = np.full(len(q), 0.5)
    area[left] = auroc(s.plus[:, left], s.minus[:, left])  # the costly one, so only where it can still matter
    passed["auroc"] = np.abs(area - 0.5) >= rule.auroc - 0.5
    return passed


def flip_families(s: FeatureStats, flip: np.ndarray) -> FeatureStats:
    """The statistics with plus and minus swapped in the families `flip` [K]."""

    def swap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(flip[:, None], b, a)

    return s._replace(
        difference=swap(s.difference, -s.difference),
        plus=swap(s.plus, s.minus),
        minus=swap(s.minus, s.plus),
        positive=swap(s.positive, s.negative),
        negative=swap(s.negative, s.positive),
    )


def half_split_share(s: FeatureStats, rule: Rule, candidates: np.ndarray, *, splits: int, key: jax.Array) -> np.ndarray:
    """Share of random half-splits of the families in which each candidate passes again, [len(candidates)].

    Within a half, p < `half_split_p` stands in for q: half the families cannot carry a correction over every feature,
    and the candidates have passed it with all of them.
    """
    K, rng = len(s.difference), rng_of(key)
    share = np.zeros(len(candidates))
    for _ in range(splits):
        half = rng.permutation(K)[: K // 2]
        _, p, d_z = paired_t(s.difference[np.ix_(half, candidates)])
        area = auroc(s.plus[np.ix_(half, candidates)], s.minus[np.ix_(half, candidates)])
        share += (p < rule.half_split_p) & (np.abs(d_z) >= rule.d_z) & (np.abs(area - 0.5) >= rule.auroc - 0.5)
    return share / splits


class Selected(NamedTuple):
    """chosen [m] bool; passed: criterion -> [m]; stability [m], NaN where a cheaper criterion failed already."""

    chosen: np.ndarray
    passed: dict[str, np.ndarray]
    stability: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def select_features(s: FeatureStats, rule: Rule, permuted: np.ndarray, *, splits: int, key: jax.Array) -> Selected:
    """The whole rule; `permuted` [m] are the features' sign-flip p-values."""
    return _select(s, rule, criteria(s, rule), permuted, splits=splits, key=key)


def _select(
    s: FeatureStats, rule: Rule, passed: dict, permuted: np.ndarray, *, splits: int, key: jax.Array
) -> Selected:
    passed = passed | {"permutation": permuted < rule.q}
    candidates = _pass_all(passed)
    stability = np.full(len(permuted), np.nan)
    if len(candidates):
        stability[candidates] = half_split_share(s, rule, candidates, splits=splits, key=key)
    passed["half_splits"] = np.nan_to_num(stability) >= rule.half_splits
    return Selected(passed["half_splits"].copy(), passed, stability)


def _pass_all(passed: dict[str, np.ndarray]) -> np.ndarray:
    return np.flatnonzero(np.logical_and.reduce(list(passed.values())))


def expected_false(
    s: FeatureStats,
    rule: Rule,
    permutation: Callable[[np.ndarray], np.ndarray],
    *,
    relabelings: int,
    splits: int,
    key: jax.Array,
) -> np.ndarray:
    """How many features the whole rule selects under each of R random relabelings of families, [R].

    Args:
      permutation: family differences [K,.] -> sign-flip p-values [.], called for those that pass everything else.
    """
    rng = rng_of(jax.random.fold_in(key, 1))
    counts = np.zeros(relabelings, np.int64)
    for i, flip in enumerate(rng.integers(0, 2, (relabelings, len(s.difference))).astype(bool)):
        relabelled = flip_families(s, flip)
        passed = criteria(relabelled, rule)
        left, permuted = _pass_all(passed), np.ones(s.difference.shape[1])
        if len(left):
            permuted[left] = permutation(relabelled.difference[:, left])
        counts[i] = _select(relabelled, rule, passed, permuted, splits=splits, key=key).chosen.sum()
    return counts


def top_budget(s: FeatureStats, share: float) -> np.ndarray:
    """The labelled budget mode: the `share` of all features with the largest |t| among those that fire, [m] bool."""
    t = np.where(s.fires.max(0) > 0, np.abs(paired_t(s.difference)[0]), -1.0)
    count = max(1, round(share * len(t)))
    chosen = np.zeros(len(t), bool)
    chosen[np.argsort(-t, kind="stable")[:count]] = True
    return chosen & (t > 0)
