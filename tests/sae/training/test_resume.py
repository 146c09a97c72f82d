"""A killed training goes on to the bit, and its metrics have every row once."""

import dataclasses
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from jaxmech.activations.stream import ActivationStream, ArrayStream
from jaxmech.io import files as disk
from jaxmech.models.decoder import init_params
from jaxmech.sae.training import checkpoint, loop, train_saes
from jaxmech.sae.training.metrics import MetricsLog
from tests.conftest import tiny_config
from tests.sae.training.toy import KEY, SMALL, fit, sparse_data

pytestmark = pytest.mark.slow

CONFIG = dataclasses.replace(SMALL, sparsity=(3, 5))


def run(folder=None, **changes):
    log = {"log_dir": folder} if folder else {}
    return fit(dataclasses.replace(CONFIG, **changes), checkpoint_dir=folder and folder / "ckpt", **log)


def same(a, b):
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert ours.config == theirs.config
        for name, leaf in ours.params.items():
            np.testing.assert_array_equal(leaf, theirs.params[name])
    pd.testing.assert_frame_equal(a[1], b[1])


def test_killed_training_resumes_to_the_bit(tmp_path):
    """A second process kills itself (SIGKILL) between checkpoints; this one goes on."""
    # The step after the checkpoint's is logged before it is killed: that row must not come twice.
    code = (
        "import tests.sae.training.test_resume as t, jaxmech.sae.training.loop as m, os, pathlib, signal, time\n"
        f"step, folder = m.train_step, pathlib.Path({str(tmp_path)!r})\n"
        "def dies(*a):\n"
        "    time.sleep(0.1)\n"
        "    if (folder / 'ckpt' / '8').exists() and t.steps_of(folder)[-1:] == [12]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(*a)\n"
        "m.train_step = dies\n"
        "t.run(folder)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "ckpt" / "24").exists()
    whole = run()
    same(run(tmp_path), whole)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "metrics.csv"), whole[1])
    same(run(tmp_path), whole)  # and a finished one is only read
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "metrics.csv"), whole[1])
    with pytest.raises(ValueError, match="lr was 0.003, is 0.1"):
        run(tmp_path, lr=0.1)


def steps_of(folder):
    """The logged steps, a line that is being written left out."""
    file = folder / "metrics.csv"
    lines = file.read_text().rpartition("\n")[0].splitlines()[1:] if file.exists() else []
    return [int(line.split(",")[0]) for line in lines]


