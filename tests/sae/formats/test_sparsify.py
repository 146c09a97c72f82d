"""EleutherAI's sparsify, written by hand: the numbers of its definition, sites from the folder's name, faults named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxmech.sae.formats import load_sae, load_saes

D, F, K = 6, 24, 4
CFG = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K,
       "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}  # fmt: skip


def tensors(skip=False, seed=0):
    rng = np.random.default_rng(seed)
    raw = {
        "encoder.weight": rng.normal(size=(F, D)),
        "encoder.bias": rng.normal(size=F),
        "W_dec": rng.normal(size=(F, D)) * rng.uniform(0.2, 3, (F, 1)),
        "b_dec": rng.normal(size=D),
    } | ({"W_skip": rng.normal(size=(D, D))} if skip else {})
    return {name: jnp.asarray(value, jnp.bfloat16) for name, value in raw.items()}


def write(root, name="layers.3", weights=None, remove=(), **changes):
    folder = root / name
    folder.mkdir(parents=True)
    cfg = {key: value for key, value in (CFG | changes).items() if key not in remove}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights or tensors(bool(changes.get("skip_connection"))), folder / "sae.safetensors")
    return folder


def check(sae, w, transcode=False, signed=False):
    """Against the definition, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    x = (np.random.default_rng(5).normal(size=(50, D)) * 2).astype(np.float32)
    pre = (x - (0 if transcode else w["b_dec"])) @ w["encoder.weight"].T + w["encoder.bias"]
    rank = np.abs(pre) if signed else np.maximum(pre, 0)
    f = np.where(rank >= np.sort(rank, axis=1)[:, -K, None], pre if signed else rank, 0)
    y = f @ w["W_dec"] + w["b_dec"]
    y = y + x @ w["W_skip"].T if "W_skip" in w else y
    got = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(got != 0, f != 0)
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got, x), y, atol=1e-4)
    np.testing.assert_allclose(sae(x), y, atol=1e-4)


def test_autoencoder(tmp_path):
    sae = load_sae(write(tmp_path))
    c = sae.config
    assert (c.site, c.site_out, c.layers, c.activation, c.k, c.l0) == (
        "resid_post",
        "resid_post",
        (3,),
        "topk",
        K,
        (K,),
    )
    check(sae, tensors())


def test_transcoders(tmp_path):
    sae = load_sae(write(tmp_path, "layers.3.mlp", transcode=True, skip_connection=True))
    assert (sae.config.site, sae.config.site_out, sae.config.layers) == ("mlp_in", "mlp_out", (3,))
    check(sae, tensors(skip=True), transcode=True)
    sae = load_sae(write(tmp_path, "layers.4", transcode=True))
    assert (sae.config.site, sae.config.site_out) == ("resid_pre", "resid_post")
    check(sae, tensors(), transcode=True)


def test_transcoders_before_transcode_was_a_key(tmp_path):
    """They subtract b_dec; the run's config.json, or the skip connection, says that they are transcoders."""
    folder = write(tmp_path / "a", "layers.5.mlp", remove=["transcode", "activation"], skip_connection=True)
    sae = load_sae(folder)
    assert (sae.config.site, sae.config.site_out, sae.config.subtract_b_dec) == ("mlp_in", "mlp_out", True)
    check(sae, tensors(skip=True))
    folder = write(tmp_path / "b", "layers.5.mlp", remove=["transcode"])
    assert load_sae(folder).config.site == "mlp_out"
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "transcode": True}))
    sae = load_sae(folder)
    assert (sae.config.site, sae.config.model) == ("mlp_in", "EleutherAI/pythia-70m")


def test_signed(tmp_path):
    sae = load_sae(write(tmp_path, signed=True, remove=["activation", "transcode", "skip_connection", "multi_topk"]))
    assert sae.config.activation == "abstopk"
    check(sae, tensors(), signed=True)


@pytest.mark.parametrize(
    "name, site", [("layers.3.attention", "attn_out"), ("h.3.mlp", "mlp_out"), ("layers.3/seed1", "resid_post")]
)
def test_sites(name, site, tmp_path):
    assert (c := load_sae(write(tmp_path, name)).config).site == site and c.layers == (3,)


def test_names_that_are_no_site(tmp_path):
    folder = write(tmp_path, "embed_tokens")
    with pytest.raises(ValueError, match="embed_tokens' is none of our sites"):
        load_sae(folder)
    assert load_sae(folder, site="resid_pre", layer=0).config.site == "resid_pre"
    with pytest.raises(ValueError, match=r"layers.2.attention.input' is none of our sites"):
        load_sae(write(tmp_path, "layers.2.attention", transcode=True))
    folder = write(tmp_path / "run", "layers.2.mlp")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "google/gemma-2-2b"}))
    with pytest.raises(ValueError, match=r"none of our sites.*site="):  # the MLP's output before its norm
        load_sae(folder)
    (folder / "cfg.json").write_text(json.dumps(CFG | {"transcode": True}))
    with pytest.raises(ValueError, match="give the folder the name"):  # a transcoder has two, and `site` says one
        load_sae(folder)


def test_the_folder_seen_from_within(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path))
    for source in (".", "sae.safetensors", "../layers.3/"):
        assert load_sae(source).config.layers == (3,)


def test_stack(tmp_path):
    for layer in (10, 2):
        write(tmp_path, f"layers.{layer}", tensors(seed=layer))
    stack = load_saes(tmp_path)
    assert stack.config.layers == (2, 10)
    check(stack.at(10), tensors(seed=10))


def test_faults(tmp_path):
    folder = write(tmp_path / "a", surprise=1, activation="groupmax", k=0, gram_lookup=True, remove=["d_in"])
    with pytest.raises(ValueError) as error:
        load_sae(folder, batch_topk=True)
    for part in ("surprise: unknown key", "got 'groupmax'", "k: expected a whole number", "gram_lookup: not supported",
                 "d_in: missing", "batch_topk"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="k: the files say 4, asked for 5"):
        load_sae(write(tmp_path / "b"), k=5)
    weights = tensors()
    weights["W_dec"], weights["b_dec"], weights["W_skip"] = (
        weights["W_dec"].T,
        weights["b_dec"] * np.nan,
        weights["W_dec"],
    )
    del weights["encoder.bias"]
    with pytest.raises(ValueError) as error:
        load_sae(write(tmp_path / "c", weights=weights))
    for part in ("W_dec: expected (24, 6), got (6, 24)", "encoder.bias: missing", "b_dec: 6 values are NaN",
                 "W_skip: unknown tensor"):  # fmt: skip
        assert part in str(error.value)
    folder = write(tmp_path / "d")
    (folder / "sae.safetensors").write_bytes((folder / "sae.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        load_sae(folder)
