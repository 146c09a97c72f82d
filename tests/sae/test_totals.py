"""Sums over tokens taken tile by tile against whole codes."""

import jax
import numpy as np
import pytest

from jaxmech.sae.totals import feature_totals
from tests.sae.test_module import D, F, random_sae, random_x


def whole(sae, x):
    """Total and firings from all codes at once, in float64."""
    f = np.asarray(sae.encode(x), np.float64)
    return f.sum(-2), (f != 0).sum(-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tile", [{}, {"rows": 4, "features": 8}, {"rows": 5, "features": 20}, {"rows": 15, "features": 1}]
)
@pytest.mark.parametrize("options", [
    {}, {"activation": "relu"}, {"activation": "topk"}, {"activation": "abstopk"}, {"activation": "batchtopk"},
    {"normalize": "layer_norm"}, {"subtract": False, "skip": True},
], ids=str)  # fmt: skip
def test_totals_are_those_of_whole_codes(options, tile):
    sae, x = random_sae(layers=(3, 5), **options), random_x().reshape(1, 15, D).repeat(2, 0)
    found = feature_totals(sae, x, **tile)
    total, fired = whole(sae, x)
    np.testing.assert_allclose(found.total, total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.fired, fired)
    assert found.total.shape == (2, F)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 15, 64])
def test_tokens_count_as_often_as_they_are_said_to(rows):
    """As if each stood that often in x; what counts 0 times may be anything."""
    sae, x = random_sae(layers=(3, 5)), random_x().reshape(1, 15, D).repeat(2, 0)
    count = np.array([3, 0, 1, 1, 2, 0, 4, 1, 1, 1, 7, 0, 0, 1, 2], np.int32)
    total, fired = whole(sae, x.repeat(count, axis=1))
    found = feature_totals(sae, np.where((count > 0)[:, None], x, np.nan), count=count, rows=rows, features=8)
    np.testing.assert_allclose(found.total, total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.fired, fired)
    with pytest.raises(ValueError, match=r"count: expected one per token, \[15\], got \(14,\)"):
        feature_totals(sae, x, count=count[1:])


def test_one_dictionary_and_one_program():
    sae, x = random_sae(), random_x().reshape(15, D)
    feature_totals.clear_cache()
    for seed in range(3):
        found = feature_totals(random_sae(seed=seed), x)
        np.testing.assert_array_equal(found.fired, whole(random_sae(seed=seed), x)[1])
    assert feature_totals._cache_size() == 1
    with pytest.raises(ValueError, match=r"expected \[1, n, 6\]"):
        feature_totals(sae, x[:, :4])


def test_nothing_as_large_as_the_codes_exists():
    sae, x = random_sae(), np.zeros((4096, D), np.float32)
    lowered = feature_totals.lower(sae, x, rows=64, features=4)
    codes = 4 * 4096 * F
    assert lowered.compile().memory_analysis().temp_size_in_bytes < codes + x.nbytes
    assert f"tensor<4096x{F}" not in lowered.as_text()
    assert jax.eval_shape(feature_totals, sae, x).total.shape == (F,)


def test_activations_that_are_no_numbers_are_seen():
    sae, x = random_sae(layers=(3, 5)), random_x().reshape(1, 15, D).repeat(2, 0)
    x[1, 7] = np.nan
    found = feature_totals(sae, x, rows=4, features=8)
    assert np.isnan(found.total[1]).all() and np.isfinite(found.total[0]).all()


def test_64_bit_jax_counts_the_same():
    sae, x = random_sae("batchtopk", layers=(3, 5)), random_x().reshape(1, 15, D).repeat(2, 0)
    total, fired = whole(sae, x)
    with jax.enable_x64(True):
        found = feature_totals(sae, x)
    assert found.total.dtype == np.float32 and found.fired.dtype == np.int32
    np.testing.assert_allclose(found.total, total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.fired, fired)
