"""What is folded into the weights gives the same code and output as the formula it replaces."""

import numpy as np

from jaxmech.sae.formats import folds
from jaxmech.sae.module import SAEConfig, make_sae

D, F = 5, 30
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, D)) * 2
W = {
    "W_enc": RNG.normal(size=(D, F)),
    "b_enc": RNG.normal(size=F),
    "W_dec": RNG.normal(size=(F, D)) * RNG.uniform(0.2, 3, (F, 1)),
    "b_dec": RNG.normal(size=D),
    "threshold": RNG.uniform(0, 1, F),
}


def check(params, f, y):
    sae = make_sae(params, SAEConfig(D, F, subtract_b_dec=True))
    got = np.asarray(sae.encode(X.astype(np.float32)))
    np.testing.assert_array_equal(got > 0, f > 0)
    np.testing.assert_allclose(got, f, atol=1e-4)
    np.testing.assert_allclose(sae.decode(got), y, atol=1e-4)


def test_gated_is_jumprelu():
    gates = {name: RNG.normal(size=F) for name in ("r_mag", "b_gate", "b_mag")}
    u = (X - W["b_dec"]) @ W["W_enc"]
    f = (u + gates["b_gate"] > 0) * np.maximum(u * np.exp(gates["r_mag"]) + gates["b_mag"], 0)
    folded = folds.gated({name: W[name] for name in ("W_enc", "W_dec", "b_dec")} | gates)
    assert (folded["threshold"] < 0).any() and (folded["threshold"] > 0).any()
    assert all(value.dtype == np.float32 for value in (folded["W_enc"], folded["b_enc"], folded["threshold"]))
    check(folded, f, f @ W["W_dec"] + W["b_dec"])


def test_unit_rows():
    pre = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    f = np.maximum(pre, 0) * (pre > W["threshold"])
    norm = np.linalg.norm(W["W_dec"], axis=1)
    folded = folds.unit_rows(W)
    np.testing.assert_allclose(np.linalg.norm(folded["W_dec"], axis=1), 1, rtol=1e-6)
    check(folded, f * norm, f @ W["W_dec"] + W["b_dec"])


def test_unit_rows_of_features_without_a_direction_or_a_threshold():
    w = {name: value.copy() for name, value in W.items()}
    w["W_dec"][3], w["threshold"][3], w["threshold"][4], w["W_dec"][5], w["threshold"][5] = 0, 0.2, np.inf, 0, np.inf
    pre = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = np.maximum(pre, 0) * (pre > w["threshold"]) * np.linalg.norm(w["W_dec"], axis=1)
    assert not f[:, 3:6].any()
    check(folds.unit_rows(w), f, (np.maximum(pre, 0) * (pre > w["threshold"])) @ w["W_dec"] + w["b_dec"])


def test_input_scale():
    s = 0.3
    pre = (s * X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    f = np.maximum(pre, 0) * (pre > W["threshold"])
    check(folds.input_scale(W, s), f, (f @ W["W_dec"] + W["b_dec"]) / s)
