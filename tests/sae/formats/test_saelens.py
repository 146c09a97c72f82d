"""SAELens' format: SAELens' own numbers, what is written comes back, and every fault is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmech.sae.formats import load_sae, load_saes, save_sae, save_saes
from jaxmech.sae.formats.saelens import KINDS
from jaxmech.sae.module import SAEConfig, make_sae, param_shapes

GOLDENS = Path(__file__).parents[2] / "goldens" / "sae"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


def random_sae(activation="jumprelu", layers=(9,), d_in=6, **options):
    rng = np.random.default_rng(0)
    config = SAEConfig(d_in, 20, activation=activation, layers=layers, model="gemma-3-270m", **options)
    lead = (len(layers),) if len(layers) > 1 else ()
    return make_sae({n: rng.normal(size=lead + s) for n, s in param_shapes(config).items()}, config)


def edit_cfg(folder, **changes):
    """Changes keys; "remove" takes one out, and metadata is changed key by key."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = cfg.get("metadata", {}) | changes.pop("metadata", {})
    cfg = cfg | ({"metadata": metadata} if metadata else {}) | changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if v != "remove"}))
    return folder


def edit_weights(folder, change):
    weights = load_file(folder / "sae_weights.safetensors")
    change(weights)
    weights = {name: np.ascontiguousarray(w) if w.ndim else w for name, w in weights.items()}
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def copy(name, tmp_path):
    return Path(shutil.copytree(GOLDENS / name, tmp_path / name))


# SAELens' own numbers ------------------------------------------------------------------------------------------------


def check(sae, io, f=None):
    f = io["f"] if f is None else f
    got = np.asarray(sae.encode(io["x"]))
    np.testing.assert_array_equal(got != 0, f != 0)
    np.testing.assert_allclose(got, f, atol=1e-4)
    if f is io["f"]:
        # SAELens' decode leaves the skip term to the whole.
        np.testing.assert_allclose(sae.decode(got, io["x"]), io["whole" if sae.config.skip else "y"], atol=1e-4)
        np.testing.assert_allclose(sae(io["x"]), io["whole"], atol=1e-4)


def test_goldens_exist():
    assert len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_written_by_saelens(name):
    sae, io = load_sae(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    c = sae.config
    site = ("mlp_normed", "mlp_out") if "transcoder" in name else ("resid_post", "resid_post")
    assert (c.site, c.site_out, c.layers, c.model) == (*site, (9,), "gemma-3-270m")
    assert c.l0 == ((k := {"topk": 5, "abstopk": 5, "batchtopk": None}.get(name.split("_")[0])),) or k is None
    check(sae, io)


def test_batchtopk_as_trained():
    """From the trainer's files as from SAELens' export of them."""
    io = np.load(GOLDENS / "batchtopk_trainer" / "io.npz")
    sae = load_sae(GOLDENS / "batchtopk_trainer", batch_topk=True)
    assert (sae.config.activation, sae.config.k, sae.config.l0) == ("batchtopk", 4.5, (4.5,))
    check(sae, io, io["f_trained"])
    assert load_sae(GOLDENS / "batchtopk_trainer").config.l0 == (4.5,)
    exported = load_sae(GOLDENS / "batchtopk_exported", batch_topk=True)
    assert (exported.config.activation, exported.config.k) == ("batchtopk", 4.0)


def test_decoder_norms_are_folded():
    sae = load_sae(GOLDENS / "topk_rescaled")
    assert np.ptp(np.linalg.norm(load_file(GOLDENS / "topk_rescaled" / "sae_weights.safetensors")["W_dec"], axis=1)) > 1
    np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=1), 1, rtol=1e-5)
    assert sae.config.units == "residual"


# Before version 6 ----------------------------------------------------------------------------------------------------


