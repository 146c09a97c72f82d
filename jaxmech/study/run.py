"""Runs a study: stages in order, each skipped when nothing it depends on has changed."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from jaxmech.io.lock import sole_user
from jaxmech.io.progress import console
from jaxmech.io.version import __version__
from jaxmech.study import claims
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import RunFolder, digest, read_json, way_out, write_json
from jaxmech.study.keys import STAGES, Stage, stage_keys, with_ancestors

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


INSTRUMENT = "instrument.json"
"""What the study said of models whose truth is known, in the run folder; see `demo.check_instrument`."""

_SECTIONS = {"contrast": "selection"}
"""Stages whose numbers are in results.json under another name."""


def run_study(config: StudyConfig, *, report: Callable[..., Path] | None = None, until: str | None = None) -> Path:
    """Runs what is missing and writes results.json, manifest.json and the report.

    Args:
      until: run only this stage and what it depends on; the summary is skipped then.
      report: `(folder, manifest) -> Path`, called when anything it shows has changed.

    Returns:
      The run folder.

    Raises:
      ValueError: from a stage, naming what is wrong; the stages before it are kept.
    """
    stages, keys, folder = with_ancestors(until), stage_keys(config), RunFolder(config.run_dir, create=False)
    kept = all(_state(stage, keys, folder) == "kept" for stage in stages)
    if kept and (until is not None or finished(config, folder, report)):
        for number in range(1, len(stages) + 1):
            _announce(number, stages, "kept")
        return folder.path
    with sole_user(folder.path):
        folder = RunFolder(config.run_dir)
        folder.sweep()
        compute(config, keys, folder, stages)
        if until is None:
            finish(config, folder, report)
    return folder.path


def compute(config: StudyConfig, keys: Mapping[str, str], folder: RunFolder, stages: Sequence[Stage]) -> None:
    """Runs those of the stages that are not kept under their keys, in order.

    Raises:
      ValueError: from a stage.
    """
    context = None
    for number, stage in enumerate(stages, 1):
        if _state(stage, keys, folder) == "kept":
            _announce(number, stages, "kept")
            continue
        if context is None:
            from jaxmech.study.context import Context  # loads JAX, which a finished study does not need

            context = Context(config)
        _announce(number, stages, "…")
        begun = time.monotonic()
        try:
            outcome = stage.run(context.of(stage.name))
        except OSError as error:
            raise ValueError(
                f"stage {stage.name}: {error}. Earlier stages are kept; run the same command again"
            ) from error
        seconds = time.monotonic() - begun
        record = {"key": keys[stage.name], "seconds": seconds, "peak_gb": peak_memory_gb()}
        folder.save(stage.name, outcome, record | {"environment": environment()})
        _announce(number, stages, f"{seconds:.1f} s")


def _announce(number: int, stages: Sequence[Stage], what: str) -> None:
    between = " " if what == "…" else ": "
    console().print(f"[{number}/{len(stages)}] {stages[number - 1].name}{between}{what}", highlight=False, markup=False)


def study_hash(config: StudyConfig, folder: RunFolder) -> str:
    """A hash of what a finished run's results, manifest and page were made from, wherever its folder is."""
    settings = dataclasses.asdict(config) | {"run_dir": None}
    return digest(
        {stage.name: folder.key(stage.name) for stage in STAGES}, __version__, settings, _instrument(config, folder)
    )


def _instrument(config: StudyConfig, folder: RunFolder) -> dict[str, Any]:
    """What was said of the organisms that the study names; nothing of others that an earlier run named."""
    path = folder.path / INSTRUMENT
    scores = read_json(path) if config.instrument and path.is_file() else {}
    return scores if set(scores) == set(config.instrument) else {}


