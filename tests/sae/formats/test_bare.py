"""Goodfire, OpenAI's GPT-2 and Qwen-Scope by their definitions, the files faked as arrays; faults named."""

import json

import numpy as np
import pytest

from jaxmech.sae.formats import bare, load_sae

D, F, K = 6, 40, 4
X = (np.random.default_rng(5).normal(size=(40, D)) * 2 + 0.5).astype(np.float32)
GOODFIRE = {"encoder_linear.weight": (F, D), "encoder_linear.bias": (F,), "decoder_linear.weight": (D, F),
            "decoder_linear.bias": (D,)}  # fmt: skip
OPENAI = {"pre_bias": (D,), "encoder.weight": (F, D), "latent_bias": (F,), "decoder.weight": (D, F)}
QWEN = {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)}
STATISTICS = {"stats_last_nonzero": np.zeros(F, np.int64), "latents_activation_frequency": np.ones(F, np.float32)}


def tensors(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path, monkeypatch):
    def write(name, weights):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        monkeypatch.setattr(bare, "read_tensors", lambda path: dict(weights))
        return path

    return write


def top(pre, k):
    return np.maximum(np.where(pre >= np.sort(pre, axis=1)[:, -k, None], pre, 0), 0)


def check(sae, f, y):
    got = np.asarray(sae.encode(X))
    np.testing.assert_array_equal(got > 0, f > 0)
    assert 0 < (f > 0).mean() < 1
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got, X), y, atol=1e-4)
    np.testing.assert_allclose(sae(X), y, atol=1e-4)


def test_goodfire(write):
    w = tensors(GOODFIRE)
    sae = load_sae(write("Llama-3.1-8B-Instruct-SAE-l19.pth", w))
    c = sae.config
    assert (c.site, c.layers, c.model) == ("resid_post", (19,), "meta-llama/Llama-3.1-8B-Instruct")
    f = np.maximum(X @ w["encoder_linear.weight"].T + w["encoder_linear.bias"], 0)
    check(sae, f, f @ w["decoder_linear.weight"].T + w["decoder_linear.bias"])
    path = write("sae.pth", w)
    with pytest.raises(ValueError, match="says its layer"):
        load_sae(path)
    assert load_sae(path, layer=19).config.layers == (19,)


def openai(w, k):
    mean, std = X.mean(1, keepdims=True), X.std(1, keepdims=True, ddof=1)
    pre = ((X - mean) / (std + 1e-5) - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    f = top(pre, k)
    return f, (f @ w["decoder.weight"].T + w["pre_bias"]) * std + mean


@pytest.mark.parametrize(
    "location, site",
    [("resid_post_mlp", "resid_post"), ("resid_delta_mlp", "mlp_out"), ("resid_post_attn", "resid_mid"),
     ("resid_delta_attn", "attn_out")],
)  # fmt: skip
def test_openai(location, site, write):
    w = tensors(OPENAI)
    state = {"activation": np.asarray("TopK"), "activation_state_dict.k": np.asarray(K),
             "activation_state_dict.postact_fn": np.asarray("ReLU")}  # fmt: skip
    sae = load_sae(write(f"{location}_v5_32k/autoencoders/6.pt", w | STATISTICS | state))
    c = sae.config
    assert (c.site, c.layers, c.model, c.k, c.normalize, c.l0) == (site, (6,), "gpt2", K, "layer_norm", (K,))
    check(sae, *openai(w, K))


def test_openai_without_an_activation(write):
    w = tensors(OPENAI)
    sae = load_sae(write("6.pt", w), site="resid_post", layer=6)
    assert sae.config.k == 32
    check(sae, *openai(w, 32))
    check(load_sae(write("6.pt", w), site="resid_post", layer=6, k=5), *openai(w, 5))


def test_openai_version_1(write):
    """ReLU of raw activations."""
    w = tensors(OPENAI)
    sae = load_sae(write("resid_delta_mlp/autoencoders/3.pt", w))
    assert (sae.config.activation, sae.config.normalize) == ("relu", "none")
    f = np.maximum((X - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"], 0)
    check(sae, f, f @ w["decoder.weight"].T + w["pre_bias"])
    with pytest.raises(ValueError, match="says its site"):  # the MLP's neurons
        load_sae(write("mlp_post_act_v4/autoencoders/3.pt", w))


def test_openai_other_activations(write):
    w = tensors(OPENAI) | {"activation": np.asarray("TopK"), "activation_state_dict.postact_fn": np.asarray("Identity")}
    with pytest.raises(ValueError, match="expected ReLU, or TopK followed by ReLU, got TopK, Identity"):
        load_sae(write("6.pt", w), site="resid_post", layer=6)


def test_qwen_scope(write):
    w = tensors(QWEN)
    path = write("SAE-Res-Qwen3-8B-Base-W64K-L0_4/layer22.sae.pt", w)
    sae = load_sae(path)
    c = sae.config
    assert (c.site, c.layers, c.model, c.k) == ("resid_post", (22,), "Qwen/Qwen3-8B-Base", K)
    f = top(X @ w["W_enc"].T + w["b_enc"], K)
    check(sae, f, f @ w["W_dec"].T + w["b_dec"])
    with pytest.raises(ValueError, match="k: the files say 4, asked for 5"):
        load_sae(path, k=5)
    path = write("elsewhere/layer22.sae.pt", w)
    with pytest.raises(ValueError, match="says its k; pass"):
        load_sae(path)
    assert load_sae(path, k=5).config.k == 5
    config = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-8B-Base", "k": 7, "hook_point": "resid_post"}
    (path.parent / "config.json").write_text(json.dumps(config))
    assert (load_sae(path).config.k, load_sae(path).config.model) == (7, "Qwen/Qwen3-8B-Base")


def test_faults(write):
    w = tensors(QWEN)
    with pytest.raises(ValueError, match="tensors W_dec, W_enc, b_dec, b_enc: neither Goodfire's"):
        load_sae(write("weights.pt", w))
    with pytest.raises(ValueError, match="batch_topk"):
        load_sae(write("layer3.sae.pt", w), k=4, batch_topk=True)
    w["W_dec"], w["stray"] = w["W_dec"].T, w["b_dec"]
    w["b_enc"][3] = np.nan
    del w["b_dec"]
    with pytest.raises(ValueError) as error:
        load_sae(write("layer3.sae.pt", w), k=4)
    for part in ("W_dec: expected (6, 40), got (40, 6)", "stray: unknown tensor", "b_dec: missing", "b_enc: 1 values"):
        assert part in str(error.value)


def test_real_files(tmp_path):
    """What needs torch: that a file is read, its nested settings too, and that code in one is refused."""
    torch = pytest.importorskip("torch")
    w = tensors(OPENAI)
    state = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save({name: torch.tensor(value) for name, value in w.items()} | state, tmp_path / "6.pt")
    check(load_sae(tmp_path / "6.pt", site="resid_post", layer=6), *openai(w, K))
    torch.save({"W_enc": torch.zeros(2, 2), "code": print}, tmp_path / "layer1.sae.pt")
    with pytest.raises(ValueError, match="code, so it is refused"):
        load_sae(tmp_path / "layer1.sae.pt", k=1)
