"""What objects look like at the end of a notebook's cell: the types and shapes of their arrays, not the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

_LONGEST = 60  # characters of what is printed as it is
_MOST = 6  # entries of a mapping or a sequence that are printed one by one


def short_repr(self: Any) -> str:
    """`Name(field=…, …)` of a named tuple or a dataclass; give it to the class as its `__repr__`."""
    names = getattr(self, "_fields", None) or [field.name for field in dataclasses.fields(self)]
    return f"{type(self).__name__}({', '.join(f'{name}={described(getattr(self, name))}' for name in names)})"


def described(value: Any) -> str:
    """A value on one line: arrays and tables by their shape, long sequences by their number of entries."""
    if hasattr(value, "columns") and hasattr(value, "shape"):
        return f"table of {value.shape[0]:,} rows and {value.shape[1]} columns"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if hasattr(value, "_fields"):
        return short_repr(value)
    if type(value).__module__.startswith("jaxmech"):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + _entries(f"{key}: {described(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{_entries(map(described, value))}]"
    if isinstance(value, tuple):
        return f"({_entries(map(described, value))})"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _entries(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts) if len(texts) <= _MOST else f"{len(texts):,} entries"


def layers(numbers: tuple[int, ...]) -> str:
    """layer 12; layers 0 to 25; layers 8, 10, 12."""
    if len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:_MOST])) + (", …" if len(numbers) > _MOST else "")
    return f"{'layer' if len(numbers) == 1 else 'layers'} {shown}"


def memory(arrays: Iterable[Any]) -> str:
    """The memory that arrays take, with their types: float32, 1.02 GiB."""
    arrays = [array for array in arrays if hasattr(array, "dtype")]  # a tree may hold placeholders for arrays
    types = ", ".join(sorted({str(array.dtype) for array in arrays}))
    amount, unit = float(sum(array.size * array.dtype.itemsize for array in arrays)), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount >= 1000:
            amount, unit = amount / 1024, larger
    return f"{types}, {amount:.3g} {unit}"


def concrete(value: Any) -> bool:
    """Whether it is an array with numbers that this process can read."""
    if isinstance(value, jax.core.Tracer):
        return False
    return isinstance(value, np.ndarray) or (isinstance(value, jax.Array) and value.is_fully_addressable)


def extent(values: Any) -> str:
    """The least and the largest of some numbers: 0.981 to 0.993."""
    values = np.asarray(values, np.float64)
    if not values.size:
        return "of none"
    return " to ".join(dict.fromkeys(f"{bound:.3g}" for bound in (values.min(), values.max())))
