"""Which features carry the contrast: streaming moments per family and feature, and the rule that selects.

`B` denotes pairs in a batch, `K` families, `L` layers, `F` features a layer, `R` relabelings. A pair has a generous (+)
and a selfish (-) prompt; d = z+ - z- is a feature's difference at the decision token. Nothing dense over prompts is
kept: batches are folded into `Moments` by Chan, Golub & LeVeque's update (1979), in float32.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.contrast.statistics import auroc, benjamini_hochberg, paired_t
from jaxmech.io.reprs import short_repr

_PRECISION = jax.lax.Precision.HIGHEST


class Moments(NamedTuple):
    """Sufficient statistics. Stance axis: 0 generous, 1 selfish.

    n [K] pairs; mean, m2 [2,L,K,F] of z; mean_d, m2_d [L,K,F]; positive, negative [L,K,F], pairs with d > 0, d < 0;
    active [2,L,K,F], pairs that fire; mean_g, m2_g [2,K] of the share given; c_zg [2,L,K,F], co-moment of z and g.
    """

    n: jax.Array
    mean: jax.Array
    m2: jax.Array
    mean_d: jax.Array
    m2_d: jax.Array
    positive: jax.Array
    negative: jax.Array
    active: jax.Array
    mean_g: jax.Array
    m2_g: jax.Array
    c_zg: jax.Array

    __repr__ = short_repr


def empty_moments(L: int, K: int, F: int) -> Moments:
    """Moments of no pairs."""
    shapes = {"n": (K,), "mean_g": (2, K), "m2_g": (2, K)}
    shapes |= dict.fromkeys(("mean", "m2", "active", "c_zg"), (2, L, K, F))
    # An array of its own for every field: they are donated together.
    return Moments(**{name: jnp.zeros(shapes.get(name, (L, K, F))) for name in Moments._fields})


def batch_moments(z: jax.Array, g: jax.Array, member: jax.Array) -> Moments:
    """Moments of one batch.

    Args:
      z: [2,L,B,F] activations at the decision token; g: [2,B] share given; member: [B,K], 1 where the pair belongs to
        the family, an all-zero row for padding.
    """
    n = member.sum(0)
    share = member / jnp.maximum(n, 1.0)  # [B,K]
    mean = lambda v: jnp.einsum("...bf,bk->...kf", v, share, precision=_PRECISION)  # noqa: E731
    total = lambda v: jnp.einsum("...bf,bk->...kf", v, member, precision=_PRECISION)  # noqa: E731
    back = lambda m: jnp.einsum("...kf,bk->...bf", m, member, precision=_PRECISION)  # noqa: E731
    z, d, g = z * member.any(1)[:, None], z[0] - z[1], g[..., None]  # g [2,B,1]
    mean_z, mean_d, mean_g = mean(z), mean(d), mean(g)
    off_z, off_d, off_g = z - back(mean_z), d - back(mean_d), g - back(mean_g)
    return Moments(
        n, mean_z, total(off_z**2), mean_d, total(off_d**2), total(1.0 * (d > 0)), total(1.0 * (d < 0)),
        total(1.0 * (z > 0)), mean_g[..., 0], total(off_g**2)[..., 0], total(off_z * off_g[:, None]),
    )  # fmt: skip


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of pairs."""
    n = a.n + b.n
    weight = b.n / jnp.maximum(n, 1.0)
    cross = a.n * weight

    def means(x, y, w):
        return x + (y - x) * w

    f, cf = weight[:, None], cross[:, None]
    shift_z, shift_d, shift_g = b.mean - a.mean, b.mean_d - a.mean_d, b.mean_g - a.mean_g
    return Moments(
        n=n,
        mean=means(a.mean, b.mean, f),
        m2=a.m2 + b.m2 + shift_z**2 * cf,
        mean_d=means(a.mean_d, b.mean_d, f),
        m2_d=a.m2_d + b.m2_d + shift_d**2 * cf,
        positive=a.positive + b.positive,
        negative=a.negative + b.negative,
        active=a.active + b.active,
        mean_g=means(a.mean_g, b.mean_g, weight),
        m2_g=a.m2_g + b.m2_g + shift_g**2 * cross,
        c_zg=a.c_zg + b.c_zg + shift_z * shift_g[:, None, :, None] * cf,
    )


