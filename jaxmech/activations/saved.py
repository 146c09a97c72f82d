"""Activations on disk: zarr arrays that any reader opens, written while the model runs, and trained on as a stream.

`n` denotes texts, `T` tokens, `L` the model's layers, `L'` those asked for, `D` the width at a site.

A folder is a zarr v3 group:
  <site>  [L',n,T,D], one for every site, zero at padding; attributes: site, layers, dtype, model
  tokens  [n,T] int32;  mask [n,T] bool, True on real tokens;  layer [L'] int32, the model's layers
The group's attributes say what it was computed from and how many texts are written. One file holds `rows` texts of one
layer; within it each token position is compressed separately, so that reading a layer or a position reads no other.

Zarr has no bfloat16 that every reader knows, so it is stored as its bits, uint16, and the array's attribute `dtype`
says so: `(x.astype("uint32") << 16).view("float32")` are the values. `load_activations` does that by itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxmech.activations.stream import BatchStream, after_first, first_layers, hash_of, order_of, sample_of, token_rows
from jaxmech.io import reprs
from jaxmech.io.arguments import Array, whole_number, whole_numbers
from jaxmech.io.files import disk_errors, read_json, reason, require_space, whole
from jaxmech.io.progress import progress
from jaxmech.models.block import SITES
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward

_STORED = {"float32": "float32", "bfloat16": "uint16", "float16": "float16"}
_FORMAT = "jaxmech activations, 1"
_REMEDY = "make room, or choose another folder, fewer layers or a smaller dtype"


def save_activations(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    *,
    mask: Array | None = None,
    folder: str | Path,
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    dtype: str = "float32",
    batch: int = 8,
    rows: int = 32,
    model: str | None = None,
) -> Activations:
    """Writes the activations of every text; a call that was killed resumes where it stood.

    Only the layers up to the deepest one asked for are run. A file is written while the model computes the next; the
    activations of at most `2 * rows + batch` texts are in memory at any time.

    Args:
      config, params: the model.
      tokens: [n,T] int; mask: [n,T] bool, True on real tokens; None when all are.
      folder: new, empty, or begun by a call with the same arguments.
      sites: of `jaxmech.models.block.SITES`; layers: all by default.
      dtype: "float32"; "bfloat16" (3 digits, the range of float32); or "float16" (4 digits, up to 65,504; what is
        below 6e-5 loses digits, below 3e-8 everything).
      batch: texts in one forward pass; rows: texts in one file, a multiple of `batch`.
      model: its name, kept with the data.

    Returns:
      What `load_activations` gives.

    Raises:
      ValueError: bad arguments; a folder of something else, or of other tokens, model or settings; too little room;
        activations that are not finite, or too large for float16.
    """
    if dtype not in _STORED:
        raise ValueError(f"dtype: expected one of {', '.join(_STORED)}, got {dtype!r}")
    batch, rows = whole_number("batch", batch, 1), whole_number("rows", rows, 1)
    if rows % batch:
        raise ValueError(f"batch, rows: expected rows to be a multiple of batch, got batch {batch} and rows {rows}")
    tokens, mask = token_rows(config, tokens, mask)
    sites, layers = _sites(sites), _layers(config, layers)
    if max(layers) + 1 < config.n_layers:
        config, params = first_layers(config, params, max(layers) + 1)
    read = partial(_read, config, sites, layers, dtype)
    widths = {s: x.shape[-1] for s, (x, _) in jax.eval_shape(read, params, tokens[:1], mask[:1]).items()}
    facts = {
        "format": _FORMAT, "model": model, "sites": list(sites), "layers": list(layers), "dtype": dtype, "rows": rows,
        "texts": len(tokens), "length": tokens.shape[1], "tokens_hash": hash_of(tokens, mask),
        "model_hash": hash_of(config, *map(sample_of, jax.tree.leaves(params))),
    }  # fmt: skip
    writer = _Writer(Path(folder), facts, widths, tokens, mask)
    resumed = f" ({writer.done} texts are done)" if writer.done else ""
    with progress(f"activations{resumed}", len(tokens) - writer.done, unit="texts") as advance:
        for start in range(writer.done, len(tokens), rows):
            stop = min(start + rows, len(tokens))
            block = {
                s: np.empty((len(layers), stop - start, tokens.shape[1], widths[s]), jnp.dtype(dtype)) for s in sites
            }
            for first in range(start, stop, batch):
                texts = np.minimum(np.arange(first, first + batch), stop - 1)  # filled up: one shape is compiled
                keep = min(batch, stop - first)
                for site, (x, largest) in read(params, tokens[texts], mask[texts]).items():
                    _require_range(site, layers, dtype, np.asarray(largest), (first, first + keep - 1))
                    block[site][:, first - start : first - start + keep] = np.asarray(x)[:, :keep]
                advance(keep)
            writer.write(start, block)
        writer.settle()
    return load_activations(folder)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _read(config, sites, layers, dtype, params, tokens, mask) -> dict[str, tuple[jax.Array, jax.Array]]:
    """site -> ([L',B,T,D] in `dtype`, zero at padding; the largest magnitude [L'], NaN where there is one)."""
    everywhere = jnp.broadcast_to(mask, (config.n_layers, *mask.shape))
    taps = {site: Tap(site, partial(_rounded, dtype), everywhere) for site in sites}
    out = forward(config, params, tokens, mask=mask, taps=taps, logits="none").taps
    return out if layers == tuple(range(config.n_layers)) else jax.tree.map(lambda x: x[np.array(layers)], out)


def _rounded(dtype: str, mask: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = jnp.where(mask[..., None], x, 0)
    return x.astype(dtype), jnp.abs(x).max().astype(jnp.float32)


def _require_range(site: str, layers, dtype: str, largest: np.ndarray, texts: tuple[int, int]) -> None:
    """Refuses what `dtype` cannot hold. largest [L']."""
    where = "{} of layer {} in texts {}..{}".format(site, "{}", *texts)
    if (bad := np.flatnonzero(~np.isfinite(largest))).size:
        raise ValueError(f"{where.format(layers[bad[0]])} is not finite; check the model's weights and dtype")
    limit = float(jnp.finfo(dtype).max)
    if (bad := np.flatnonzero(largest > limit)).size:
        raise ValueError(
            f"dtype: {where.format(layers[bad[0]])} reaches {largest[bad[0]]:.4g}, and {dtype} ends at {limit:.4g}; "
            "use 'bfloat16' or 'float32', in a new folder"
        )


class _Writer:
    """A folder that grows file by file; `done` texts are safely on disk, and the group's attributes say so.

    A count is written only once the data it covers are on disk; whatever a killed call left beyond it is rewritten.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], widths: Mapping[str, int], tokens, mask):
        self._folder, self._facts = folder, facts
        self._pending: tuple[int, list[Any]] | None = None
        with disk_errors(folder, _REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
            self.done = _begun(folder, facts)
            size = jnp.dtype(facts["dtype"]).itemsize * len(facts["layers"]) * sum(widths.values())
            require_space(folder, int(mask[self.done :].sum()) * size, _REMEDY)
            self._record(self.done)
            self._arrays = {s: _create_site(folder, facts, s, width) for s, width in widths.items()}
            if not self.done:
                layer = np.asarray(facts["layers"], np.int32)
                _write_table(folder / "tokens", tokens, ("text", "token"))
                _write_table(folder / "mask", mask, ("text", "token"))
                _write_table(folder / "layer", layer, ("layer",))

    def write(self, start: int, block: Mapping[str, np.ndarray]) -> None:
        """Begins to write texts from `start` on, site -> [L',rows,T,D], once the texts before them are on disk."""
        self.settle()
        stop = start + next(iter(block.values())).shape[1]
        # Not copied first: the block is not touched again.
        keep: dict[str, Any] = {"can_reference_source_data_indefinitely": True}
        writes = [self._arrays[s][:, start:stop].write(_bits(x), **keep) for s, x in block.items()]
        self._pending = (stop, writes)

    def settle(self) -> None:
        """Waits for what is being written."""
        if self._pending is None:
            return
        (stop, writes), self._pending = self._pending, None
        with disk_errors(self._folder, _REMEDY):
            for write in writes:
                write.result()
            self._record(stop)

    def _record(self, done: int) -> None:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {**self._facts, "texts_done": done}}
        with whole(self._folder / "zarr.json") as temporary:
            temporary.write_text(json.dumps(group, indent=2))
        self.done = done


def _begun(folder: Path, facts: Mapping[str, Any]) -> int:
    """How many texts an earlier call wrote here."""
    if not (folder / "zarr.json").exists():
        if any(not file.name.startswith(".zarr.json.") for file in folder.iterdir()):
            raise ValueError(f"folder: {folder} holds something other than activations; choose a new or an empty one")
        return 0
    stored = _attributes(folder)
    differing = [name for name in facts if stored.get(name) != facts[name]]
    if differing:
        listed = [
            f"{name} ({stored.get(name)!r} there, {facts[name]!r} now)" if not name.endswith("_hash") else name[:-5]
            for name in differing
        ]
        raise ValueError(f"folder: the activations in {folder} differ in {', '.join(listed)}; choose another folder")
    return stored["texts_done"]


def _attributes(folder: Path) -> dict[str, Any]:
    if not (folder / "zarr.json").is_file():
        raise ValueError(f"folder: {folder} is not a folder of activations; save_activations writes one")
    attributes = read_json(folder / "zarr.json", "write the activations again").get("attributes", {})
    if attributes.get("format") != _FORMAT:
        raise ValueError(f"folder: {folder} is a zarr group, but not one that save_activations wrote")
    return attributes


def _create_site(folder: Path, facts: Mapping[str, Any], site: str, width: int) -> ts.TensorStore:
    shape = [len(facts["layers"]), facts["texts"], facts["length"], width]
    stored = _STORED[facts["dtype"]]
    ends = {"name": "bytes", "configuration": {"endian": "little"}}
    pack = {"cname": "lz4", "clevel": 1, "shuffle": "bitshuffle", "typesize": np.dtype(stored).itemsize, "blocksize": 0}
    inside = {
        "chunk_shape": [1, facts["rows"], 1, width],
        "codecs": [ends, {"name": "blosc", "configuration": pack}],
        "index_codecs": [ends, {"name": "crc32c"}],
    }
    metadata = {
        "shape": shape,
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, facts["rows"], *shape[2:]]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inside}],
        "dimension_names": ["layer", "text", "token", f"{site}_width"],
        "attributes": {"site": site} | {name: facts[name] for name in ("layers", "dtype", "model")},
    }
    return _open(folder / site, metadata=metadata)


