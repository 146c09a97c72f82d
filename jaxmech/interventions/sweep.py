"""The engine: one compiled program for a whole sweep of interventions, which computes only what they can change.

`S` denotes sweep points, `C` points of a chunk, `B` prompts, `T` their tokens, `M` trie nodes, `G` shared prefixes, `P`
their tokens, `L` layers, `D` the residual width, `N` choices.

An edit changes nothing in layers below the first it acts at, nor at tokens before the first it acts on. So the prefixes
and the tokens before the first edited one are run once and cached as keys and values, the remaining tokens are run
once, unedited, up to the first edited layer, and every point starts there. Points are sorted by their first edited
layer, so that a chunk of them starts as late as its points allow. The points of a chunk are one vmapped batch; chunks
are as large as the device's memory allows and run one after another in the same program.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.tree_util import Partial

from jaxmech.answers.prompts import Prompts, rows_of
from jaxmech.answers.score import Choices, cache_before, lay_out, read_out
from jaxmech.answers.trie import Trie
from jaxmech.io.progress import progress
from jaxmech.models.checks import check_edits, check_groups
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Part, embed, next_positions, run_layers
from jaxmech.models.edits import Edits, from_slot, on_prefix, with_answers
from jaxmech.models.sharding import shard_batch
from jaxmech.sae.module import SAE
from jaxmech.sae.selection import Selection, check_selection

_BUCKET = 8
_CPU_LIMIT = 2**31
"""Bytes. On a CPU larger chunks gain nothing."""


def sweep(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    edits: Edits | Callable[[Any], Edits],
    points: Any = None,
    *,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    advance: Callable[[int], None] | None = None,
) -> Choices:
    """Scores every choice of every prompt under each of S interventions.

    The numbers are those of `score` with each point's edits alone.

    Args:
      prompts: B prompts; a prefix that several of them share is run once, or once per point where edits act on it.
      edits: edits whose every array has S in front; or, with `points`, what makes a point's edits: a callable pytree
        whose leaves are the arrays that all points share, such as `steering.AddVector`, `patching.PatchFeatures`, a
        `flax.struct.dataclass` of your own with a `__call__`, or a `jax.tree_util.Partial` of a module's function.
        A lambda or a local function works too, but is compiled each time it is made.
      points: what the function is mapped over, a pytree that leads with S. Anything may vary among points: coefficient,
        direction, features, layers, positions.
      chunk: points in one call of the program, the last call padded; by default as many as fit. With the same number,
        sweeps of any length share a program.
      mesh: spreads the points of a chunk over its "data" axis. The parameters should be on it.
      advance: called with the number of points just done; without it a progress bar is shown.

    Returns:
      logprobs [S,B,N], a NumPy array.

    Raises:
      ValueError: arrays that do not lead with one S, or edits that `forward` would refuse.
    """
    if advance is None:
        with progress("sweep", _count(edits if points is None else points), unit="points") as advance:
            return sweep(config, params, prompts, edits, points, chunk=chunk, mesh=mesh, advance=advance)
    if points is None:
        build: Any = Partial(_as_given)
        points = edits
    else:
        build = Partial(edits) if jax.tree_util.all_leaves([edits]) else edits  # a plain function is no pytree
    total = _count(points)
    _check_selections(build, points)
    shapes = jax.eval_shape(lambda all_points: build(jax.tree.map(itemgetter(0), all_points)), points)
    check_groups(shapes)
    (B, T), M = prompts.tokens.shape, prompts.trie.tokens.shape[1]
    check_edits(config, jax.eval_shape(lambda edits: with_answers(edits, T, M), shapes), (B, T + M))
    shared, entry = _prepare(config, params, prompts, shapes, build, points)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least one sweep point at a time, got {chunk}")
    if (size := chunk) is None:
        most = points_at_once(config, shared.parts, shapes)
        size = math.ceil(total / math.ceil(total / most))  # as few chunks, and as little padding
    if mesh is not None:
        size = math.ceil(size / mesh.shape["data"]) * mesh.shape["data"]
    order, layer, pieces = np.argsort(entry, kind="stable"), np.zeros((), entry.dtype), []
    for slots, keep in _chunks(total, size):
        rows = order[slots]
        shared, layer = _run_to(config, params, shared, layer, entry[rows[0]]), entry[rows[0]]
        part = rows_of(points, rows)
        part = part if mesh is None else shard_batch(mesh, part)
        pieces.append(np.asarray(run_chunk(config, params, shared, layer, build, part))[:keep])
        if advance is not None:
            advance(keep)
    return Choices(np.concatenate(pieces)[np.argsort(order)])


@struct.dataclass
class Shared:
    """What all points share, computed up to some layer.

    parts: what each point runs itself: the prefix, if edits act on it, and the prompts from slot `cut` on, with their
    answers; trie: the prompts'.
    """

    parts: tuple[Part, ...]
    trie: Trie
    cut: int = struct.field(pytree_node=False)


class Reach(NamedTuple):
    """What a point's edits act on: first layer (L: none), first token of the prompts (T: none), the prefix or not."""

    layer: jax.Array
    token: jax.Array
    prefix: jax.Array


