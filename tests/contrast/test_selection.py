"""Streaming moments against NumPy on all data at once, the rule on planted features, and its null."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmech.contrast import flips, selection
from jaxmech.contrast.flips import flip_tests, permutation_p, sign_flips
from jaxmech.contrast.moments import batch_moments, correlation_with_g, empty_moments, merge_moments

L, K, F = 2, 6, 5
RULE = selection.Rule()


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
    fires = np.full((2, K, m), 2.0)
    return selection.FeatureStats(
        d, plus, minus, 2.0 * (d > 0), 2.0 * (d < 0), fires, 2.0 * K, np.full(m, 0.05), {"placebo": np.abs(placebo)}
    )  # fmt: skip


def flipped(s, R=1000):
    return flip_tests(s.difference, sign_flips(len(s.difference), key=jax.random.key(0), R=R), live=s.live)


def selected(s, rule=RULE, *, splits=20, key=0):
    tests = selection.family_tests(s)
    return selection.select_features(s, rule, tests, flipped(s), splits=splits, key=jax.random.key(key))


def relabelled(s, rule=RULE, *, relabelings, splits):
    """How many are selected under each relabelling, and which families each turns."""
    flips = flipped(s)
    rows = selection.draw_relabelings(flips, relabelings=relabelings, key=jax.random.key(1))
    counts = selection.expected_false(s, rule, flips, rows, splits=splits, key=jax.random.key(1))
    return counts, flips.signs[rows] < 0


def test_the_rule_finds_what_was_planted_and_no_placebo():
    s = planted()
    chosen = selected(s)
    assert set(np.flatnonzero(chosen.chosen)) == {0, 1, 2}
    assert selection.top_budget(s, 5 / 300).sum() == 5


def test_the_null_selects_next_to_nothing():
    assert relabelled(planted(), relabelings=200, splits=10)[0].mean() <= 0.1


@pytest.mark.parametrize("loose", [{}, {"max_t": 1.0}])
def test_the_null_is_the_whole_rule_on_relabelled_families(loose):
    """With criteria so loose that a good many features pass by chance, against the rule on each relabelling."""
    rule = selection.Rule(
        **{"max_t": 0.9, "q": 0.3, "d_z": 0.1, "sign": 0.5, "control_ratio": 0.0, "auroc": 0.6, "half_splits": 0.0}
        | loose
    )
    s = with_words_and_flipped_examples(planted())
    got, flips = relabelled(s, rule, relabelings=6, splits=2)
    for count, flip in zip(got, flips, strict=True):
        assert count == selected(selection.flip_families(s, flip), rule, splits=2, key=1).chosen.sum()
    assert got.max() > 0 and flips.any(1).all() and len({tuple(flip) for flip in flips}) == 6


def with_words_and_flipped_examples(s):
    """Three pairs of words, of which a family has two, and flipped examples in half of the families and in another."""
    rng, (K, m) = np.random.default_rng(2), s.difference.shape
    family, words = np.repeat(np.arange(K), 2), np.arange(2 * K) % 3
    cells = selection.Cells(s.difference[family] + rng.normal(0, 0.1, (2 * K, m)), family, words, np.ones(2 * K))
    reverse = np.vstack([s.difference[: K // 2], np.ones((1, m))])
    return s._replace(cells=cells, flipped=selection.Flipped(reverse, np.append(np.arange(K // 2), -1)))


def test_there_are_no_more_relabelings_than_flips():
    few = flipped(planted(K=6), R=1000)
    rows = selection.draw_relabelings(few, relabelings=200, key=jax.random.key(0))
    assert set(rows) == set(range(1, 64))


@pytest.mark.parametrize("name, oriented", [("valence", True), ("number", True), ("placebo", False)])
def test_a_control_that_moves_a_feature_rejects_it(name, oriented):
    """Feature 1 goes with the control, half as far as with the contrast; a placebo's pairs point either way."""
    pairs, rng = 6, np.random.default_rng(1)
    family = np.repeat(np.arange(K), pairs)
    z = np.abs(rng.normal(1.0, 0.05, (2, L, len(family), F))).astype(np.float32)
    contrast = z.copy()
    contrast[0, 0, :, :2] += 1.0
    side = np.zeros(len(family), int) if oriented else np.arange(len(family)) % 2
    z[side, 0, np.arange(len(family)), 1] += 0.5
    g = np.zeros((2, len(family)), np.float32)
    streams = [streamed(a, g, family, 12) for a in (contrast, z)]
    size = selection.control_size(streams[1], oriented=oriented)
    d = (z[0] - z[1]).astype(float)
    by_family = np.stack([[layer[family == k] for k in range(K)] for layer in d])  # [L,K,pairs,F]
    want = np.abs(by_family.mean((1, 2))) if oriented else np.sqrt((by_family**2).mean((1, 2)))
    np.testing.assert_allclose(size, want.ravel(), atol=1e-5)
    if not oriented:  # a mean would not see it
        assert selection.control_size(streams[1])[1] < 0.1
    rule = selection.Rule(q=0.05)  # six families have 64 flips
    density = np.full((L, F), 0.05)
    for controls, found in (({name: size}, {0}), ({}, {0, 1})):
        s = selection.feature_stats(streams[0], controls, density)
        chosen = selected(s, rule)
        assert set(np.flatnonzero(chosen.chosen)) == found
        assert chosen.passed["control"][1] == (1 in found)
    strongest, most = selection.strongest_control(s._replace(controls={"other": size / 2, name: size}))
    assert (strongest == name).all() and (most == size).all()


