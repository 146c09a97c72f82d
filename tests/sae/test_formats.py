"""SAELens' format: its own files reproduce its own numbers, ours come back as they were, and faults are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmech.sae.formats import load_sae, load_saes, save_sae, save_saes
from jaxmech.sae.module import SAEConfig, make_sae, param_shapes

GOLDENS = Path(__file__).parents[1] / "goldens" / "sae"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


def random_sae(activation="jumprelu", layers=(9,), **options):
    rng = np.random.default_rng(0)
    config = SAEConfig(6, 20, activation=activation, layers=layers, model="gemma-3-270m", units="residual", **options)
    lead = (len(layers),) if len(layers) > 1 else ()
    return make_sae({n: rng.normal(size=lead + s) for n, s in param_shapes(config).items()}, config)


def test_goldens_exist():
    assert len(NAMES) == 7


@pytest.mark.parametrize("name", NAMES)
def test_written_by_saelens(name):
    sae, io = load_sae(GOLDENS / name), np.load(GOLDENS / name / "io.npz")
    assert (sae.config.site, sae.config.layers, sae.config.model) == ("resid_post", (9,), "gemma-3-270m")
    f = np.asarray(sae.encode(io["x"]))
    if name == "topk_rescaled":  # the scale of a feature and of its decoder row are folded into each other
        norm = np.linalg.norm(load_file(GOLDENS / name / "sae_weights.safetensors")["W_dec"], axis=1)
        np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=1), 1, rtol=1e-5)
        assert np.ptp(norm) > 1
    np.testing.assert_array_equal(f > 0, io["f"] > 0)
    np.testing.assert_allclose(f, io["f"], atol=1e-4)
    np.testing.assert_allclose(sae.decode(f), io["y"], atol=1e-4)
    np.testing.assert_allclose(sae(io["x"]), io["whole"], atol=1e-4)


@pytest.mark.parametrize(
    "activation, options", [("relu", {}), ("jumprelu", {"subtract_b_dec": False}), ("topk", {"k": 3})]
)
def test_round_trip(activation, options, tmp_path):
    sae = random_sae(activation, site="mlp_out", **options)
    back = load_sae(save_sae(sae, tmp_path / "sae"))
    for name, leaf in sae.params.items():
        np.testing.assert_array_equal(back.params[name], leaf)
    for field in ("activation", "k", "subtract_b_dec", "site", "layers", "model", "units"):
        assert getattr(back.config, field) == getattr(sae.config, field)
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_stack_round_trip(tmp_path):
    stack = random_sae(layers=(12, 2))
    back = load_saes(save_saes(stack, tmp_path))
    assert back.config.layers == (2, 12)
    np.testing.assert_array_equal(back.params["W_enc"][::-1], stack.params["W_enc"])
    with pytest.raises(ValueError, match="load_saes"):
        load_sae(tmp_path)
    (tmp_path / "layer_2").rename(tmp_path / "layer_3")
    with pytest.raises(ValueError, match="says layer 3, its cfg.json layer 2"):
        load_saes(tmp_path)


def edit_cfg(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if v != "remove"}))


def edit_weights(folder, change):
    weights = load_file(folder / "sae_weights.safetensors")
    change(weights)
    save_file({n: np.ascontiguousarray(w) for n, w in weights.items()}, folder / "sae_weights.safetensors")


def test_all_config_faults_at_once(tmp_path):
    folder = save_sae(random_sae(), tmp_path)
    edit_cfg(folder, normalize_activations="layer_norm", surprise=1, d_in="6", d_sae="remove", architecture="gated")
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in (
        "'layer_norm' is not supported",
        "surprise: unknown key",
        "d_in: expected",
        "d_sae: missing",
        "'gated'",
    ):
        assert part in str(error.value)


def test_all_tensor_faults_at_once(tmp_path):
    folder = save_sae(random_sae(), tmp_path)

    def change(w):
        w["W_enc"], w["stray"] = w["W_enc"].T, w["b_dec"]
        del w["threshold"]

    edit_weights(folder, change)
    with pytest.raises(ValueError) as error:
        load_sae(folder)
    for part in ("W_enc: expected (6, 20), got (20, 6)", "stray: unknown tensor", "threshold: missing"):
        assert part in str(error.value)


def test_values_and_files_refused_by_name(tmp_path):
    folder, weights = save_sae(random_sae(), tmp_path), tmp_path / "sae_weights.safetensors"
    edit_weights(folder, lambda w: w["b_enc"].__setitem__(3, np.nan))
    with pytest.raises(ValueError, match="b_enc: 1 values are NaN"):
        load_sae(folder)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load_sae(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="no such file"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_sae(folder)
    (folder / "cfg.json").write_text('{"d_in": 3, "hook_point": "x"}')
    with pytest.raises(ValueError, match="before version 6"):
        load_sae(folder)
    with pytest.raises(ValueError, match="NaN"):
        sae = random_sae()
        save_sae(sae.replace(params={**sae.params, "W_dec": sae.params["W_dec"] * np.nan}), tmp_path / "new")
    with pytest.raises(ValueError, match="save_saes"):
        save_sae(random_sae(layers=(1, 2)), tmp_path)


def test_where_it_belongs(tmp_path):
    folder = save_sae(random_sae(), tmp_path)
    with pytest.raises(ValueError, match="was trained at resid_post of layer 9"):
        load_sae(folder, layer=8)
    edit_cfg(folder, metadata={"hook_name": None})
    with pytest.raises(ValueError, match="no hook_name"):
        load_sae(folder)
    assert load_sae(folder, site="resid_pre", layer=4).config.layers == (4,)
    edit_cfg(folder, metadata={"hook_name": "blocks.1.ln1.hook_normalized"})
    with pytest.raises(ValueError, match="is none of"):
        load_sae(folder)


def test_unused_finetuning_scale_and_bfloat16(tmp_path):
    import ml_dtypes

    sae = random_sae()
    folder = save_sae(sae, tmp_path)
    edit_weights(folder, lambda w: w.update(scaling_factor=np.ones(20, np.float32)))
    np.testing.assert_array_equal(load_sae(folder).params["W_dec"], sae.params["W_dec"])
    edit_weights(folder, lambda w: w.update(scaling_factor=np.full(20, 2, np.float32)))
    with pytest.raises(ValueError, match="scaling_factor"):
        load_sae(folder)

    def halve(w):
        w.pop("scaling_factor")
        w.update({n: v.astype(ml_dtypes.bfloat16) for n, v in w.items()})

    edit_weights(folder, halve)
    assert load_sae(folder).params["W_dec"].dtype == np.float32
