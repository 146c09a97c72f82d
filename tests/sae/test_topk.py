"""The k largest of a batch against NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.sae.topk import largest


@pytest.mark.slow
@pytest.mark.parametrize("guess", [1e-6, 1.0, 1e9])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_largest_is_numpys(n, guess):
    values = np.random.default_rng(n).normal(size=(3, 20, 50)).astype(np.float32)
    mask = np.asarray(jax.jit(jax.vmap(lambda v: largest(v, n, guess)))(values))
    for row, kept in zip(values, mask, strict=True):
        assert kept.sum() == n
        np.testing.assert_array_equal(np.sort(row[kept]), np.sort(row, axis=None)[-n:])


def test_largest_with_ties_and_few_positives():
    values = jnp.array([[3.0, 1.0, -1.0], [1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(largest(values, 2), [[1, 1, 0], [1, 0, 1]])  # all that equal the second
    np.testing.assert_array_equal(largest(values, 6), values > 0)
    assert not largest(-values, 1)[:, ::2][0, 0]
    assert largest(jnp.zeros((2, 3)), 2).sum() == 0


def test_a_traced_n_serves_several_lanes():
    values = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    masks = jax.jit(jax.vmap(lambda n: largest(values, n)))(jnp.array([3, 70]))
    assert masks.sum((1, 2)).tolist() == [3, 70]
