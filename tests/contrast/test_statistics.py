"""Statistics against SciPy and hand-computed values."""

import jax
import numpy as np
import pytest
from scipy import stats

from jaxmech.contrast import statistics
from jaxmech.interventions.proximity import within_layer_difference

RNG = np.random.default_rng(0)


def test_family_means_are_group_means():
    values, families = np.array([1.0, 3.0, 5.0, 9.0]), np.array(["b", "a", "b", "a"])
    np.testing.assert_array_equal(statistics.family_means(values, families), [6.0, 3.0])


@pytest.mark.parametrize("K", [6, 8, 16])
def test_a_detectable_effect_is_found_in_four_of_five_studies(K):
    """Its power by the noncentral t distribution, and by simulation."""
    means = RNG.normal(size=K)
    noncentrality = statistics.detectable(means) / stats.sem(means)
    assert stats.nct.sf(stats.t.ppf(0.975, K - 1), K - 1, noncentrality) == pytest.approx(0.8, abs=0.01)
    draws = RNG.normal(noncentrality / np.sqrt(K), 1, (20_000, K))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)
    assert np.isnan(statistics.detectable(means[:1])) and statistics.detectable(np.ones(K)) == 0


def test_paired_t_equals_scipy():
    d = RNG.normal(size=(9, 5)) + 0.3
    t, p, d_z = statistics.paired_t(d)
    want = stats.ttest_1samp(d, 0)
    np.testing.assert_allclose(t, want.statistic)
    np.testing.assert_allclose(p, want.pvalue)
    np.testing.assert_allclose(d_z, d.mean(0) / d.std(0, ddof=1))
    assert statistics.paired_t(np.zeros((4, 1)))[1][0] == 1.0


def test_paired_t_over_many_blocks(monkeypatch):
    d = RNG.normal(size=(6, 4, 5)).astype(np.float32)
    want = statistics.paired_t(d)
    monkeypatch.setattr(statistics, "_COLUMNS", 3)
    for a, b in zip(statistics.paired_t(d), want, strict=True):
        assert a.shape == (4, 5)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spread", [1.0, 1e-12, 0.0])
def test_benjamini_hochberg_is_the_least_level_that_rejects(spread):
    """Also where values differ in their last digits alone, or not at all."""
    p = 0.3 + spread * (RNG.uniform(size=300) ** 2 - 0.3)
    levels = {value: len(p) * value / (p <= value).sum() for value in p}
    want = [min(level for value, level in levels.items() if value >= mine) for mine in p]
    np.testing.assert_allclose(statistics.benjamini_hochberg(p), np.minimum(want, 1.0), rtol=1e-12)


def test_auroc_equals_mann_whitney():
    a, b = RNG.integers(0, 4, (7, 3)).astype(float), RNG.integers(0, 4, (9, 3)).astype(float)
    want = [stats.mannwhitneyu(a[:, i], b[:, i]).statistic / 63 for i in range(3)]
    np.testing.assert_allclose(statistics.auroc(a, b), want)


def test_holm_by_hand():
    np.testing.assert_allclose(statistics.holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])


def test_p_from_null_counts_ties_and_nan():
    assert statistics.p_from_null(2.0, [1.0, 2.0, -3.0, np.nan]) == pytest.approx(3 / 5)


def test_p_from_a_normal_null_is_uniform_under_it():
    draws = RNG.normal(2.0, 3.0, (2000, 11))
    assert stats.kstest([statistics.p_from_normal_null(d[0], d[1:]) for d in draws], "uniform").pvalue > 0.01
    assert statistics.p_from_normal_null(1.0, np.zeros(5)) == 1.0


