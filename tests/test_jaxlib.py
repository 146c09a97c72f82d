"""What the library rests on in jaxlib and a release has had wrong, silently."""

import jax
import jax.numpy as jnp
import numpy as np


def test_products_of_a_batch_that_are_summed_at_once():
    """Wrong on CPUs in jaxlib 0.10.2, beyond 32,768 rows (jax-ml/jax#39103); gradients of shared prefixes were."""
    x = np.random.default_rng(0).standard_normal((40_000, 3), np.float32)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
    np.testing.assert_allclose(got, (x**2).sum(1), rtol=1e-5)