def test_what_worked_examples_teach_is_rejected_where_they_teach_the_reverse():
    s = planted()
    reverse = s.difference * np.where(np.arange(s.difference.shape[1]) == 1, -1, 1)  # feature 1 is a mapping
    reverse[:4, 2] *= -1  # three families in four are enough
    s = s._replace(flipped=selection.Flipped(reverse, np.arange(16)))
    chosen = selected(s)
    assert set(np.flatnonzero(chosen.chosen)) == {0, 2} and not chosen.passed["flipped"][1]
    assert selection.family_tests(s).flipped_sign[[0, 1, 2]].tolist() == [1.0, 0.0, 0.75]


def of_word_pairs(strength, words, *, K=16):
    """Differences [n,3] of three like features, `strength` of the pair of words, two in a family; and what the rule
    sees of them."""
    family, words = np.repeat(np.arange(K), 2), np.asarray(words)
    d = np.random.default_rng(0).normal(0, 0.01, (2 * K, 3)) + np.asarray(strength)[words][:, None]
    by_family = d.reshape(K, 2, 3)
    mean = by_family.mean(1)
    return d, selection.FeatureStats(
        mean, 3 + mean / 2, 3 - mean / 2, (by_family > 0).sum(1), (by_family < 0).sum(1), np.full((2, K, 3), 2.0),
        2.0 * K, np.zeros(3), {}, selection.Cells(d, family, words, np.ones(2 * K)),
    )  # fmt: skip


def test_pairs_of_words_are_a_second_factor():
    """By hand: one t over families, another over pairs of words, and min F' of both."""
    words = np.arange(32) % 6
    d, s = of_word_pairs([1.0, 1.2, 0.8, 1.1, 0.9, 1.0], words)
    tests = selection.family_tests(s)
    t_words = stats.ttest_1samp([d[words == w].mean(0) for w in range(6)], 0).statistic
    np.testing.assert_allclose(tests.t_words, t_words)
    np.testing.assert_allclose(tests.min_f, tests.t**2 * t_words**2 / (tests.t**2 + t_words**2))
    assert (tests.sign_words == 1).all() and selected(s).chosen.all()


def test_a_pair_of_words_that_goes_the_other_way_is_seen_however_rare_it_is():
    words = np.arange(32) % 2
    words[5] = 2
    s = of_word_pairs([1.0, 1.2, -0.1], words)[1]
    chosen = selected(s)
    assert chosen.passed["sign"].all() and not chosen.passed["words"].any() and not chosen.chosen.any()
    np.testing.assert_allclose(selection.family_tests(s).sign_words, 2 / 3)
    alone = selected(of_word_pairs([1.0, 1.2], np.arange(32) % 2)[1])
    assert "words" not in alone.passed and alone.chosen.all()  # two agree too often by chance to be asked


