"""Training: exact selection, a planted dictionary recovered, layers independent, resume to the bit, one trace."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxmech.sae import train as train_module
from jaxmech.sae.stream import ArrayStream
from jaxmech.sae.topk import largest
from jaxmech.sae.train import SAETrainConfig, init_state, train, train_step

D, F = 24, 32
KEY = jax.random.key(0)
SMALL = SAETrainConfig(d_sae=F, k=3, steps=24, lr=3e-3, dead_after=4, aux_features=8, log_every=4, checkpoint_every=8)


def sparse_data(layers=2, n=1024, features=24, active=3, seed=0):
    """Sums of a few known unit directions, plus a mean far from zero; a tenth of the rows are huge."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(layers, features, D))
    W /= np.linalg.norm(W, axis=-1, keepdims=True)
    codes = np.zeros((layers, n, features))
    for code in codes.reshape(-1, features):
        code[rng.choice(features, active, replace=False)] = rng.uniform(1, 3, active)
    x = codes @ W + 50 * rng.normal(size=(layers, 1, D))
    return W, x.astype(np.float32)


def stream(layers=2, **options):
    return ArrayStream(sparse_data(layers)[1], batch_size=128, layers=range(3, 3 + layers), model="toy", **options)


@pytest.mark.parametrize("guess", [1e-6, 1.0, 1e9])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_largest_is_numpys(n, guess):
    values = np.random.default_rng(n).normal(size=(3, 20, 50)).astype(np.float32)
    mask = np.asarray(jax.jit(jax.vmap(lambda v: largest(v, n, guess)))(values))
    for row, kept in zip(values, mask, strict=True):
        assert kept.sum() == n
        np.testing.assert_array_equal(np.sort(row[kept]), np.sort(row, axis=None)[-n:])


