"""What a stage's result depends on, and the key that says so: settings, what it reads, and the source it is made of.

A stage is kept while its key stays. It can read no setting and no stage's results that its key does not hold, so that
nothing is kept by mistake. Only source that can change a number counts: not docstrings, comments, error messages, nor
the modules in `_NO_NUMBERS`. Source is hashed as Python unparses it, so another Python may recompute a study.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxmech.behavior.read import is_own, is_table
from jaxmech.io import help_topics, hub
from jaxmech.io.folders import walk
from jaxmech.io.version import __version__
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import Outcome, digest
from jaxmech.study.organisms import with_organism

_ROOT = Path(__file__).parents[2]
_NO_NUMBERS = {
    "jaxmech",
    *(f"jaxmech.io.{name}" for name in ("interrupt", "lock", "progress", "reprs", "tpu", "version")),
    *(f"jaxmech.study.{name}" for name in ("config", "folder", "keys", "organisms")),
}
"""Modules that cannot change a result: they show, guard and store it. The settings themselves are in the key."""


class Stage(NamedTuple):
    """A stage and what its result depends on.

    name: of the module in `study.stages` and of the folder; settings: keys and sections of the configuration; after:
    the stages whose results it reads, besides those that they read.
    """

    name: str
    settings: tuple[str, ...]
    after: tuple[str, ...] = ()

    def run(self, context: Any) -> Outcome:
        return importlib.import_module(f"jaxmech.study.stages.{self.name}").run(context)

    def declares(self, setting: str) -> bool:
        return setting in self.settings


_MODEL = ("model", "dtype", "seed", "batch")
_BEHAVIOR = (*_MODEL, "behavior", "words", "bank")

STAGES = (
    Stage("behavior", (*_BEHAVIOR, "gate")),
    Stage("text", (*_BEHAVIOR, "text")),
    Stage("dictionaries", (*_MODEL, "dictionaries"), ("text",)),
    Stage("fidelity", (*_BEHAVIOR, "fidelity"), ("dictionaries",)),
    Stage("contrast", (*_BEHAVIOR, "rule", "selection"), ("fidelity",)),
    Stage("dual_process", ("dual_process",), ("contrast",)),
    Stage("patching", ("patching",), ("contrast",)),
    Stage("attribution", ("attribution",), ("contrast",)),
    Stage("proximity", ("proximity",), ("dual_process",)),
    Stage("steering", ("steering", "fidelity"), ("dual_process", "patching")),
    Stage("transfer", ("transfer",), ("steering",)),
)


def with_ancestors(name: str | None) -> Sequence[Stage]:
    """A stage and everything it depends on, in order; all stages without a name.

    Raises:
      ValueError: no stage has that name.
    """
    if name is None:
        return STAGES
    known = {stage.name: stage for stage in STAGES}
    if name not in known:
        raise ValueError(f"until: expected one of {', '.join(known)}, got {name!r}")
    needed, queue = set(), [name]
    while queue:
        needed.add(queue.pop())
        queue += [above for below in needed for above in known[below].after if above not in needed]
    return [stage for stage in STAGES if stage.name in needed]


class Settings:
    """A configuration as one stage may read it: the settings that its key holds, by its own or an earlier stage's.

    Raises:
      ValueError: another one is read.
    """

    def __init__(self, config: StudyConfig, stage: str):
        self._config, self._stage = config, stage

    def __getattr__(self, name: str) -> Any:
        known = name in {field.name for field in dataclasses.fields(self._config)}
        if known and not any(stage.declares(name) for stage in with_ancestors(self._stage)):
            raise ValueError(
                f"stage {self._stage} reads the setting {name!r}, which its key does not hold; declare it in "
                "jaxmech.study.keys.STAGES"
            )
        return getattr(self._config, name)


def stage_keys(config: StudyConfig) -> dict[str, str]:
    """Each stage's hash: of its settings, of the files and revisions that these name, of the version and the source
    that it is made of, and of the hashes of the stages it reads."""
    settings, opened = dataclasses.asdict(config), with_organism(config)
    keys: dict[str, str] = {}
    settings["model"] = (config.model, contents(opened.model))
    settings["behavior"] = (config.behavior, _behavior(config.behavior))
    settings["dictionaries"]["path"] = (config.dictionaries.path, contents(opened.dictionaries.path))
    del settings["dictionaries"]["train"]["checkpoint_every"]
    settings["text"]["file"] = (config.text.file, contents(config.text.file))
    settings["text"]["dataset"] = (config.text.dataset, _data_set(config.text.dataset))
    for stage in STAGES:
        own = {name: value for name, value in settings.items() if stage.declares(name)}
        read = [keys[name] for name in stage.after]
        keys[stage.name] = digest(stage.name, __version__, source(stage.name), own, read)
    return keys


def contents(name: str | None) -> list:
    """Facts that change with what a path or a name stands for: names, sizes and times of the files at a path, the files
    of a packaged model, the commit of a hub repository; empty for what does not exist yet."""
    if not name:
        return []
    root = Path(name).expanduser()
    if root.exists():
        files = [root / inside for inside in sorted(walk(root).files)] if root.is_dir() else [root]
        return [_fact(file, root) for file in files if file.is_file()]
    from jaxmech.models.load import packaged_files, packaged_models

    if name in dict(packaged_models()):
        try:
            files, sha256 = packaged_files(name)
        except ValueError:  # not installed: what opens it explains
            return []
        return [sha256] if sha256 else [_fact(file, file.parent) for file in files]
    commit = hub.revision(repository, "model") if (repository := _repository(name)) else None
    return [commit] if commit else []


def _behavior(name: str) -> list:
    """What a behaviour of your own is made of: a file's facts, or the source of the module, or the package, that
    makes it; what that reads or imports is not tracked."""
    if is_table(name):
        return contents(name) if Path(name).expanduser().exists() else []
    if not is_own(name):
        return []
    module = name.partition(":")[0]
    near = Path(*module.split("."))
    files = [file for file in (near.with_suffix(".py"), *sorted(near.glob("*.py"))) if file.is_file()]
    if not files:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module)
            files = [Path(spec.origin)] if spec and spec.origin else []
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _fact(file: Path, root: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns


def _repository(name: str) -> str | None:
    """The repository of the hub that a model's or a dictionary's name stands for, if it looks like one."""
    from jaxmech.sae.formats import places, suites

    try:
        known = suites.find(name.rstrip("/"))
        return known.repo if known else places.hub_id(name)[0]
    except ValueError:  # what opens it explains
        return None


def _data_set(name: str | None) -> Any:
    """Facts that change with a data set: the commit of one of the hub, the file of one that comes with Python."""
    if name == help_topics.NAME:
        return contents(help_topics.file())
    return hub.revision(name, "dataset") if name else None


def source(stage: str, root: Path = _ROOT) -> str:
    """A hash of the source below `root` that a stage is made of: its module, and whatever that imports."""
    hashes, queue = {}, [f"jaxmech.study.stages.{stage}"]
    while queue:
        name = queue.pop()
        if name not in hashes and name not in _NO_NUMBERS and (parsed := _parsed(root, name)):
            hashes[name], imported = parsed
            queue += imported
    return digest(sorted(hashes.items()))


@cache
def _parsed(root: Path, name: str) -> tuple[str, tuple[str, ...]] | None:
    """A module's hash, with the data beside it that has its name, and the names that it imports; None for no module."""
    if (file := _file(root, name)) is None:
        return None
    tree, imported = ast.parse(file.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxmech":
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [name if _file(root, name) else node.module for name in inside]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if alias.name.split(".")[0] == "jaxmech"]
    hashed = hashlib.sha256(ast.unparse(_Numbers().visit(tree)).encode())
    for data in sorted(file.parent.glob(f"{file.stem}_*")):
        if data.suffix != ".py" and data.is_file():
            hashed.update(data.read_bytes())
    return hashed.hexdigest(), tuple(imported)


def _file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


class _Numbers(ast.NodeTransformer):
    """Removes from a module what changes no number: docstrings and error messages."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.copy_location(ast.Raise(), node)
