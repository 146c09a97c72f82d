"""Callers' arguments as plain Python data, or refused by name.

NumPy's, pandas' and JAX's numbers become Python's here, so that all that is derived from them (the configuration that a
program is compiled for, a fingerprint, the JSON of a checkpoint) is the same whichever was given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
"""Where either is accepted."""


def plain(value: Any) -> Any:
    """The Python number of a scalar of NumPy, JAX or torch, a tuple of these for several; anything else as it is."""
    if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1:
        return tuple(plain(entry) for entry in value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number.

    Raises:
      ValueError: it is not one (a float, a string, a bool), or is below `least`.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")
    return value


def number(name: str, value: Any) -> int | float:
    """A number; a whole one stays whole.

    Raises:
      ValueError: it is not one (a string, a bool, an array).
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return value


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Whole numbers of a list, an array, a column or any other iterable.

    Raises:
      ValueError: it is not one (one string, one number), or an entry is not a whole number.
    """
    if not _holds_several(values):
        raise ValueError(f"{name}: expected whole numbers in a list, such as [1, 3], got {plain(values)!r}")
    values = [plain(value) for value in values]
    if any(isinstance(value, bool) for value in values):
        raise ValueError(f"{name}: expected whole numbers, got bools; np.flatnonzero(mask) gives those of a mask")
    return tuple(whole_number(name, value) for value in values)


def numbers_or_none(name: str, values: Any) -> tuple[int | float | None, ...]:
    """Numbers of a list, in which None stands for a missing one.

    Raises:
      ValueError: it is not a list (one string, one number), or an entry is not a number.
    """
    if not _holds_several(values):
        raise ValueError(f"{name}: expected numbers in a list, got {plain(values)!r}")
    return tuple(None if value is None else number(name, value) for value in values)


def strings(name: str, values: Any) -> Iterator[str]:
    """The strings of a list, a column, a generator, one by one.

    Raises:
      ValueError: it is one string, which would be read letter by letter, or an entry is not a string.
    """
    if not _holds_several(values):
        shown = f"[{values[:20]!r}{', cut' if len(values) > 20 else ''}]" if isinstance(values, str) else "['...']"
        raise ValueError(f"{name}: expected strings in a list, got one {type(values).__name__}; write {shown}")
    return _strings(name, values)


def _strings(name: str, values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected strings, got {value!r} among them")
        yield value


def plain_numbers(config: Any) -> list[str]:
    """Makes the numbers of a frozen dataclass plain, as its annotations say; returns messages for those that cannot."""
    kinds = {"int": whole_number, "float": number, "list[int]": whole_numbers, "tuple[int, ...]": whole_numbers}
    faults = []
    for field in dataclasses.fields(config):
        kind, _, alternative = str(field.type).partition(" | ")
        value = getattr(config, field.name)
        if kind not in kinds or alternative not in ("", "None") or value is None and alternative:
            continue
        try:
            object.__setattr__(config, field.name, kinds[kind](field.name, value))
        except ValueError as error:
            faults.append(str(error))
    return faults


def _holds_several(values: Any) -> bool:
    """Whether it is an iterable other than one string, which would be read letter by letter."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes) and getattr(values, "ndim", 1) != 0


def as_indices(name: str, which: Any, end: int) -> np.ndarray:
    """The indices that `which` chooses of 0..end-1: bools are a mask of that length, integers are indices.

    Raises:
      ValueError: neither, or an index out of range; names `name`.
    """
    listed = which if isinstance(which, np.ndarray | jax.Array) else list(_require_several(name, which, end))
    if isinstance(listed, list) and 0 < sum(isinstance(i, bool | np.bool_) for i in listed) < len(listed):
        raise ValueError(f"{name}: expected indices or a mask, got bools and numbers mixed: {which!r:.80}")
    listed = np.asarray(listed)
    if listed.dtype == bool and listed.shape == (end,):
        return np.flatnonzero(listed)
    if listed.size == 0 and listed.ndim == 1 and listed.dtype != bool:
        return np.zeros(0, int)
    if listed.ndim != 1 or not np.issubdtype(listed.dtype, np.integer):
        raise ValueError(f"{name}: expected indices as integers, or a mask of {end} bools, got {which!r:.80}")
    if len(wrong := listed[(listed < 0) | (listed >= end)]):
        raise ValueError(f"{name}: expected 0..{end - 1}, got {wrong.tolist()}")
    return listed


def _require_several(name: str, which: Any, end: int) -> Iterable:
    if not _holds_several(which):
        raise ValueError(f"{name}: expected a list of indices from 0 to {end - 1}, or a mask, got {which!r:.80}")
    return which


def is_key(key: Any) -> bool:
    """Whether it is one JAX key: of a key type, or the raw uint32 words of one."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    return key.ndim == 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.dtype == np.uint32 and key.ndim == 1


def key_words(name: str, key: Any) -> tuple[int, ...]:
    """The numbers that a JAX key consists of.

    Raises:
      ValueError: it is no key.
    """
    if not is_key(key):
        raise ValueError(f"{name}: expected one JAX key, such as jax.random.key(0), got {key!r:.80}")
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def rng_of(key: jax.Array) -> np.random.Generator:
    """NumPy's generator for a JAX key: the same key draws the same."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
