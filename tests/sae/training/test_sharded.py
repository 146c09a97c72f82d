"""On the fake devices: features over the model axis, rows over the data axis, and the numbers of a single device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmech.models.sharding import make_mesh
from jaxmech.sae.training.step import batch_sharding, init_state, state_shardings, train_step
from tests.sae.training.toy import KEY, SMALL, SPARSITY, fit, stream

pytestmark = [pytest.mark.devices, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["batchtopk", "topk", "matryoshka", "jumprelu"])
def test_sharded_equals_unsharded(kind):
    config = dataclasses.replace(SMALL, kind=kind, sparsity=SPARSITY[kind], steps=12)
    (one,), history = fit(config)
    (many,), sharded_history = fit(config, mesh=make_mesh(data=2, model=4))
    for name, leaf in one.params.items():
        np.testing.assert_allclose(many.params[name], leaf, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(sharded_history.to_numpy(float), history.to_numpy(float), rtol=1e-2, atol=1e-3)


def test_the_state_stays_where_it_lies():
    mesh, config = make_mesh(data=4, model=2), dataclasses.replace(SMALL, lr=4e-3)
    state = init_state(config, stream(), KEY)
    state = jax.device_put(state, state_shardings(config, state, mesh))
    before = train_step._cache_size()
    for i in range(3):
        state, _ = train_step(config, state, jax.device_put(stream().batch(i), batch_sharding(mesh)), mesh)
    assert train_step._cache_size() == before + 1
    for leaf in (state.params["E"], state.params["b_enc"], state.silent, state.optimizer[0].mu["W_dec"]):
        assert leaf.sharding.spec[2] == "model" and leaf.addressable_shards[0].data.shape[2] == config.d_sae // 2
    assert state.params["b_dec"].sharding.spec in (PartitionSpec(), PartitionSpec(None, None, None))


def test_devices_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="d_sae: 32 cannot be spread evenly over the 3 devices"):
        fit(SMALL, mesh=make_mesh(data=1, model=3))
    with pytest.raises(ValueError, match="batch_size: 128 .* 5 devices"):
        fit(SMALL, mesh=make_mesh(data=5))
    with pytest.raises(ValueError, match="expected an axis 'data' or 'model', got x"):
        fit(SMALL, mesh=jax.make_mesh((2,), ("x",)))
