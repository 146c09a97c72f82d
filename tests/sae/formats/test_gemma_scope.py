"""Gemma Scope 1 and 2, written by hand: the numbers of their definition, their sites, and faults named."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmech.sae.formats import load_sae, load_saes

D, F, OUT = 6, 20, 5


def weights(seed=0, d_in=D, d_out=D, lower=False, affine=None):
    rng = np.random.default_rng(seed)
    tensors = {
        "W_enc": rng.normal(size=(d_in, F)),
        "b_enc": rng.normal(size=F),
        "W_dec": rng.normal(size=(F, d_out)) * rng.uniform(0.2, 3, (F, 1)),  # rows of unequal norm
        "b_dec": rng.normal(size=d_out),
        "threshold": rng.uniform(0, 1, F),
    }
    if lower:
        tensors = {name.lower(): value for name, value in tensors.items()}
    if affine is not None:
        tensors["affine_skip_connection"] = rng.normal(size=(d_in, d_out)) if affine is True else affine
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def check(sae, tensors):
    """Against the definition, in float64; nothing is subtracted from x."""
    w = {name.lower(): value.astype(np.float64) for name, value in tensors.items()}
    x = np.random.default_rng(9).normal(size=(40, w["w_enc"].shape[0])) * 2
    pre = x @ w["w_enc"] + w["b_enc"]
    f = np.maximum(pre, 0) * (pre > w["threshold"])
    y = f @ w["w_dec"] + w["b_dec"]
    if "affine_skip_connection" in w:
        y = y + x @ w["affine_skip_connection"]
    x = x.astype(np.float32)
    got = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(got > 0, f > 0)
    assert 0 < (f > 0).mean() < 1
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got, x), y, atol=1e-4)
    np.testing.assert_allclose(sae(x), y, atol=1e-4)


def first(root, tensors, repo="gemma-scope-2b-pt-res", layer=20, l0=71):
    folder = root / repo / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors)
    return folder


def second(root, tensors, site="resid_post", name="layer_12_width_16k_l0_medium", repo="gemma-scope-2-1b-pt", cfg=None):
    folder = root / repo / site / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    if cfg is not None:
        (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def config(point="model.layers.12.output", out=None, **changes):
    return {
        "hf_hook_point_in": point,
        "hf_hook_point_out": out or point,
        "width": F,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    } | changes


TRANSCODER = config(
    "model.layers.12.pre_feedforward_layernorm.output",
    "model.layers.12.post_feedforward_layernorm.output",
    type="transcoder",
)


# Gemma Scope 1 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo, site, site_out, model",
    [
        ("gemma-scope-2b-pt-res", "resid_post", "resid_post", "google/gemma-2-2b"),
        ("gemma-scope-9b-pt-mlp", "mlp_out", "mlp_out", "google/gemma-2-9b"),
        ("gemma-scope-27b-pt-att", "attn_z", "attn_z", "google/gemma-2-27b"),
        ("gemma-scope-9b-it-res", "resid_post", "resid_post", "google/gemma-2-9b-it"),
        ("gemma-scope-2b-pt-transcoders", "mlp_normed", "mlp_out", "google/gemma-2-2b"),
    ],
)
def test_first_suite(repo, site, site_out, model, tmp_path):
    tensors = weights()
    sae = load_sae(first(tmp_path, tensors, repo))
    check(sae, tensors)
    c = sae.config
    assert (c.site, c.site_out, c.model, c.layers, c.l0) == (site, site_out, model, (20,), (71,))
    assert (c.activation, c.subtract_b_dec, c.skip, c.skip_first) == ("jumprelu", False, False, 1)


def test_first_suite_in_a_folder_of_another_name(tmp_path):
    tensors = weights()
    folder = first(tmp_path, tensors, "mine")
    with pytest.raises(ValueError, match=r"nothing in it says its site.*site="):
        load_sae(folder)
    sae = load_sae(folder, site="mlp_normed", model="gemma-2-2b")
    assert (sae.config.site_out, sae.config.model) == ("mlp_out", "gemma-2-2b")
    check(load_sae(folder / "params.npz", site="mlp_out"), tensors)
    for other in (
        "mlp_in",
        "attn_out",
    ):  # where the second suite reads; what "att" is not
        with pytest.raises(ValueError, match=f"site: '{other}' is none of this suite's: resid_post, mlp_out, attn_z"):
            load_sae(folder, site=other)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"site": "mlp_out"}, "site: the files say 'resid_post', asked for 'mlp_out'"),
        ({"layer": 3}, "layer: the files say 20, asked for 3"),
        ({"model": "google/gemma-2-9b"}, "model: the files say 'google/gemma-2-2b'"),
    ],
)
def test_contradictions_with_the_caller(said, message, tmp_path):
    folder = first(tmp_path, weights())
    with pytest.raises(ValueError, match=message):
        load_sae(folder, **said)
    load_sae(folder, site="resid_post", layer=20, model="gemma-2-2b")


def test_dictionaries_of_the_embedding_are_refused(tmp_path):
    folder = first(tmp_path, weights(), layer=0)
    moved = folder.parents[2] / "embedding" / "width_4k" / "average_l0_6"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    with pytest.raises(ValueError, match="token embeddings"):
        load_sae(moved)


def test_every_fault_of_the_tensors_at_once(tmp_path):
    tensors = weights()
    del tensors["b_enc"]
    tensors["surplus"] = np.ones(3)
    tensors["b_dec"][1] = np.nan
    tensors["threshold"] = np.ones(F - 1, np.float32)
    with pytest.raises(ValueError) as error:
        load_sae(first(tmp_path, tensors))
    for fault in (
        "b_enc: missing",
        "surplus: unknown tensor",
        "b_dec: 1 values are NaN",
        r"threshold: expected (20,), got (19,)",
        "params.npz",
    ):
        assert fault in str(error.value)


def test_a_scale_of_one_is_nothing_and_another_is_refused(tmp_path):
    tensors = weights()
    check(load_sae(first(tmp_path, tensors | {"scaling_factor": np.ones(F)})), tensors)
    with pytest.raises(ValueError, match="scaling_factor"):
        load_sae(first(tmp_path, tensors | {"scaling_factor": np.full(F, 2.0)}, layer=21))


def test_one_dictionary_a_layer(tmp_path):
    for layer, l0 in ((3, 50), (11, 90)):
        first(tmp_path, weights(layer), layer=layer, l0=l0)
    root = tmp_path / "gemma-scope-2b-pt-res"
    stack = load_saes(root)
    assert (stack.config.layers, stack.config.l0) == ((3, 11), (50, 90))
    for layer in (3, 11):
        check(stack.at(layer), weights(layer))
    assert load_saes(root, layers=[11, 3]).config.l0 == (90, 50)
    check(load_sae(root, layer=11), weights(11))
    with pytest.raises(ValueError, match="layer 4; it has layers 3, 11"):
        load_saes(root, layers=[3, 4])
    with pytest.raises(ValueError, match="holds 2 dictionaries.*layer=.*load_saes"):
        load_sae(root)
    first(tmp_path, weights(), layer=3, l0=9)
    with pytest.raises(ValueError, match="several dictionaries of layer 3 .*average_l0_50, .*average_l0_9"):
        load_saes(root)
    with pytest.raises(ValueError, match="say which: the path of one"):
        load_sae(root, layer=3)


# Gemma Scope 2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    "folder, point, site",
    [
        ("resid_post", "model.layers.12.output", "resid_post"),
        ("resid_post_all", "model.language_model.layers.12.output", "resid_post"),
        ("attn_out", "model.layers.12.self_attn.o_proj.input", "attn_z"),
        ("mlp_out_all", "model.layers.12.post_feedforward_layernorm.output", "mlp_out"),
    ],
)
def test_second_suite(folder, point, site, with_config, tmp_path):
    tensors = weights(lower=True)
    sae = load_sae(second(tmp_path, tensors, folder, cfg=config(point) if with_config else None))
    check(sae, tensors)
    c = sae.config
    assert (c.site, c.site_out, c.layers, c.model) == (site, site, (12,), "google/gemma-3-1b-pt")
    assert (c.l0, c.skip_first) == ((60 if with_config else None,), 1)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("d_out", [D, OUT])
@pytest.mark.parametrize("affine", [True, None])
def test_transcoders_of_the_second_suite(affine, d_out, with_config, tmp_path):
    tensors = weights(d_out=d_out, lower=True, affine=affine)
    name = "layer_12_width_16k_l0_big" + "_affine" * bool(affine)
    cfg = TRANSCODER | {"affine_connection": bool(affine)}
    sae = load_sae(second(tmp_path, tensors, "transcoder_all", name, cfg=cfg if with_config else None))
    check(sae, tensors)
    c = sae.config
    assert (c.site, c.site_out, c.skip, c.d_out) == ("mlp_in", "mlp_out", bool(affine), d_out)


def test_instruction_tuned_models_leave_out_their_first_four_tokens(tmp_path):
    sae = load_sae(second(tmp_path, weights(lower=True), repo="gemma-scope-2-270m-it"))
    assert (sae.config.skip_first, sae.config.model) == (4, "google/gemma-3-270m-it")
    sae = load_sae(second(tmp_path, weights(lower=True), repo="gemma-scope-2-270m-pt"))
    assert (sae.config.skip_first, sae.config.model) == (1, "google/gemma-3-270m")


def test_a_copy_of_the_innermost_folder_alone(tmp_path):
    tensors = weights(lower=True)
    folder = second(tmp_path, tensors, "copied", cfg=config(model_name="gemma-v3-270m-pt"))
    sae = load_sae(folder)
    assert (sae.config.site, sae.config.model) == ("resid_post", "google/gemma-3-270m")
    unnamed = second(tmp_path, tensors, "copied", repo="mine", cfg=config(model_name=""))
    assert load_sae(unnamed).config.model is None
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="nothing in it says its site"):
        load_sae(folder)
    with pytest.raises(ValueError, match="site: 'attn_out' is none of this suite's"):  # its folder holds attn_z
        load_sae(folder, site="attn_out")
    sae = load_sae(folder, site="mlp_in")
    assert (sae.config.site, sae.config.site_out) == ("mlp_in", "mlp_out")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "topk"}, "architecture: expected 'jump_relu', got 'topk'"),
        ({"type": "clt"}, "cross-layer transcoder.*not supported"),
        ({"type": "crosscoder"}, "crosscoder.*not supported"),
        ({"type": "other"}, "type: expected 'sae' or 'transcoder'"),
        ({"hf_hook_point_in": "model.layers.7.output"}, "layer 7, the folder's name says layer 12"),
        ({"hf_hook_point_in": "model.layers.12.post_feedforward_layernorm.output"}, "is mlp_out, the folder"),
        ({"hf_hook_point_in": "model.embed_tokens.output"}, "is not a known site"),
        ({"hf_hook_point_in": "model.layers.12.mlp.output"}, "is not a known site"),  # before its post-norm
        ({"affine_connection": True}, "affine_skip_connection: missing"),
        ({"width": F + 1}, "width: config.json says 21, w_enc has 20"),
        ({"surprise": 1, "architecture": "topk"}, "surprise: unknown key.*architecture"),
    ],
)
def test_contradictions_of_a_configuration(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(second(tmp_path, weights(lower=True), cfg=config() | changes))


def test_a_skip_term_that_nothing_announces(tmp_path):
    tensors = weights(lower=True, affine=True)
    with pytest.raises(ValueError, match="affine_skip_connection: present, contrary to"):
        load_sae(second(tmp_path, tensors, "transcoder", cfg=TRANSCODER))


@pytest.mark.parametrize("folder", ["crosscoder", "clt"])
def test_several_layers_at_once_are_refused_by_name(folder, tmp_path):
    path = second(tmp_path, weights(lower=True), folder, "layer_9_width_16k_l0_medium")
    with pytest.raises(ValueError, match="crosscoder|cross-layer transcoder"):
        load_sae(path)
    with pytest.raises(ValueError, match="crosscoder|cross-layer transcoder"):
        load_saes(path.parents[1])


def test_a_layer_of_a_cross_layer_transcoder_is_refused_by_name(tmp_path):
    path = tmp_path / "clt" / "width_262k_l0_big_affine" / "params_layer_0.safetensors"
    path.parent.mkdir(parents=True)
    save_file(weights(lower=True), path)
    for source in (path.parents[1], path.parent, path):
        with pytest.raises(ValueError, match="a cross-layer transcoder, which"):
            load_sae(source)


def test_a_decoder_with_an_axis_of_layers_is_refused_whatever_it_is_called(tmp_path):
    tensors = weights(lower=True)
    tensors["w_dec"] = np.ones((F, 3, D), np.float32)
    with pytest.raises(ValueError, match="w_dec has an axis of layers"):
        load_sae(second(tmp_path, tensors))


def test_damaged_files(tmp_path):
    path = second(tmp_path, weights(lower=True), cfg=config()) / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="params.safetensors is damaged or truncated"):
        load_sae(path.parent)
    (path.parent / "config.json").write_text('{"width": 2')
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_sae(path.parent)


@pytest.mark.parametrize("said", [{"k": 4}, {"batch_topk": True}])
def test_what_is_for_topk_dictionaries_is_refused(said, tmp_path):
    folder = first(tmp_path, weights())
    with pytest.raises(ValueError, match=f"{next(iter(said))}: for TopK dictionaries"):
        load_sae(folder, **said)
