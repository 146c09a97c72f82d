"""Moments folded layer by layer against a plain loop over prompts, and against the formula over all codes at once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech.answers.trie import build_tries
from jaxmech.contrast.moments import Positions, batch_moments, empty_moments, merge_moments
from jaxmech.sae.collect import distinct_residuals, residuals, run_decision, update_moments
from jaxmech.sae.module import SAE

PAIRS, BATCH, K, F = 8, 5, 3, 24
FAMILY = np.array([0, 0, 0, 1, 1, 2, 2, 2])
AMOUNTS, SHARES = ["0", "1", "5", "10"], np.array([0.0, 0.1, 0.5, 1.0])
WORDS = "ask give keep lend save take want help".split()
PLUS, MINUS = ([f"the {kind} one can {w} $" for w in WORDS] for kind in ("kind", "mean"))


def prompts(lm, texts):
    tokens, mask = jm.encode_prompts(lm, texts, length=26)
    return jm.Prompts(tokens, mask, build_tries(lm, texts, [AMOUNTS] * len(texts)))


def batches(lm):
    """Prompts, values and membership of every batch, the last one filled up."""
    for start in range(0, PAIRS, BATCH):
        at = np.arange(start, start + BATCH)
        real, at = at < PAIRS, np.minimum(at, PAIRS - 1)
        member = (np.arange(K) == FAMILY[at][:, None]) * real[:, None] * 1.0
        values = jnp.asarray(np.tile(SHARES, (2 * BATCH, 1)), jnp.float32)
        p = prompts(lm, [side[i] for side in (PLUS, MINUS) for i in at])
        yield p, {"values": values, "member": jnp.asarray(member, jnp.float32)}


def collected(lm, saes):
    moments, runs = empty_moments(len(saes.config.layers), K, F), []
    for p, pairs in batches(lm):
        moments, run = update_moments(lm.config, lm.params, p, saes=saes, **pairs, moments=moments)
        runs.append(run)
    return moments, runs


@pytest.fixture(scope="module")
def alone(lm):
    """Every prompt by itself: resid [2,PAIRS,L,D] and the share given [2,PAIRS]."""
    runs = [[run_decision(lm.config, lm.params, prompts(lm, [text])) for text in side] for side in (PLUS, MINUS)]
    resid = np.array([[run.resid[:, 0] for run in side] for side in runs], np.float64)
    probs = [[np.exp(np.asarray(run.choices.logprobs[0], np.float64)) for run in side] for side in runs]
    return resid, np.array([[p @ SHARES / p.sum() for p in side] for side in probs])


def kind(saes, name):
    if name == "one dictionary":
        return saes.at(3)
    if name == "jumprelu":
        return saes
    params = {n: leaf for n, leaf in saes.params.items() if n != "threshold"}
    return SAE(params, dataclasses.replace(saes.config, activation=name, k=4))


def code(sae, x):
    """The features of one residual [D], by the definition, in float64."""
    p = {n: np.asarray(leaf, np.float64) for n, leaf in sae.params.items()}
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if sae.config.activation == "jumprelu":
        return np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
    signed = sae.config.activation == "abstopk"
    top = np.argsort(-(np.abs(pre) if signed else pre), kind="stable")[:4]
    out = np.zeros_like(pre)
    out[top] = pre[top] if signed else np.maximum(pre[top], 0)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jumprelu", "topk", "abstopk", "one dictionary"])
def test_moments_equal_a_plain_loop(lm, saes, alone, name):
    saes, (resid, g) = kind(saes, name), alone
    m, _ = collected(lm, saes)
    close = dict(rtol=2e-4, atol=1e-4)
    np.testing.assert_array_equal(m.n, np.bincount(FAMILY))
    for k in range(K):
        here = FAMILY == k
        off = g[:, here] - g[:, here].mean(1, keepdims=True)
        np.testing.assert_allclose(m.mean_g[:, k], g[:, here].mean(1), **close)
        np.testing.assert_allclose(m.m2_g[:, k], (off**2).sum(1), **close)
        for slot, layer in enumerate(saes.config.layers):
            z = np.array([[code(saes.at(layer), x) for x in side[:, layer]] for side in resid[:, here]])  # [2,n,F]
            d = z[0] - z[1]
            np.testing.assert_allclose(m.mean[:, slot, k], z.mean(1), **close)
            np.testing.assert_allclose(m.m2[:, slot, k], ((z - z.mean(1, keepdims=True)) ** 2).sum(1), **close)
            np.testing.assert_allclose(m.mean_d[slot, k], d.mean(0), **close)
            np.testing.assert_allclose(m.m2_d[slot, k], ((d - d.mean(0)) ** 2).sum(0), **close)
            np.testing.assert_array_equal(m.positive[slot, k], (d > 0).sum(0))
            np.testing.assert_array_equal(m.negative[slot, k], (d < 0).sum(0))
            np.testing.assert_array_equal(m.active[:, slot, k], (z > 0).sum(1))
            np.testing.assert_allclose(m.c_zg[:, slot, k], np.einsum("snf,sn->sf", z, off), **close)
    assert np.asarray(m.c_zg).any() and np.asarray(m.m2_d).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_means_over_tokens_equal_a_plain_loop(lm, saes, name):
    """Each prompt by itself, each token by itself; the longest common end of a pair is 4 to 6 tokens, of a window of 7.
    Two cells, the last pair in none."""
    saes, W, cells = kind(saes, name), 7, np.arange(PAIRS) % 2
    shared = 4 + np.arange(PAIRS) % 3
    m = Positions(empty_moments(2, K, F, C=2), empty_moments(2, K, F, C=2))
    for start, (p, pairs) in zip(range(0, PAIRS, BATCH), batches(lm), strict=True):
        rows = np.minimum(np.arange(start, start + BATCH), PAIRS - 1)
        weight = (np.arange(W) >= W - shared[rows, None]) / shared[rows, None]
        real = (np.arange(start, start + BATCH) < PAIRS - 1)[:, None]
        cell = jnp.asarray((cells[rows][:, None] == np.arange(2)) * real, jnp.float32)
        weight = jnp.asarray(np.tile(weight, (2, 1)), jnp.float32)
        m, _ = update_moments(lm.config, lm.params, p, saes=saes, **pairs, moments=m, cell=cell, weight=weight)
    single, _ = collected(lm, saes)
    for field, a, b in zip(single._fields, single, m.decision, strict=True):
        if field != "cells":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=field)
    close = dict(rtol=2e-4, atol=1e-4)
    for slot, layer in enumerate(saes.config.layers):
        z = np.zeros((2, PAIRS, F))
        for side, texts in enumerate((PLUS, MINUS)):
            for i, text in enumerate(texts):
                x = np.asarray(residuals(lm.config, lm.params, prompts(lm, [text]))[layer, 0, -shared[i] :], np.float64)
                z[side, i] = np.mean([code(saes.at(layer), token) for token in x], axis=0)
        d = z[0] - z[1]
        for k in range(K):
            of_k = d[FAMILY == k]
            np.testing.assert_allclose(m.after.mean_d[slot, k], of_k.mean(0), **close)
            np.testing.assert_allclose(m.after.m2_d[slot, k], ((of_k - of_k.mean(0)) ** 2).sum(0), **close)
            np.testing.assert_array_equal(m.after.active[:, slot, k], (z[:, FAMILY == k] > 0).sum(1))
        for c in range(2):
            np.testing.assert_allclose(m.after.cells[slot, c], d[:-1][cells[:-1] == c].sum(0), **close)
    assert np.abs(np.asarray(m.after.mean_d) - np.asarray(m.decision.mean_d)).max() > 0.01


@pytest.mark.slow
def test_moments_equal_the_formula_over_all_codes_at_once(lm, saes):
    got, runs = collected(lm, saes)
    want = empty_moments(2, K, F)
    for (_, pairs), run in zip(batches(lm), runs, strict=True):
        z = saes.encode(run.resid[np.array(saes.config.layers)])
        z = jnp.moveaxis(z.reshape(2, 2, BATCH, F), 1, 0)
        batch = batch_moments(z, run.choices.expected(pairs["values"]).reshape(2, -1), pairs["member"])
        want = merge_moments(want, batch)
    for name, a, b in zip(got._fields, got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_the_batch_itself_comes_back(lm, saes, site):
    p = next(batches(lm))[0]
    _, runs = collected(lm, saes.replace(config=dataclasses.replace(saes.config, site=site, site_out=site)))
    want = run_decision(lm.config, lm.params, p, site=site)
    np.testing.assert_allclose(runs[0].resid, want.resid, atol=1e-5)
    np.testing.assert_allclose(runs[0].choices.logprobs, want.choices.logprobs, atol=1e-5)


def test_one_program_for_all_batches_in_the_moments_own_buffers(lm, saes):
    before = update_moments._cache_size()
    collected(lm, saes)
    moments = empty_moments(2, K, F)
    p, pairs = next(batches(lm))
    update_moments(lm.config, lm.params, p, saes=saes, **pairs, moments=moments)
    assert update_moments._cache_size() <= before + 1
    assert all(leaf.is_deleted() for leaf in moments)


def test_codes_exist_for_one_layer_at_a_time(lm, saes):
    (p, pairs), moments = next(batches(lm)), empty_moments(2, K, F)
    shapes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            shapes.update(v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    walk(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    walk(inner)

    run = partial(update_moments, lm.config)
    walk(jax.make_jaxpr(run)(lm.params, p, saes=saes, **pairs, moments=moments).jaxpr)
    codes = [shape for shape in shapes if F in shape and {BATCH, 2 * BATCH} & set(shape)]
    assert codes and max(map(np.prod, codes)) == 2 * BATCH * F


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_post", "attn_z"])
def test_residuals_of_shared_worked_examples_are_those_of_whole_texts(lm, site):
    before = ["the kind one can give $5\n", "the mean one can keep $10\n"]
    prefixes, texts = (
        [before[i] for i in (1, 0, 1)],
        [f"the {kind} one can give $" for kind in ("kind", "mean", "mean")],
    )
    shared = jm.make_prompts(lm, texts, AMOUNTS, prefixes=prefixes)
    whole = jm.make_prompts(lm, [a + b for a, b in zip(prefixes, texts, strict=True)], AMOUNTS)
    real = np.concatenate([np.asarray(shared.prefix.mask)[shared.prefix.rows], np.asarray(shared.mask)], axis=1)
    found = np.asarray(residuals(lm.config, lm.params, shared, site=site))[:, real]
    np.testing.assert_allclose(
        found, np.asarray(residuals(lm.config, lm.params, whole, site=site))[:, np.asarray(whole.mask)], atol=1e-5
    )
    x, count = distinct_residuals(lm.config, lm.params, shared, site=site)
    assert np.asarray(shared.prefix.mask).sum() + np.asarray(shared.mask).sum() == np.count_nonzero(count)
    assert count.sum() == real.sum()
    np.testing.assert_allclose(np.einsum("lnd,n->ld", x, count), found.sum(1), rtol=1e-5, atol=1e-4)
    alone, once = distinct_residuals(lm.config, lm.params, whole, site=site)
    np.testing.assert_array_equal(once, np.asarray(whole.mask).reshape(-1))
    np.testing.assert_allclose(np.einsum("lnd,n->ld", alone, once), found.sum(1), rtol=1e-5, atol=1e-4)
