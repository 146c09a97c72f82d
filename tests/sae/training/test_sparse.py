"""Sparse products on a CPU give what dense ones do: values, gradients, and what is said of the code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.sae.training import SAETrainConfig
from jaxmech.sae.training.objectives import selecting, sparsely
from jaxmech.sae.training.sparse import fits
from jaxmech.sae.training.step import can_be_sparse

D = 5


def both(kind, k, B=12, F=64, k_max=4, change=lambda p, x: (p, x)):
    rng = np.random.default_rng(0)
    shapes = {"E": (F, D), "W_dec": (F, D), "b_enc": F, "b_dec": D}
    p = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    p, x = change(p, jnp.asarray(rng.normal(size=(B, D)), jnp.float32))
    config = SAETrainConfig(d_sae=F, sparsity=k_max, kind=kind)

    def run(objective):
        def loss(p, k):
            terms = objective(config, p, x, k, 1.0)
            return terms.loss, terms

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(p, jnp.float32(k))

    return run(sparsely), run(selecting)


def agree(ours, dense):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind, k", [("topk", 4), ("topk", 1), ("batchtopk", 4), ("batchtopk", 0.5)])
def test_sparse_is_dense(kind, k):
    ours, dense = both(kind, k)
    agree(ours, dense)
    assert ours[0][1].active == k * 12
    agree(*both(kind, k, B=1, F=32))


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_few_or_no_positive_entries(kind):
    ours, dense = both(kind, 4, change=lambda p, x: (p | {"b_enc": p["b_enc"] - 6}, x))
    agree(ours, dense)
    assert 0 < ours[0][1].active < 4 * 12
    ours, dense = both(kind, 4, change=lambda p, x: (p | {"b_enc": p["b_enc"] - 1e3}, x))
    agree(ours, dense)
    assert ours[0][1].active == 0 and ours[0][1].smallest == np.inf


def test_tokens_that_occur_twice_are_kept_alike():
    ours, dense = both("batchtopk", 4, change=lambda p, x: (p, x.at[6:].set(x[:6])))
    agree(ours, dense)


def test_where_it_is_used():
    config = SAETrainConfig(d_sae=64, sparsity=(2, 16))
    assert can_be_sparse(config, 128) == (jax.default_backend() == "cpu")
    for change in ({"sparsity": 17}, {"kind": "matryoshka"}, {"compute_dtype": "bfloat16"}, {"d_sae": 65}):
        assert not can_be_sparse(dataclasses.replace(config, **change), 128)
    assert not fits(2**20, 4096)
