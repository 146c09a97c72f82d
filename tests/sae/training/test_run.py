"""`jaxmech train-sae` on a tiny model: settings checked, everything written, a second run trains nothing."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError

from jaxmech import cli
from jaxmech.io.lock import sole_user
from jaxmech.io.settings import load_settings
from jaxmech.sae.formats import load_saes
from jaxmech.sae.training import loop, run
from jaxmech.sae.training.run import TrainSettings, run_training

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[3] / "configs" / "train-sae-gemma-3-270m.yaml"
SMALL = [
    "text_count=12", "text_length=24", "layers=[1,3]", "d_sae=32", "sparsity=[2,4]", "steps=12", "batch=16",
    "buffer=128", "checkpoint_every=4", "log_every=4", "warmup=2", "site=mlp_out",
]  # fmt: skip


@pytest.fixture
def tiny(lm, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load_model", lambda *_, **__: lm)
    return [*SMALL, f"run_dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"]


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["jaxmech", "train-sae", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_command_trains_saves_measures_and_goes_on(tiny, monkeypatch, capsys, tmp_path):
    step, calls = loop.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    settings = load_settings(TrainSettings, CONFIG, tiny)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", dies)
        run_training(settings)
    monkeypatch.setattr(run.text, "sample_text", None)  # the text it wrote is still there
    code, out, err = call(monkeypatch, capsys, CONFIG, *tiny)
    assert code == 0, err
    folder = tmp_path / "run"
    assert "On held-out text" in out and "Dictionaries" in out
    table, history = pd.read_csv(folder / "evaluation.csv"), pd.read_csv(folder / "metrics.csv")
    assert history.step.tolist() == [4] * 4 + [8] * 4 + [12] * 4
    assert table[["sparsity", "layer"]].to_numpy().tolist() == [[2, 1], [2, 3], [4, 1], [4, 3]]
    assert np.isfinite(table[["fvu", "l0"]].to_numpy()).all()
    for k in (2, 4):
        stack = load_saes(folder / "saes" / f"sparsity_{k}")
        assert stack.config.layers == (1, 3) and stack.config.site == "mlp_out" and stack.config.d_sae == 32
    monkeypatch.setattr(loop, "train_step", None)
    _, again = run_training(settings)
    pd.testing.assert_frame_equal(again, table, check_dtype=False, rtol=1e-6)
    assert list((tmp_path / "cache").iterdir())


def test_one_sparsity_needs_no_folder_of_its_own(tiny, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("it was 10:30. " * 100)
    (tmp_path / "run" / "saes" / "layer_2").mkdir(parents=True)  # of an earlier training, not to be opened with these
    settings = load_settings(
        TrainSettings, CONFIG,
        [*tiny, "sparsity=0.05", "kind=gated", f"text_file={tmp_path / 'a.txt'}", "cache=null", "steps=4"],
    )  # fmt: skip
    folder, table = run_training(settings)
    assert load_saes(folder).config.activation == "jumprelu" and load_saes(folder).config.layers == (1, 3)
    assert not (folder / "layer_2").exists() and table.sparsity.tolist() == [0.05, 0.05]
    assert not (tmp_path / "run" / "text.safetensors").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_at_the_end_is_one_message(tiny, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(run, "save_saes", full)
    settings = load_settings(TrainSettings, CONFIG, [*tiny, "sparsity=2", "steps=4"])
    with pytest.raises(ValueError, match="saes could not be written .No space left on device.; make room"):
        run_training(settings)


@pytest.mark.devices
def test_mesh_in_the_settings(tiny):
    settings = load_settings(TrainSettings, CONFIG, [*tiny, "mesh_data=2", "mesh_model=4", "sparsity=2", "steps=4"])
    assert np.isfinite(run_training(settings)[1].fvu).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsty=3", "unknown configuration key 'sparsty' (did you mean 'sparsity'?)"),
        ("sparsity=many", "sparsity: expected a number or several, got 'many'"),
        ("kind=l1", "kind: expected one of topk, batchtopk, matryoshka, jumprelu, gated, standard"),
        ("steps=ten", "steps"),
        ("held_out=1", "held_out"),
        ("layers=[9]", "layers: expected 0..3"),
        ("site=resid", "site: expected one of"),
        ("batch=100000", "do not fit the smallest buffer"),
        ("mesh_data=99", "devices"),
        ("mesh_data=0", "devices"),
        pytest.param("mesh_model=3", "d_sae: 32 cannot be spread evenly over the 3 devices", marks=pytest.mark.devices),
        ("layers=[1,1]", "layers: expected distinct layers"),
        ("layers=[]", "layers: expected distinct layers, at least one"),
        ("forward_batch=0", "forward_batch: expected"),
        ("buffer_dtype=float16", "expected 'float32' or 'bfloat16'"),
        ("tensorboard=true", "pip install 'jaxmech[tensorboard]'"),
        ("prefixes=[4]", "prefixes: goes with matryoshka"),
        ("sparsity=[1,", "overrides"),
    ],
)
def test_mistakes_end_with_their_message(tiny, monkeypatch, capsys, override, message):
    """Before any text is sampled, which can take hours."""
    monkeypatch.setattr(run.text, "sample_text", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, err = call(monkeypatch, capsys, CONFIG, *tiny, override)
    assert code == 1 and message in " ".join(err.split()) and "Traceback" not in err


def test_text_of_another_training_is_kept(tiny, monkeypatch, capsys, tmp_path):
    settings = load_settings(TrainSettings, CONFIG, tiny)
    file, rows = tmp_path / "text.safetensors", run.text.Tokens(np.ones((2, 3), np.int32), np.ones((2, 3), bool))
    monkeypatch.setattr(run.text, "sample_text", lambda *_, **__: rows)
    run.draw_text(settings, None, file)
    before = file.read_bytes()
    np.testing.assert_array_equal(run.draw_text(settings, None, file).tokens, rows.tokens)
    other = dataclasses.replace(settings, text_count=settings.text_count + 1)
    with pytest.raises(ValueError, match=f"text_count was {settings.text_count}, is {other.text_count}; use another"):
        run.draw_text(other, None, file)
    assert file.read_bytes() == before


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such configuration"):
        load_settings(TrainSettings, tmp_path / "none.yaml")
    (tmp_path / "some.yaml").write_text("model: tiny\n")
    with pytest.raises(ValueError, match="missing configuration key d_sae, .*sparsity"):
        load_settings(TrainSettings, tmp_path / "some.yaml")
    for text in ("- model\n", "3\n"):
        (tmp_path / "some.yaml").write_text(text)
        with pytest.raises(ValueError, match="some.yaml: (expected lines of key: value|not YAML)"):
            load_settings(TrainSettings, tmp_path / "some.yaml")
    (tmp_path / "some.yaml").write_text("model: [\n")
    with pytest.raises(ValueError, match="some.yaml: not YAML"):
        load_settings(TrainSettings, tmp_path / "some.yaml")


def test_a_folder_has_one_training_at_a_time_and_text_is_looked_for_first(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load_model", None)
    settings = load_settings(TrainSettings, CONFIG, [*tiny, f"text_file={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match="text_file: no text file at"):
        run_training(settings)
    assert not (tmp_path / "run").exists()
    with sole_user(tmp_path / "run"), pytest.raises(ValueError, match="run_dir: .* is in use by process"):
        run_training(dataclasses.replace(settings, text_file=None))
