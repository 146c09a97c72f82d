"""Llama Scope, written by hand: the numbers of its definition before folding, and faults named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxmech.sae.formats import load_sae, load_saes
from jaxmech.sae.formats.llama_scope import WEIGHTS

D, F = 16, 24
THRESHOLD = 0.4


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    raw = {
        "encoder.weight": rng.normal(size=(F, D)) / D**0.5,
        "encoder.bias": rng.normal(size=F) * 0.3,
        "decoder.weight": rng.normal(size=(D, F)) * rng.uniform(0.1, 2, F),  # columns of unequal norm
        "decoder.bias": rng.normal(size=D),
    }
    return {name: jnp.asarray(value, jnp.bfloat16) for name, value in raw.items()}


def hyperparams(layer=15, kind="R", **changes):
    hooks = {"R": ("hook_resid_post",) * 2, "A": ("hook_attn_out",) * 2, "M": ("hook_mlp_out",) * 2}
    hooks["TC"] = ("ln2.hook_normalized", "hook_mlp_out")
    return {
        "device": "cuda:0",
        "dtype": "torch.bfloat16",
        "hook_point_in": f"blocks.{layer}.{hooks[kind][0]}",
        "hook_point_out": f"blocks.{layer}.{hooks[kind][1]}",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": THRESHOLD,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 9.5, "out": 9.5 if kind != "TC" else 1.7},
        "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
    } | changes


def write(root, layer=15, kind="R", seed=0, weights=None, **changes):
    folder = root / f"Llama3_1-8B-Base-L{layer}{kind}-8x"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(weights or tensors(seed), folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams(layer, kind, **changes)))
    return folder


def defined(x, w, cfg, folded=False):
    """Code and output as trained: on x scaled to an average norm of sqrt(d), the output scaled back; nothing folded."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    average = {"in": D**0.5, "out": D**0.5} if folded else cfg["dataset_average_activation_norm"]
    s_in, s_out = D**0.5 / average["in"], D**0.5 / average["out"]
    hidden = s_in * x @ w["encoder.weight"].T + w["encoder.bias"]
    strength = hidden * np.linalg.norm(w["decoder.weight"], axis=0) / s_out  # in units of the raw output
    gate = strength > THRESHOLD
    return strength * gate, ((hidden * gate) @ w["decoder.weight"].T + w["decoder.bias"]) / s_out


def check(sae, w, cfg, folded=False):
    x = np.random.default_rng(5).normal(size=(50, D)) * 3
    f, y = defined(x, w, cfg, folded)
    x = x.astype(np.float32)
    got = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(got > 0, f > 0)
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got), y, atol=1e-4)
    np.testing.assert_allclose(sae(x), y, atol=1e-4)


@pytest.mark.parametrize(
    "kind, site, site_out",
    [
        ("R", "resid_post", "resid_post"),
        ("A", "attn_out", "attn_out"),
        ("M", "mlp_out", "mlp_out"),
        ("TC", "mlp_normed", "mlp_out"),
    ],
)
def test_the_numbers_before_folding(kind, site, site_out, tmp_path):
    sae = load_sae(write(tmp_path, kind=kind))
    check(sae, tensors(), hyperparams(kind=kind))
    c = sae.config
    assert (c.site, c.site_out, c.layers, c.l0) == (site, site_out, (15,), (50,))
    assert (c.model, c.units, c.subtract_b_dec) == ("meta-llama/Llama-3.1-8B", "residual", False)
    np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=1), 1, rtol=1e-5)


def test_scales_that_are_folded_already_are_not_folded_again(tmp_path):
    sae = load_sae(write(tmp_path, norm_activation="inference"))
    check(sae, tensors(), hyperparams(), folded=True)


def test_unit_decoder_rows_betray_scales_folded_already(tmp_path):
    w = tensors()
    norm = jnp.linalg.norm(w["decoder.weight"].astype(jnp.float32), axis=0)
    w["decoder.weight"] = (w["decoder.weight"] / norm).astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="every decoder row has norm 1.*fold them twice.*'inference'"):
        load_sae(write(tmp_path, weights=w))
    check(load_sae(write(tmp_path, 16, weights=w, decoder_exactly_fixed_norm=True)), w, hyperparams())


def test_a_stack_over_layers(tmp_path):
    for layer in (3, 21):
        write(tmp_path, layer, seed=layer)
    stack = load_saes(tmp_path)
    assert stack.config.layers == (3, 21)
    check(stack.at(21), tensors(21), hyperparams())
    check(
        load_sae(tmp_path / "Llama3_1-8B-Base-L3R-8x" / "checkpoints" / "final.safetensors"), tensors(3), hyperparams()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset_average_activation_norm": None}, "needs its 'in' and 'out', got None.*'inference'"),
        ({"dataset_average_activation_norm": {"in": 3.0}}, "needs its 'in' and 'out'"),
        ({"norm_activation": "token-wise"}, "norm_activation: expected 'dataset-wise' or 'inference'"),
        ({"act_fn": "topk"}, "act_fn: expected 'jumprelu', got 'topk'"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder: expected False"),
        ({"sparsity_include_decoder_norm": False, "use_glu_encoder": True}, "decoder_norm: expected True.*glu_encoder"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold: expected a number >= 0"),
        ({"jump_relu_threshold": -0.5}, "jump_relu_threshold: expected a number >= 0"),
        ({"d_sae": "many"}, "d_sae: expected a positive whole number"),
        ({"hook_point_in": "blocks.15.hook_mlp_in"}, "expected two known sites of one layer"),
        ({"hook_point_out": "blocks.16.hook_resid_post"}, "expected two known sites of one layer"),
    ],
)
def test_faults_of_the_configuration(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(write(tmp_path, **changes))


@pytest.mark.parametrize("inside, source", [("", "."), ("", WEIGHTS), ("checkpoints", "final.safetensors")])
def test_paths_seen_from_within(inside, source, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path) / inside)
    assert load_sae(source).config.layers == (15,)


def test_contradictions_and_damage(tmp_path):
    folder = write(tmp_path)
    for said in ({"site": "mlp_out"}, {"layer": 3}, {"model": "gpt2"}):
        with pytest.raises(ValueError, match="the files say"):
            load_sae(folder, **said)
    cfg = hyperparams()
    del cfg["jump_relu_threshold"], cfg["act_fn"]
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="jump_relu_threshold: missing; act_fn: missing"):
        load_sae(folder)
    cfg = hyperparams()
    del cfg["use_decoder_bias"], cfg["use_glu_encoder"]  # which the tensors tell
    (folder / "hyperparams.json").write_text(json.dumps(cfg))
    load_sae(folder)
    path = write(tmp_path, 16) / "checkpoints" / "final.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="final.safetensors is damaged or truncated"):
        load_sae(path.parents[1])


def test_faults_of_the_tensors_at_once(tmp_path):
    w = tensors()
    w["decoder.weight"] = w["decoder.weight"].T
    w["encoder.weight"] = w["encoder.weight"].at[0, 0].set(jnp.nan)
    w["extra"] = w.pop("encoder.bias")
    with pytest.raises(ValueError) as error:
        load_sae(write(tmp_path, weights=w))
    for fault in (
        "decoder.weight: expected (16, 24), got (24, 16)",
        "encoder.weight: 1 values",
        "extra: unknown tensor",
        "encoder.bias: missing",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize("said", [{"k": 4}, {"batch_topk": True}])
def test_what_is_for_topk_dictionaries_is_refused(said, tmp_path):
    folder = write(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(said))}: for TopK dictionaries"):
        load_sae(folder, **said)
