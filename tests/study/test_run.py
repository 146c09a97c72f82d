"""A study resumes where it stood, recomputes only what changed, and gives the numbers of an uninterrupted run."""

import dataclasses
import os

import numpy as np
import pytest
from safetensors import SafetensorError

from jaxmech.io.lock import sole_user
from jaxmech.io.settings import build
from jaxmech.study import effects
from jaxmech.study import run as runner
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import Outcome, RunFolder


def test_keys_change_with_what_a_stage_depends_on(small_study):
    base = runner.stage_keys(small_study)

    def changed(**settings):
        other = runner.stage_keys(build(StudyConfig, settings, small_study))
        return {name for name in base if base[name] != other[name]}

    assert changed(run_dir="elsewhere") == set()
    assert changed(transfer={"families": 1}) == {"transfer"}
    assert changed(steering={"alphas": [-2.0, -1.0, 0.0, 1.0]}) == {"steering", "transfer"}
    assert changed(dictionaries={"train": {"sparsity": 9}}) == set(base) - {"behavior", "text"}
    assert changed(dictionaries={"train": {"checkpoint_every": 3}}) == set()
    assert changed(seed=1) == set(base)
    sections = {field.name for field in dataclasses.fields(small_study)}
    read = {setting for stage in runner.STAGES for setting in stage.settings}
    assert sections - read == {"run_dir", "instrument"}, "a setting no stage depends on"


def test_a_half_written_stage_is_not_a_stage(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "stages" / ".patching-x").mkdir()
    folder.save("text", Outcome({"a": np.float32(1.5), "b": float("nan")}, arrays={"x": np.eye(2)}), {"key": "k"})
    assert folder.key("patching") is None and folder.key("text") == {"key": "k"}
    assert folder.results("text") == {"a": 1.5, "b": None}
    folder.sweep()
    assert not list((tmp_path / "stages").glob(".*"))


def test_a_full_disk_is_one_message_and_keeps_what_is_there(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save("text", Outcome({"a": 1}), {"key": "old"})

    def full(*_):
        raise OSError(28, "No space left on device")

    def full_for_arrays(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="stage text: .*No space left on device"):
        patch.setattr("jaxmech.study.folder.save_file", full_for_arrays)
        folder.save("text", Outcome({"a": 2}, arrays={"x": np.eye(2)}), {"key": "new"})
    monkeypatch.setattr("jaxmech.study.folder.write_json", full)
    with pytest.raises(ValueError, match="stage text: .*No space left on device.*run the same command again"):
        folder.save("text", Outcome({"a": 2}), {"key": "new"})
    assert folder.results("text") == {"a": 1}


def test_unknown_stages_are_named(small_study):
    with pytest.raises(ValueError, match="'steeering'"):
        runner.run_study(small_study, until="steeering")


def test_directions_are_named_after_what_they_move_to():
    assert effects.DIRECTIONS["to_plus"] == ("minus", "plus")


def test_a_folder_has_one_user_at_a_time(small_study, tmp_path):
    with sole_user(small_study.run_dir):
        with pytest.raises(ValueError, match=f"run_dir: .*in use by process {os.getpid()}"):
            runner.run_study(small_study, until="behavior")
    with sole_user(small_study.run_dir):  # let go of
        pass


def test_a_finished_run_that_cannot_be_written_to_is_shown(small_study, tmp_path, monkeypatch):
    folder = RunFolder(small_study.run_dir)
    for name, key in runner.stage_keys(small_study).items():
        folder.save(name, Outcome({"excluded_pairs": 0}), {"key": key, "seconds": 1.0})
    monkeypatch.setattr(runner.claims, "judge", lambda results, config: {})
    assert runner.run_study(small_study) == folder.path and (folder.path / "results.json").is_file()

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runner, "sole_user", refused)
    monkeypatch.setattr(runner.os, "access", lambda *_: False)
    moved = folder.path.rename(tmp_path / "moved")
    elsewhere = dataclasses.replace(small_study, run_dir=str(moved))
    assert runner.run_study(elsewhere) == moved
    monkeypatch.setattr(runner, "__version__", "of another day")
    assert runner.run_study(elsewhere) == moved


def test_values_given_in_python_are_held_to_their_types(small_study):
    assert build(StudyConfig, {"seed": np.int64(3), "bank": {"stakes": np.array([10])}}, small_study).bank.stakes == (
        10,
    )
    given = {
        "batch": 4.0, "dictionaries.train.lr": "1e-3", "steering.alphas": "-1", "bank.stakes": [1.5],
        "dictionaries.layers": [True],
    } | {"dictionaries.layers": [1, 1], "seed": -1, "rule.q": float("nan"), "text.length": 1}  # fmt: skip
    for name, value in given.items():
        *sections, key = name.split(".")
        for section in reversed(sections):
            key, value = section, {key: value}
        for make in (lambda **s: dataclasses.replace(small_study, **s), lambda **s: build(StudyConfig, s, small_study)):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                make(**{key: value})
