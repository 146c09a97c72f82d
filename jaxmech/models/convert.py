"""Checkpoint tensors -> the stacked parameter tree, by a table; everything that does not fit is reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]
_LISTED = 20  # names printed per kind of problem


class Rule(NamedTuple):
    """One line of a table.

    Attributes:
      pattern: regular expression that the whole source name must match; a group `(?P<layer>...)` makes the tensor
        slice `layer` of a stacked parameter.
      path: where it goes, such as "layers/attn/q/kernel".
      transform: source array -> parameter (one layer of it).
    """

    pattern: str
    path: str
    transform: Transform = lambda x: x


class Table(NamedTuple):
    """How a checkpoint is laid out.

    Attributes:
      rules: the first that matches a name decides.
      strays: patterns of tensors that are known to occur and are not parameters.
      twins: pairs (pattern, path) of tensors that repeat a parameter (a stored unembedding of a tied model); they must
        be equal to it.
    """

    rules: tuple[Rule, ...]
    strays: tuple[str, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()


class Source(Protocol):
    """A checkpoint: tensors by name, read one at a time, each into an array of its own."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as "a/b/c" -> leaf."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


class _Place(NamedTuple):
    """Where one source tensor goes. layer is None for a parameter that is not stacked."""

    path: str
    layer: int | None
    transform: Transform


def convert(source: Source, table: Table, shapes: Mapping[str, Any], dtype, finish: Callable = lambda x: x) -> dict:
    """Fills the parameter tree of `shapes` from a checkpoint.

    Args:
      source: the checkpoint.
      table: its layout.
      shapes: tree whose leaves have `.shape`; leaves under "layers" lead with the layer axis.
      dtype: of the parameters.
      finish: applied to each finished array, for example to put it on a device before the next one is built.

    Returns:
      The tree of arrays.

    Raises:
      ValueError: listing every tensor that is unknown, missing, given twice or of a wrong shape.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
    places, twins, problems = _plan(source, table, wanted)
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n" + "\n".join(problems))
    by_path: dict[str, list[tuple[str, _Place]]] = {path: [] for path in wanted}
    for name, place in places.items():
        by_path[place.path].append((name, place))
    filled = {}
    for path, shape in wanted.items():
        array = _fill(source, by_path[path], shape, np.dtype(dtype))
        for name in (twin for twin, repeated in twins.items() if repeated == path):
            if not np.array_equal(array, source.read(name).astype(dtype)):
                raise ValueError(f"the model ties {name!r} to {path!r}, yet the checkpoint stores different values")
        filled[path] = finish(array)
        del array
    return unflatten(filled)


def _fill(source: Source, places: Sequence[tuple[str, _Place]], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """One parameter, its layers stacked."""
    name, place = places[0]
    if place.layer is None:
        whole = place.transform(source.read(name))
        if whole.dtype == dtype and whole.flags.c_contiguous:
            return whole  # a large embedding is not copied
        array = aligned_empty(shape, dtype)
        array[...] = whole
        return array
    array = aligned_empty(shape, dtype)
    for name, place in places:
        array[place.layer] = place.transform(source.read(name))
    return array


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array that starts on a cache line, which lets `jax.device_put` take it over on a CPU without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _plan(source: Source, table: Table, wanted: Mapping[str, tuple[int, ...]]):
    """What goes where, and every problem as a line of text."""
    rules = [(re.compile(rule.pattern), rule) for rule in table.rules]
    strays = [re.compile(pattern) for pattern in table.strays]
    places: dict[str, _Place] = {}
    twins: dict[str, str] = {}
    unknown, twice, misshapen = [], [], []
    taken: dict[tuple[str, int | None], str] = {}
    for name in source.names():
        place = _match(name, rules, wanted)
        if place is not None:
            key = (place.path, place.layer)
            if key in taken:
                twice.append(f"{name} and {taken[key]} are both {_named(*key)}")
            taken[key] = name
            places[name] = place
            misshapen += _shape_problem(name, source.shape(name), place, wanted[place.path])
        elif twin := next((path for pattern, path in table.twins if re.fullmatch(pattern, name)), None):
            twins[name] = twin
        elif not any(stray.fullmatch(name) for stray in strays):
            unknown.append(f"{name} {list(source.shape(name))}")
    missing = [_named(*key) for key in _slots(wanted) if key not in taken]
    kinds = {"unknown": unknown, "missing": missing, "given twice": twice, "of a wrong shape": misshapen}
    return places, twins, [_lines(kind, found) for kind, found in kinds.items() if found]


def _match(name: str, rules, wanted) -> _Place | None:
    for pattern, rule in rules:
        if found := pattern.fullmatch(name):
            layer = found.groupdict().get("layer")
            layer = None if layer is None else int(layer)
            fits = rule.path in wanted and (layer is None or layer < wanted[rule.path][0])
            return _Place(rule.path, layer, rule.transform) if fits else None
    return None


def _shape_problem(name: str, shape: tuple[int, ...], place: _Place, wanted: tuple[int, ...]) -> list[str]:
    """Runs the transform on an array without memory to see what shape comes out."""
    expected = wanted if place.layer is None else wanted[1:]
    try:
        got = place.transform(np.broadcast_to(np.float32(0), shape)).shape
    except ValueError as error:
        return [f"{name} {list(shape)}: {error}"]
    return [] if got == expected else [f"{name} {list(shape)}: gives {list(got)}, {place.path} needs {list(expected)}"]


def _slots(wanted: Mapping[str, tuple[int, ...]]):
    for path, shape in wanted.items():
        yield from ((path, layer) for layer in range(shape[0])) if path.startswith("layers/") else ((path, None),)


def _named(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}[{layer}]"


def _lines(kind: str, found: list[str]) -> str:
    more = [f"... and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
    return "\n    ".join([f"  {len(found)} {kind}:", *found[:_LISTED], *more])