def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path, monkeypatch):
    room = iter([10**12, 10**12, 1000])

    def require_some(folder, needed, remedy):
        """The disk as this training sees it, and nobody else in the process."""
        with monkeypatch.context() as patch:
            patch.setattr(disk.shutil, "disk_usage", lambda _: Usage(next(room)))
            disk.require_space(folder, needed, remedy)

    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(checkpoint, "require_space", require_some)
    with pytest.raises(ValueError, match="GB are needed and 0.00 GB are free; make room, .* resumes from its last"):
        run(tmp_path)
    room = iter([1000])
    with monkeypatch.context() as patch:  # and a disk that is full already says so before the first step
        patch.setattr(loop, "train_step", None)
        with pytest.raises(ValueError, match="GB are needed"):
            run(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/ckpt could not be written .*choose another folder"):
        run(tmp_path / "file")
    (kept,) = [path.name for path in (tmp_path / "ckpt").iterdir() if path.name.isdigit()]
    assert kept == "8"
    monkeypatch.undo()
    same(run(tmp_path), run())


def test_a_checkpoint_keeps_the_history_of_its_own_step(tmp_path, monkeypatch):
    """Whatever the training adds while it is still being written."""
    checkpoints, history, begun = checkpoint.Checkpoints(tmp_path, {}), [{"step": 4}], []
    monkeypatch.setattr(checkpoints._manager, "save", lambda step, args: begun.append(args))
    checkpoints.save(4, {"a": np.zeros(2)}, history)
    history += [{"step": 8}]
    assert begun[0].about.item["history"] == [{"step": 4}]
    checkpoints.close()


def test_what_differs_is_named(tmp_path):
    _, x = sparse_data()
    options = {"batch_size": 128, "layers": (3, 4), "skip_first": 1}

    def train_on(x, training_key=KEY, **changes):
        train_saes(
            SMALL, ArrayStream(x, **(options | changes)), key=training_key, checkpoint_dir=tmp_path, progress=False
        )

    train_on(x)
    for name, said in {
        "batch_size": (64, "batch_size was 128, is 64"), "layers": ((1, 2), r"layers was \[3, 4\], is \[1, 2\]"),
        "key": (jax.random.key(5), r"order was \[0, 0\], is \[0, 5\]"), "skip_first": (2, "skip_first was 1, is 2"),
        "site": ("mlp_out", "site was 'resid_post', is 'mlp_out'"),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"a training that differs: {said[1]}; use another folder"):
            train_on(x, **{name: said[0]})
    with pytest.raises(ValueError, match="differs: other activations; use another folder"):
        train_on(x + 1)
    with pytest.raises(ValueError, match=r"differs: key was \[0, 0\], is \[0, 1\]; use another folder"):
        train_on(x, training_key=jax.random.key(1))


def test_what_differs_in_activations_of_a_model_is_named(tmp_path):
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 40, (24, 24))
    options = {"layers": (1, 3), "batch_size": 64, "buffer_tokens": 128}

    def train_on(tokens=tokens, params=params, **changes):
        data = ActivationStream(config, params, tokens, **(options | changes))
        short = dataclasses.replace(SMALL, steps=2)
        train_saes(short, data, key=KEY, checkpoint_dir=tmp_path, progress=False)

    train_on()
    train_on(forward_batch=3)  # which changes nothing
    for name, value, said in (
        ("batch_size", 32, "batch_size was 64, is 32"), ("key", jax.random.key(1), r"order was \[0, 0\], is \[0, 1\]"),
        ("layers", (1,), r"layers was \[1, 3\], is \[1\]"), ("epochs", 2, "epochs was 1, is 2"),
        ("buffer_tokens", 200, "buffer_tokens was 128, is 200"), ("dtype", "bfloat16", "dtype was 'float32', is 'bfl"),
        ("tokens", tokens[::-1], "other tokens"), ("params", init_params(config, jax.random.key(1)), "other weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"a training that differs: {said}"):
            train_on(**{name: value})


def test_tensorboard(tmp_path, monkeypatch):
    row = {"step": 4, "tokens": 512, "layer": 3, "sparsity": 3.0, "fvu": 0.5, "l0": 3.0}
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxmech\[tensorboard\]'"):
        MetricsLog(tmp_path, [row], tensorboard=True)
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((Path(folder).name, purge_step))

        def add_scalar(self, *values):
            seen.append(values)

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = Writer
    log = MetricsLog(tmp_path, [row], tensorboard=True)
    log.add([row | {"step": 8}])
    log.close()
    assert seen[0] == ("tensorboard", 5) and seen[-1] == "closed"
    assert set(seen[1:-1]) == {("fvu/layer 3, sparsity 3", 0.5, 8), ("l0/layer 3, sparsity 3", 3.0, 8)}
    assert steps_of(tmp_path) == [4, 8]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = tmp_path / "x [1]"
    whole = run(folder)
    (folder / "metrics.csv").unlink()
    same(run(folder), whole)  # read from its last checkpoint
    assert sorted(path.name for path in (folder / "ckpt").iterdir() if path.name.isdigit()) == ["16", "24"]


def test_a_checkpoint_cut_in_half_is_one_short_message(tmp_path):
    run(tmp_path)
    for file in (tmp_path / "ckpt" / "24").rglob("*"):
        if file.is_file() and file.stat().st_size > 300:
            file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(ValueError, match="checkpoint_dir: .*24 is damaged .*delete this folder") as error:
        run(tmp_path)
    assert len(str(error.value)) < 600