def _as_given(edits: Edits) -> Edits:
    return edits


def _count(points: Any) -> int:
    """S, the same for every array."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(points)]
    leading = {shape[:1] for shape in shapes}
    if len(leading) != 1 or leading <= {(), (0,)}:
        raise ValueError(
            "sweep: every array of the edits (or of the points) leads with the number of sweep points, the same for all"
            f" and at least one; got shapes {shapes}"
        )
    return leading.pop()[0]


def _check_selections(build: Callable[[Any], Edits], points: Any) -> None:
    """Refuses points that select features which none of the dictionaries given to `build` has, or one of them twice."""

    def instances(tree, kind):
        leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
        return [leaf for leaf in leaves if isinstance(leaf, kind)]

    dictionaries = instances(build, SAE)
    if len({(saes.config.layers, saes.config.d_sae) for saes in dictionaries}) == 1:
        for selection in instances(points, Selection):
            check_selection(dictionaries[0].config, selection)


def _chunks(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Indices of the points in each chunk, the last chunk padded with the last point, and how many of them count."""
    for begin in range(0, total, size):
        yield np.minimum(np.arange(begin, begin + size), total - 1), min(size, total - begin)


def _prepare(config, params, prompts: Prompts, shapes: Edits, build, points) -> tuple[Shared, np.ndarray]:
    """What all points share, before layer 0, and the layer before which each point starts, [S]."""
    T = prompts.tokens.shape[1]
    reach = jax.device_get(_reach(config, build, points, T))
    if prompts.prefix is not None and reach.prefix.any():
        cut = None
        if any(edit.rows() > 1 for group in jax.eval_shape(on_prefix, shapes).values() for edit in group):
            prompts = prompts._replace(prefix=prompts.prefix.apart())
    else:
        window = max(T - int(reach.token.min()), 1)
        # Only a few lengths, so that sweeps over other positions find their program compiled.
        cut = T - (1 if window == 1 else min(-(-window // _BUCKET) * _BUCKET, T))
    shared = prepare(config, params, prompts, cut)
    entry = np.minimum(reach.layer, config.n_layers - 1) + 1 if _only_after_layers(shapes) else reach.layer
    return shared, entry.astype(np.int32)


def _only_after_layers(edits: Edits) -> bool:
    """Whether all edits act on the output of a layer: then that layer too is the same for all points."""
    return all(site == "resid_post" and edit.reads in (None, site) for site, group in edits.items() for edit in group)


@partial(jax.jit, static_argnums=(0, 3))
def _reach(config, build, points, T: int) -> Reach:
    """The `Reach` of every point, [S] each."""

    def reach(point):
        layers, tokens, prefix = jnp.zeros(config.n_layers, bool), jnp.zeros(T, bool), jnp.zeros((), bool)
        for group in build(point).values():
            for edit in group:
                acts = edit.acts()
                on = jax.tree.map(lambda span, acts=acts: (span.T & acts).T, edit.spans)
                layers |= on.prompt.any((1, 2)) | on.answer.any(1)
                tokens |= on.prompt.any((0, 1))
                if on.prefix is not None:
                    layers |= on.prefix.any(1)
                    prefix |= on.prefix.any()
        first = lambda acts: jnp.where(acts.any(), acts.argmax(), len(acts))  # noqa: E731
        return Reach(first(layers), first(tokens), prefix)

    return jax.lax.map(reach, points)


@partial(jax.jit, static_argnums=(0, 3))
def prepare(config: ModelConfig, params: Params, prompts: Prompts, cut: int | None) -> Shared:
    """Runs and caches the prefix and the prompts' first `cut` tokens, unless it is None, and embeds the rest."""
    parts: tuple[Part, ...] = ()
    prefix = prompts.prefix
    if cut is not None:
        prompts = cache_before(config, params, prompts, cut)
    elif prefix is not None:
        positions = next_positions(prefix.mask, ())
        parts = (Part(embed(config, params, prefix.tokens, positions, prefix.mask), positions, prefix.mask),)
    tokens, mask, positions, within = lay_out(prompts)
    rows = prefix.rows if parts and prefix is not None else None
    last = Part(embed(config, params, tokens, positions, mask), positions, mask, within, prompts.cache, rows)
    return Shared((*parts, last), prompts.trie, cut or 0)


@partial(jax.jit, static_argnums=0)
def _run_to(config, params, shared: Shared, start, stop) -> Shared:
    """The same, run unedited from before layer `start` to before layer `stop`."""
    xs = run_layers(config, params, shared.parts, [{}] * len(shared.parts), start=start, stop=stop)
    parts = tuple(part._replace(x=x) for part, x in zip(shared.parts, xs, strict=True))
    return dataclasses.replace(shared, parts=parts)


@partial(jax.jit, static_argnums=0)
def run_chunk(
    config: ModelConfig, params: Params, shared: Shared, layer: jax.Array, build: Callable[[Any], Edits], points: Any
) -> jax.Array:
    """log s(a) [C,B,N] at each of C points, starting before layer `layer`, below which no point's edits act."""
    prompts, M = shared.parts[-1], shared.trie.tokens.shape[1]
    window = prompts.x.shape[1] - M

    def run_point(point):
        edits = build(point)
        by_part = [on_prefix(edits), with_answers(from_slot(edits, shared.cut), window, M)][-len(shared.parts) :]
        parts: Sequence[Part] = shared.parts
        if _only_after_layers(edits):
            parts = [p._replace(x=_edited(p.x, e, layer - 1)) for p, e in zip(parts, by_part, strict=True)]
        return run_layers(config, params, parts, by_part, start=layer)[-1][:, window - 1 :]

    return read_out(config, params, jax.vmap(run_point)(points), shared.trie)


def _edited(x: jax.Array, edits: Edits, layer: jax.Array) -> jax.Array:
    """The output x of layer `layer`, with the edits that act there."""
    index = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    group = jax.tree.map(index, edits.get("resid_post", ()))
    return x + sum(edit.delta(x) for edit in group).astype(x.dtype) if group else x


def points_at_once(config: ModelConfig, parts: tuple[Part, ...], shapes: Edits) -> int:
    """How many points fit into half of the memory that is free, by an estimate of what one needs; at least one.

    Args:
      shapes: one point's edits, or their shapes.
    """
    size = parts[-1].x.dtype.itemsize
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    keys = 0
    for part in parts:
        B, T, D = part.x.shape
        keys += T + sum(segment.mask.shape[1] for segment in part.cache)
        stream = B * T * (6 * D + 3 * config.d_mlp + 4 * config.n_heads * config.head_dim) * size
        scores = 3 * B * config.n_heads * T * keys * 4
        own = 4 * B * keys * config.n_kv_heads * config.head_dim * size  # per point where a prefix is edited
        needed += stream + scores + own
    return max(int(_free_bytes() // 2 // max(needed, 1)), 1)


def _free_bytes() -> int:
    """Free memory of the first device; on a CPU the machine's, up to `_CPU_LIMIT`."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # which Windows lacks
        return _CPU_LIMIT
    return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _CPU_LIMIT)


def in_chunks(
    run: Callable[[Any], Any], points: Any, *, size: int, advance: Callable[[int], None] | None = None
) -> Any:
    """Runs a compiled function of points in chunks of `size`, the last one padded: one program serves any number.

    Args:
      run: chunk of points -> a pytree whose leaves lead with the points.
      advance: called with the number of points just done, for a progress bar.

    Returns:
      NumPy arrays over all points.
    """
    pieces = []
    for rows, keep in _chunks(_count(points), size):
        piece = run(jax.tree.map(itemgetter(rows), points))
        pieces.append(jax.tree.map(lambda a, keep=keep: np.asarray(a)[:keep], piece))
        if advance is not None:
            advance(keep)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