def flat(folder, **changes):
    """The same dictionary with a flat cfg.json."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    cfg |= {"hook_name": metadata["hook_name"], "model_name": metadata["model_name"]} | changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if v != "remove"}))
    return folder


@pytest.mark.parametrize(
    "name, changes",
    [
        ("standard", {"architecture": "remove", "apply_b_dec_to_input": "remove", "activation_fn": "relu"}),
        ("standard", {"architecture": "remove", "normalize_activations": None, "noise_scale": 0}),
        ("jumprelu_raw_input", {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "dtype": "torch.float32"}),
        ("gated", {"finetuning_scaling_factor": False, "hook_head_index": None, "seqpos_slice": [None]}),
        ("topk", {"k": "remove", "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("topk", {"architecture": "remove", "k": "remove", "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("standard_scaled", {"normalize_activations": True}),
        ("standard", {"hook_name": "remove", "hook_point": "blocks.{layer}.hook_resid_post", "hook_point_layer": 9}),
    ],
)  # fmt: skip
def test_flat_configs(name, changes, tmp_path):
    check(load_sae(flat(copy(name, tmp_path), **changes)), np.load(GOLDENS / name / "io.npz"))


def test_flat_attention_configs_imply_the_reshape(tmp_path):
    folder = flat(copy("standard", tmp_path), reshape_activations="remove", hook_name="blocks.9.attn.hook_z")
    assert load_sae(folder).config.site == "attn_z"
    with pytest.raises(ValueError, match="'hook_z' does not go with hook 'blocks.9.hook_resid_post'"):
        load_sae(edit_cfg(folder, hook_name="blocks.9.hook_resid_post", reshape_activations="hook_z"))


def test_flat_faults(tmp_path):
    folder = flat(copy("standard", tmp_path), activation_fn="tanh-relu", activation_fn_kwargs={"a": 1}, surprise=1,
                  hook_head_index=3, hook_layer=9)  # fmt: skip
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in ("got 'tanh-relu'", "activation_fn_kwargs: a: unknown", "surprise: unknown key", "hook_head_index: 3"):
        assert part in str(error.value)
    folder = edit_cfg(folder, activation_fn="relu", activation_fn_kwargs={}, surprise="remove", hook_head_index=None)
    load_sae(folder)
    with pytest.raises(ValueError, match="hook_layer 8 contradicts hook name 'blocks.9.hook_resid_post'"):
        load_sae(edit_cfg(folder, hook_layer=8))


# Written and read back -----------------------------------------------------------------------------------------------

PAIR = {"site": "mlp_in", "site_out": "mlp_out", "subtract_b_dec": False}


@pytest.mark.parametrize(
    "activation, options",
    [
        ("relu", {"l0": (np.float32(12.5),), "skip_first": 4}),
        ("jumprelu", {"subtract_b_dec": False, "units": "residual"}),
        ("topk", {"k": 3, "normalize": "layer_norm"}),
        ("abstopk", {"k": 3, "normalize": "norm"}),
        ("jumprelu", {"d_out": 4, "skip": True, **PAIR}),
        ("jumprelu", PAIR),
        ("relu", {"skip": True, **PAIR}),
        ("relu", {"d_out": 4, **PAIR, "site": "mlp_normed"}),
    ],
)
def test_round_trip(activation, options, tmp_path):
    sae = random_sae(activation, **{"site": "attn_out", **options})
    back = load_sae(save_sae(sae, tmp_path / "sae"))
    for name, leaf in sae.params.items():
        np.testing.assert_array_equal(back.params[name], leaf)
    config = dataclasses.replace(sae.config, source=back.config.source, l0=back.config.l0)
    assert back.config == config
    assert back.config.l0 == (options.get("l0", (sae.config.k,)))
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_batchtopk_round_trip(tmp_path):
    sae = random_sae("batchtopk", k=2.5)
    folder = save_sae(sae, tmp_path)
    back = load_sae(folder, batch_topk=True)
    assert (back.config.activation, back.config.k) == ("batchtopk", 2.5)
    np.testing.assert_array_equal(back.params["W_enc"], sae.params["W_enc"])
    with pytest.raises(ValueError, match="none was learnt.*batch_topk=True"):
        load_sae(folder)


def test_transcoders_that_subtract_b_dec_are_folded(tmp_path):
    """SAELens' never do."""
    sae = random_sae("relu", skip=True, site="mlp_in", site_out="mlp_out", subtract_b_dec=True)
    back = load_sae(save_sae(sae, tmp_path))
    assert not back.config.subtract_b_dec
    x = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    np.testing.assert_allclose(back.encode(x), sae.encode(x), atol=1e-5)
    np.testing.assert_allclose(back(x), sae(x), atol=1e-5)


def test_every_architecture_is_written_or_has_another_form():
    from jaxmech.sae.formats.saelens_save import _architecture

    k, skip = {"k": 3}, {"skip": True, **PAIR}
    forms = [("relu", {}), ("jumprelu", {}), ("topk", k), ("abstopk", k), ("batchtopk", k)]
    forms += [(activation, options) for activation in ("relu", "jumprelu") for options in (PAIR, skip)]
    written = {_architecture(random_sae(activation, **options).config) for activation, options in forms}
    assert set(KINDS) - written == {"gated", "matryoshka_batchtopk"}


