"""The real configurations of published models, without their weights: shapes, and the published parameter counts."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmech.models.convert import flatten
from jaxmech.models.decoder import forward, param_shapes
from jaxmech.models.families import config_from_hf, table_for

PUBLISHED = json.loads((Path(__file__).parents[1] / "goldens" / "published.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    config = config_from_hf(PUBLISHED[name]["config"])
    shapes = param_shapes(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]["parameters"]
    assert set(flatten(shapes)) <= {rule.path for rule in table_for(config).rules}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_go_through(name):
    config = config_from_hf(PUBLISHED[name]["config"])
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), param_shapes(config))
    run = partial(forward, config, taps=("resid_post",), return_cache=True)
    out = jax.eval_shape(run, params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert out.logits.shape == (2, config.vocab_size) and out.logits.dtype == jnp.float32
    assert out.taps["resid_post"].shape == (config.n_layers, 2, 16, config.d_model)
    assert out.cache.k.shape == (config.n_layers, 2, 16, config.n_kv_heads, config.head_dim)
