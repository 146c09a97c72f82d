"""Training: a planted dictionary recovered by every kind, lanes that do not know of each other, dead features."""

import dataclasses
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxmech.activations.stream import ArrayStream
from jaxmech.sae.training import KINDS, SAETrainConfig, loop
from jaxmech.sae.training.config import optimizer, sparsity_at
from jaxmech.sae.training.step import init_state, train_step
from tests.sae.training.toy import KEY, SMALL, SPARSITY, F, fit, sparse_data, stream

pytestmark = pytest.mark.slow

LONG = dataclasses.replace(SMALL, steps=400, lr=1e-2, dead_after=20, threshold_speed=1.0)


@pytest.mark.parametrize("kind, init", [*((kind, "data") for kind in KINDS), ("batchtopk", "random")])
def test_planted_dictionary_is_recovered(kind, init):
    W, x = sparse_data(n=2048)
    # Matryoshka's inner dictionary has to hold all that is planted, or it learns mixtures.
    prefixes = (24,) * (kind == "matryoshka")
    config = dataclasses.replace(LONG, kind=kind, init=init, sparsity=SPARSITY[kind], start_l0=8, prefixes=prefixes)
    (sae,), history = fit(config, ArrayStream(x, batch_size=128))
    cosine = np.einsum("lfd,lgd->lfg", W, np.asarray(sae.params["W_dec"]))
    found = cosine.max(-1)
    assert np.mean(found > 0.95) > 0.9, found.round(2)
    y, f = np.asarray(sae(x)), np.asarray(sae.encode(x))
    fvu = ((x - y) ** 2).sum((1, 2)) / ((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2))
    assert np.all(fvu < 0.1)
    l0 = (f > 0).sum(-1).mean(-1)
    assert np.all(abs(l0 - 3) < (0.5 if config.selects else 2))
    np.testing.assert_allclose(sae.config.l0, l0, atol=0.3)
    assert history.groupby("layer").fvu.last().max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=-1), 1, rtol=1e-4)