def test_forms_that_saelens_does_not_have(tmp_path):
    for activation in ("topk", "abstopk", "batchtopk"):
        with pytest.raises(ValueError, match=f"no {activation} transcoder"):
            save_sae(random_sae(activation, k=3, **PAIR), tmp_path)
    with pytest.raises(ValueError, match="normalises each token"):
        save_sae(random_sae(normalize="norm", **PAIR), tmp_path)
    with pytest.raises(ValueError, match="no hook for 'somewhere'"):
        save_sae(random_sae(site="somewhere"), tmp_path)
    with pytest.raises(ValueError, match="save_saes"):
        save_sae(random_sae(layers=(1, 2)), tmp_path)
    sae = random_sae()
    with pytest.raises(ValueError, match="W_dec: 120 values are NaN"):
        save_sae(sae.replace(params={**sae.params, "W_dec": sae.params["W_dec"] * np.nan}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_stack_round_trip(tmp_path):
    stack = random_sae(layers=(12, 2), l0=(30.0, None))
    back = load_saes(save_saes(stack, tmp_path))
    assert (back.config.layers, back.config.l0) == ((2, 12), (None, 30.0))
    np.testing.assert_array_equal(back.params["W_enc"][::-1], stack.params["W_enc"])
    assert load_saes(tmp_path, layers=[12, 2]).config.layers == (12, 2)
    (tmp_path / "layer_2").rename(tmp_path / "layer_3")
    with pytest.raises(ValueError, match="layer: the files say 2, asked for 3"):
        load_saes(tmp_path)


# Faults --------------------------------------------------------------------------------------------------------------


def test_all_config_faults_at_once(tmp_path):
    folder = edit_cfg(save_sae(random_sae(), tmp_path), normalize_activations="covariance_whitening", surprise=1,
                      d_in="6", d_sae="remove", architecture="glued", apply_b_dec_to_input=1,
                      metadata={"hook_head_index": 2})  # fmt: skip
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in (
        *("'covariance_whitening'; SAELens folds it", "surprise: unknown key", "d_in: expected", "d_sae: missing"),
        *("'glued'", "apply_b_dec_to_input: expected true or false", "hook_head_index: 2"),
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["temporal", "matching_pursuit"])
def test_architectures_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' is not supported"):
        load_sae(edit_cfg(save_sae(random_sae(), tmp_path), architecture=name))


@pytest.mark.parametrize(
    "golden, changes, message",
    [
        ("standard", {"k": 3}, "k: does not go with 'standard'"),
        ("standard", {"d_out": 3}, "d_out: does not go with 'standard'"),
        ("jumprelu", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: does not go"),
        ("topk", {"k": "remove"}, "k: missing"),
        ("topk", {"k": 4.5}, "k: expected a positive whole number, got 4.5"),
        ("standard", {"d_sae": 40.0}, "d_sae: expected a positive whole number, got 40.0"),
        ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input: does not go with 'transcoder'"),
        ("transcoder", {"normalize_activations": "layer_norm"}, "not supported for a transcoder"),
        ("transcoder", {"metadata": {"hook_name_out": "blocks.10.hook_mlp_out"}}, "cross-layer transcoder"),
        ("transcoder", {"metadata": {"hook_name_out": "blocks.9.mlp.hook_post"}}, "write that site's name there"),
        ("transcoder", {"metadata": {"hook_name_out": None, "hook_name": "blocks.9.hook_resid_mid"}},
         "hook_name_out: missing"),
        ("standard", {"metadata": {"hook_name": "blocks.9.hook_mlp_in"}}, "residual before the MLP's norm"),
        ("standard", {"metadata": {"hook_name": None}}, "nothing in it says its site"),
    ],
)  # fmt: skip
def test_configs_refused(golden, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(edit_cfg(copy(golden, tmp_path), **changes))


def test_all_tensor_faults_at_once(tmp_path):
    folder = save_sae(random_sae(), tmp_path)

    def change(w):
        w["W_enc"], w["stray"] = w["W_enc"].T, w["b_dec"]
        w["b_enc"][3] = np.nan
        del w["threshold"]

    edit_weights(folder, change)
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in ("W_enc: expected (6, 20), got (20, 6)", "stray: unknown tensor", "threshold: missing",
                 "b_enc: 1 values are NaN"):  # fmt: skip
        assert part in str(error.value)


def test_damaged_files(tmp_path):
    folder, weights = save_sae(random_sae(), tmp_path), tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="cfg.json"):
        load_sae(folder)


@pytest.mark.parametrize("name", ["batchtopk_trainer", "batchtopk_exported"])
def test_unset_batchtopk_threshold(name, tmp_path):
    def unset(w):
        for key in {"threshold", "topk_threshold"} & w.keys():
            w[key] = np.zeros_like(w[key])

    folder = edit_weights(copy(name, tmp_path), unset)
    with pytest.raises(ValueError, match="none was learnt.*batch_topk=True"):
        load_sae(folder)
    assert load_sae(folder, batch_topk=True).config.activation == "batchtopk"


def test_what_the_caller_says(tmp_path):
    folder = copy("standard", tmp_path)
    for given, message in (
        ({"layer": 8}, "layer: the files say 9, asked for 8"),
        ({"site": "mlp_out"}, "site: the files say 'resid_post', asked for 'mlp_out'"),
        ({"model": "gpt2"}, "model: the files say"),
        ({"k": 3}, "k: a 'standard' dictionary has none"),
        ({"batch_topk": True}, "not one trained with BatchTopK"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sae(folder, **given)
    with pytest.raises(ValueError, match="k: the files say 5, asked for 6"):
        load_sae(GOLDENS / "topk", k=6)
    edit_cfg(folder, metadata={"hook_name": "blocks.9.hook_mlp_in"})
    assert load_sae(folder, site="resid_mid").config.site == "resid_mid"
    edit_cfg(folder, metadata={"hf_hook_name": "model.layers.9.pre_feedforward_layernorm.output"})
    assert load_sae(folder).config.site == "mlp_in"


# Scales --------------------------------------------------------------------------------------------------------------


def test_scale_unknown_or_folded_twice(tmp_path):
    folder = copy("standard_scaled", tmp_path)
    (folder / "activation_scaler.json").unlink()
    with pytest.raises(ValueError, match="needs its factor.*activation_scaler.json"):
        load_sae(folder)
    for content in ('{"scaling_factor": Infinity}', '{"scaling_factor": null, "has_whitening": false}'):
        (folder / "activation_scaler.json").write_text(content)
        with pytest.raises(ValueError, match="needs its factor"):
            load_sae(folder)
    edit_cfg(folder, normalize_activations="none")
    load_sae(folder)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.4}')
    with pytest.raises(ValueError, match="folding it twice"):
        load_sae(folder)


def test_scale_of_a_batchtopk_threshold(tmp_path):
    """It is in units of what is ranked, which with rescaling shrinks by the factor that is folded in."""
    x = np.load(GOLDENS / "batchtopk_trainer" / "io.npz")["x"]
    plain = load_sae(GOLDENS / "batchtopk_trainer")
    folder = edit_cfg(copy("batchtopk_trainer", tmp_path), normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    scaled = load_sae(folder)
    np.testing.assert_allclose(scaled.encode(x * 4), plain.encode(x) * 4, atol=1e-4)
    np.testing.assert_allclose(scaled(x * 4), plain(x) * 4, atol=1e-4)


def test_finetuning_scale(tmp_path):
    sae, x = load_sae(GOLDENS / "standard"), np.load(GOLDENS / "standard" / "io.npz")["x"]
    folder, scale = copy("standard", tmp_path), np.linspace(0.5, 2, 40, dtype=np.float32)
    edit_weights(folder, lambda w: w.update(scaling_factor=np.ones(40, np.float32)))
    np.testing.assert_array_equal(load_sae(folder).params["W_dec"], sae.params["W_dec"])
    edit_weights(folder, lambda w: w.update(scaling_factor=scale))
    with pytest.raises(ValueError, match="scaling_factor: not all 1"):
        load_sae(folder)
    tuned = load_sae(edit_cfg(folder, finetuning_scaling_factor=True))
    np.testing.assert_array_equal(tuned.encode(x), sae.encode(x))
    np.testing.assert_allclose(tuned(x), sae.decode(sae.encode(x) * scale), atol=1e-5)


def test_older_log_threshold_and_bfloat16(tmp_path):
    import ml_dtypes

    sae, folder = load_sae(GOLDENS / "jumprelu"), copy("jumprelu", tmp_path)
    edit_weights(folder, lambda w: w.update(log_threshold=np.log(w.pop("threshold"))))
    np.testing.assert_allclose(load_sae(folder).params["threshold"], sae.params["threshold"], rtol=1e-6)
    edit_weights(folder, lambda w: w.update({n: v.astype(ml_dtypes.bfloat16) for n, v in w.items()}))
    assert load_sae(folder).params["W_dec"].dtype == np.float32


def test_activations_of_a_processed_model_are_warned_about(tmp_path):
    folder = edit_cfg(copy("standard", tmp_path),
                      metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})  # fmt: skip
    with pytest.warns(UserWarning, match="center_writing_weights"):
        load_sae(folder)
    load_sae(edit_cfg(folder, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": False}}))


def test_configs_that_saelens_overrides(tmp_path):
    root = tmp_path / "models--JoshEngels--Mistral-7B-Residual-Stream-SAEs" / "snapshots" / "0123"
    shutil.copytree(GOLDENS / "standard", root / "mistral_7b_layer_8")
    assert load_sae(flat(root / "mistral_7b_layer_8")).config.normalize == "norm"
    copied = tmp_path / "GPT2-Small-SAEs-Reformatted"
    copied.mkdir()
    folder = flat(copy("standard", copied))
    with pytest.warns(UserWarning, match="center_writing_weights"):
        load_sae(folder)


def test_tokens_left_out_of_training(tmp_path):
    folder = copy("standard", tmp_path)
    assert load_sae(folder).config.skip_first == 1
    assert load_sae(edit_cfg(folder, metadata={"seqpos_slice": [5, -5]})).config.skip_first == 5