def test_largest_with_ties_and_few_positives():
    values = jnp.array([[3.0, 1.0, -1.0], [1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(largest(values, 2), [[1, 1, 0], [1, 0, 1]])  # all that equal the second
    np.testing.assert_array_equal(largest(values, 6), values > 0)
    assert not largest(-values, 1)[:, ::2][0, 0]
    assert largest(jnp.zeros((2, 3)), 2).sum() == 0


@pytest.mark.parametrize("kind, init", [("batchtopk", "data"), ("batchtopk", "random"), ("topk", "data")])
def test_planted_dictionary_is_recovered(kind, init):
    W, x = sparse_data(n=2048)
    config = SAETrainConfig(d_sae=F, k=3, kind=kind, init=init, steps=400, lr=1e-2, dead_after=20, aux_features=8)
    sae, history = train(config, ArrayStream(x, batch_size=128), key=KEY, progress=False)
    cosine = np.einsum("lfd,lgd->lfg", W, np.asarray(sae.params["W_dec"]))
    found = cosine.max(-1)
    assert np.mean(found > 0.95) > 0.9, found.round(2)
    y, f = np.asarray(sae(x)), np.asarray(sae.encode(x))
    fvu = ((x - y) ** 2).sum((1, 2)) / ((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2))
    assert np.all(fvu < 0.1)
    assert np.all(abs((f > 0).sum(-1).mean(-1) - 3) < 0.5)
    assert history.groupby("layer").fvu.last().max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(sae.params["W_dec"], axis=-1), 1, rtol=1e-4)


def test_layers_do_not_know_of_each_other():
    both, _ = train(SMALL, stream(), key=KEY, progress=False)
    _, x = sparse_data()
    for row, layer in enumerate((3, 4)):
        alone, _ = train(SMALL, ArrayStream(x[row : row + 1], batch_size=128, layers=(layer,)), key=KEY, progress=False)
        for name, leaf in alone.params.items():
            np.testing.assert_allclose(both.params[name][row], leaf[0], rtol=2e-3, atol=2e-3)


def test_export_equals_the_trained_form():
    """The exported dictionary on raw x is the trained one on (x - mean) / scale, massive dimensions and all."""
    _, x = sparse_data()
    x[:, :, 5] *= 40  # max_spread has work to do
    data = ArrayStream(x, batch_size=128)
    for kind in ("batchtopk", "topk"):
        config = dataclasses.replace(SMALL, kind=kind, max_norm=1e9)
        state = init_state(config, data, KEY)
        for i in range(20):
            state, _ = train_step(config, state, data.batch(i))
        sae = train_module.export(config, state, data)
        p, mean, scale = jax.device_get((state.params, state.mean, state.scale))
        assert np.ptp(scale, axis=1).min() > 1
        z = (x - mean[:, None]) / scale[:, None]
        pre = np.einsum("lnd,lfd->lnf", z - p["b_dec"][:, None], p["E"]) + p["b_enc"][:, None]
        if kind == "topk":
            kept = (pre >= np.sort(pre, axis=-1)[..., -3:-2]) & (pre > 0)
        else:
            threshold = np.asarray(state.threshold) / (1 - (1 - config.threshold_rate) ** 20)
            kept = pre > threshold[:, None, None]
        y = (np.where(kept, pre, 0) @ p["W_dec"] + p["b_dec"][:, None]) * scale[:, None] + mean[:, None]
        f = np.asarray(sae.encode(x))
        assert np.mean((f > 0) == kept) > 0.9999
        same = ((f > 0) == kept).all(-1)
        np.testing.assert_allclose(np.asarray(sae(x))[same], y[same], rtol=1e-3, atol=1e-2)


def test_outliers_do_not_take_every_place():
    _, x = sparse_data(layers=1)
    x[0, ::50] += 500
    _, history = train(SMALL, ArrayStream(x, batch_size=128), key=KEY, progress=False)
    assert history.fvu.max() < 2


def test_dead_features_come_back():
    """Features too faint ever to be kept stay dead without AuxK, and come back with it."""

    def dead_at_the_end(coefficient):
        data = stream()
        config = dataclasses.replace(SMALL, steps=200, aux_coefficient=coefficient)
        state = init_state(config, data, KEY)
        faint = jnp.where(jnp.arange(F) < 10, 1e-3, 1.0)[:, None]
        state = state.replace(params={**state.params, "E": state.params["E"] * faint})
        for i in range(config.steps):
            state, metrics = train_step(config, state, data.batch(i))
        return float(metrics["dead"].mean())

    without, with_aux = dead_at_the_end(0.0), dead_at_the_end(1.0)
    assert without > 0.1 and with_aux < without / 2, (without, with_aux)


def run(folder=None, steps=SMALL.steps, **changes):
    config = dataclasses.replace(SMALL, steps=steps, **changes)
    return train(config, stream(), key=KEY, checkpoint_dir=folder, progress=False)


def same(a, b):
    assert a[0].config == b[0].config
    for name, leaf in a[0].params.items():
        np.testing.assert_array_equal(leaf, b[0].params[name])
    pd.testing.assert_frame_equal(a[1], b[1])


def test_killed_training_resumes_to_the_bit(tmp_path):
    """A second process is killed (SIGKILL) between checkpoints; this one goes on."""
    code = (
        "import tests.sae.test_train as t, jaxmech.sae.train as m, time\n"
        "step = m.train_step\n"
        "def slow(*a):\n"
        "    time.sleep(0.1)\n"
        "    return step(*a)\n"
        "m.train_step = slow\n"
        f"t.run({str(tmp_path / 'ckpt')!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.time() + 60
    while child.poll() is None and not (tmp_path / "ckpt" / "8").exists():
        assert time.time() < deadline
        time.sleep(0.02)
    time.sleep(0.15)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "ckpt" / "24").exists()
    same(run(tmp_path / "ckpt"), run())
    same(run(tmp_path / "ckpt"), run())  # and a finished one is only read
    with pytest.raises(ValueError, match="lr was 0.003, is 0.1"):
        run(tmp_path / "ckpt", lr=0.1)


def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "free")
    room = iter([10**12, 1000])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: Usage(next(room)))
        with pytest.raises(ValueError, match="GB are needed and 0.00 GB are free; make room, .* goes on from its last"):
            run(tmp_path / "ckpt")
    (kept,) = [path.name for path in (tmp_path / "ckpt").iterdir() if path.name.isdigit()]
    assert kept == "8"
    same(run(tmp_path / "ckpt"), run())


def test_one_trace():
    config = dataclasses.replace(SMALL, steps=7, lr=2e-3)
    before = train_step._cache_size()
    train(config, stream(), key=KEY, progress=False)
    assert train_step._cache_size() == before + 1


def test_progress_bar(monkeypatch):
    seen = []

    @contextmanager
    def bar(what, total, *, unit):
        yield lambda n, note: seen.append((n, total, unit, note))

    monkeypatch.setattr(train_module, "progress_bar", bar)
    train(dataclasses.replace(SMALL, steps=6), stream(), key=KEY, progress=True)
    assert [s[:3] for s in seen] == [(4, 6, "step"), (2, 6, "step")]
    assert all(name in seen[0][3] for name in ("FVU", "L0 3", "dead"))


def test_refusals():
    for wrong in ({"kind": "l1"}, {"k": F + 1}, {"steps": 0}, {"init": "ones"}, {"threshold_rate": 0.0}):
        with pytest.raises(ValueError):
            dataclasses.replace(SMALL, **wrong)
    _, x = sparse_data()
    bad = x.copy()
    bad[0, 5, 5] = np.nan
    with pytest.raises(ValueError, match="finite"):
        train(SMALL, ArrayStream(bad, batch_size=128), key=KEY, progress=False)
