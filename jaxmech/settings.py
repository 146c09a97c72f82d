"""Configuration files: one flat YAML file, checked against one dataclass; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Settings = TypeVar("Settings")


def load_settings(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file into the dataclass `kind` and applies `key=value` overrides.

    Raises:
      ValueError: the file is missing or no YAML, a key is unknown (the nearest one is named) or missing, or a value is
        of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration; the ones that come with jaxmech are in configs/")
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
        given = OmegaConf.merge(found, changes)
        _refuse_unknown(kind, given, path)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:  # OmegaConf's word for a lone number is an OSError
        raise ValueError(f"{path}: not YAML: {error}") from error


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
