"""Configuration files: one flat YAML file, checked against one dataclass; unknown keys are errors."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Settings = TypeVar("Settings")

_CONFIGS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where the configurations that come with jaxmech are: beside this file when installed, in a clone a floor up."""


def load_settings(
    kind: type[Settings],
    path: str | Path,
    overrides: Sequence[str] = (),
    others: Mapping[str, type] | None = None,
) -> Settings:
    """Reads a YAML file into the dataclass `kind` and applies `key=value` overrides.

    Args:
      path: of a file, or the short name of a configuration that comes with jaxmech, such as "quickstart".
      others: command -> the kind of configuration that it takes, to say whose a file is that is of another kind.

    Raises:
      ValueError: the file is missing or no YAML, a key is unknown (the nearest one is named) or missing, or a value is
        of the wrong type.
    """
    asked, path = path, find_config(path)
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"overrides are written key=value, got {', '.join(map(repr, bad))}")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except YAMLError as error:
        raise ValueError(f"overrides {' '.join(overrides)}: not YAML: {error}") from error
    try:
        found = OmegaConf.load(path)
        if not OmegaConf.is_dict(found):
            raise ValueError(f"{path}: expected lines of key: value")
        _refuse_other_kind(kind, found, asked, others or {})
        given = OmegaConf.merge(found, changes)
        _refuse_unknown(kind, given, path)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:  # OmegaConf's word for a lone number is an OSError
        raise ValueError(f"{path}: not YAML: {error}") from error


def find_config(path: str | Path) -> Path:
    """A configuration's file, by its path or its short name.

    Raises:
      ValueError: there is none; names those that come with jaxmech.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    shipped = {file.stem: file for folder in _CONFIGS for file in sorted(folder.glob("*.yaml"))}
    if str(path) in shipped:
        return shipped[str(path)]
    raise ValueError(
        f"{path}: no such configuration; expected a YAML file, or the name of one that comes with jaxmech: "
        f"{', '.join(shipped)}"
    )


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Gives the names of arguments that a ValueError is about as the configuration's keys: {argument: key}."""
    try:
        yield
    except ValueError as error:
        known = "|".join(map(re.escape, names))
        # Names stand where a fault begins, one or several, and where a bound is given, as in "d_sae=24".
        begins = rf"(?:^|(?<=; )|(?<=\n))(?:\w+, )*(?:{known})(?:, \w+)*(?=:)|\b(?:{known})(?==)"
        said = re.sub(
            begins, lambda found: re.sub(rf"\b(?:{known})\b", lambda name: names[name[0]], found[0]), str(error)
        )
        raise ValueError(said) from error


def _refuse_other_kind(kind: type, found, asked: str | Path, others: Mapping[str, type]) -> None:
    def strangers(one: type) -> int:
        return len(set(found) - {field.name for field in dataclasses.fields(one)})

    for command, other in others.items():
        if strangers(other) < strangers(kind):
            raise ValueError(
                f"{asked}: this configuration is {command.removeprefix('jaxmech ')}'s; start it with: {command} {asked}"
            )


def _refuse_unknown(kind: type, given, path: Path) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    unknown = [key for key in given if key not in known]
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, n=1)
        hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    faults = [f"unknown configuration key {', '.join(hints)}; the keys are: {', '.join(known)}"] if hints else []
    if missing := [name for name in required if name not in given]:
        faults.insert(0, f"missing configuration key {', '.join(missing)}")
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
