"""Fidelity against plain NumPy; spliced losses and divergences against a plain loop over tokens and `edits.splice`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxmech.interventions import edits
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import forward, init_params
from jaxmech.sae.evaluate import Fidelity, density_histogram, evaluate_saes, loss_recovered
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


def check_row(row, density, x, f, y, reference):
    """A row against the formulas; x, y [n,D] target and output, f [n,F]."""
    a, b = x - reference, y - reference
    error = (x - y) ** 2
    spread = ((x - x.mean(0)) ** 2).sum(0)
    norm = lambda v: np.linalg.norm(v, axis=1)  # noqa: E731
    expected = {
        "tokens": len(x),
        "fvu": error.sum() / spread.sum(),
        "fvu_median": np.median(error.sum(0) / spread),
        "fvu_token": (error.sum(1) / norm(a) ** 2).mean(),
        "mse": error.sum(1).mean(),
        "cosine": ((x * y).sum(1) / norm(x) / norm(y)).mean(),
        "cosine_centred": ((a * b).sum(1) / norm(a) / norm(b)).mean(),
        "norm_ratio": (norm(y) / norm(x)).mean(),
        "norm_ratio_centred": (norm(b) / norm(a)).mean(),
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "dead": ((f != 0).sum(0) == 0).mean(),
        "dense": ((f != 0).mean(0) > 0.1).mean(),
    }
    assert set(expected) == set(row.index) - {"layer"}
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(density, (f != 0).mean(0))


def test_fidelity_is_the_formulas():
    sae = random_sae(width=6)
    x = 100 + np.random.default_rng(1).normal(size=(2, 50, 6)).astype(np.float32) * np.arange(1, 7)
    sae = sae.replace(params={**sae.params, "b_dec": sae.params["b_dec"] + 100})
    table, density = evaluate_saes(sae, [x[:, :20], x[:, 20:45], x[:, 45:]])
    f, y = np.asarray(sae.encode(x)), np.asarray(sae(x))
    assert table.layer.tolist() == [2, 0]
    for i in range(2):
        check_row(table.iloc[i], density[i], x[i].astype(float), f[i], y[i], x[i, :20].mean(0))


@pytest.mark.parametrize(
    "facts",
    [
        dict(activation="abstopk", k=3),
        dict(activation="topk", k=4, normalize="layer_norm"),
        dict(activation="relu", normalize="norm"),
        dict(activation="batchtopk", k=2.5),
        dict(activation="jumprelu", skip=True, subtract_b_dec=False, d_out=5, site="mlp_in", site_out="mlp_out"),
    ],
    ids=lambda facts: facts["activation"] + facts.get("normalize", ""),
)
def test_every_kind_is_measured_single_or_stacked(facts):
    rng, config = np.random.default_rng(2), SAEConfig(6, 12, **facts)
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in param_shapes(config).items()}
    sae, x = make_sae(params, config), rng.normal(size=(40, 6)).astype(np.float32)
    target = rng.normal(size=(40, config.d_out)) if config.d_out != 6 else x
    batch = x if target is x else (x, target)
    found = evaluate_saes(sae, [batch])
    check_row(
        found.table.iloc[0], found.density[0], target, np.asarray(sae.encode(x)), np.asarray(sae(x)), target.mean(0)
    )
    stack = make_sae({name: value[None] for name, value in params.items()}, config)
    stacked = evaluate_saes(stack, [jax.tree.map(lambda a: a[None], batch)])
    np.testing.assert_allclose(stacked.table, found.table, rtol=1e-6)


def test_a_transcoder_wants_both_of_its_sites():
    config = SAEConfig(6, 12, activation="relu", subtract_b_dec=False, site="mlp_in", site_out="mlp_out")
    sae = make_sae({n: np.ones(s) for n, s in param_shapes(config).items()}, config)
    with pytest.raises(ValueError, match="read mlp_in and write mlp_out; give pairs"):
        evaluate_saes(sae, [np.ones((3, 6))])
    with pytest.raises(ValueError, match=r"expected \[L', n, D\] as \(1, 3, 6\) in"):
        evaluate_saes(sae, [(np.ones((3, 6)), np.ones((3, 5)))])


def test_the_histogram_counts_every_feature_that_fires_once():
    density = np.array([[0, 0.004, 0.02, 0.5, 1.0, 1.0], [0, 0, 0, 0, 0, 1 / 250]])
    found = Fidelity(pd.DataFrame({"layer": [2, 0], "tokens": 250}), density)
    table = density_histogram(found)
    counts = table.groupby("layer")["features"].sum()
    assert counts[2] == 5 and counts[0] == 1
    for row in table.itertuples():
        inside = density[[2, 0].index(row.layer)]
        with np.errstate(divide="ignore"):
            logs = np.log10(inside)
        last = row.high == 0
        assert row.features == ((logs >= row.low) & ((logs < row.high) | (last & (logs == 0)))).sum()


def test_a_perfect_dictionary_is_perfect():
    eye = np.concatenate([np.eye(4), -np.eye(4)], axis=1)
    params = {"W_enc": eye, "b_enc": np.zeros(8), "W_dec": eye.T, "b_dec": np.zeros(4), "threshold": np.zeros(8)}
    sae = make_sae(params, SAEConfig(4, 8))
    x = np.random.default_rng(0).normal(size=(1, 30, 4)).astype(np.float32)
    row = evaluate_saes(sae, [x]).table.iloc[0]
    assert max(row.fvu, row.fvu_token, row.mse) < 1e-12 and row.l0 == 4 and row.dead == 0
    np.testing.assert_allclose(row[["cosine", "cosine_centred", "norm_ratio"]].astype(float), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_saes(sae, [])


def plain_divergence(logits, clean):
    """Mean of KL(clean || changed) over kept tokens, one by one."""
    found = []
    for row, base, real in zip(np.asarray(logits, np.float64), np.asarray(clean, np.float64), MASK, strict=True):
        for t in range(1, 7):
            if real[t]:
                p, q = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (base[t], row[t]))
                found.append((p * np.log(p / q)).sum())
    return np.mean(found)


def plain_loss(logits):
    """Summed over predictions made at kept tokens, one by one; and their number."""
    total, n = 0.0, 0
    for row, tokens, real in zip(np.asarray(logits, np.float64), TOKENS, MASK, strict=True):
        for t in range(1, 6):  # not at the first token
            if real[t] and real[t + 1]:
                total -= row[t, tokens[t + 1]] - np.log(np.exp(row[t]).sum())
                n += 1
    return total, n


@pytest.mark.slow
def test_loss_recovered_is_a_plain_loop():
    sae = random_sae()
    table = loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK, batch=2).set_index("layer")
    kept = MASK & (np.arange(7) >= 1)
    out = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", taps=("resid_post",))
    clean, n = plain_loss(out.logits)
    assert (table.tokens == n).all() and (table.excluded == TOKENS.size - n).all()
    np.testing.assert_allclose(table.ce, clean / n, rtol=1e-5)
    for layer in (2, 0):
        where = (np.arange(3) == layer)[:, None, None] & kept
        spans = edits.Spans(None, jnp.asarray(where), jnp.zeros((3, 1), bool))
        x = np.asarray(out.taps["resid_post"])[layer]
        cases = {
            "ce_spliced": edits.splice(sae, 3, spans=spans),
            "ce_zero": edits.Replace(donor=jnp.zeros((3, 1, 1, 8)), spans=spans),
            "ce_mean": edits.Replace(donor=jnp.tile(x[kept].mean(0), (3, 1, 1, 1)), spans=spans),
        }
        for name, edit in cases.items():
            logits = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", edits={"resid_post": (edit,)}).logits
            np.testing.assert_allclose(table.loc[layer, name], plain_loss(logits)[0] / n, rtol=1e-4)
            divergence = plain_divergence(logits, out.logits)
            np.testing.assert_allclose(table.loc[layer, name.replace("ce_", "kl_")], divergence, rtol=1e-3)
        row = table.loc[layer]
        expected = (row.ce_zero - row.ce_spliced) / (row.ce_zero - row.ce)
        np.testing.assert_allclose(row.recovered_zero, expected)
        np.testing.assert_allclose(row.recovered_kl, 1 - row.kl_spliced / row.kl_zero)


def test_zeros_reach_the_skipped_tokens_only_when_asked():
    sae = random_sae(layers=(1,))
    usual = loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK).iloc[0]
    whole = loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK, zero_skipped=True).iloc[0]
    edit = edits.Replace(donor=jnp.zeros((3, 1, 1, 8)), spans=edits.everywhere(3, [1]))
    logits = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", edits={"resid_post": (edit,)}).logits
    total, n = plain_loss(logits)
    np.testing.assert_allclose(whole.ce_zero, total / n, rtol=1e-4)
    assert abs(usual.ce_zero - whole.ce_zero) > 1e-3
    np.testing.assert_allclose(usual.ce_spliced, whole.ce_spliced)


def test_a_transcoder_is_put_in_where_it_writes():
    rng = np.random.default_rng(0)
    config = SAEConfig(8, 12, subtract_b_dec=False, site="mlp_in", site_out="mlp_out", layers=(1,), skip_first=2)
    sae = make_sae({n: rng.normal(size=s) for n, s in param_shapes(config).items()}, config)
    out = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", taps=("mlp_in",))
    kept = MASK & (np.arange(7) >= 2)
    where = jnp.asarray((np.arange(3) == 1)[:, None, None] & kept)
    donor = jnp.broadcast_to(sae(out.taps["mlp_in"][1]), (3, 5, 7, 8))
    edit = edits.Replace(donor=donor, spans=edits.Spans(None, where, jnp.zeros((3, 1), bool)))
    logits = forward(CONFIG, PARAMS, TOKENS, mask=MASK, logits="all", edits={"mlp_out": (edit,)}).logits
    row = loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK, batch=2).iloc[0]
    losses = jax.nn.logsumexp(logits, -1)[:, :-1] - jnp.take_along_axis(logits[:, :-1], TOKENS[:, 1:, None], -1)[..., 0]
    scored = kept[:, :-1] & MASK[:, 1:]
    assert row.tokens == scored.sum()
    np.testing.assert_allclose(row.ce_spliced, np.asarray(losses)[scored].mean(), rtol=1e-4)


def test_loss_recovered_of_a_perfect_dictionary_is_one():
    eye = np.concatenate([np.eye(8), -np.eye(8)], axis=1)
    params = {"W_enc": eye, "b_enc": np.zeros(16), "W_dec": eye.T, "b_dec": np.zeros(8), "threshold": np.zeros(16)}
    sae = make_sae(params, SAEConfig(8, 16, layers=(1,)))
    table = loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK)
    np.testing.assert_allclose(table.ce_spliced, table.ce, rtol=1e-5)
    np.testing.assert_allclose(table.recovered_mean, 1, rtol=1e-3)
    with pytest.raises(ValueError, match="no prediction left"):
        loss_recovered(CONFIG, PARAMS, TOKENS, saes=sae, mask=MASK, skip_first=7)


def test_activations_that_are_no_numbers_are_refused_by_batch_and_layer():
    sae, x = random_sae(layers=(3, 5)), np.random.default_rng(0).normal(size=(2, 10, 8)).astype(np.float32)
    bad = x.copy()
    bad[1, 4, 2] = np.nan
    for wrong in (bad, np.where(np.isnan(bad), np.inf, bad)):
        with pytest.raises(ValueError, match="batches: layer 5 of batch 1 is not finite"):
            evaluate_saes(sae, [x, wrong])
    with pytest.raises(ValueError, match=r"got \(8,\), \(8,\); one array alone is given as \[x\]"):
        evaluate_saes(random_sae(layers=(3,)), x[0])


def test_64_bit_jax_measures_the_same():
    sae, x = random_sae(), np.random.default_rng(0).normal(size=(2, 10, 8))
    config = dataclasses.replace(sae.config, activation="batchtopk", k=3)
    sae = make_sae({name: leaf for name, leaf in sae.params.items() if name != "threshold"}, config)
    expected = evaluate_saes(sae, [x]).table
    with jax.enable_x64(True):
        pd.testing.assert_frame_equal(evaluate_saes(sae, [x]).table, expected, rtol=1e-5)


def test_tokens_that_the_model_does_not_have():
    for wrong in (30, -1, 2**32 + 5):
        tokens = TOKENS.copy()
        tokens[0, 3] = wrong
        with pytest.raises(ValueError, match=r"tokens: expected integers 0\.\.29"):
            loss_recovered(CONFIG, PARAMS, tokens, saes=random_sae(), mask=MASK)
