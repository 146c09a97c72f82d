"""W6: a contrast's tests over a million features, against vectorised NumPy and SciPy."""

from __future__ import annotations

import jax
import numpy as np
from scipy import stats

from jaxmech.contrast.flips import permutation_p, sign_flips
from jaxmech.contrast.statistics import benjamini_hochberg, paired_t
from peers.bench import Bench
from peers.results import Row
from peers.timing import Peer, compare

FAMILIES = 32
CHUNK = 4096
"""Features at a time: their sums under all sign flips, 16 MB, stay in the processor's cache."""


BATCH = 50
"""Flips at a time over all features: their sums are 200 MB."""


def plain_tests(difference: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, q and the sign-flip p [m] of family differences [K,m], under signs [R,K]: SciPy's own tests over all features
    at once, a product for a batch of flips."""
    t, p = stats.ttest_1samp(difference, 0.0)
    observed = np.abs(difference.sum(0)) * np.float32(1 - 1e-6)
    beaten = np.zeros(difference.shape[1], np.int64)
    for start in range(0, len(signs), BATCH):
        beaten += (np.abs(signs[start : start + BATCH] @ difference) >= observed).sum(0)
    return t, stats.false_discovery_control(p), beaten / len(signs)


def blocked_tests(difference: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """t, q and the sign-flip p [m] of family differences [K,m], under signs [R,K]: the same by hand, chunk by
    chunk, so that nothing leaves the processor's cache."""
    K, m = difference.shape
    t, p, beaten = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.int64)
    for start in range(0, m, CHUNK):
        here = slice(start, start + CHUNK)
        x = difference[:, here]
        t[here] = x.mean(0) / (x.std(0, ddof=1) / np.float32(np.sqrt(K)))
        p[here] = 2 * stats.t.sf(np.abs(t[here]), K - 1)
        sums = signs @ x
        np.abs(sums, out=sums)
        beaten[here] = np.count_nonzero(sums >= np.abs(x.sum(0)) * np.float32(1 - 1e-6), axis=0)
    return t, stats.false_discovery_control(p), beaten / len(signs)


def contrast(bench: Bench) -> list[Row]:
    """W6."""
    m, R = bench.sizes.tests, bench.sizes.flips
    rng = np.random.default_rng(0)
    difference = rng.standard_normal((FAMILIES, m), np.float32)
    difference[:, ::50] += 1  # a share of features that carry the contrast
    key = jax.random.key(0)
    signs = sign_flips(FAMILIES, key=key, R=R)

    def ours():
        t, p, _ = paired_t(difference)
        return np.asarray(t), np.asarray(benjamini_hochberg(p)), permutation_p(difference, key=key, R=R)

    def furthest(a, b):
        """Relative for t; a sum that ties with the observed one counts or not by its rounding, so p may differ by a
        few flips in R, and its mean is compared."""
        (t, q, p), (peer_t, peer_q, peer_p) = a, b
        far = np.abs(p - peer_p).mean()
        return max(float(np.abs(t - peer_t).max() / np.abs(peer_t).max()), float(np.abs(q - peer_q).max()), float(far))

    return compare(
        "W6",
        f"t, BH and {len(signs):,} sign flips, {m:,} features × {FAMILIES} families",
        ours,
        [
            Peer("NumPy and SciPy, vectorised", lambda: plain_tests(difference, signs), furthest, most=3),
            Peer("NumPy, blocked by hand for the cache", lambda: blocked_tests(difference, signs), furthest, most=3),
        ],
        runs=bench.runs,
    )