def test_correlated_but_dense_or_rare_features_fail():
    s = planted()
    density, fires = s.density.copy(), s.active.copy()
    density[0], fires[..., 1] = 0.5, 0.2
    chosen = selected(s._replace(density=density, active=fires))
    assert not chosen.passed["density"][0] and not chosen.passed["fires"][1]
    assert set(np.flatnonzero(chosen.chosen)) == {2}


def test_a_feature_that_often_goes_the_other_way_fails():
    """In pairs, or in families, and by nothing else: a sparse feature, which may do so more often, is selected."""
    s = planted()
    positive, d, minus = s.positive.copy(), s.difference.copy(), s.minus.copy()
    positive[:4, 0] = 1  # one of the two pairs
    d[:2, 1] = -0.2
    minus[:2, 1] = s.plus[:2, 1] + 0.2
    s = s._replace(positive=positive, difference=d, minus=minus)
    chosen = selected(s)
    assert selection.family_tests(s).sign[:3].tolist() == [28 / 32, 14 / 16, 1.0]
    assert set(np.flatnonzero(chosen.chosen)) == {2} and not chosen.passed["sign"][:2].any()
    active = s.active.copy()
    active[..., :2] *= 0.8
    assert set(np.flatnonzero(selected(s._replace(active=active)).chosen)) == {0, 1, 2}


def test_q_is_adjusted_over_the_live_features_of_all_layers():
    z, g, family = data(pairs=48)
    z[:, 1] += 0.4 * np.arange(2)[::-1, None, None]  # much of the second layer differs, none of the first
    z[..., 2] = 0
    s = selection.feature_stats(streamed(z, g, family, 12), {}, np.zeros((L, F)))
    d = z[0] - z[1]
    means = np.stack([d[:, family == k].mean(1).ravel() for k in range(K)])
    live, want = np.tile(np.arange(F) != 2, L), np.ones(L * F)
    want[live] = stats.false_discovery_control(stats.ttest_1samp(means[:, live], 0).pvalue)
    np.testing.assert_allclose(selection.family_tests(s).q, want, rtol=1e-3)


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


def test_the_largest_t_is_that_of_a_plain_loop(monkeypatch):
    """Over several blocks; the last feature is not live, the one before it not finite."""
    monkeypatch.setattr(flips, "_SUMS", 64 * 4)
    K, m = 7, 10
    d = np.random.default_rng(0).normal(0.3, 1.0, (K, m))
    d[:, 0] += 1.5
    d[2, -2], live = np.nan, np.arange(m) < m - 1
    signs = sign_flips(K, key=jax.random.key(0), R=60)

    def t(x):
        return np.abs(x.mean(0) / x.std(0, ddof=1))

    most = np.array([np.nanmax(t(sign[:, None] * d)[live]) for sign in signs])
    want = [(most >= value * (1 - 1e-6)).mean() if ok else 1.0 for value, ok in zip(t(d), live, strict=True)]
    want[-2] = 1.0
    got = flip_tests(d.astype(np.float32), signs, live=live)
    np.testing.assert_allclose(got.p_max, want)
    np.testing.assert_allclose(got.p, permutation_p(d.astype(np.float32), key=jax.random.key(0), R=60))


def test_max_t_bounds_the_error_of_any_feature():
    """In 5 % of studies without an effect, with correlated features of heavy tails."""
    rng, errors = np.random.default_rng(0), 0
    for i in range(400):
        d = rng.standard_t(3, (12, 40)) + 0.7 * rng.standard_t(3, (12, 1))
        signs = sign_flips(12, key=jax.random.key(i), R=256)
        errors += (flip_tests(d.astype(np.float32), signs).p_max <= 0.05).any()
    assert stats.binomtest(errors, 400, 0.05).pvalue > 0.001


def test_flipping_families_twice_is_nothing():
    s, flip = with_words_and_flipped_examples(planted()), np.arange(16) % 3 == 0
    again = selection.flip_families(selection.flip_families(s, flip), flip)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(s), strict=True):
        np.testing.assert_array_equal(a, b)
