"""Runs a study: stages in order, each skipped when nothing it depends on has changed."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from jaxmech.progress import console
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import Outcome, RunFolder, digest, write_json


class Stage(NamedTuple):
    """A stage and what its result depends on.

    name: of the module in `study.stages` and of the folder; settings: prefixes or names of configuration keys;
    after: the stages whose results it reads; revision: raise it when the stage computes something else.
    """

    name: str
    settings: tuple[str, ...]
    after: tuple[str, ...] = ()
    revision: int = 1

    def run(self, context) -> Outcome:
        return importlib.import_module(f"jaxmech.study.stages.{self.name}").run(context)


_MODEL = ("model", "dtype", "seed", "batch")
_BANK = (
    *_MODEL,
    "selection_families",
    "development_families",
    "test_families",
    "pairs",
    "examples",
    "stakes",
    "stance_words",
    "heldout_words",
)

STAGES = (
    Stage("behavior", (*_BANK, "samples", "gate_")),
    Stage("text", (*_BANK, "text_file", "text_dataset", "text_count", "text_length")),
    Stage("dictionaries", (*_MODEL, "sae_"), ("text",), revision=2),
    Stage("fidelity", (*_BANK, "text_check"), ("dictionaries",), revision=2),
    Stage(
        "contrast",
        (*_BANK, "rule_", "half_splits", "permutations", "relabelings", "selection", "budget_share"),
        ("fidelity",),
    ),
    Stage("dual_process", ("items_per_generator", "index_cut"), ("contrast",)),
    Stage("patching", ("random_sets",), ("contrast",)),
    Stage("attribution", ("audit_features", "attribution_steps"), ("contrast",)),
    Stage("proximity", ("proximity_features",), ("dual_process",)),
    Stage(
        "steering", ("alphas", "random_sets", "random_directions", "text_check", "arithmetic_items"), ("dual_process",)
    ),
    Stage("games", ("game_",), ("steering",)),
)


_SECTIONS = {"contrast": "selection"}
"""Where a stage's numbers stand in results.json under another name."""


def stage_keys(config: StudyConfig) -> dict[str, str]:
    """Each stage's hash: of its settings, its revision, and the hashes of the stages it reads."""
    settings, keys = dataclasses.asdict(config), {}
    for name in ("model", "sae_path", "text_file"):
        settings[name] = (settings[name], contents(settings[name]))
    for stage in STAGES:
        own = {
            k: v
            for k, v in settings.items()
            if any(k == p or (p.endswith("_") and k.startswith(p)) for p in stage.settings)
        }
        keys[stage.name] = digest(stage.name, stage.revision, own, [keys[name] for name in stage.after])
    return keys


def contents(path: str | None) -> list:
    """Names, sizes and times of the files at a path, by which a change is seen; empty for what is no path."""
    root = Path(path).expanduser() if path else None
    if root is None or not root.exists():
        return []
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    return [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def run_study(config: StudyConfig, *, report: Callable[..., Path] | None = None, until: str | None = None) -> Path:
    """Runs what is missing and writes results.json, manifest.json and the report.

    Args:
      until: run only this stage and what it depends on; the summing up is left out then.
      report: `(folder, config, manifest) -> Path`, called when anything it shows has changed.

    Returns:
      The run folder.

    Raises:
      ValueError: from a stage, naming what is wrong; the stages before it are kept.
    """
    folder, keys, context, out = RunFolder(config.run_dir), stage_keys(config), None, console()
    stages = STAGES if until is None else with_ancestors(until)
    folder.sweep()
    for number, stage in enumerate(stages, 1):
        record, label = folder.key(stage.name), f"[{number}/{len(stages)}] {stage.name}"
        if record and record["key"] == keys[stage.name]:
            out.print(f"{label}: kept", highlight=False, markup=False)
            continue
        if context is None:
            from jaxmech.study.context import Context  # loads JAX, which a finished study does not need

            context = Context(config)
        out.print(f"{label} …", highlight=False, markup=False)
        begun = time.monotonic()
        try:
            outcome = stage.run(context)
        except OSError as error:
            raise ValueError(
                f"stage {stage.name}: {error}. Earlier stages are kept; run the same command again"
            ) from error
        seconds = time.monotonic() - begun
        folder.save(stage.name, outcome, {"key": keys[stage.name], "seconds": seconds, "peak_gb": peak_memory_gb()})
        out.print(f"{label}: {seconds:.1f} s", highlight=False, markup=False)
    if until is None:
        finish(config, folder, report)
    return folder.path


def with_ancestors(name: str) -> list[Stage]:
    """A stage and everything it depends on, in order."""
    known = {stage.name: stage for stage in STAGES}
    if name not in known:
        raise ValueError(f"stage: expected one of {', '.join(known)}, got {name!r}")
    needed, queue = set(), [name]
    while queue:
        needed.add(queue.pop())
        queue += [above for at in needed for above in known[at].after if above not in needed]
    return [stage for stage in STAGES if stage.name in needed]


def finish(config: StudyConfig, folder: RunFolder, report) -> None:
    """Writes what sums up all stages, unless it stands there already for these very stages."""
    page, manifest_file = folder.path / "report.html", folder.path / "manifest.json"
    records = {stage.name: folder.key(stage.name) for stage in STAGES}
    whole = digest(records, version("jaxmech"), dataclasses.asdict(config))
    expected = [manifest_file, folder.path / "results.json", *([page] if report else [])]
    if all(file.is_file() for file in expected) and f'"{whole}"' in manifest_file.read_text():
        return
    results = {_SECTIONS.get(stage.name, stage.name): folder.results(stage.name) for stage in STAGES}
    results["stages"] = {name: record["seconds"] for name, record in records.items()}
    manifest = {
        "study": whole,
        "config": dataclasses.asdict(config),
        "stages": records,
        "environment": environment(),
        "exclusions": {"pairs": results["behavior"]["excluded_pairs"]},
        "fidelity": results["fidelity"],
    }
    try:
        write_json(folder.path / "results.json", results)
        if report is not None:
            report(folder, config, manifest)
        write_json(manifest_file, manifest)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder.path}: {error.strerror}. All stages are kept; make room and run again"
        ) from error


def environment() -> dict:
    """Versions and devices, as the manifest keeps them."""
    import jax

    packages = (
        "jaxmech",
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
        "packages": {name: version(name) for name in packages},
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
    }


def peak_memory_gb() -> float:
    """The process's largest resident memory so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if platform.system() == "Linux" else 1e9)


def plan(config: StudyConfig) -> list[tuple[str, str]]:
    """Each stage with "kept", "to run" or "changed"."""
    folder, keys = RunFolder(config.run_dir), stage_keys(config)
    states = []
    for stage in STAGES:
        record = folder.key(stage.name)
        states.append(
            (stage.name, "to run" if record is None else "kept" if record["key"] == keys[stage.name] else "changed")
        )
    return states