def _write_table(path: Path, x: np.ndarray, names: Sequence[str]) -> None:
    chunks = [min(len(x), 65_536), *x.shape[1:]]
    metadata = {
        "shape": list(x.shape),
        "data_type": str(x.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}} if x.dtype.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
        ],
        "dimension_names": list(names),
    }
    _open(path, metadata=metadata)[...].write(x).result()


def _open(path: Path, *, metadata: Mapping[str, Any] | None = None) -> ts.TensorStore:
    """Opens an array, or makes it if `metadata` are given."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    # Zeros are written too, so that a missing file is an error and never an array of zeros.
    spec |= {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    if metadata is None:
        return ts.open(spec, open=True, read=True).result()
    return ts.open({**spec, "metadata": metadata}, open=True, create=True).result()


def load_activations(folder: str | Path) -> Activations:
    """Opens what `save_activations` wrote; nothing but tokens and mask is read.

    Raises:
      ValueError: no such folder, or one that is not finished.
    """
    folder = Path(folder)
    facts = _attributes(folder)
    if facts["texts_done"] < facts["texts"]:
        raise ValueError(
            f"folder: {folder} has {facts['texts_done']} of {facts['texts']} texts; "
            "call save_activations again with the same arguments, and it resumes"
        )
    try:
        tokens, mask = (_open(folder / name).read().result() for name in ("tokens", "mask"))
        arrays = {site: _open(folder / site) for site in facts["sites"]}
    except ValueError as error:
        raise ValueError(f"{folder} is damaged ({reason(error)}); write the activations again") from error
    return Activations(folder, facts, tokens, mask, arrays)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations on disk, read on request.

    folder; facts: the group's attributes; tokens, mask [n,T]; arrays: site -> TensorStore [L',n,T,D], as stored.
    """

    folder: Path
    facts: Mapping[str, Any]
    tokens: np.ndarray
    mask: np.ndarray
    arrays: Mapping[str, ts.TensorStore]

    def __repr__(self) -> str:
        n, T = self.mask.shape
        what = f"{', '.join(self.sites)}, {reprs.layers(self.layers)}, {n:,} texts of {T} tokens, {self.facts['dtype']}"
        return f"Activations({str(self.folder)!r}: {what})"

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.facts["sites"])

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.facts["layers"])

    def read(
        self, layer: int | Sequence[int], *, site: str | None = None, texts: slice = slice(None), at: Any = slice(None)
    ) -> np.ndarray:
        """The activations of a layer [.., .., D], or of several [L',.., .., D], as a NumPy array.

        Args:
          layer: of the model. site: the only one, when there is one.
          texts, at: which texts and which token positions, as NumPy would index them; `at=-1` is the last slot.

        Raises:
          ValueError: a layer or a site that is not stored, or files that are missing or damaged.
          IndexError: texts or positions beyond the last.
        """
        site, single = self.site(site), np.ndim(layer) == 0
        wanted = (whole_number("layer", layer),) if single else whole_numbers("layer", layer)
        if unknown := sorted(set(wanted) - set(self.layers)):
            raise ValueError(f"layer: {self.folder} has layers {self.layers}, got {unknown}")
        rows = self.layers.index(wanted[0]) if single else [self.layers.index(number) for number in wanted]
        n, T = self.mask.shape
        part = self.arrays[site].oindex[rows, _along(n, texts), _along(T, at)]
        try:
            x = part.read().result()
        except ValueError as error:
            raise ValueError(
                f"{self.folder / site} is damaged ({reason(error)}); write the activations again"
            ) from error
        return x.view(jnp.bfloat16) if self.facts["dtype"] == "bfloat16" else x

    def site(self, name: str | None) -> str:
        """`name`, or the only site there is.

        Raises:
          ValueError: none is named and there are several, or that one is not stored.
        """
        if name is None and len(self.sites) > 1 or name is not None and name not in self.sites:
            raise ValueError(f"site: {self.folder} has {', '.join(self.sites)}, got {name!r}")
        return name or self.sites[0]

    def stream(self, **options: Any) -> CacheStream:
        """The activations as shuffled batches to train on: see `CacheStream`."""
        return CacheStream(self, **options)


