"""A model spread over eight fake devices, data x model, against the same model on one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmech.interventions.edits import add_vector, everywhere
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import forward
from jaxmech.models.generate import generate
from jaxmech.models.load import load_model
from jaxmech.models.saved import load_saved, save_model
from jaxmech.models.sharding import make_mesh, param_shardings, shard_batch

pytestmark = [pytest.mark.devices, pytest.mark.slow]
GOLDENS = Path(__file__).parents[1] / "goldens"
TIGHT = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module", params=[(2, 4), (1, 8)], ids=lambda s: f"{s[0]}x{s[1]}")
def mesh(request):
    return make_mesh(*request.param)


@pytest.fixture(scope="module", params=["tiny-gemma3", "tiny-gpt2"])
def name(request):
    return GOLDENS / request.param


def shards(leaf) -> set[tuple[int, ...]]:
    return {shard.data.shape for shard in leaf.addressable_shards}


def test_parameters_are_spread(name, mesh):
    lm, whole = load_model(name, mesh=mesh), load_model(name)
    c, width = lm.config, mesh.shape["model"]
    kernel = lm.params["layers"]["mlp"]["up"]["kernel"]
    assert shards(kernel) == {(c.n_layers, c.d_model, c.d_mlp // width if c.d_mlp % width == 0 else c.d_mlp)}
    heads = c.n_heads // width if c.n_heads % width == 0 else c.n_heads
    assert shards(lm.params["layers"]["attn"]["q"]["kernel"]) == {(c.n_layers, c.d_model, heads, c.head_dim)}
    assert shards(lm.params["final_norm"]["scale"]) == {(c.d_model,)}
    jax.tree.map(np.testing.assert_array_equal, lm.params, whole.params)


def test_logits_equal_those_of_one_device(name, mesh):
    lm, whole = load_model(name, mesh=mesh), load_model(name)
    tokens = jnp.asarray(np.repeat(np.load(name / "golden.npz")["tokens"], 2, axis=0))
    vector = jax.random.normal(jax.random.key(0), (lm.config.n_layers, lm.config.d_model))
    edits = {"resid_post": (add_vector(vector, everywhere(lm.config.n_layers)),)}
    expected = forward(whole.config, whole.params, tokens, logits="all", taps=("resid_mid",), edits=edits)
    rows = shard_batch(mesh, tokens)
    got = forward(lm.config, lm.params, rows, logits="all", taps=("resid_mid",), edits=edits)
    scale = np.asarray(expected.logits).std()
    np.testing.assert_allclose(got.logits / scale, expected.logits / scale, **TIGHT)
    np.testing.assert_allclose(got.taps["resid_mid"], expected.taps["resid_mid"], rtol=1e-4, atol=1e-4)


def test_generation_equals_that_of_one_device(name):
    mesh = make_mesh(2, 4)
    lm, whole = load_model(name, mesh=mesh), load_model(name)
    tokens = jnp.asarray(np.load(name / "golden.npz")["tokens"])
    draw = dict(max_new_tokens=5, temperature=1.0, key=jax.random.key(1), eos_ids=())
    expected = generate(whole.config, whole.params, tokens, **draw)
    np.testing.assert_array_equal(generate(lm.config, lm.params, shard_batch(mesh, tokens), **draw), expected)


def test_a_saved_model_is_restored_onto_the_mesh(name, tmp_path):
    mesh = make_mesh(2, 4)
    lm = load_model(name, mesh=mesh)
    saved = save_model(lm, tmp_path / "saved")
    for again in (load_saved(saved, mesh=mesh), load_saved(saved)):
        jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    spread = load_saved(saved, mesh=mesh).params["embed"]["embedding"]
    assert spread.sharding == lm.params["embed"]["embedding"].sharding


def test_what_the_devices_do_not_divide_is_replicated():
    facts = dict(family="llama", vocab_size=10, n_layers=2, d_model=8, n_heads=4, n_kv_heads=1, head_dim=2, d_mlp=12)
    facts |= dict(activation="silu", norm_eps=1e-6, rope=None, query_scale=1.0, max_positions=8, is_local=(False,) * 2)
    specs = param_shardings(ModelConfig(**facts), make_mesh(2, 4))
    assert specs["layers"]["attn"]["q"]["kernel"].spec == P(None, None, "model", None)
    assert specs["layers"]["attn"]["k"]["kernel"].spec == P(None, None, None, None)
    assert specs["layers"]["mlp"]["down"]["kernel"].spec == P(None, "model", None)
    assert specs["embed"]["embedding"].spec == P(None, None)


def test_any_mesh_will_do(name):
    tokens = jnp.asarray(np.load(name / "golden.npz")["tokens"])
    explicit = jax.make_mesh((2, 4), ("data", "model"))  # its axes of JAX's own default type
    lm = load_model(name, mesh=explicit)
    assert np.isfinite(forward(lm.config, lm.params, shard_batch(explicit, tokens)).logits).all()
    with pytest.raises(ValueError, match="mesh: expected an axis 'data'"):
        shard_batch(jax.make_mesh((8,), ("model",)), tokens)


def test_refusals():
    with pytest.raises(ValueError, match=r"data \* model: expected 1 to 8 devices, the number available, got 4 \* 4"):
        make_mesh(4, 4)
    with pytest.raises(ValueError, match="batch: 3 rows cannot be spread evenly over 2 devices"):
        shard_batch(make_mesh(2, 4), jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match="mesh: expected an axis 'data' or 'model', got x"):
        load_model(GOLDENS / "tiny-gpt2", mesh=jax.make_mesh((8,), ("x",)))
