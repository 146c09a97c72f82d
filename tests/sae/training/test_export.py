"""The exported dictionary on raw x is the trained one on (x - mean) / scale, for every kind, massive dimensions too;
saved in SAELens' format it comes back the same."""

import dataclasses

import numpy as np
import pytest

from jaxmech.activations.stream import ArrayStream
from jaxmech.sae.formats import load_saes, save_saes
from jaxmech.sae.training import KINDS
from jaxmech.sae.training.export import export
from jaxmech.sae.training.step import init_state, train_step
from tests.sae.training.toy import KEY, SMALL, SPARSITY, sparse_data

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_export_equals_the_trained_form(kind, tmp_path):
    _, x = sparse_data()
    x[:, :, 5] *= 40  # max_spread has work to do
    data = ArrayStream(x, batch_size=128, skip_first=4)
    other = 5 if kind in ("topk", "batchtopk", "matryoshka") else 0.5
    config = dataclasses.replace(SMALL, kind=kind, sparsity=(SPARSITY[kind], other), max_norm=1e9)
    state = init_state(config, data, KEY)
    for i in range(20):
        state, _ = train_step(config, state, data.batch(i))
    mean, scale = np.asarray(state.mean, np.float64), np.asarray(state.scale, np.float64)
    assert np.ptp(scale, axis=1).min() > 1
    z = (x - mean[:, None]) / scale[:, None]
    for row, sae in enumerate(export(config, state, data)):
        p = {name: np.asarray(leaf[row], np.float64) for name, leaf in state.params.items()}
        running = np.asarray(state.threshold[row]) / (1 - (1 - config.threshold_rate) ** 20)
        code = trained_code(kind, p, z, config.sparsities[row], running)
        y = (code @ p["W_dec"] + p["b_dec"][:, None]) * scale[:, None] + mean[:, None]
        f = np.asarray(sae.encode(x))
        assert np.mean((f > 0) == (code > 0)) > 0.9999
        same = ((f > 0) == (code > 0)).all(-1)
        assert 0 < (f > 0).sum(-1).mean() < 30
        np.testing.assert_allclose(np.asarray(sae(x))[same], y[same], rtol=1e-3, atol=1e-2)
        assert sae.config.skip_first == 4 and all(l0 > 0 for l0 in sae.config.l0)
        again = load_saes(save_saes(sae, tmp_path / str(row)))
        assert again.config.activation == sae.config.activation and again.config.layers == sae.config.layers
        for name, leaf in sae.params.items():
            np.testing.assert_array_equal(again.params[name], leaf)


def trained_code(kind, p, z, k, running):
    """The code [L',n,F] of centred, scaled activations, by each kind's definition."""
    raw = np.einsum("lnd,lfd->lnf", z - p["b_dec"][:, None], p["E"])
    if kind == "gated":
        gate = raw + p["b_gate"][:, None] > 0
        return gate * np.maximum(raw * np.exp(p["r_mag"])[:, None] + p["b_mag"][:, None], 0)
    pre = raw + p["b_enc"][:, None]
    if kind == "topk":
        return pre * ((pre >= np.sort(pre, axis=-1)[..., [-int(k)]]) & (pre > 0))
    if kind == "jumprelu":
        return pre * (pre > np.exp(p["log_threshold"])[:, None])
    return np.maximum(pre, 0) if kind == "standard" else pre * (pre > running[:, None, None])
