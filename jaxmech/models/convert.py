"""Checkpoint tensors -> the stacked parameter tree, by a table; everything that does not fit is reported at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxmech.io.progress import progress

Transform = Callable[[np.ndarray], np.ndarray]
_LISTED = 20  # names printed per kind of problem
FLOATS = ("F64", "F32", "F16", "BF16")


def _same(x: np.ndarray) -> np.ndarray:
    return x


class Misfit(ValueError):
    """A checkpoint that does not fit the model that its configuration describes."""


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
    transform: Transform = _same


class Table(NamedTuple):
    """How a checkpoint is laid out.

    Attributes:
      rules: every rule that matches a name takes its part of the tensor (q, k and v may be stored as one).
      strays: patterns of tensors that are known to occur and are not parameters.
      twins: pairs (pattern, path) of tensors that repeat a parameter (a stored unembedding of a tied model); they must
        be equal to it, and stand for it where it is not stored.
      names: path -> how a message describes the parameter when it is missing.
    """

    rules: tuple[Rule, ...]
    strays: tuple[str, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()
    names: Mapping[str, str] = {}


class Source(Protocol):
    """A checkpoint: tensors by name, read one at a time, each into an array of its own."""

    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def kind(self, name: str) -> str: ...  # of its numbers, as the format calls it
    def read(self, name: str) -> np.ndarray: ...


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as "a/b/c" -> leaf."""
    flat: dict[str, Any] = {}
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
    """Where one source tensor, or a part of it, goes. layer is None for a parameter that is not stacked."""

    name: str
    path: str
    layer: int | None
    transform: Transform


def convert(source: Source, table: Table, target: Mapping[str, Any]) -> dict:
    """Fills the parameter tree from a checkpoint, tensor by tensor: host memory holds one of them, and its cast copy.

    Args:
      source: the checkpoint.
      table: its layout.
      target: tree of `jax.ShapeDtypeStruct`s with shardings; leaves under "layers" lead with the layer axis.

    Returns:
      The tree of arrays, each on the devices of its sharding.

    Raises:
      ValueError: listing every tensor that is unknown, missing, given twice or of a wrong shape.
    """
    wanted = flatten(target)
    places, twins, problems = _plan(source, table, {path: tuple(leaf.shape) for path, leaf in wanted.items()})
    if problems:
        raise Misfit("the checkpoint does not fit the model:\n" + "\n".join(problems))
    by_path: dict[str, list[_Place]] = {path: [] for path in wanted}
    for place in places:
        by_path[place.path].append(place)
    for name, path in twins.items():
        (place,) = by_path[path]
        if _digest(source.read(name)) != _digest(place.transform(source.read(place.name))):
            raise ValueError(
                f"the model ties {name!r} to {path!r} (tie_word_embeddings is true), yet the checkpoint stores other "
                "values; if the unembedding was trained separately, set tie_word_embeddings to false in config.json, "
                f"else remove {name!r} from the checkpoint"
            )
    with progress("converting", len(places), unit="tensors") as advance:
        return unflatten({path: _fill(source, by_path[path], leaf, advance) for path, leaf in wanted.items()})


def _digest(array: np.ndarray) -> str:
    """Digest of the values, whatever their stored type: two large tensors are compared without holding both."""
    digest = hashlib.sha256(str(array.shape).encode())
    for first in range(0, len(array), 1024):
        digest.update((np.ascontiguousarray(array[first : first + 1024], np.float32) + 0.0).data)  # -0.0 is 0.0
    return digest.hexdigest()


def _fill(source: Source, places: Sequence[_Place], leaf, advance: Callable[[], None]) -> jax.Array:
    """One parameter, its layers stacked where it lives; `advance` is called for each tensor."""
    first = places[0]
    if first.layer is None:
        advance()
        return jax.device_put(_read(source, first, leaf.dtype), leaf.sharding)
    sharding = _one_layer(leaf.sharding)
    put = _put_layer(leaf.sharding)
    stacked = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    for place in places:
        # Waited for, lest copies still on their way to the device pile up on the host.
        stacked = jax.block_until_ready(
            put(stacked, jax.device_put(_read(source, place, leaf.dtype), sharding), place.layer)
        )
        advance()
    return stacked


def _read(source: Source, place: _Place, dtype) -> np.ndarray:
    part = place.transform(source.read(place.name))
    if part.dtype == dtype and part.flags.c_contiguous:
        return part  # a large embedding is not copied
    array = aligned_empty(part.shape, dtype)
    array[...] = part
    return array


@lru_cache(maxsize=64)
def _put_layer(sharding: Sharding):
    # The donated array is written in place, so that stacking needs no second copy on the device.
    return jax.jit(
        lambda stacked, part, layer: jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _one_layer(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
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
    places: list[_Place] = []
    twins: dict[str, str] = {}
    unknown, twice, misshapen, coarse = [], [], [], []
    taken: dict[tuple[str, int | None], str] = {}
    for name in source.names():
        matched = _match(name, rules)
        if matched and all(_fits(place, wanted) for place in matched):
            for place in matched:
                key = (place.path, place.layer)
                if key in taken:
                    twice.append(f"{name} and {taken[key]} are both {_named(*key)}")
                taken[key] = name
                misshapen += _shape_problem(source.shape(name), place, wanted[place.path])
            places += matched
            coarse += _not_floats(source, name)
        elif twin := next((path for pattern, path in table.twins if re.fullmatch(pattern, name)), None):
            twins[name] = twin
            coarse += _not_floats(source, name)
        elif not any(stray.fullmatch(name) for stray in strays):
            unknown.append(f"{name} {list(source.shape(name))}")
    for name, path in list(twins.items()):
        if (path, None) not in taken:
            taken[path, None] = name
            places.append(_Place(name, path, None, _same))
            misshapen += _shape_problem(source.shape(name), places[-1], wanted[path])
            del twins[name]
    missing = [table.names.get(key[0], _named(*key)) for key in _slots(wanted) if key not in taken]
    kinds = {"unknown": unknown, "missing": missing, "given twice": twice, "of a wrong shape": misshapen}
    kinds["not floating point (quantised checkpoints are not read)"] = coarse
    return places, twins, [_lines(kind, names) for kind, names in kinds.items() if names]


def _not_floats(source: Source, name: str) -> list[str]:
    return [] if (kind := source.kind(name)) in FLOATS else [f"{name} is {kind}"]


def _match(name: str, rules) -> list[_Place]:
    places = []
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            layer = match.groupdict().get("layer")
            places.append(_Place(name, rule.path, None if layer is None else int(layer), rule.transform))
    return places


def _fits(place: _Place, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    return place.path in wanted and (place.layer is None or place.layer < wanted[place.path][0])


def _shape_problem(shape: tuple[int, ...], place: _Place, wanted: tuple[int, ...]) -> list[str]:
    """Runs the transform on an array without memory to see what shape comes out."""
    name, expected = place.name, wanted if place.layer is None else wanted[1:]
    try:
        got = place.transform(np.broadcast_to(np.float32(0), shape)).shape
    except (ValueError, IndexError) as error:
        return [f"{name} {list(shape)}: {error}"]
    return [] if got == expected else [f"{name} {list(shape)}: gives {list(got)}, {place.path} needs {list(expected)}"]


def _slots(wanted: Mapping[str, tuple[int, ...]]):
    for path, shape in wanted.items():
        yield from ((path, layer) for layer in range(shape[0])) if path.startswith("layers/") else ((path, None),)


def _named(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}[{layer}]"


def _lines(kind: str, names: list[str]) -> str:
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return "\n    ".join([f"  {len(names)} {kind}:", *names[:_LISTED], *more])