def pool_families(m: Moments) -> Moments:
    """All families merged into one (K = 1): what a correlation over every prompt of a stance needs."""
    axis = {name: 0 for name in ("n",)} | {name: 1 for name in ("mean_g", "m2_g")}
    take = lambda k: Moments(  # noqa: E731
        **{f: jnp.take(v, jnp.array([k]), axis=axis.get(f, v.ndim - 2)) for f, v in m._asdict().items()}
    )
    out = take(0)
    for k in range(1, m.n.shape[0]):
        out = merge_moments(out, take(k))
    return out


def correlation_with_g(m: Moments) -> np.ndarray:
    """Pearson correlation of z with the share given within stance, [2,L,F]; 0 where either is constant."""
    pooled = pool_families(m)
    spread = np.sqrt(np.asarray(pooled.m2)[:, :, 0] * np.asarray(pooled.m2_g)[:, None])
    return np.divide(np.asarray(pooled.c_zg)[:, :, 0], spread, out=np.zeros_like(spread), where=spread > 0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a feature must show to be selected; all must hold. See `FeatureStats` for the quantities."""

    q: float = 0.01
    d_z: float = 0.8
    sign: float = 0.9
    sign_sparse: float = 0.75
    sparse_below: float = 0.9  # a feature that fires in fewer pairs than this, in either stance, counts as sparse
    auroc: float = 0.85
    fires: float = 0.25
    density: float = 0.2
    placebo_ratio: float = 3.0
    half_splits: float = 0.8
    half_split_p: float = 0.01


class FeatureStats(NamedTuple):
    """What the rule looks at, features flattened to m = L * F.

    difference, plus, minus [K,m] family means of d, z+ and z-; positive, negative [K,m], pairs with d > 0 and d < 0;
    pairs, their number; fires [2,m], share of pairs in which z+, z- is active; density [m], share of neutral
    text tokens on which it fires; placebo_d_z [m].
    """

    difference: np.ndarray
    plus: np.ndarray
    minus: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    pairs: float
    fires: np.ndarray
    density: np.ndarray
    placebo_d_z: np.ndarray

    __repr__ = short_repr


def feature_stats(m: Moments, placebo: Moments, density: np.ndarray) -> FeatureStats:
    """Flattens moments [L,K,F] of the stance and of the placebo contrast, and density [L,F]."""
    flat = lambda a: np.moveaxis(np.asarray(a, np.float64), -3, -2).reshape(*a.shape[:-3], a.shape[-2], -1)  # noqa: E731
    pairs = float(m.n.sum())
    fires = flat(m.active).sum(1) / pairs
    placebo_d_z = paired_t(flat(placebo.mean_d))[2]
    return FeatureStats(
        flat(m.mean_d), flat(m.mean)[0], flat(m.mean)[1], flat(m.positive), flat(m.negative), pairs, fires,
        np.asarray(density).reshape(-1), placebo_d_z,
    )  # fmt: skip


class FamilyTests(NamedTuple):
    """Over family means, each [m]: paired t, its p, BH q over live features, paired d_z; and the sign consistency."""

    t: np.ndarray
    p: np.ndarray
    q: np.ndarray
    d_z: np.ndarray
    sign: np.ndarray

    __repr__ = short_repr


def family_tests(s: FeatureStats) -> FamilyTests:
    t, p, d_z = paired_t(s.difference)
    live = s.fires.max(0) > 0
    q = np.ones_like(p)
    q[live] = benjamini_hochberg(p[live])
    return FamilyTests(t, p, q, d_z, np.maximum(s.positive.sum(0), s.negative.sum(0)) / s.pairs)


def criteria(s: FeatureStats, rule: Rule) -> dict[str, np.ndarray]:
    """Each criterion's verdict [m], half-splits and permutation apart."""
    _, _, q, d_z, consistent = family_tests(s)
    needed = np.where(s.fires.max(0) < rule.sparse_below, rule.sign_sparse, rule.sign)
    passed = {
        "q": q < rule.q,
        "d_z": np.abs(d_z) >= rule.d_z,
        "sign": consistent >= needed,
        "fires": s.fires.max(0) >= rule.fires,
        "density": s.density <= rule.density,
        "placebo": np.abs(d_z) >= rule.placebo_ratio * np.abs(s.placebo_d_z),
    }
    left = _pass_all(passed)
    area = np.full(len(q), 0.5)
    area[left] = auroc(s.plus[:, left], s.minus[:, left])  # the costly one, so only where it can still matter
    passed["auroc"] = np.abs(area - 0.5) >= rule.auroc - 0.5
    return passed


def flip_families(s: FeatureStats, flip: np.ndarray) -> FeatureStats:
    """The statistics if in the families `flip` [K] generous and selfish had been the other way round."""
    swap = lambda a, b: np.where(flip[:, None], b, a)  # noqa: E731
    return s._replace(
        difference=swap(s.difference, -s.difference),
        plus=swap(s.plus, s.minus),
        minus=swap(s.minus, s.plus),
        positive=swap(s.positive, s.negative),
        negative=swap(s.negative, s.positive),
    )


def permutation_p(difference: np.ndarray, *, key: jax.Array, R: int) -> np.ndarray:
    """Sign-flip permutation p-values [m] of the family differences [K,m]: the share of `sign_flips` under which |t| is
    as large as it is. 1 for features that are not finite.

    Under sign flips the sum of squares does not change, so comparing |mean| is comparing |t|: sums are enough.
    """
    K, m = difference.shape
    bits, together, low, high = _flip_codes(key, K, R)
    signs = _signs(2 ** (bits - together), high)
    cores = os.cpu_count() or 1
    width = min(max(1 << (-(-m // cores) - 1).bit_length(), _LEAST), _BLOCK)  # a few programs serve all numbers
    tile = _TILE if jax.default_backend() == "cpu" else width
    if m < width:
        difference = np.pad(difference, ((0, 0), (0, width - m)))
    columns = difference.shape[1]
    starts = np.minimum(np.arange(0, columns, width), columns - width)  # the last block overlaps the one before
    beaten = np.empty(columns, np.int32)

    def block(start: int) -> None:
        here = slice(start, start + width)
        part = difference[:, here].astype(np.float32)
        beaten[here] = _count_as_large(signs, part, low=low, bits=together, tile=tile)

    with ThreadPoolExecutor(cores) as threads:  # a loop inside a program runs on one core
        list(threads.map(block, starts))
    return np.maximum(beaten[:m], 1) / 2**bits  # flipping nothing counts, whatever the rounding


def sign_flips(key: jax.Array, K: int, R: int) -> np.ndarray:
    """Sign flips of K families, [2^r,K] of 1 and -1: the smallest power of two that is at least R, or all 2^K.

    They are a group, the first of which flips nothing, so p-values are exact, and not just close to those of all 2^K
    (Hemerik & Goeman 2018, doi:10.1007/s11749-017-0571-1; Koning & Hemerik 2023, doi:10.1093/biomet/asad050): all
    products of r flips, of which each turns a family that the other r - 1 leave alone, and other families at random.
    """
    bits, together, low, high = _flip_codes(key, K, R)
    return _signs(2**bits, np.array(low, np.uint32) | high << np.uint32(together))


def _flip_codes(key: jax.Array, K: int, R: int) -> tuple[int, int, tuple[int, ...], np.ndarray]:
    """r, how many of them are low, and the r bits of each family, the low ones apart from the high ones [K]: flip j
    turns a family whose bits have an odd number in common with those of j.

    The low bits are part of a program, so they are the same whatever the key.
    """
    bits = min(max(R - 1, 0).bit_length(), K)
    together = min(bits, _TOGETHER)
    low = np.random.default_rng(0).integers(0, 2**together, K, np.uint32)
    high = np.asarray(jax.random.bits(key, (K,), jnp.uint32)) % np.uint32(2 ** (bits - together))
    own = 2 ** np.arange(bits, dtype=np.uint32)  # so that no two flips are alike
    low[:bits], high[:bits] = own % 2**together, own >> together
    return bits, together, tuple(low.tolist()), high


def _signs(flips: int, codes: np.ndarray) -> np.ndarray:
    """[flips,K] float32 of families' bits [K]."""
    common = np.arange(flips, dtype=np.uint32)[:, None] & codes
    return 1 - 2 * (np.bitwise_count(common) % 2).astype(np.float32)


_TOGETHER = 7  # bits whose flips are summed at a time
_LEAST, _BLOCK = 512, 32768
"""Powers of two between which a call's number of features lies."""

_TILE = 64
"""Features at a time on a CPU: their differences stay in a core's nearest cache, and XLA, which shares out what it
thinks worth it, leaves a tile to one thread: for so short a piece of work a second one is a loss (jaxlib 0.10)."""


@partial(jax.jit, static_argnames=("low", "bits", "tile"))
def _count_as_large(
    signs: jax.Array, difference: jax.Array, *, low: tuple[int, ...], bits: int, tile: int
) -> jax.Array:
    """How many flips give a sum of differences [K,n] as large as the observed one, [n]; `tile` divides n.

    Every row of `signs` [.,K], which stands for the high bits of a flip, goes with all values of its low `bits`. The
    sums under all of these are a Walsh-Hadamard transform, one addition a flip and bit.
    """

    def one_tile(start):
        d = jax.lax.dynamic_slice(difference, (jnp.zeros_like(start), start), (len(low), tile))
        # A flip that leaves the sum as it is must count, whatever the rounding.
        observed = jnp.abs(d.sum(0)) - 1e-6 * jnp.abs(d).sum(0)

        def flips(count, sign):
            sums = [jnp.zeros((1, tile))] * 2**bits  # rows, never reshaped: so all of it is one loop for XLA
            for k, at in enumerate(low):
                sums[at] += sign[k] * d[k : k + 1]
            for total in _walsh_hadamard(sums):
                count += ~(jnp.abs(total) < observed)  # counts a NaN
            return count, None

        return jax.lax.scan(flips, jnp.zeros((1, tile), jnp.int32), signs)[0][0]

    return jax.lax.map(one_tile, jnp.arange(0, difference.shape[1], tile)).reshape(-1)


def _walsh_hadamard(x: list[jax.Array]) -> list[jax.Array]:
    """sum_i (-1)^popcount(i & j) x_i for every j."""
    if len(x) == 1:
        return x
    first, second = x[: len(x) // 2], x[len(x) // 2 :]
    both = list(zip(first, second, strict=True))
    return _walsh_hadamard([a + b for a, b in both]) + _walsh_hadamard([a - b for a, b in both])


def half_split_share(s: FeatureStats, rule: Rule, candidates: np.ndarray, *, splits: int, seed: int) -> np.ndarray:
    """Share of random half-splits of the families in which each candidate passes again, [len(candidates)].

    Within a half, p < `half_split_p` stands in for q: half the families cannot carry a correction over every feature,
    and the candidates have passed it with all of them.
    """
    K, rng = len(s.difference), np.random.default_rng(seed)
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

    __repr__ = short_repr


def select_features(s: FeatureStats, rule: Rule, permuted: np.ndarray, *, splits: int, seed: int) -> Selected:
    """The whole rule; `permuted` [m] are the features' sign-flip p-values."""
    return _select(s, rule, criteria(s, rule), permuted, splits=splits, seed=seed)


def _select(s: FeatureStats, rule: Rule, passed: dict, permuted: np.ndarray, *, splits: int, seed: int) -> Selected:
    passed = passed | {"permutation": permuted < rule.q}
    candidates = _pass_all(passed)
    stability = np.full(len(permuted), np.nan)
    if len(candidates):
        stability[candidates] = half_split_share(s, rule, candidates, splits=splits, seed=seed)
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
    seed: int,
) -> np.ndarray:
    """How many features the whole rule selects under each of R random relabelings of families, [R].

    Args:
      permutation: family differences [K,.] -> sign-flip p-values [.], asked for those that pass all the rest.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros(relabelings, np.int64)
    for i, flip in enumerate(rng.integers(0, 2, (relabelings, len(s.difference))).astype(bool)):
        relabelled = flip_families(s, flip)
        passed = criteria(relabelled, rule)
        left, permuted = _pass_all(passed), np.ones(s.difference.shape[1])
        if len(left):
            permuted[left] = permutation(relabelled.difference[:, left])
        counts[i] = _select(relabelled, rule, passed, permuted, splits=splits, seed=seed).chosen.sum()
    return counts


def top_budget(s: FeatureStats, share: float) -> np.ndarray:
    """The labelled budget mode: the `share` of all features with the largest |t| among those that fire, [m] bool."""
    t = np.where(s.fires.max(0) > 0, np.abs(paired_t(s.difference)[0]), -1.0)
    count = max(1, round(share * len(t)))
    chosen = np.zeros(len(t), bool)
    chosen[np.argsort(-t, kind="stable")[:count]] = True
    return chosen & (t > 0)
