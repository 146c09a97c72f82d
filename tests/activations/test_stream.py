"""The activation stream against plain forwards: right layers, right tokens, a pure function of (key, i)."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmech.activations.stream import ActivationStream, ArrayStream
from jaxmech.models.block import SITES
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import forward, init_params

CONFIG = ModelConfig(
    family="gemma3", vocab_size=50, n_layers=4, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_mlp=16,
    activation="gelu_tanh", norm_eps=1e-6, rope=Rope(10_000.0), query_scale=0.5, max_positions=64,
    is_local=(True, False, True, False), window=3, bos_id=1, eos_ids=(2,),
)  # fmt: skip
PARAMS = init_params(CONFIG, jax.random.key(0))
RNG = np.random.default_rng(0)
N, T = 7, 9
TOKENS = RNG.integers(3, 50, (N, T))
LENGTHS = np.array([9, 5, 9, 3, 7, 2, 9])
MASK = np.arange(T) < LENGTHS[:, None]


def stream(**options):
    return ActivationStream(CONFIG, PARAMS, TOKENS, mask=MASK, **{"layers": (2, 0), "batch_size": 4} | options)


def rows(x):
    """Rows of [L',n,D] as a set that rounding does not disturb."""
    return sorted(map(tuple, np.round(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), 3).tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_buffer_holds_every_kept_token_once(site):
    data = stream(site=site, forward_batch=3)
    taps = np.asarray(forward(CONFIG, PARAMS, TOKENS, mask=MASK, taps=(site,), logits="none").taps[site])
    kept = MASK & (np.arange(T) >= 1)
    assert data.buffer_sizes == (kept.sum(),) and data.tokens_seen == kept.sum() and data.d_in == taps.shape[-1]
    expected = taps[[2, 0]][:, kept]
    got = np.asarray(data.buffer(0))
    order, wanted = np.lexsort(got[0].T), np.lexsort(expected[0].T)
    np.testing.assert_allclose(got[:, order], expected[:, wanted], atol=1e-5)


def test_an_epoch_visits_each_row_at_most_once():
    data = stream(epochs=2)
    n, per_epoch = data.buffer_sizes[0], data.buffer_sizes[0] // 4
    assert data.batches_per_pass == 2 * per_epoch
    everything = rows(np.asarray(data.buffer(0)))
    for epoch in range(2):
        seen = np.concatenate([data.batch(epoch * per_epoch + i) for i in range(per_epoch)], axis=1)
        seen = rows(seen)
        assert len(set(seen)) == per_epoch * 4 and set(seen) <= set(everything)
    assert not np.array_equal(data.batch(0), data.batch(per_epoch))
    assert n - per_epoch * 4 < 4


def test_batches_are_pure_functions_of_key_and_number():
    a, b = stream(buffer_tokens=12, epochs=2), stream(buffer_tokens=12, epochs=2)
    assert len(a.buffer_sizes) > 1
    total = 2 * a.batches_per_pass
    forwards = [np.asarray(a.batch(i)) for i in range(total)]
    for i in reversed(range(total)):
        np.testing.assert_array_equal(b.batch(i), forwards[i])
    assert a.fingerprint() == b.fingerprint()
    other = stream(buffer_tokens=12, epochs=2, key=jax.random.key(1))
    assert other.fingerprint() != a.fingerprint()
    assert not np.array_equal(other.batch(0), forwards[0])
    first = next(iter(a))
    np.testing.assert_array_equal(first, forwards[0])


def test_the_same_buffers_in_another_order():
    data = stream(key=jax.random.key(1))
    first, held = np.asarray(data.batch(0)), data.buffer(0)
    other = data.reordered(jax.random.key(2))
    assert rows(np.asarray(other.buffer(0))) == rows(np.asarray(held))
    assert not np.array_equal(other.batch(0), first) and np.array_equal(data.batch(0), first)
    assert other.fingerprint() != data.fingerprint()
    assert np.array_equal(other.batch(3), data.reordered(jax.random.key(2)).batch(3))


def test_statistics_and_chunks():
    data = stream()
    x = np.asarray(data.buffer(0), np.float64)
    mean, spread = data.statistics()
    np.testing.assert_allclose(mean, x.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spread, x.std(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate(list(data.chunks(5)), axis=1), data.buffer(0))


def test_layers_above_are_not_run():
    data = stream(layers=(1,))
    assert data._config.n_layers == 2
    assert jax.tree.leaves(data._params["layers"])[0].shape[0] == 2
    poisoned = {**PARAMS, "layers": jax.tree.map(lambda leaf: leaf.at[2:].set(np.nan), PARAMS["layers"])}
    clean = ActivationStream(CONFIG, poisoned, TOKENS, mask=MASK, layers=(1,), batch_size=4)
    np.testing.assert_array_equal(data.batch(0), clean.batch(0))


def test_bfloat16_buffer():
    full, half = stream().batch(0), stream(dtype="bfloat16").batch(0)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, rtol=1e-2, atol=1e-4)


def test_a_cache_is_read_in_place_of_computing(tmp_path, monkeypatch):
    options = {"buffer_tokens": 12, "epochs": 2, "key": jax.random.key(3), "dtype": "bfloat16"}
    plain, kept = stream(**options), stream(**options, cache=tmp_path / "new")
    total = kept.batches_per_pass
    expected = [np.asarray(plain.batch(i)) for i in range(total)]
    for i in range(total):
        np.testing.assert_array_equal(kept.batch(i), expected[i])
    files = sorted((tmp_path / "new").iterdir())
    assert len(files) == len(kept.buffer_sizes) > 1 and plain.fingerprint() == kept.fingerprint()
    # Another training on the same activations computes none of them; other activations have files of their own.
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "_compute", None)
        np.testing.assert_array_equal(stream(**(options | {"epochs": 1}), cache=tmp_path / "new").batch(0), expected[0])
        again = stream(**options, cache=tmp_path / "new")
        for i in reversed(range(total)):
            np.testing.assert_array_equal(again.batch(i), expected[i])
    changed = {**PARAMS, "embed": jax.tree.map(lambda leaf: leaf * 1.01, PARAMS["embed"])}
    elsewhere = ActivationStream(
        CONFIG, changed, TOKENS, mask=MASK, layers=(2, 0), batch_size=4, **options, cache=tmp_path / "new"
    )
    elsewhere.buffer(0)
    assert len(list((tmp_path / "new").iterdir())) == len(files) + 1
    files[0].write_bytes(files[0].read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged .*; delete it"):
        [stream(**options, cache=tmp_path / "new").buffer(b) for b in range(2)]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not be written .*train without cache"):
        stream(**options, cache=tmp_path / "file").buffer(0)


def test_refusals():
    with pytest.raises(ValueError, match=r"0\.\.3, got \[4\]"):
        stream(layers=(4,))
    for layers in ((), (1, 1)):
        with pytest.raises(ValueError, match="layers: expected distinct layers, at least one"):
            stream(layers=layers)
    for name, wrong in {"skip_first": -1, "forward_batch": 0, "batch_size": 0, "epochs": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
            stream(**{name: wrong})
    for wrong in (0, jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match=r"key: expected one JAX key, such as jax.random.key\(0\), got"):
            stream(key=wrong)
    with pytest.raises(ValueError, match="site"):
        stream(site="resid")
    with pytest.raises(ValueError, match="do not fit the smallest buffer"):
        stream(batch_size=1000)
    with pytest.raises(ValueError, match="dtype"):
        stream(dtype="int8")
    with pytest.raises(ValueError, match="n,T"):
        ActivationStream(CONFIG, PARAMS, TOKENS[0], layers=(0,))
    with pytest.raises(ValueError, match="vary"):
        ArrayStream(np.ones((1, 8, 3)), batch_size=2).statistics()
    with pytest.raises(ValueError, match="layers"):
        ArrayStream(np.ones((1, 8, 3)), batch_size=2, layers=(0, 1))
    with pytest.raises(ValueError, match="distinct"):
        ArrayStream(np.ones((2, 8, 3)), batch_size=2, layers=(1, 1))
    assert dataclasses.replace(CONFIG) == CONFIG


def test_activations_that_are_no_numbers_are_refused_in_any_buffer():
    poisoned = {**PARAMS, "layers": jax.tree.map(lambda leaf: leaf.at[2].set(np.nan), PARAMS["layers"])}
    data = ActivationStream(CONFIG, poisoned, TOKENS, mask=MASK, layers=(1, 2), batch_size=4)
    with pytest.raises(ValueError, match="activations: resid_post of layer 2 is not finite in buffer 0"):
        data.batch(0)
    with pytest.raises(ValueError, match="layer 2 is not finite"):
        next(data.chunks())


def test_tokens_that_the_model_does_not_have_are_refused():
    for wrong in (50, 1050, -1, -100, 2**32 + 5):
        tokens = TOKENS.copy()
        tokens[2, 3] = wrong
        with pytest.raises(ValueError, match=r"tokens: expected integers 0\.\.49"):
            ActivationStream(CONFIG, PARAMS, tokens, mask=MASK, layers=(0,))
    with pytest.raises(ValueError, match="tokens: expected integers .*float64"):
        ActivationStream(CONFIG, PARAMS, TOKENS.astype(float), mask=MASK, layers=(0,))


def test_the_settings_are_json_whatever_numbers_were_given():
    plain = stream(batch_size=4, buffer_tokens=12)
    for numbers in (np.int64, np.int32, jax.numpy.int32):
        again = stream(layers=np.array([2, 0]), batch_size=numbers(4), buffer_tokens=numbers(12))
        assert json.dumps(again.settings()) == json.dumps(plain.settings())
        assert again.fingerprint() == plain.fingerprint()
    assert stream(buffer_tokens=1000).settings() == stream(buffer_tokens=2000).settings()