def finished(config: StudyConfig, folder: RunFolder, report: Callable[..., Path] | None) -> bool:
    """Whether the summary of all stages is there already for these very stages, or cannot be rewritten."""
    manifest = folder.path / "manifest.json"
    names = ("manifest.json", "results.json", *(["report.html"] if report else []))
    if not all((folder.path / name).is_file() for name in names):
        return False
    if f'"{study_hash(config, folder)}"' in manifest.read_text():
        return True
    if os.access(folder.path, os.W_OK):
        return False
    console().print(f"{folder.path} cannot be written to: its page is that of an earlier run", highlight=False)
    return True


def finish(config: StudyConfig, folder: RunFolder, report: Callable[..., Path] | None) -> None:
    """Writes the summary of all stages, unless it is there already for these very stages.

    Raises:
      ValueError: it cannot be written, or a stage's results are damaged.
    """
    if finished(config, folder, report):
        return
    records: dict[str, Any] = {stage.name: folder.key(stage.name) for stage in STAGES}
    results = {_SECTIONS.get(stage.name, stage.name): folder.results(stage.name) for stage in STAGES}
    results["claims"] = claims.as_json(
        claims.judge(results | {"contrast": results["selection"]}, dataclasses.asdict(config))
    )
    results["instrument"] = _instrument(config, folder)
    results["stages"] = {name: record["seconds"] for name, record in records.items()}
    manifest = {
        "study": study_hash(config, folder),
        "config": dataclasses.asdict(config),
        "stages": records,
        "environment": environment(),
        "exclusions": {"pairs": results["behavior"]["excluded_pairs"]},
        "fidelity": results["fidelity"],
        "instrument": results["instrument"],
    }
    try:
        write_json(folder.path / "results.json", results)
        if report is not None:
            report(folder, manifest)
        write_json(folder.path / "manifest.json", manifest)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder.path}: {error.strerror}. All stages are kept; {way_out(error)} and run again"
        ) from error


def rewrite_report(config: StudyConfig, command: str, *, report: Callable[..., Path]) -> Path:
    """Writes the page of a finished run again, from its tables.

    Args:
      command: the one that starts the run, for the message if none is finished.
      report: as for `run_study`.

    Returns:
      The run folder.

    Raises:
      ValueError: no finished run, one of another version, damaged tables, or a folder that cannot be written to.
    """
    folder = RunFolder(config.run_dir, create=False)
    manifest = folder.path / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{folder.path} holds no finished run; start it with: {command}")
    with sole_user(folder.path):
        try:
            report(folder, read_json(manifest))
        except OSError as error:
            raise ValueError(f"cannot write to {folder.path}: {error.strerror}; {way_out(error)}") from error
        except (KeyError, TypeError, AttributeError, IndexError, UndefinedError) as error:
            raise ValueError(
                f"{folder.path} holds a run of another version, which this one cannot show "
                f"({type(error).__name__}: {error}); recompute it with: {command}"
            ) from error
    return folder.path


def environment() -> dict:
    """Versions and devices, as the manifest keeps them."""
    import jax

    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "numpy",
        "scipy",
        "pandas",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"jaxmech": __version__} | {name: version(name) for name in packages},
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
    }


def peak_memory_gb() -> float | None:
    """The process's largest resident memory so far, in GB; None where the system does not report it (Windows)."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Linux" else 1e9)


def plan(config: StudyConfig, until: str | None = None) -> list[tuple[str, str]]:
    """Each stage, or `until` and those that it depends on, with "kept", "to run" or "changed". Writes nothing."""
    folder, stages = RunFolder(config.run_dir, create=False), with_ancestors(until)
    begun = any(folder.key(stage.name) for stage in stages)
    keys = stage_keys(config) if begun else {}  # hashes the source, which takes a second
    return [(stage.name, _state(stage, keys, folder)) for stage in stages]


def _state(stage: Stage, keys: Mapping[str, str], folder: RunFolder) -> str:
    record = folder.key(stage.name)
    return "to run" if record is None else "kept" if record["key"] == keys[stage.name] else "changed"
