"""dictionary_learning, by the definition of every class, its files faked as dictionaries of arrays; faults named."""

import json

import numpy as np
import pytest

from jaxmech.sae.formats import dictionary_learning, load_sae

D, F, K = 6, 24, 4
LINEAR = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
CANONICAL = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
SHAPES = {
    "AutoEncoder": LINEAR | {"bias": (D,)},
    "AutoEncoderNew": LINEAR | {"decoder.bias": (D,)},
    "GatedAutoEncoder": {"encoder.weight": (F, D), "decoder.weight": (D, F), "decoder_bias": (D,), "r_mag": (F,),
                         "gate_bias": (F,), "mag_bias": (F,)},
    "JumpReluAutoEncoder": CANONICAL | {"threshold": (F,)},
    "AutoEncoderTopK": LINEAR | {"b_dec": (D,), "threshold": ()},
    "BatchTopKSAE": LINEAR | {"b_dec": (D,), "threshold": ()},
    "MatryoshkaBatchTopKSAE": CANONICAL | {"threshold": ()},
}  # fmt: skip
BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
X = (np.random.default_rng(5).normal(size=(40, D)) * 2).astype(np.float32)


def tensors(name):
    rng = np.random.default_rng(0)
    raw = {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES[name].items()}
    if "threshold" in raw:
        raw["threshold"] = np.abs(raw["threshold"]) + np.float32(0.5)
    if "TopK" in name:
        raw["k"] = np.asarray(K, np.int32)
    if "Matryoshka" in name:
        raw["group_sizes"] = np.asarray([4, F - 4])
    return raw


@pytest.fixture
def write(tmp_path, monkeypatch):
    def write(name, weights=None, buffer=None, remove=(), **changes):
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 8, "lr": 1e-4,
                   "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8"}  # fmt: skip
        trainer |= ({"k": K} if "TopK" in name else {}) | changes
        config = {
            "trainer": {key: value for key, value in trainer.items() if key not in remove},
            "buffer": buffer or {},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "ae.pt").touch()
        content = tensors(name) if weights is None else weights
        monkeypatch.setattr(dictionary_learning, "read_tensors", lambda path: dict(content))
        return tmp_path

    return write


def largest(values, k):
    """The k largest, the rest 0."""
    return np.where(values >= np.sort(values.ravel())[-k], values, 0)


def defined(name, w, batch=False):
    """Code and output of each class, as its repository has them: nothing folded."""
    w = {key: np.asarray(value, np.float64) for key, value in w.items()}
    encoder = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    bias = next(w[key] for key in ("bias", "decoder_bias", "b_dec", "decoder.bias") if key in w)
    subtracted = 0 if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else bias
    pre = (X - subtracted) @ encoder + next((w[key] for key in ("b_enc", "encoder.bias") if key in w), 0)
    if name == "GatedAutoEncoder":
        f = (pre + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * pre + w["mag_bias"], 0)
    elif name == "JumpReluAutoEncoder":
        f = np.maximum(pre * (pre > w["threshold"]), 0)
    else:
        f = np.maximum(pre, 0)
        if name == "AutoEncoderTopK":
            f = np.stack([largest(row, K) for row in f])
        elif name in BATCH:
            f = largest(f, K * len(X)) if batch else f * (f > w["threshold"])
    return f, f @ decoder + bias


