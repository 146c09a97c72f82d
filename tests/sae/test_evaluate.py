"""Fidelity against plain NumPy; spliced losses against a plain loop over tokens and against `edits.splice`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech import edits
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import forward, init_params
from jaxmech.sae.evaluate import evaluate, loss_recovered
from jaxmech.sae.module import SAEConfig, make_sae, param_shapes

CONFIG = ModelConfig(
    family="llama", vocab_size=30, n_layers=3, d_model=8, n_heads=2, n_kv_heads=2, head_dim=4, d_mlp=16,
    activation="silu", norm_eps=1e-6, rope=Rope(10_000.0), query_scale=0.5, max_positions=64,
    is_local=(False,) * 3, bos_id=1, eos_ids=(2,),
)  # fmt: skip
PARAMS = jax.tree.map(lambda p: 8 * p if p.ndim > 2 else p, init_params(CONFIG, jax.random.key(0)))
TOKENS = np.random.default_rng(0).integers(3, 30, (5, 7))
MASK = np.arange(7) < np.array([7, 4, 2, 7, 6])[:, None]


def random_sae(layers=(2, 0), width=8):
    rng = np.random.default_rng(0)
    config = SAEConfig(width, 12, layers=layers)
    return make_sae({n: rng.normal(size=(len(layers), *s)) for n, s in param_shapes(config).items()}, config)


def test_fidelity_is_the_formulas():
    sae = random_sae(width=6)
    x = 100 + np.random.default_rng(1).normal(size=(2, 50, 6)).astype(np.float32) * np.arange(1, 7)
    sae = sae.replace(params={**sae.params, "b_dec": sae.params["b_dec"] + 100})
    table, density = evaluate(sae, [x[:, :20], x[:, 20:45], x[:, 45:]])
    f, y = np.asarray(sae.encode(x)), np.asarray(sae(x))
    for i, layer in enumerate((2, 0)):
        row, a, error = table.iloc[i], x[i] - x[i].mean(0), (x[i] - y[i]) ** 2
        assert (row.layer, row.tokens) == (layer, 50)
        np.testing.assert_allclose(row.fvu, error.sum() / (a**2).sum(), rtol=1e-4)
        np.testing.assert_allclose(row.fvu_median, np.median(error.sum(0) / (a**2).sum(0)), rtol=1e-4)
        np.testing.assert_allclose(row.l0, (f[i] > 0).sum(1).mean())
        np.testing.assert_allclose(row.dead, ((f[i] > 0).sum(0) == 0).mean())
        np.testing.assert_allclose(density[i], (f[i] > 0).mean(0))
        reference = x[i, :20].mean(0)
        a, b = x[i] - reference, y[i] - reference
        lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(row.cosine, ((a * b).sum(1) / lengths[0] / lengths[1]).mean(), rtol=1e-4)
        np.testing.assert_allclose(row.norm_ratio, (lengths[1] / lengths[0]).mean(), rtol=1e-4)


def test_a_perfect_dictionary_is_perfect():
    eye = np.concatenate([np.eye(4), -np.eye(4)], axis=1)
    params = {"W_enc": eye, "b_enc": np.zeros(8), "W_dec": eye.T, "b_dec": np.zeros(4), "threshold": np.zeros(8)}
    sae = make_sae(params, SAEConfig(4, 8))
    x = np.random.default_rng(0).normal(size=(1, 30, 4)).astype(np.float32)
    row = evaluate(sae, [x]).table.iloc[0]
    assert row.fvu < 1e-12 and row.l0 == 4 and row.dead == 0
    np.testing.assert_allclose([row.cosine, row.norm_ratio], 1, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(sae, [])


def plain_loss(logits):
    """Summed over predictions made at kept tokens, one by one; and their number."""
    total, n = 0.0, 0
    for row, tokens, real in zip(np.asarray(logits, np.float64), TOKENS, MASK, strict=True):
        for t in range(1, 6):  # not at the first token
            if real[t] and real[t + 1]:
                total -= row[t, tokens[t + 1]] - np.log(np.exp(row[t]).sum())
                n += 1
    return total, n


def test_loss_recovered_is_a_plain_loop():
    sae = random_sae()
    table = loss_recovered(CONFIG, PARAMS, sae, TOKENS, MASK, forward_batch=2).set_index("layer")
    kept = MASK & (np.arange(7) >= 1)
    out = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", taps=("resid_post",))
    clean, n = plain_loss(out.logits)
    assert (table.tokens == n).all() and (table.excluded == TOKENS.size - n).all()
    np.testing.assert_allclose(table.ce, clean / n, rtol=1e-5)
    for layer in (2, 0):
        where = (np.arange(3) == layer)[:, None, None] & kept
        spans = {"where": jnp.asarray(where), "after": jnp.zeros((3, 1), bool)}
        x = np.asarray(out.taps["resid_post"])[layer]
        cases = {
            "ce_spliced": edits.splice(sae, 3, **spans),
            "ce_zero": edits.Replace(donor=jnp.zeros((3, 1, 1, 8)), **spans),
            "ce_mean": edits.Replace(donor=jnp.tile(x[kept].mean(0), (3, 1, 1, 1)), **spans),
        }
        for name, edit in cases.items():
            logits = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", edits={"resid_post": (edit,)}).logits
            np.testing.assert_allclose(table.loc[layer, name], plain_loss(logits)[0] / n, rtol=1e-4)
        row = table.loc[layer]
        expected = (row.ce_zero - row.ce_spliced) / (row.ce_zero - row.ce)
        np.testing.assert_allclose(row.recovered_zero, expected)


def test_loss_recovered_of_a_perfect_dictionary_is_one():
    eye = np.concatenate([np.eye(8), -np.eye(8)], axis=1)
    params = {"W_enc": eye, "b_enc": np.zeros(16), "W_dec": eye.T, "b_dec": np.zeros(8), "threshold": np.zeros(16)}
    sae = make_sae(params, SAEConfig(8, 16, layers=(1,)))
    table = loss_recovered(CONFIG, PARAMS, sae, TOKENS, MASK)
    np.testing.assert_allclose(table.ce_spliced, table.ce, rtol=1e-5)
    np.testing.assert_allclose(table.recovered_mean, 1, rtol=1e-3)
    with pytest.raises(ValueError, match="no prediction left"):
        loss_recovered(CONFIG, PARAMS, sae, TOKENS, MASK, skip_first=7)