def _along(n: int, which) -> int | slice | np.ndarray:
    """NumPy's index of an axis as TensorStore takes it, which counts no index from the end."""
    indices = np.arange(n)[which]
    if indices.ndim == 0:
        return int(indices)
    run = indices.ndim == 1 and len(indices) > 0 and (np.diff(indices) == 1).all()
    return slice(int(indices[0]), int(indices[-1]) + 1) if run else indices


class CacheStream(BatchStream):
    """Shuffled batches of activations on disk.

    Files are visited in a random order; those of one buffer are read together, and its rows are shuffled.

    Args:
      source: from `load_activations`.
      layers: all by default; site: the only one there is.
      batch_size, buffer_tokens, epochs, skip_first, key: as for `ActivationStream`.
    """

    def __init__(
        self,
        source: Activations,
        *,
        layers: Sequence[int] | None = None,
        site: str | None = None,
        batch_size: int | None = None,
        buffer_tokens: int = 65_536,
        epochs: int = 1,
        skip_first: int = 1,
        key: jax.Array | None = None,
    ):
        self._source, self.site, self.model = source, source.site(site), source.facts["model"]
        self.layers = source.layers if layers is None else whole_numbers("layers", layers)
        if not self.layers or len(set(self.layers)) < len(self.layers) or set(self.layers) - set(source.layers):
            raise ValueError(f"layers: expected distinct ones of {source.layers}, at least one, got {self.layers}")
        self.epochs, self.skip_first, self.order = epochs, whole_number("skip_first", skip_first, 0), order_of(key)
        self.d_in = source.arrays[self.site].shape[-1]
        self._kept = after_first(source.mask, self.skip_first)
        total, rows = int(self._kept.sum()), source.facts["rows"]
        self.batch_size = min(512, max(total, 1)) if batch_size is None else whole_number("batch_size", batch_size, 1)
        self.buffer_tokens = max(whole_number("buffer_tokens", buffer_tokens), self.batch_size)
        sizes = np.add.reduceat(self._kept.sum(1), np.arange(0, len(self._kept), rows))
        order = np.random.default_rng((*self.order, 0)).permutation(len(sizes))
        count = int(np.clip(total // self.buffer_tokens, 1, len(sizes)))
        while count > 1 and min(sizes[files].sum() for files in np.array_split(order, count)) < self.batch_size:
            count -= 1
        self._files = np.array_split(order, count)
        self.buffer_sizes = tuple(int(sizes[files].sum()) for files in self._files)
        self._check()

    @property
    def tokens_seen(self) -> int:
        """Distinct activations of one pass, that is real tokens less those skipped."""
        return sum(self.buffer_sizes)

    def buffer(self, b: int) -> jax.Array:
        rows, parts = self._source.facts["rows"], []
        for file in self._files[b]:
            texts = slice(int(file) * rows, (int(file) + 1) * rows)
            parts.append(self._source.read(self.layers, site=self.site, texts=texts)[:, self._kept[texts]])
        return jnp.asarray(np.concatenate(parts, axis=1))

    def contents(self) -> dict[str, Any]:
        names = ("dtype", "rows", "tokens_hash", "model_hash")
        facts = {name: self._source.facts[name] for name in names}
        return {"buffer_tokens": min(self.buffer_tokens, self.tokens_seen)} | facts


def _sites(sites: Sequence[str]) -> tuple[str, ...]:
    if isinstance(sites, str):
        raise ValueError(f"sites: expected names in a tuple, such as ({sites!r},), got a string")
    if not sites or len(set(sites)) < len(sites) or set(sites) - set(SITES):
        raise ValueError(f"sites: expected some of {', '.join(SITES)}, each once, got {tuple(sites)}")
    return tuple(sites)


def _layers(config: ModelConfig, layers: Sequence[int] | None) -> tuple[int, ...]:
    layers = tuple(range(config.n_layers)) if layers is None else whole_numbers("layers", layers)
    if not layers or len(set(layers)) < len(layers) or set(layers) - set(range(config.n_layers)):
        raise ValueError(f"layers: expected distinct ones of 0..{config.n_layers - 1}, at least one, got {layers}")
    return layers


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
