"""Dictionaries spread over eight fake devices, against the same on one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxmech.models.sharding import make_mesh
from jaxmech.sae.sharding import sae_shardings, shard_saes

pytestmark = [pytest.mark.devices, pytest.mark.slow]


@pytest.mark.parametrize("stacked", [True, False])
def test_features_are_spread_and_nothing_changes(saes, stacked):
    whole = saes if stacked else saes.replace(
        params={name: leaf[0] for name, leaf in saes.params.items()},
        config=dataclasses.replace(saes.config, layers=(1,), l0=()),
    )  # fmt: skip
    spread = shard_saes(whole, make_mesh(2, 4))
    F, D = whole.config.d_sae, whole.config.d_in
    lead = (2,) if stacked else ()
    shapes = {"W_enc": (D, F // 4), "b_enc": (F // 4,), "W_dec": (F // 4, D), "b_dec": (D,), "threshold": (F // 4,)}
    for name, shape in shapes.items():
        assert {shard.data.shape for shard in spread.params[name].addressable_shards} == {(*lead, *shape)}
    x = jax.random.normal(jax.random.key(0), (*lead, 5, D))
    np.testing.assert_allclose(spread(x), whole(x), rtol=1e-5, atol=1e-5)


def test_what_the_devices_do_not_divide_is_whole(saes):
    for sharding in sae_shardings(saes, make_mesh(1, 7)).params.values():
        assert sharding.is_fully_replicated
