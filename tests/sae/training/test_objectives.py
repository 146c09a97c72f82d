"""Each objective's loss against its formula in NumPy, and its gradient against differences of that formula.

Thresholds have no gradient to differentiate: theirs is compared with the papers' estimator, written out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.sae.training import KINDS, SAETrainConfig
from jaxmech.sae.training.objectives import OBJECTIVES, product, revival

B, D, F, K, WEIGHT = 16, 6, 12, 3, 0.07
CONFIG = SAETrainConfig(d_sae=F, sparsity=K, kind="matryoshka", prefixes=(2, 5), bandwidth=0.2)
WIDTH = CONFIG.bandwidth * D**0.5


def problem(kind, seed=0):
    """Parameters and a batch, float64."""
    rng = np.random.default_rng(seed)
    p = {"E": rng.normal(size=(F, D)), "W_dec": rng.normal(size=(F, D)), "b_dec": 0.1 * rng.normal(size=D)}
    biases = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    p |= {name: 0.3 * rng.normal(size=F) for name in biases}
    if kind == "jumprelu":
        p["log_threshold"] = np.log(rng.uniform(0.5, 1.5, F))
    return p, rng.normal(size=(B, D))


def code_of(kind, p, x):
    raw = (x - p["b_dec"]) @ p["E"].T
    if kind == "gated":
        return np.where(raw + p["b_gate"] > 0, np.maximum(raw * np.exp(p["r_mag"]) + p["b_mag"], 0), 0)
    pre = raw + p["b_enc"]
    if kind == "topk":
        return np.where(pre >= np.sort(pre)[:, [-K]], np.maximum(pre, 0), 0)
    if kind in ("batchtopk", "matryoshka"):
        return np.where(pre >= np.sort(pre, axis=None)[-K * B], np.maximum(pre, 0), 0)
    return pre * (pre > (np.exp(p["log_threshold"]) if kind == "jumprelu" else 0))


def loss_of(kind, p, x, frozen):
    """The papers' losses; `frozen` is the decoder that a gated dictionary's second reconstruction goes through."""
    f = code_of(kind, p, x)

    def miss(f, decoder):
        return np.mean((x - f @ decoder["W_dec"] - decoder["b_dec"]) ** 2)

    loss = miss(f, p)
    if kind == "matryoshka":
        loss += sum(miss(np.where(np.arange(F) < m, f, 0), p) for m in CONFIG.prefixes)
    if kind == "jumprelu":
        loss += WEIGHT * (f > 0).sum() / B
    if kind == "standard":
        loss += WEIGHT * (f * np.linalg.norm(p["W_dec"], axis=1)).sum() / B / D**0.5
    if kind == "gated":
        gate = np.maximum((x - p["b_dec"]) @ p["E"].T + p["b_gate"], 0)
        loss += WEIGHT * gate.sum() / B / D**0.5 + miss(gate, frozen)
    return loss


def ours(kind, p, x, **changes):
    config = dataclasses.replace(CONFIG, kind=kind, prefixes=CONFIG.prefixes if kind == "matryoshka" else (), **changes)
    sparsity = jnp.float32(K if config.selects else WEIGHT)
    p, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    return jax.value_and_grad(lambda p: OBJECTIVES[kind](config, p, x, sparsity, 1.0).loss)(p)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind):
    p, x = problem(kind)
    loss, grads = ours(kind, p, x)
    np.testing.assert_allclose(loss, loss_of(kind, p, x, p), rtol=1e-5)
    rng, h = np.random.default_rng(1), 1e-6
    for name in p.keys() - {"log_threshold"}:
        for _ in range(3):
            along = rng.normal(size=p[name].shape)
            ends = [loss_of(kind, {**p, name: p[name] + s * h * along}, x, p) for s in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * h)
            np.testing.assert_allclose(np.sum(grads[name] * along), slope, rtol=1e-3, atol=1e-5, err_msg=name)


def test_thresholds_have_the_papers_gradient():
    """d loss / d theta = -E[(theta * d loss / d f + weight) K((pre - theta) / width) / width], eqs. 11 and 12."""
    p, x = problem("jumprelu")
    _, grads = ours("jumprelu", p, x)
    theta, pre = np.exp(p["log_threshold"]), (x - p["b_dec"]) @ p["E"].T + p["b_enc"]
    error = x - code_of("jumprelu", p, x) @ p["W_dec"] - p["b_dec"]
    by_code = -2 * error @ p["W_dec"].T / D  # of each token's own loss
    kernel = (np.abs(pre - theta) / WIDTH < 0.5) / WIDTH
    assert (kernel.sum(0) > 0).sum() > F / 2
    slope = -np.mean((theta * by_code + WEIGHT) * kernel, axis=0)
    np.testing.assert_allclose(grads["log_threshold"], theta * slope, rtol=1e-4, atol=1e-6)


def test_a_gated_dictionarys_second_reconstruction_leaves_the_decoder_alone():
    p, x = problem("gated")
    p["b_gate"] -= 100  # nothing opens: y = b_dec, and neither gate nor decoder rows matter
    _, grads = ours("gated", p, x)
    assert not np.any(grads["W_dec"])
    np.testing.assert_allclose(grads["b_dec"], -2 * (x - p["b_dec"]).mean(0) / D, rtol=1e-5)


def test_matryoshka_of_one_width_is_batchtopk():
    p, x = problem("matryoshka")
    config = dataclasses.replace(CONFIG, kind="matryoshka", prefixes=(F,))
    assert config.widths == (F,) and dataclasses.replace(CONFIG, kind="matryoshka", prefixes=()).widths == (1, 3, 6, F)
    p, x = jax.tree.map(jnp.float32, (p, x))
    nested, flat = (OBJECTIVES[kind](config, p, x, 3.0, 1.0) for kind in ("matryoshka", "batchtopk"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), nested, flat)


def test_aux_k_is_gao_et_als():
    p, x = problem("topk")
    error, helpers, dead = np.random.default_rng(2).normal(size=(B, D)), np.array([4, 7, 1]), np.array([1, 1, 0], bool)
    config = dataclasses.replace(CONFIG, kind="topk", prefixes=())
    got = revival(config, *jax.tree.map(jnp.float32, (p, x, error)), helpers, dead)
    pre = np.maximum((x - p["b_dec"]) @ p["E"][[4, 7]].T + p["b_enc"][[4, 7]], 0)
    expected = np.mean((error - pre @ p["W_dec"][[4, 7]]) ** 2) / np.mean(error**2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert revival(config, *jax.tree.map(jnp.float32, (p, x, error)), helpers, np.zeros(3, bool)) == 0


def test_bfloat16_product():
    """The sum, in float32, of products of rounded entries; on an accelerator by the hardware's own product."""
    n = 7
    a, b, g = (np.random.default_rng(i).normal(size=(n, n)).astype(np.float32) for i in range(3))
    multiply = product(dataclasses.replace(CONFIG, compute_dtype="bfloat16", kind="matryoshka"))
    got, back = jax.vjp(multiply, a, b)
    rounded = [np.asarray(m, jnp.bfloat16).astype(np.float64) for m in (a, b, g)]
    expected = [rounded[0] @ rounded[1], rounded[2] @ rounded[1].T, rounded[0].T @ rounded[2]]
    for ours, theirs in zip((got, *back(jnp.asarray(g))), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for platform, half in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = jax.jit(multiply).trace(a, b).lower(lowering_platforms=(platform,)).as_text()
        assert (f"tensor<{n}x{n}xbf16>" in text) == half


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_sum_in_float32(kind):
    p, x = problem(kind)
    (loss, grads), (half, half_grads) = ours(kind, p, x), ours(kind, p, x, compute_dtype="bfloat16")
    np.testing.assert_allclose(half, loss, rtol=0.1)
    assert half != loss and {g.dtype for g in half_grads.values()} == {np.dtype("float32")}
    cosine = np.sum(half_grads["W_dec"] * grads["W_dec"])
    cosine /= np.linalg.norm(half_grads["W_dec"]) * np.linalg.norm(grads["W_dec"])
    assert cosine > 0.9
