"""Configuration files: YAML in sections, checked against a dataclass; unknown keys are errors.

A section is a field that is a dataclass itself, with a default, which the values of a file override. In Python a
section may be given as a dictionary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np
from yaml import YAMLError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

_CONFIGS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where the configurations that come with jaxmech are: in the package when installed, one level up in a clone."""


class Checked:
    """A frozen dataclass of settings, whose values are made plain data of their fields' types, or refused by name.

    MOVED: keys of earlier versions -> where they are now, for the message that refuses them.
    """

    MOVED: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        fields = dataclasses.fields(cast("DataclassInstance", self))
        for name, value in _typed(type(self), {field.name: getattr(self, field.name) for field in fields}):
            object.__setattr__(self, name, value)


def load_settings(
    kind: type[Settings],
    path: str | Path,
    overrides: Sequence[str] = (),
    others: Mapping[str, type] | None = None,
) -> Settings:
    """Reads a YAML file into the dataclass `kind` and applies overrides, `key=value` or `section.key=value`.

    Args:
      path: of a file, or the short name of a configuration that comes with jaxmech, such as "quickstart".
      others: command -> the kind of configuration that it takes, to name the command of a file of another kind.

    Raises:
      ValueError: the file is missing or not YAML, a key is unknown (the nearest one is named) or missing, or a value is
        of the wrong type.
    """
    from omegaconf import OmegaConf  # of the extra `study`; settings given in Python do without
    from omegaconf.errors import OmegaConfBaseException

    asked, path = path, find_config(path)
    if bad := [item for item in overrides if "=" not in item]:
        raise ValueError(f"overrides are written key=value, got {', '.join(map(repr, bad))}")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
    except YAMLError as error:
        raise ValueError(f"overrides {' '.join(overrides)}: not YAML: {error}") from error
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ValueError(f"{path}: expected lines of key: value")
        _refuse_other_kind(kind, loaded, asked, others or {})
        given: Any = OmegaConf.to_container(OmegaConf.merge(loaded, changes), resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{str(error).splitlines()[0]}") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:  # for a lone number, OmegaConf raises an OSError
        raise ValueError(f"{path}: not YAML: {error}") from error
    try:
        return build(kind, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build(kind: type[Settings], given: Mapping[str, Any], base: Settings | None = None, section: str = "") -> Settings:
    """Settings of a kind from plain data, overriding those of `base` if given.

    Raises:
      ValueError: an unknown or a missing key, or a value that is refused; names keys with their section.
    """
    _refuse_unknown(kind, given, base, section)
    with _within(section):
        typed = dict(_typed(kind, given, base, section))
        return kind(**typed) if base is None else dataclasses.replace(base, **typed)


def _typed(kind: type, given: Mapping[str, Any], base: Any = None, section: str = "") -> Iterator[tuple[str, Any]]:
    """Each value given as its field's type says."""
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for name, value in given.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            under = getattr(base, name, None) if base is not None else _default(fields[name])
            yield name, build(hints[name], value, under, f"{section}.{name}" if section else name)
        else:
            yield name, _value(name, value, hints[name])


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


_PLAIN: dict[type, tuple[Any, str]] = {
    str: (str | os.PathLike, "a string"),
    bool: (bool | np.bool_, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}


def _value(name: str, value: Any, hint: Any) -> Any:
    """A value as plain data of a type.

    Raises:
      ValueError: it is of another type, or not finite.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inside:
            return None
        kinds = [kind for kind in inside if kind is not type(None)]
        several = [kind for kind in kinds if typing.get_origin(kind) in (tuple, list)]
        return _value(name, value, several[0] if several and _is_list(value) else kinds[0])
    if origin in (tuple, list):
        if not _is_list(value):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        entry = [inside[0]] * len(value) if origin is list or inside[-1] is Ellipsis else inside
        if len(entry) != len(value):
            raise ValueError(f"{name}: expected {len(entry)} entries in {list(value)!r}")
        return origin(_value(name, element, kind) for element, kind in zip(value, entry, strict=True))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        keys = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(hint))
        raise ValueError(f"{name}: expected a section of settings ({keys}), got {value!r}")
    if hint is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected keys with values, got {value!r}")
        return dict(value)
    accepted, said = _PLAIN[hint]
    if isinstance(value, bool | np.bool_) != (hint is bool) or not isinstance(value, accepted):
        raise ValueError(f"{name}: expected {said}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if hint is str else float(value) if hint is float else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


@contextlib.contextmanager
def _within(section: str) -> Iterator[None]:
    """Puts a section's name in front of the key that a ValueError begins with."""
    try:
        yield
    except _Named:
        raise
    except ValueError as error:
        raise _Named(f"{section}.{error}" if section else str(error)) from error


class _Named(ValueError):
    """Begins with a key and all its sections already."""


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
            begins, lambda match: re.sub(rf"\b(?:{known})\b", lambda name: names[name[0]], match[0]), str(error)
        )
        raise ValueError(said) from error


def _refuse_other_kind(kind: type, keys: Any, asked: str | Path, others: Mapping[str, type]) -> None:
    def unknown(kind: type) -> int:
        return len(set(keys) - {field.name for field in dataclasses.fields(kind)} - set(getattr(kind, "MOVED", ())))

    for command, other_kind in others.items():
        if unknown(other_kind) < unknown(kind):
            raise ValueError(
                f"{asked}: this configuration is for {command.removeprefix('jaxmech ')}; start it with: "
                f"{command} {asked}"
            )


def _refuse_unknown(kind: type, given: Mapping[str, Any], base: Any, section: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    dot, moved, hints, faults = f"{section}." if section else "", getattr(kind, "MOVED", {}), [], []
    for key in given:
        if key in known and not (key in moved and not isinstance(given[key], Mapping)):
            continue
        if key in moved:
            faults.append(f"configuration key {key!r} is now {moved[key]!r}")
            continue
        near = difflib.get_close_matches(str(key), known, n=1)
        hints.append(f"{dot + str(key)!r}" + (f" (did you mean {dot + near[0]!r}?)" if near else ""))
    if hints:
        keys = f"the keys of {section} are" if section else "the keys are"
        faults.append(f"unknown configuration key {', '.join(hints)}; {keys}: {', '.join(known)}")
    if base is None and (missing := [name for name in required if name not in given]):
        faults.insert(0, f"missing configuration key {', '.join(dot + name for name in missing)}")
    if faults:
        raise _Named("; ".join(faults))