def test_mean_effect_is_scipys_t_test():
    means = RNG.normal(0.3, 1.0, 7)
    want = stats.ttest_1samp(means, 0.0)
    interval = want.confidence_interval(0.95)
    np.testing.assert_allclose(
        statistics.mean_effect(means), [means.mean(), interval.low, interval.high, want.pvalue], rtol=1e-10
    )
    assert statistics.mean_effect(np.full(5, 2.0)) == (2.0, 2.0, 2.0, 0.0)
    assert statistics.mean_effect(np.zeros(5)) == (0.0, 0.0, 0.0, 1.0)
    one = statistics.mean_effect(np.array([3.0]))
    assert one.value == 3 and np.isnan(one[1:]).all()


@pytest.mark.parametrize("K", [6, 8, 16])
def test_intervals_cover_the_truth(K):
    """95 % of 4,000 draws, within three standard errors: of a mean, and of a ratio that goes with its denominator."""
    rng = np.random.default_rng(K)
    below = rng.normal(1.0, 0.5, (4000, K))
    above = 0.4 * below + rng.normal(0.0, 0.3, (4000, K))
    means = [statistics.mean_effect(row) for row in below]
    ratios = [statistics.ratio_of_sums(n, d) for n, d in zip(above, below, strict=True)]
    for effects, truth in ((means, 1.0), (ratios, 0.4)):
        assert np.mean([e.low <= truth <= e.high for e in effects]) == pytest.approx(0.95, abs=3 * 0.00345)


def test_ratio_of_sums_is_not_a_mean_of_ratios():
    effect = statistics.ratio_of_sums(np.array([1.0, 5.0]), np.array([0.001, 10.0]))
    assert effect.value == pytest.approx(6 / 10.001)
    assert (effect.low, effect.high) == (-np.inf, np.inf)  # two families: what is below may be 0
    assert np.isnan(statistics.ratio_of_sums(np.ones(2), np.array([1.0, -1.0])).value)
    n, d = RNG.normal(3.0, 1.0, 9), np.full(9, 2.0)  # a denominator that is known: Student's t
    np.testing.assert_allclose(statistics.ratio_of_sums(n, d)[:3], np.array(statistics.mean_effect(n)[:3]) / 2)
    np.testing.assert_allclose(statistics.ratio_of_sums(-n, -d)[:3], statistics.ratio_of_sums(n, d)[:3])


def test_a_test_without_a_p_value_is_none():
    """As R's p.adjust: the others are adjusted for their own number."""
    p = np.array([0.001, 0.002, np.nan, 0.5, 0.9])
    np.testing.assert_allclose(statistics.benjamini_hochberg(p), [0.004, 0.004, np.nan, 2 / 3, 0.9])
    np.testing.assert_allclose(statistics.holm(p), [0.004, 0.006, np.nan, 1.0, 1.0])
    assert (
        np.isnan(statistics.holm(np.full(2, np.nan))).all() and np.isnan(statistics.benjamini_hochberg([np.nan])).all()
    )
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"p: expected p-values from 0 to 1, got {wrong}"):
            statistics.benjamini_hochberg([0.1, wrong])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_mean_that_is_no_number_is_not_significant(wrong):
    effect = statistics.mean_effect(np.array([wrong, 0.1, 0.2]))
    assert not np.isfinite(effect.value) and np.isnan([effect.low, effect.high, effect.p]).all()


def test_what_is_not_a_number_stays_none():
    high, low = np.array([[1.0, np.nan], [2.0, 3.0]]), np.array([[0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(statistics.auroc(high, low), [0.875, np.nan])
    assert np.isnan(statistics.p_from_normal_null(np.nan, [0.0, 1.0, 2.0]))
    assert np.isnan(statistics.p_from_normal_null(5.0, [0.0, np.nan, 2.0]))
    assert statistics.p_from_null(np.nan, [0.0, 1.0]) == 1.0 and statistics.p_from_null(5.0, [0.0, np.nan]) == 2 / 3
    labels, layer = np.array([True, False] * 4), np.repeat([0, 1], 4)
    difference, p, _ = within_layer_difference(
        np.array([np.nan, *np.arange(7.0)]), layer, labels, permutations=50, key=jax.random.key(0)
    )
    assert np.isnan(difference) and np.isnan(p)
