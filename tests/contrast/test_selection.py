"""Streaming moments against NumPy on all data at once, the rule on planted features, and its null."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.contrast import flips, selection
from jaxmech.contrast.flips import permutation_p, sign_flips
from jaxmech.contrast.moments import batch_moments, correlation_with_g, empty_moments, merge_moments
from jaxmech.io.arguments import rng_of

L, K, F = 2, 6, 5


def data(pairs=24, seed=0):
    rng = np.random.default_rng(seed)
    family = np.arange(pairs) % K
    z = np.maximum(rng.normal(0.3, 1.0, (2, L, pairs, F)) + rng.normal(0, 0.5, (K, 1))[family], 0).astype(np.float32)
    return z, rng.uniform(size=(2, pairs)).astype(np.float32), family


def streamed(z, g, family, batch):
    moments = empty_moments(L, K, F)
    for start in range(0, len(family), batch):
        at = np.arange(start, start + batch)
        real, at = at < len(family), np.minimum(at, len(family) - 1)
        member = (np.arange(K) == family[at][:, None]) * real[:, None] * 1.0
        moments = merge_moments(moments, batch_moments(z[:, :, at], g[:, at], jnp.asarray(member, jnp.float32)))
    return moments


@pytest.mark.slow
@pytest.mark.parametrize("batch", [24, 5, 1])
def test_streaming_equals_all_at_once(batch):
    z, g, family = data()
    m = streamed(z, g, family, batch)
    d = z[0] - z[1]
    for k in range(K):
        here = family == k
        n = here.sum()
        np.testing.assert_allclose(m.mean[:, :, k], z[:, :, here].mean(2), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.m2[:, :, k], z[:, :, here].var(2) * n, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(m.m2_d[:, k], d[:, here].var(1) * n, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(m.positive[:, k], (d[:, here] > 0).sum(1))
        np.testing.assert_array_equal(m.active[:, :, k], (z[:, :, here] > 0).sum(2))
        g_off = g[:, here] - g[:, here].mean(1, keepdims=True)
        np.testing.assert_allclose(
            m.c_zg[:, :, k], np.einsum("slbf,sb->slf", z[:, :, here], g_off), rtol=1e-3, atol=1e-4
        )


def test_correlation_equals_numpy():
    z, g, family = data(60)
    got = correlation_with_g(streamed(z, g, family, 7))
    for s in range(2):
        for layer in range(L):
            for f in range(F):
                assert got[s, layer, f] == pytest.approx(np.corrcoef(z[s, layer, :, f], g[s])[0, 1], abs=1e-4)


def planted(K=16, m=300, found=3, seed=0):
    """Family differences of which the first `found` features are real, the next two fire with the placebo too."""
    rng = np.random.default_rng(seed)
    minus = np.abs(rng.normal(1.0, 0.3, (K, m)))
    plus = np.abs(minus + rng.normal(0, 0.3, (K, m)))
    plus[:, : found + 2] = minus[:, : found + 2] + 2.0 + rng.normal(0, 0.2, (K, found + 2))
    d = plus - minus
    placebo = rng.normal(0, 0.2, m)
    placebo[found : found + 2] = 5.0
    fires = np.ones((2, m))
    return selection.FeatureStats(
        d, plus, minus, 2.0 * (d > 0), 2.0 * (d < 0), 2.0 * K, fires, np.full(m, 0.05), placebo
    )  # fmt: skip


def test_the_rule_finds_what_was_planted_and_no_placebo():
    s = planted()
    permuted = permutation_p(s.difference, key=jax.random.key(0), R=1000)
    chosen = selection.select_features(s, selection.Rule(), permuted, splits=20, key=jax.random.key(0))
    assert set(np.flatnonzero(chosen.chosen)) == {0, 1, 2}
    assert selection.top_budget(s, 5 / 300).sum() == 5


def test_the_null_selects_next_to_nothing():
    s = planted()
    permutation = partial(permutation_p, key=jax.random.key(0), R=1000)
    assert (
        selection.expected_false(
            s, selection.Rule(), permutation, relabelings=40, splits=10, key=jax.random.key(1)
        ).mean()
        <= 0.1
    )


def test_the_null_is_the_whole_rule_on_relabelled_families():
    """With criteria so loose that a good many features pass by chance, against the rule on each relabelling."""
    s, rule = planted(), selection.Rule(q=0.3, d_z=0.1, sign=0.5, control_ratio=0.0, auroc=0.6, half_splits=0.0)
    permutation = partial(permutation_p, key=jax.random.key(0), R=1000)
    got = selection.expected_false(s, rule, permutation, relabelings=6, splits=2, key=jax.random.key(1))
    flips = rng_of(jax.random.fold_in(jax.random.key(1), 1)).integers(0, 2, (6, len(s.difference))).astype(bool)
    for count, flip in zip(got, flips, strict=True):
        again = selection.flip_families(s, flip)
        alone = selection.select_features(again, rule, permutation(again.difference), splits=2, key=jax.random.key(1))
        assert count == alone.chosen.sum()
    assert got.max() > 0


def test_correlated_but_dense_or_rare_features_fail():
    s = planted()
    permuted = permutation_p(s.difference, key=jax.random.key(0), R=1000)
    density, fires = s.density.copy(), s.fires.copy()
    density[0], fires[:, 1] = 0.5, 0.1
    chosen = selection.select_features(
        s._replace(density=density, fires=fires), selection.Rule(), permuted, splits=20, key=jax.random.key(0)
    )
    assert not chosen.passed["density"][0] and not chosen.passed["fires"][1]
    assert set(np.flatnonzero(chosen.chosen)) == {2}


@pytest.mark.slow
def test_permutation_p_equals_a_plain_loop():
    d = np.random.default_rng(3).normal(0.4, 1.0, (12, 6)).astype(np.float32)
    R, key = 256, jax.random.key(5)
    t = lambda x: np.abs(x.mean(0) / x.std(0, ddof=1))  # noqa: E731
    count = sum(t(s[:, None] * d) >= t(d) * (1 - 1e-6) for s in sign_flips(12, key=key, R=R))
    np.testing.assert_allclose(permutation_p(d, key=key, R=R), count / R)


@pytest.mark.parametrize("K, m, R", [(7, 11, 60), (6, 4, 7), (6, 4, 64), (13, 9, 1), (70, 5, 1000), (3, 5, 1000)])
def test_permutation_p_over_many_blocks(monkeypatch, K, m, R):
    """Several blocks, the last one padded, more and fewer families than independent flips, sparse features full of
    ties."""
    monkeypatch.setattr(flips, "_SUMS", 128)
    rng, key = np.random.default_rng(K), jax.random.key(1)
    d = rng.normal(0.2, 1.0, (K, m)) * (rng.uniform(size=(K, m)) < 0.5)
    signs = sign_flips(K, key=key, R=R).astype(np.float64)
    d = d.astype(np.float32)
    count = (np.abs(signs @ d) >= np.abs(d.sum(0, dtype=np.float64)) - 1e-6 * np.abs(d).sum(0)).sum(0)
    np.testing.assert_allclose(permutation_p(d, key=key, R=R), count / len(signs))


@pytest.mark.parametrize(
    "K, R, flips", [(32, 1000, 1024), (32, 1024, 1024), (11, 1000, 1024), (4, 1000, 16), (9, 1, 1)]
)
def test_sign_flips_are_a_group(K, R, flips):
    signs = sign_flips(K, key=jax.random.key(2), R=R)
    assert signs.shape == (flips, K) and set(signs.ravel()) <= {-1, 1} and (signs[0] == 1).all()
    as_bits = {tuple(row) for row in signs < 0}
    assert len(as_bits) == flips
    assert flips in (1, 2**K) or (signs[1:] < 0).sum(1).min() >= K // 8  # none turns next to nothing
    if flips > 1:
        products = (signs[:, None] * signs[None, :: flips // 16]).reshape(-1, K) < 0
        assert {tuple(row) for row in products} <= as_bits


def test_features_that_are_not_finite_have_no_small_p():
    d = np.ones((8, 3), np.float32)
    d[2, 0], d[3, 1] = np.nan, np.inf
    np.testing.assert_array_equal(permutation_p(d, key=jax.random.key(0), R=1000), [1, 1, 2 / 256])


def test_p_values_of_sign_flips_are_exact():
    """Without an effect, p is at most a in a share a of all cases: of families of unlike spread and heavy tails too."""
    rng = np.random.default_rng(0)
    d = rng.standard_t(2, (24, 20_000)) * rng.uniform(0.1, 3, (24, 1))
    p = permutation_p(d.astype(np.float32), key=jax.random.key(0), R=1000)
    for a in (0.01, 0.05, 0.3):
        assert abs((p <= a).mean() - a) < 4 * np.sqrt(a * (1 - a) / 20_000) + 1 / 1024


def test_flipping_families_twice_is_nothing():
    s, flip = planted(), np.arange(16) % 3 == 0
    for a, b in zip(selection.flip_families(selection.flip_families(s, flip), flip), s, strict=True):
        np.testing.assert_array_equal(a, b)