def check(sae, f, y):
    got = np.asarray(sae.encode(X))
    np.testing.assert_array_equal(got > 0, f > 0)
    assert 0 < (f > 0).mean() < 1
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got), y, atol=1e-4)
    np.testing.assert_allclose(sae(X), y, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_classes(name, write):
    sae = load_sae(write(name))
    c = sae.config
    assert (c.site, c.layers, c.model) == ("resid_post", (8,), "EleutherAI/pythia-70m")
    assert c.l0 == ((K if "TopK" in name else None),)
    check(sae, *defined(name, tensors(name)))


@pytest.mark.parametrize("name", BATCH)
def test_as_trained(name, write):
    weights = tensors(name) | {"threshold": np.float32(-1)}
    sae = load_sae(write(name, weights), batch_topk=True)
    assert (sae.config.activation, sae.config.k) == ("batchtopk", K)
    check(sae, *defined(name, weights, batch=True))


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("value, said", [(-1.0, "-1.0"), (None, "missing"), (np.nan, "nan"), (np.ones(3), r"\(3,\)")])
def test_unset_threshold(name, value, said, write):
    weights = {key: array for key, array in tensors(name).items() if key != "threshold"}
    if value is not None:
        weights["threshold"] = np.asarray(value, np.float32)
    with pytest.raises(ValueError, match=f"threshold: {said}.*batch_topk=True"):
        load_sae(write(name, weights))


def test_topk_needs_no_threshold(write):
    weights = tensors("AutoEncoderTopK")
    f, y = defined("AutoEncoderTopK", weights)
    del weights["threshold"]
    check(load_sae(write("AutoEncoderTopK", weights)), f, y)
    with pytest.raises(ValueError, match="k: the files say 4, asked for 5"):
        load_sae(write("AutoEncoderTopK", weights | {"k": np.asarray(4)}, k=5))
    del weights["k"]
    with pytest.raises(ValueError, match="says its k"):
        load_sae(write("AutoEncoderTopK", weights, remove=["k"]))
    assert load_sae(write("AutoEncoderTopK", weights, remove=["k"]), k=3).config.k == 3


@pytest.mark.parametrize(
    "changes, site",
    [
        ({"submodule_name": None}, "resid_post"),
        ({"submodule_name": "mlp_out_layer8"}, "mlp_out"),
        ({"submodule_name": "attn_out_layer_8"}, "attn_out"),
        ({"buffer": {"io": "out", "ctx_len": 128}}, "resid_post"),
        ({"buffer": {"io": "in"}}, "resid_pre"),
        ({"submodule_name": "mlp_layer_8", "buffer": {"io": "in"}}, "mlp_in"),
    ],
)
def test_sites(changes, site, write):
    assert load_sae(write("AutoEncoder", **changes)).config.site == site


def test_checkpoints_of_newer_versions(write):
    folder = write("AutoEncoder")
    (folder / "ae.pt").unlink()
    (folder / "run").mkdir()
    (folder / "run" / "ae_final.pt").touch()
    check(load_sae(folder / "run" / "ae_final.pt"), *defined("AutoEncoder", tensors("AutoEncoder")))


def test_where_it_belongs(write):
    with pytest.raises(ValueError, match="'head_3' settles no site"):
        load_sae(write("AutoEncoder", submodule_name="head_3"))
    assert load_sae(write("AutoEncoder", submodule_name="head_3"), site="attn_z").config.site == "attn_z"
    with pytest.raises(ValueError, match="'in_and_out' settles no site"):
        load_sae(write("AutoEncoder", buffer={"io": "in_and_out"}))
    with pytest.raises(ValueError, match="layer: the files say 7, asked for 8"):
        load_sae(write("AutoEncoder", submodule_name="resid_post_layer_7"))
    with pytest.raises(ValueError, match="says its layer"):
        load_sae(write("AutoEncoder", remove=["layer"]))
    with pytest.raises(ValueError, match="none of our sites"):  # the MLP's output before its norm
        load_sae(write("AutoEncoder", submodule_name="mlp_out_layer_8", lm_name="google/gemma-2-2b"))


def test_faults(write):
    with pytest.raises(ValueError, match="several layers or models"):
        load_sae(write("BatchTopKCrossCoder", weights={}))
    with pytest.raises(ValueError) as error:
        load_sae(write("IdentityDict", weights={}, activation_dim="6", remove=["dict_size"]))
    for part in ("dict_class: expected one of", "activation_dim: expected", "dict_size: expected"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="batch_topk: a AutoEncoder"):
        load_sae(write("AutoEncoder"), batch_topk=True)
    weights = tensors("JumpReluAutoEncoder")
    weights["W_enc"], weights["stray"] = weights["W_enc"].T, weights["b_dec"]
    weights["W_dec"][2, 3] = np.inf
    del weights["threshold"]
    with pytest.raises(ValueError) as error:
        load_sae(write("JumpReluAutoEncoder", weights))
    for part in ("W_enc: expected (6, 24), got (24, 6)", "stray: unknown tensor", "threshold: missing",
                 "W_dec: 1 values are NaN or infinite"):  # fmt: skip
        assert part in str(error.value)
    folder = write("AutoEncoder")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="trainer: expected an object"):
        load_sae(folder)


def test_real_file(tmp_path, write):
    """The one thing that needs torch: that ae.pt is read, non-contiguous tensors and all."""
    torch = pytest.importorskip("torch")
    folder = write("BatchTopKSAE")
    weights = {key: torch.tensor(value) for key, value in tensors("BatchTopKSAE").items()}
    weights["decoder.weight"] = weights["decoder.weight"].T.contiguous().T
    torch.save(weights, folder / "ae.pt")
    with pytest.MonkeyPatch.context() as patch:
        from jaxmech.sae.formats.files import read_tensors

        patch.setattr(dictionary_learning, "read_tensors", read_tensors)
        check(load_sae(folder), *defined("BatchTopKSAE", tensors("BatchTopKSAE")))
