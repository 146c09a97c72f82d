"""Activations on disk against plain forwards, read by zarr and by TensorStore alone; killed writings that go on."""

import dataclasses
import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import zarr

from jaxmech.activations import saved
from jaxmech.models.decoder import forward
from jaxmech.sae.training import SAETrainConfig, train_saes

N, T = 21, 9
RNG = np.random.default_rng(0)
MASK = np.arange(T) < np.append(RNG.integers(2, T + 1, N - 1), T)[:, None]
MASK[3] = MASK[3, ::-1]  # padding on the left
SITES = ("resid_post", "attn_z")


@pytest.fixture(scope="module")
def tokens(lm):
    return RNG.integers(1, lm.config.vocab_size, (N, T))


@pytest.fixture(scope="module")
def taps(lm, tokens):
    """site -> [L,n,T,D], zero at padding."""
    out = forward(lm.config, lm.params, tokens, mask=MASK, taps=SITES, logits="none").taps
    return {site: np.asarray(x) * MASK[..., None] for site, x in out.items()}


def save(lm, tokens, folder, mask=MASK, **options):
    options = dict(layers=(2, 0), batch=4, rows=8, model="tiny") | options
    return saved.save_activations(lm.config, lm.params, tokens, mask=mask, folder=folder, **options)


@pytest.mark.parametrize("dtype, rtol", [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_what_is_read_is_what_the_model_computed(lm, tokens, taps, tmp_path, dtype, rtol):
    got = save(lm, tokens, tmp_path, sites=SITES, dtype=dtype)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.mask, MASK)
    assert got.sites == SITES and got.layers == (2, 0) and got.facts["model"] == "tiny"
    close = dict(rtol=rtol, atol=1e-4)
    for site, want in taps.items():
        x = got.read(2, site=site)
        assert x.dtype == jnp.dtype(dtype) and not x[~MASK].any()
        np.testing.assert_allclose(x.astype(np.float32), want[2], **close)
        few = got.read([0, 2], site=site, texts=[20, 3, -2], at=-1)
        np.testing.assert_allclose(few.astype(np.float32), want[[0, 2]][:, [20, 3, -2], -1], **close)
        part = got.read(0, site=site, texts=slice(5, 17), at=slice(2, None, 3))
        np.testing.assert_allclose(part.astype(np.float32), want[0, 5:17, 2::3], **close)


def test_zarr_reads_all_of_it(lm, tokens, taps, tmp_path):
    save(lm, tokens, tmp_path, sites=SITES)
    group = zarr.open_group(tmp_path, mode="r")
    assert set(dict(group.members())) == {*SITES, "tokens", "mask", "layer"}
    assert group.attrs["model"] == "tiny" and group.attrs["texts_done"] == group.attrs["texts"] == N
    np.testing.assert_array_equal(group["tokens"][:], tokens)
    np.testing.assert_array_equal(group["mask"][:], MASK)
    np.testing.assert_array_equal(group["layer"][:], [2, 0])
    for site, want in taps.items():
        array = group[site]
        assert array.shape == (2, N, T, want.shape[-1]) and array.dtype == np.float32
        assert array.metadata.dimension_names == ("layer", "text", "token", f"{site}_width")
        assert dict(array.attrs) == {"site": site, "layers": [2, 0], "dtype": "float32", "model": "tiny"}
        np.testing.assert_allclose(array[:], want[[2, 0]], atol=1e-4)
        np.testing.assert_allclose(array[0, :, -1], want[2, :, -1], atol=1e-4)


def test_bfloat16_reads_by_its_bits(lm, tokens, taps, tmp_path):
    save(lm, tokens, tmp_path, dtype="bfloat16")
    array = zarr.open_group(tmp_path, mode="r")["resid_post"]
    assert array.attrs["dtype"] == "bfloat16" and array.dtype == np.uint16
    values = (array[1].astype("uint32") << 16).view("float32")
    np.testing.assert_allclose(values, taps["resid_post"][0], rtol=2**-8, atol=1e-4)


def test_tensorstore_alone_reads_it(lm, tokens, taps, tmp_path):
    save(lm, tokens, tmp_path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/resid_post/"}}
    array = ts.open(spec, open=True).result()
    assert array.domain.labels == ("layer", "text", "token", "resid_post_width")
    np.testing.assert_allclose(array[0, 4:9].read().result(), taps["resid_post"][2, 4:9], atol=1e-4)


def test_files_hold_rows_of_one_layer_and_are_compressed(lm, tokens, tmp_path):
    got = save(lm, tokens, tmp_path)
    files = sorted(
        str(f.relative_to(tmp_path / "resid_post/c")) for f in tmp_path.glob("resid_post/c/**/*") if f.is_file()
    )
    assert files == [f"{layer}/{block}/0/0" for layer in range(2) for block in range(3)]
    assert got.arrays["resid_post"].chunk_layout.read_chunk.shape == (1, 8, 1, 32)


class Killed(Exception):
    pass


def killed_at(monkeypatch, call):
    """Lets that many batches through, then raises. Returns a list of one entry a batch that ran."""
    ran, read = [], saved._read

    def until(*args):
        if not isinstance(args[-1], np.ndarray):  # only asked for shapes
            return read(*args)
        if len(ran) == call:
            raise Killed
        ran.append(1)
        return read(*args)

    monkeypatch.setattr(saved, "_read", until)
    return ran


def test_a_killed_writing_goes_on(lm, tokens, tmp_path, monkeypatch):
    whole = save(lm, tokens, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5)
        save(lm, tokens, tmp_path / "parts")
    done = json.loads((tmp_path / "parts/zarr.json").read_text())["attributes"]["texts_done"]
    assert done in (0, 8)  # the second file was being filled, and the first may have been on its way
    with pytest.raises(ValueError, match=f"{done} of 21 texts; call save_activations again"):
        saved.load_activations(tmp_path / "parts")
    half = tmp_path / "parts/resid_post/c/0/1/0/0"  # a file that a power cut left unfinished
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half a file")
    with monkeypatch.context() as patch:
        ran = killed_at(patch, 99)
        save(lm, tokens, tmp_path / "parts")
    assert len(ran) == -(-(N - done) // 4)
    again = saved.load_activations(tmp_path / "parts")
    for layer in (0, 2):
        np.testing.assert_array_equal(again.read(layer), whole.read(layer))
    with monkeypatch.context() as patch:
        ran = killed_at(patch, 0)
        save(lm, tokens, tmp_path / "parts")  # finished: nothing runs
    assert not ran


def test_other_tokens_models_and_settings_are_refused(lm, tokens, tmp_path):
    save(lm, tokens, tmp_path)
    for changed, options in {
        "tokens": dict(tokens=(tokens + 1) % lm.config.vocab_size),
        "tokens ": dict(mask=np.ones_like(MASK)),
        r"layers \(\[2, 0\] there, \[1\] now\)": dict(layers=(1,)),
        r"dtype \('float32' there, 'float16' now\)": dict(dtype="float16"),
        "rows": dict(rows=4),
        "sites": dict(sites=("mlp_out",)),
        "model": dict(lm=dataclasses.replace(lm, params=jax.tree.map(lambda p: p * 1.01, lm.params))),
    }.items():
        with pytest.raises(ValueError, match=f"differ in.*{changed.strip()}.*; choose another folder"):
            save(**(dict(lm=lm, tokens=tokens, folder=tmp_path) | options))


def test_bad_arguments_are_named(lm, tokens, tmp_path):
    for name, options in {
        "dtype: expected one of float32, bfloat16, float16": dict(dtype="int8"),
        "sites: expected some of resid_pre": dict(sites=("resid",)),
        r"sites: expected names in a tuple, such as \('resid_post',\)": dict(sites="resid_post"),
        r"layers: expected distinct ones of 0\.\.3": dict(layers=(4,)),
        "rows to be a multiple of batch": dict(batch=3),
        r"tokens, mask: expected two arrays \[n,T\]": dict(mask=MASK[:2]),
        "tokens: expected integers": dict(tokens=tokens + 1000),
    }.items():
        with pytest.raises(ValueError, match=name):
            save(**(dict(lm=lm, tokens=tokens, folder=tmp_path) | options))
    assert not any(tmp_path.iterdir())


def test_folders_of_something_else(lm, tokens, tmp_path):
    with pytest.raises(ValueError, match="is not a folder of activations"):
        saved.load_activations(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than activations"):
        save(lm, tokens, tmp_path)
    zarr.open_group(tmp_path / "other", mode="w")
    with pytest.raises(ValueError, match="a zarr group, but not one that save_activations wrote"):
        save(lm, tokens, tmp_path / "other")


def test_reading_names_what_is_not_there(lm, tokens, tmp_path):
    got = save(lm, tokens, tmp_path, sites=SITES)
    with pytest.raises(ValueError, match=r"layer: .* has layers \(2, 0\), got \[1\]"):
        got.read(1, site="attn_z")
    with pytest.raises(ValueError, match="site: .* has resid_post, attn_z, got None"):
        got.read(2)
    with pytest.raises(IndexError):
        got.read(2, site="attn_z", texts=N)
    (tmp_path / "attn_z/c/0/1/0/0").unlink()
    with pytest.raises(ValueError, match="attn_z is damaged"):
        saved.load_activations(tmp_path).read(2, site="attn_z")


def scaled(lm, layer, factor):
    """A model whose residuals are `factor` times as large from a layer's feed-forward sublayer on."""
    layers = jax.tree.map(lambda leaf: leaf, lm.params["layers"])
    scale = layers["mlp_post_norm"]["scale"]
    layers["mlp_post_norm"] = {"scale": scale.at[layer].set(factor)}
    return dataclasses.replace(lm, params={**lm.params, "layers": layers})


def test_float16_refuses_what_it_cannot_hold(lm, tokens, tmp_path):
    with pytest.raises(
        ValueError, match=r"resid_post of layer 2 in texts 0\.\.3 reaches \S+e\+05, and float16 ends at"
    ):
        save(scaled(lm, 2, 1e5), tokens, tmp_path / "a", dtype="float16")
    big = save(scaled(lm, 2, 1e5), tokens, tmp_path / "b", dtype="bfloat16").read(2)
    assert np.isfinite(big.astype(np.float32)).all() and np.abs(big).max() > 65_504
    with pytest.raises(ValueError, match="resid_post of layer 2 in texts .* is not finite; check the model"):
        save(scaled(lm, 2, np.nan), tokens, tmp_path / "c")


def test_a_full_disk_is_told_before_anything_runs(lm, tokens, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "free")
    needed = int(MASK.sum()) * 2 * 32 * 4
    monkeypatch.setattr("jaxmech.io.files.shutil.disk_usage", lambda _: Usage(needed - 1))
    ran = killed_at(monkeypatch, 0)
    with pytest.raises(ValueError, match="are needed and .* are free; make room"):
        save(lm, tokens, tmp_path)
    assert not ran
    monkeypatch.setattr("jaxmech.io.files.shutil.disk_usage", lambda _: Usage(needed))
    with pytest.raises(Killed):
        save(lm, tokens, tmp_path)


def test_one_program_and_no_wide_copy(lm, tokens, tmp_path):
    before = saved._read._cache_size()
    save(lm, tokens, tmp_path, dtype="float16", batch=5, rows=10)
    assert saved._read._cache_size() == before + 1
    args = (lm.config, ("resid_post",), (0, 1, 2, 3), "float16", lm.params, tokens[:5], MASK[:5])
    text = saved._read.lower(*args).as_text()
    assert "tensor<4x5x9x32xf16>" in text and "tensor<4x5x9x32xf32>" not in text


def test_the_stream_visits_every_kept_token_once(lm, tokens, taps, tmp_path):
    data = save(lm, tokens, tmp_path, layers=None).stream(layers=(3, 1), batch_size=16, buffer_tokens=30)
    kept = MASK & (np.cumsum(MASK, axis=1) > 1)
    assert len(data.buffer_sizes) == 3 and data.tokens_seen == kept.sum() and data.d_in == 32
    got = np.concatenate([np.asarray(x) for x in data.chunks()], axis=1)
    want = taps["resid_post"][[3, 1]][:, kept]
    order, wanted = np.lexsort(np.round(got[0], 2).T), np.lexsort(np.round(want[0], 2).T)
    np.testing.assert_allclose(got[:, order], want[:, wanted], atol=1e-3)
    again = saved.load_activations(tmp_path).stream(layers=(3, 1), batch_size=16, buffer_tokens=30)
    assert again.fingerprint() == data.fingerprint()
    np.testing.assert_array_equal(again.batch(5), data.batch(5))
    other = saved.load_activations(tmp_path).stream(
        layers=(3, 1), batch_size=16, buffer_tokens=30, key=jax.random.key(1)
    )
    assert other.fingerprint() != data.fingerprint()
    assert len(saved.load_activations(tmp_path).stream(batch_size=60, buffer_tokens=60).buffer_sizes) == 1
    with pytest.raises(ValueError, match="layers: expected distinct ones of"):
        saved.load_activations(tmp_path).stream(layers=(3, 3))


@pytest.mark.slow
def test_a_dictionary_trains_on_it(lm, tokens, tmp_path):
    data = save(lm, tokens, tmp_path, dtype="bfloat16").stream(batch_size=16)
    config = SAETrainConfig(kind="topk", d_sae=48, sparsity=4, steps=3)
    (saes,), _ = train_saes(config, data, key=jax.random.key(0))
    assert saes.config.layers == (2, 0) and saes.config.model == "tiny" and saes.config.site == "resid_post"