def test_matryoshka_puts_what_matters_most_first():
    """Eight of the planted features are four times as strong: the innermost dictionary of eight has to find them."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(24, 24))
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    codes = (rng.random((2048, 24)) < 0.12) * rng.uniform(1, 2, (2048, 24)) * np.where(np.arange(24) < 8, 4, 1)
    data = ArrayStream((codes @ W)[None].astype(np.float32), batch_size=128)

    def inner(kind):
        config = dataclasses.replace(LONG, kind=kind, prefixes=(8,) * (kind == "matryoshka"))
        rows = np.asarray(fit(config, data)[0][0].params["W_dec"])[0, :8]
        return np.mean((W[:8] @ rows.T).max(1) > 0.9)

    assert inner("matryoshka") > 0.7 and inner("batchtopk") < 0.4


@pytest.mark.parametrize("kind, sparsities", [("batchtopk", (2.5, 6)), ("topk", (2, 6)), ("jumprelu", (0.02, 0.2))])
def test_lanes_do_not_know_of_each_other(kind, sparsities):
    k_start = 1.0 if kind == "jumprelu" else 2.0
    config = dataclasses.replace(SMALL, kind=kind, sparsity=sparsities, sparsity_warmup=8, k_start=k_start)
    stacks, history = fit(config)
    _, x = sparse_data()
    for sparsity, both in zip(sparsities, stacks, strict=True):
        (alone,), rows = fit(
            dataclasses.replace(config, sparsity=sparsity), ArrayStream(x[1:], batch_size=128, layers=(4,))
        )
        for name, leaf in alone.params.items():
            np.testing.assert_allclose(both.params[name][1], leaf[0], rtol=2e-3, atol=2e-3)
        lane = history[(history.sparsity == sparsity) & (history.layer == 4)].reset_index(drop=True)
        np.testing.assert_allclose(lane.to_numpy(float), rows.to_numpy(float), rtol=2e-2, atol=2e-3)
    l0 = history[history.step == config.steps].groupby("sparsity").l0.mean()
    if config.selects:
        np.testing.assert_allclose(l0, sparsities, atol=0.05)
    else:
        assert l0[sparsities[0]] > l0[sparsities[1]]


def test_schedules():
    config = dataclasses.replace(SMALL, steps=100, warmup=10, decay=0.5, sparsity_warmup=20, k_start=3.0)
    steps = jnp.array([0, 10, 20, 90])
    np.testing.assert_allclose(sparsity_at(config, 3.0, steps), [9, 6, 3, 3])
    np.testing.assert_allclose(sparsity_at(config, 20.0, steps), [F, F, 20, 20])
    rising = dataclasses.replace(config, kind="gated", sparsity=0.1, k_start=1.0)
    np.testing.assert_allclose(sparsity_at(rising, 0.1, steps), [0, 0.05, 0.1, 0.1])
    assert sparsity_at(SMALL, jnp.float32(3), jnp.int32(0)) == 3
    for schedule, expected in {"constant": 1.0, "linear": 0.5, "cosine": 0.5}.items():
        lr = steps_of(dataclasses.replace(config, schedule=schedule))
        np.testing.assert_allclose(lr[[0, 4, 9, 49]] / config.lr, [0.1, 0.5, 1, 1], rtol=1e-3)
        np.testing.assert_allclose(lr[75] / config.lr, expected, rtol=1e-3)
    cosine = steps_of(dataclasses.replace(config, schedule="cosine"))
    np.testing.assert_allclose(cosine[50:] / config.lr, (1 + np.cos(np.pi * np.arange(50) / 50)) / 2, atol=1e-3)


def steps_of(config):
    """Adam moves a parameter with a constant gradient by exactly its step size."""
    adam = optimizer(config)

    def one(carry, _):
        updates, carry = adam.update(jnp.float32(1), carry)
        return carry, -updates

    return np.asarray(jax.lax.scan(one, adam.init(jnp.float32(0)), length=config.steps)[1])


def test_outliers_do_not_take_every_place():
    _, x = sparse_data(layers=1)
    x[0, ::50] += 500
    _, history = fit(SMALL, ArrayStream(x, batch_size=128))
    assert history.fvu.max() < 2


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "gated", "standard"])
def test_dead_features_come_back(kind):
    """Features too faint ever to fire stay dead without AuxK, and come back with it."""

    def dead_at_the_end(coefficient):
        data, lane = stream(), (slice(None), slice(None), slice(10))
        config = dataclasses.replace(
            SMALL, steps=200, kind=kind, sparsity=SPARSITY[kind] / (1 if kind == "batchtopk" else 10),
            aux_coefficient=coefficient,
        )  # fmt: skip
        state = init_state(config, data, KEY)
        p = {**state.params, "E": state.params["E"].at[lane].multiply(1e-3)}
        if kind in ("gated", "standard"):
            bias = "b_gate" if kind == "gated" else "b_enc"
            p[bias] = p[bias].at[lane].set(-0.3)
        state = state.replace(params=p)
        dead = []
        for i in range(config.steps):
            state, metrics = train_step(config, state, data.batch(i))
            dead.append(float(metrics["dead"].mean()))
        return np.mean(dead[-100:])  # a feature or two come and go

    without, with_aux = dead_at_the_end(0.0), dead_at_the_end(1.0)
    assert without > 0.1 and with_aux < without / 2, (without, with_aux)


@pytest.mark.parametrize("kind", ["batchtopk", "gated"])
def test_bfloat16_trains_float32_masters(kind):
    config = dataclasses.replace(SMALL, kind=kind, sparsity=SPARSITY[kind], steps=60)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    state = init_state(half, stream(), KEY)
    state, _ = train_step(half, state, stream().batch(0))
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    full, rounded = (fit(c)[1].groupby("layer").fvu.last().to_numpy() for c in (config, half))
    assert not np.array_equal(full, rounded)
    np.testing.assert_allclose(rounded, full, rtol=0.1)


def test_one_trace():
    config = dataclasses.replace(SMALL, steps=7, lr=2e-3, sparsity=(2, 3), sparsity_warmup=3)
    before = train_step._cache_size()
    fit(config)
    assert train_step._cache_size() == before + 1


def test_progress_bar(monkeypatch):
    seen = []

    @contextmanager
    def bar(what, total, *, unit):
        yield lambda n, note: seen.append((n, total, unit, note))

    monkeypatch.setattr(loop, "progress_bar", bar)
    loop.train_saes(dataclasses.replace(SMALL, steps=6, sparsity=(3, 9)), stream(), key=KEY)
    assert [s[:3] for s in seen] == [(4, 6, "step"), (2, 6, "step")]
    assert all(name in seen[0][3] for name in ("FVU", "L0 3 to 9", "dead"))


def test_refusals():
    wrong = {
        "kind": "l1", "sparsity": F + 1, "steps": 0, "init": "ones", "threshold_rate": 0.0, "schedule": "stairs",
        "compute_dtype": "float16", "k_start": 0.5, "prefixes": (4, 2), "decay": 2.0, "bandwidth": 0.0, "b2": 1.0,
        "sparsity_warmup": SMALL.steps,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(SMALL, **{name: value})
    for sparsity in ((), (3, 3), 0, "many", True, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            dataclasses.replace(SMALL, sparsity=sparsity)
    for change in ({"prefixes": (4,)}, {"k_start": 2.0}, {"kind": "gated", "k_start": 2.0, "sparsity_warmup": 3}):
        with pytest.raises(ValueError, match="goes with"):  # what would be ignored
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="sparsity: topk keeps a whole number"):
        dataclasses.replace(SMALL, kind="topk", sparsity=2.5)
    with pytest.raises(ValueError, match="lr.*; kind|kind.*; lr"):
        dataclasses.replace(SMALL, lr=-1, kind="l1")
    _, x = sparse_data()
    x[0, 5, 5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fit(SMALL, ArrayStream(x, batch_size=128))
    with pytest.raises(ValueError, match="log_dir"):
        fit(SMALL, tensorboard=True)


@pytest.mark.parametrize("kind", KINDS)
def test_64_bit_jax_trains_the_same(kind):
    """In which integers and random numbers are 64 bits wide unless something else is said."""
    config = dataclasses.replace(SMALL, kind=kind, sparsity=SPARSITY[kind], steps=6, sparsity_warmup=3)
    (expected,), history = fit(config)
    with jax.enable_x64(True):
        state = init_state(config, stream(), KEY)
        after, metrics = train_step(config, state, stream().batch(0))
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves((after, metrics))} == {4}
        (sae,), again = fit(config)
    for name, leaf in expected.params.items():
        np.testing.assert_allclose(sae.params[name], leaf, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again.to_numpy(float), history.to_numpy(float), rtol=1e-4, atol=1e-4)


def test_numbers_of_every_library_make_the_same_training(tmp_path):
    given = dict(
        d_sae=np.int64(F), sparsity=np.array([2, 3]), steps=np.int32(8), lr=np.float32(0.5), warmup=np.array(2)
    )
    given = SAETrainConfig(**given, decay=jnp.float32(0.25), prefixes=pd.Series([4, 8]), kind="matryoshka")
    plain = SAETrainConfig(F, (2, 3), steps=8, lr=0.5, warmup=2, decay=0.25, prefixes=(4, 8), kind="matryoshka")
    assert given == plain and repr(given) == repr(plain) and hash(given) == hash(plain)
    assert dataclasses.replace(SMALL, sparsity=pd.Series([2.5, 3.0])).sparsity == (2.5, 3.0)
    # A checkpoint of the one is gone on with by the other.
    fit(dataclasses.replace(SMALL, lr=np.float64(3e-3), steps=np.int64(8)), checkpoint_dir=tmp_path)
    fit(dataclasses.replace(SMALL, lr=3e-3, steps=8), checkpoint_dir=tmp_path)


def test_what_is_no_number_is_named():
    for name, value, said in (("steps", 4.0, "a whole number, got 4.0"), ("lr", "1e-3", "a number, got '1e-3'"),
                              ("d_sae", "32", "a whole number, got '32'"), ("b1", None, "a number, got None"),
                              ("warmup", True, "a whole number, got True"), ("lr", np.inf, "a positive number"),
                              ("prefixes", "48", "whole numbers"), ("sparsity", "3", "a number")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected {said}"):
            dataclasses.replace(SMALL, **{name: value})
    with pytest.raises(ValueError, match="kind: expected one of .*; steps: .*; lr: "):
        dataclasses.replace(SMALL, kind="l1", steps=4.0, lr="1e-3")


def test_activations_that_are_no_numbers_end_a_training():
    _, x = sparse_data()
    for value in (np.nan, np.inf):
        x[1, 700, 5] = value
        with pytest.raises(ValueError, match="activations: resid_post of layer 1 is not finite in buffer 0"):
            fit(dataclasses.replace(SMALL, kind="jumprelu", sparsity=0.1), ArrayStream(x, batch_size=128))
