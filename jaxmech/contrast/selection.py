"""Which features carry the contrast: what each must show to be selected, and how many would by chance.

`K` denotes families, `C` cells (a family and a pair of words), `W` pairs of words, `L` layers, `F` features per layer,
`m` all features, `S` sign flips, `R` relabelings. A pair has a plus (+) and a minus (-) prompt; d = z+ - z- is a
feature's difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxmech.contrast.flips import FlipTests, as_large_under, flip_tests
from jaxmech.contrast.moments import Moments
from jaxmech.contrast.statistics import auroc, benjamini_hochberg, paired_t
from jaxmech.io.arguments import rng_of
from jaxmech.io.reprs import short_repr
from jaxmech.io.settings import Checked


@dataclasses.dataclass(frozen=True)
class Rule(Checked):
    """What a feature must show to be selected; all must hold. See `FeatureStats` and `FamilyTests` for the quantities.

    max_t bounds the probability that any feature is false, q the share of false ones. sign is asked of pairs, families
    and, where there are at least three, pairs of words; flipped_sign of families whose worked examples teach the
    reverse.
    """

    max_t: float = 0.05
    q: float = 0.01
    d_z: float = 0.8
    sign: float = 0.9
    sign_sparse: float = 0.75
    sparse_below: float = 0.9  # a feature that fires in fewer pairs than this, at either pole, counts as sparse
    auroc: float = 0.85
    fires: float = 0.25
    density: float = 0.2
    control_ratio: float = 3.0
    flipped_sign: float = 0.75
    half_splits: float = 0.8
    half_split_p: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), 1 if field.name not in ("d_z", "control_ratio") else float("inf")
            if not 0 <= value <= most:
                what = "a share from 0 to 1" if most == 1 else "a number that is not negative"
                raise ValueError(f"{field.name}: expected {what}, got {value}")


_FEWEST_WORDS = 3
"""Pairs of words of which a share can be asked to agree."""


class Cells(NamedTuple):
    """Families crossed with pairs of words: total [C,m], the sum of d over a cell's pairs; its family and its pair of
    words, numbered from 0, and how many pairs of prompts it has, [C] each."""

    total: np.ndarray
    family: np.ndarray
    words: np.ndarray
    pairs: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)

    def by_words(self) -> np.ndarray:
        """Mean d of each pair of words, [W,m]."""
        member = np.arange(self.words.max() + 1)[:, None] == self.words
        return member @ self.total / (member @ self.pairs)[:, None]


class Flipped(NamedTuple):
    """Family means of d [K',m] where worked examples teach the reverse, and which of the K families each row is of, -1
    for another one."""

    difference: np.ndarray
    family: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


class FeatureStats(NamedTuple):
    """What the rule looks at, features flattened to m = L * F.

    difference, plus, minus [K,m] family means of d, z+ and z-; positive, negative [K,m], pairs with d > 0 and d < 0;
    active [2,K,m], pairs in which z+, z- is active; pairs, their number; density [m], share of neutral text tokens on
    which it fires; controls: name -> `control_size` [m]; cells and flipped, where there are any.
    """

    difference: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    active: np.ndarray
    pairs: float
    density: np.ndarray
    controls: Mapping[str, np.ndarray]
    cells: Cells | None = None
    flipped: Flipped | None = None

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def fires(self) -> np.ndarray:
        """The share of pairs in which z+, z- is active, [2,m]."""
        return self.active.sum(1, dtype=np.float64) / self.pairs

    @property
    def live(self) -> np.ndarray:
        return np.any(self.active, axis=(0, 1))

    def of(self, features: np.ndarray) -> FeatureStats:
        """Those of some features."""
        cells, flipped = self.cells, self.flipped
        return self._replace(
            **{name: getattr(self, name)[..., features] for name in (*_SWAPPED, "difference", "active", "density")},
            controls={name: size[features] for name, size in self.controls.items()},
            cells=cells and cells._replace(total=cells.total[:, features]),
            flipped=flipped and flipped._replace(difference=flipped.difference[:, features]),
        )


_SWAPPED = {"plus": "minus", "minus": "plus", "positive": "negative", "negative": "positive"}


def feature_stats(
    m: Moments,
    controls: Mapping[str, np.ndarray],
    density: np.ndarray,
    *,
    cells: Cells | None = None,
    flipped: Moments | None = None,
) -> FeatureStats:
    """Flattens moments [L,K,F] of the contrast; families without pairs of it are left out.

    Args:
      controls: name -> `control_size`; none: nothing to compare with. density: [L,F].
      cells: what the cells of the moments are; their totals are taken from these.
      flipped: moments over the same families, where worked examples teach the reverse.
    """
    n = np.asarray(m.n)
    kept = np.flatnonzero(n)
    row = np.full(len(n), -1)  # of each family, among those that are kept
    row[kept] = np.arange(len(kept))
    if cells is not None:
        cells = cells._replace(total=_flat(m.cells), family=row[cells.family])
    taught = None
    if flipped is not None:
        tried = np.flatnonzero(np.asarray(flipped.n))
        taught = Flipped(_flat(flipped.mean_d)[tried], row[tried])
    plus, minus = _flat(m.mean)[:, kept]
    return FeatureStats(
        _flat(m.mean_d)[kept], plus, minus, _flat(m.positive)[kept], _flat(m.negative)[kept], _flat(m.active)[:, kept],
        float(n.sum()), np.asarray(density).reshape(-1), controls, cells, taught,
    )  # fmt: skip


def control_size(m: Moments, *, oriented: bool = True) -> np.ndarray:
    """How far a control moves each feature [m], in units of activation, over the families that have pairs of it.

    The absolute mean of d over families. Where it means nothing which prompt of a pair comes first, as with a placebo,
    one pair would take away what another adds; then the root mean square of d over pairs and families,
    sqrt(mean over families of (sum of d^2 over a family's pairs / their number)).
    """
    n = np.asarray(m.n)
    tried = np.flatnonzero(n)
    mean = _flat(m.mean_d)[tried].astype(np.float64)
    if oriented:
        return np.abs(mean.mean(0))
    return np.sqrt((mean**2 + _flat(m.m2_d)[tried] / n[tried, None]).mean(0))


def _flat(a: jax.Array) -> np.ndarray:
    """[..,L,K,F] as [..,K,L * F]."""
    moved = np.moveaxis(np.asarray(a), -3, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def strongest_control(s: FeatureStats) -> tuple[np.ndarray, np.ndarray]:
    """The name of the control that moves each feature most, "" where none does, and its size, [m] each. A size that is
    undefined stays so, and fails the rule."""
    if not s.controls:
        return np.full(len(s.density), ""), np.zeros(len(s.density))
    sizes = np.stack(list(s.controls.values()))
    most = np.nan_to_num(sizes, nan=np.inf).argmax(0)
    size = np.take_along_axis(sizes, most[None], 0)[0]
    return np.where(size != 0, np.array(list(s.controls))[most], ""), size


class FamilyTests(NamedTuple):
    """Inference over families and over pairs of words, each [m]; NaN where there is nothing to compute it from.

    t, p, d_z: paired t over family means, its p, and mean / SD; q: p adjusted over live features (Benjamini &
    Hochberg). sign: the share of pairs, or of families if that is smaller, that go the way of the mean difference;
    sign_words: that of pairs of words; flipped_sign: that of families whose worked examples teach the reverse.
    t_words: paired t over the means of pairs of words. min_f: t^2 t_words^2 / (t^2 + t_words^2), the lower bound min F'
    of F' for families and words as random effects (Clark 1973, doi:10.1016/S0022-5371(73)80014-3).
    """

    t: np.ndarray
    p: np.ndarray
    q: np.ndarray
    d_z: np.ndarray
    sign: np.ndarray
    sign_words: np.ndarray
    t_words: np.ndarray
    min_f: np.ndarray
    flipped_sign: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def family_tests(s: FeatureStats) -> FamilyTests:
    return _family_tests(s, _q(s.difference, s.live))


def _q(difference: np.ndarray, live: np.ndarray) -> np.ndarray:
    q = np.ones(len(live))
    q[live] = benjamini_hochberg(paired_t(difference)[1][live])
    return q


def _family_tests(s: FeatureStats, q: np.ndarray) -> FamilyTests:
    t, p, d_z = paired_t(s.difference)
    way, undefined = np.sign(t), np.full_like(t, np.nan)
    of_pairs = np.where(way > 0, s.positive.sum(0, dtype=np.float64), s.negative.sum(0, dtype=np.float64)) / s.pairs
    sign = np.minimum(of_pairs, _share_that_go(way, s.difference))
    sign_words, t_words, min_f = undefined, undefined, undefined
    if s.cells is not None and s.cells.words.any():
        by_words = s.cells.by_words()
        sign_words, t_words = _share_that_go(way, by_words), paired_t(by_words)[0]
        with np.errstate(divide="ignore"):
            min_f = 1 / (1 / t**2 + 1 / t_words**2)
    flipped_sign = undefined if s.flipped is None else _share_that_go(way, s.flipped.difference)
    return FamilyTests(t, p, q, d_z, sign, sign_words, t_words, min_f, flipped_sign)


def _share_that_go(way: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The share [m] of differences [..,m] of the sign `way` [m]; 0 where that is 0."""
    return ((np.sign(differences) == way) & (way != 0)).mean(0)


def criteria(s: FeatureStats, rule: Rule, tests: FamilyTests, flips: FlipTests) -> dict[str, np.ndarray]:
    """Each criterion's verdict [m], except half-splits; `words` and `flipped` only where there is something to tell
    them from."""
    fires = s.fires.max(0)
    needed = np.where(fires < rule.sparse_below, rule.sign_sparse, rule.sign)
    mean = np.abs(s.difference.mean(0, dtype=np.float64))
    passed = {
        "max_t": flips.p_max <= rule.max_t,
        "q": tests.q < rule.q,
        "d_z": np.abs(tests.d_z) >= rule.d_z,
        "sign": tests.sign >= needed,
        "words": tests.sign_words >= needed,
        "fires": fires >= rule.fires,
        "density": s.density <= rule.density,
        "control": mean >= rule.control_ratio * strongest_control(s)[1],
        "flipped": tests.flipped_sign >= rule.flipped_sign,
        "permutation": flips.p < rule.q,
    }
    if s.cells is None or s.cells.words.max() + 1 < _FEWEST_WORDS:
        del passed["words"]
    if s.flipped is None:
        del passed["flipped"]
    left = np.flatnonzero(_all(passed))
    area = np.full(len(mean), 0.5)
    area[left] = auroc(s.plus[:, left], s.minus[:, left])  # the costly one, so only where it can still matter
    passed["auroc"] = np.abs(area - 0.5) >= rule.auroc - 0.5
    return passed


def _all(passed: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce(list(passed.values()))


def flip_families(s: FeatureStats, flip: np.ndarray) -> FeatureStats:
    """The statistics with plus and minus swapped in the families `flip` [K]."""
    sign = np.append(np.where(flip, -1, 1), 1).astype(np.float32)  # the last for a family that is not among them, -1
    cells, flipped = s.cells, s.flipped
    return s._replace(
        **{a: np.where(flip[:, None], getattr(s, b), getattr(s, a)) for a, b in _SWAPPED.items()},
        difference=s.difference * sign[:-1, None],
        active=np.where(flip[:, None], s.active[::-1], s.active),
        cells=cells and cells._replace(total=cells.total * sign[cells.family][:, None]),
        flipped=flipped and flipped._replace(difference=flipped.difference * sign[flipped.family][:, None]),
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


def select_features(
    s: FeatureStats, rule: Rule, tests: FamilyTests, flips: FlipTests, *, splits: int, key: jax.Array
) -> Selected:
    """The whole rule; flips: `flip_tests` of the differences, over live features."""
    return _with_half_splits(s, rule, criteria(s, rule, tests, flips), splits=splits, key=key)


def _with_half_splits(
    s: FeatureStats, rule: Rule, passed: Mapping[str, np.ndarray], *, splits: int, key: jax.Array
) -> Selected:
    candidates = np.flatnonzero(_all(passed))
    stability = np.full(len(s.density), np.nan)
    if len(candidates):
        stability[candidates] = half_split_share(s, rule, candidates, splits=splits, key=key)
    passed = {**passed, "half_splits": np.nan_to_num(stability) >= rule.half_splits}
    return Selected(_all(passed), passed, stability)


def draw_relabelings(flips: FlipTests, *, relabelings: int, key: jax.Array) -> np.ndarray:
    """Rows [R] of `flips.signs`, `relabelings` different ones, or all but the one that turns no family if there are
    fewer."""
    others = len(flips.signs) - 1
    return 1 + rng_of(key).choice(others, min(relabelings, others), replace=False)


def expected_false(
    s: FeatureStats, rule: Rule, flips: FlipTests, rows: np.ndarray, *, splits: int, key: jax.Array
) -> np.ndarray:
    """How many features the whole rule selects with plus and minus swapped in the families that each of the flips
    `rows` turns, [R].

    Everything is computed again, step by step for the features that have passed so far, and the largest |t| first.

    Args:
      key: of the half-splits.
    """
    live, rare = s.live, s.density <= rule.density
    counts = np.zeros(len(rows), np.int64)
    largest = as_large_under(flips, s.difference, rows, most=rule.max_t, among=rare)
    for i, (sign, features) in enumerate(zip(flips.signs[rows], largest, strict=True)):
        if not len(features):
            continue
        part, nothing = flip_families(s.of(features), sign < 0), np.zeros(len(features))
        again = flips._replace(p=flip_tests(part.difference, flips.signs).p, p_max=nothing)
        passed = criteria(part, rule, _family_tests(part, nothing), again)
        if _all(passed).any():  # q takes all features, so it comes last
            passed["q"] = _q(s.difference * sign[:, None], live)[features] < rule.q
            counts[i] = _with_half_splits(part, rule, passed, splits=splits, key=key).chosen.sum()
    return counts


def top_budget(s: FeatureStats, share: float) -> np.ndarray:
    """The labelled budget mode: the `share` of all features with the largest |t| among those that fire, [m] bool."""
    t = np.where(s.fires.max(0) > 0, np.abs(paired_t(s.difference)[0]), -1.0)
    count = max(1, round(share * len(t)))
    chosen = np.zeros(len(t), bool)
    chosen[np.argsort(-t, kind="stable")[:count]] = True
    return chosen & (t > 0)
