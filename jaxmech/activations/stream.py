"""Activations as a stream of shuffled batches, each a pure function of the key and its number.

`B` denotes a batch of activations, `N` texts, `T` tokens, `D` the width at the site, `L'` the layers asked for.

Because batch i depends on nothing but (key, i), a training that is killed resumes exactly where it stood: the data
position is the step number. Activations are computed a buffer at a time, and each buffer is visited `epochs` times in
a fresh order before the next one replaces it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmech.io import reprs
from jaxmech.io.arguments import Array, key_words, whole_number, whole_numbers
from jaxmech.io.files import disk_errors, whole
from jaxmech.models.block import SITES
from jaxmech.models.checks import check_tokens
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward

_WIDTHS = 64
"""Texts run padded to a multiple of it."""


class BatchStream:
    """Batches [L',B,D] from buffers [L',n,D] that a subclass provides; endless, buffer after buffer.

    A subclass sets `layers`, `site`, `model`, `skip_first` (tokens at the start of a text that it leaves out), `d_in`,
    `batch_size`, `epochs`, `order` (the numbers of a key) and `buffer_sizes` (rows of each buffer), and defines
    `buffer(b)` and `contents()`.
    """

    layers: tuple[int, ...]
    site: str
    model: str | None
    skip_first: int
    d_in: int
    batch_size: int
    epochs: int
    order: tuple[int, ...]
    buffer_sizes: tuple[int, ...]
    _visit: tuple[Any, Any] = (None, None)

    def __repr__(self) -> str:
        count = f"{sum(self.buffer_sizes):,} activations of width {self.d_in}, batches of {self.batch_size:,}"
        return f"{type(self).__name__}({self.site}, {reprs.layers(self.layers)}: {count})"

    def buffer(self, b: int) -> jax.Array:
        """The activations [L',n,D] of buffer b."""
        raise NotImplementedError

    def contents(self) -> dict[str, Any]:
        """What else the buffers depend on, as JSON; hashes of what cannot be shown have names that end in "_hash"."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """All that the batches depend on, as JSON."""
        names = ("site", "batch_size", "epochs", "skip_first")
        common = {"stream": type(self).__name__, "layers": list(self.layers), "order": list(self.order)}
        common |= {name: getattr(self, name) for name in names}
        return common | self.contents()

    def fingerprint(self) -> str:
        """A hash of `settings()`."""
        return hash_of(sorted(self.settings().items()))

    def reordered(self, key: jax.Array) -> BatchStream:
        """The same buffers, rows in the order of another key: what this stream holds is not computed again."""
        other = copy.copy(self)
        other.order, other._visit = order_of(key), (None, None)
        return other

    @property
    def batches_per_pass(self) -> int:
        """Batches until every buffer has been visited `epochs` times."""
        return self.epochs * sum(n // self.batch_size for n in self.buffer_sizes)

    def batch(self, i: int) -> jax.Array:
        """Batch i, [L',B,D]: rows of one buffer, none twice in an epoch; rows beyond its full batches are left out."""
        round_, place = divmod(i, self.batches_per_pass)
        for b, n in enumerate(self.buffer_sizes):  # noqa: B007
            per_epoch = n // self.batch_size
            if place < self.epochs * per_epoch:
                break
            place -= self.epochs * per_epoch
        epoch, place = divmod(place, per_epoch)
        rows = self._order(round_, b, epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return _rows(self._current(b), rows)

    def __iter__(self) -> Iterator[jax.Array]:
        i = 0
        while True:
            yield self.batch(i)
            i += 1

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every dimension, [L',D] each, over the first buffer."""
        return _moments(self._current(0))

    def chunks(self, size: int = 4096) -> Iterator[jax.Array]:
        """Every activation once, in order, [L',n,D] with n up to `size`: for evaluation."""
        for b, n in enumerate(self.buffer_sizes):
            for start in range(0, n, size):
                yield self._current(b)[:, start : start + size].astype(jnp.float32)

    def _order(self, *visit: int) -> np.ndarray:
        """The order of a buffer's rows on one visit (round, buffer, epoch)."""
        if self._visit[0] != visit:
            order = np.random.default_rng((*self.order, 1, *visit)).permutation(self.buffer_sizes[visit[1]])
            self._visit = (visit, order)
        return self._visit[1]

    def _current(self, b: int) -> jax.Array:
        if getattr(self, "_held", (None, None))[0] != b:
            self._held: tuple[Any, Any] = (None, None)  # release the old buffer before the new one is made
            buffer = self.buffer(b)
            if not (finite := np.asarray(finite_layers(buffer))).all():
                layer = self.layers[int(np.flatnonzero(~finite)[0])]
                raise ValueError(f"activations: {self.site} of layer {layer} is not finite in buffer {b}; check the "
                                 "model's weights and dtype")  # fmt: skip
            self._held = (b, buffer)
        return self._held[1]

    def _check(self) -> None:
        """Makes the numbers that a subclass was given plain, and refuses those that are too small or too large."""
        for name, least in {"batch_size": 1, "epochs": 1, "skip_first": 0}.items():
            setattr(self, name, whole_number(name, getattr(self, name), least))
        if (smallest := min(self.buffer_sizes)) < self.batch_size:
            raise ValueError(
                f"batch_size: {self.batch_size} rows do not fit the smallest buffer, which has {smallest};"
                " use more text, a larger buffer or a smaller batch"
            )


class ArrayStream(BatchStream):
    """A stream over activations [L',n,D] already in memory."""

    def __init__(
        self, activations: Array, *, batch_size: int, layers: Sequence[int] | None = None, site: str = "resid_post",
        model: str | None = None, skip_first: int = 1, key: jax.Array | None = None,
    ):  # fmt: skip
        array = jnp.asarray(activations)
        self._array = array.astype(jnp.float32) if array.dtype == np.float64 else array
        if self._array.ndim != 3:
            raise ValueError(f"activations: expected [L', n, D], got shape {self._array.shape}")
        self.layers = tuple(range(len(self._array))) if layers is None else whole_numbers("layers", layers)
        if len(self.layers) != len(self._array):
            raise ValueError(f"layers: expected {len(self._array)} entries, got {self.layers}")
        _require_distinct(self.layers)
        self.site, self.model, self.skip_first, self.epochs, self.order = site, model, skip_first, 1, order_of(key)
        self.d_in, self.batch_size = self._array.shape[2], batch_size
        self.buffer_sizes = (self._array.shape[1],)
        self._check()

    def buffer(self, b: int) -> jax.Array:
        return self._array

    def contents(self) -> dict[str, Any]:
        return {"activations_hash": hash_of(np.asarray(self._array))}


class ActivationStream(BatchStream):
    """Activations of a model at one site of some layers, computed from token arrays as they are needed.

    Only the layers up to the deepest one asked for are run. Padding never counts, nor do the first `skip_first` real
    tokens of a text: by default one, its BOS, whose activation is an outlier that has no meaning for a dictionary.

    Args:
      config, params: the model.
      tokens: [N,T] int; mask: [N,T] bool, True on real tokens.
      layers: of the model, in any order; the streams' leading axis follows it.
      site: where to read; one of `jaxmech.models.block.SITES`.
      batch_size: activations in a batch; 512 by default, or all there are if they are fewer.
      buffer_tokens: about how many activations are held at a time (all of them if they fit).
      epochs: visits of a buffer before it is replaced.
      forward_batch: texts in one forward pass.
      key: of the order of texts and activations; `jax.random.key(0)` when None.
      dtype: of the buffer; float32, or bfloat16 to hold twice as many.
      cache: a folder that keeps every buffer, so that a second pass, or another training on the same activations,
        reads instead of computing. By default nothing is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokens: Array,
        *,
        mask: Array | None = None,
        layers: Sequence[int],
        site: str = "resid_post",
        batch_size: int | None = None,
        buffer_tokens: int = 65_536,
        epochs: int = 1,
        skip_first: int = 1,
        forward_batch: int = 8,
        key: jax.Array | None = None,
        dtype: str = "float32",
        model: str | None = None,
        cache: str | Path | None = None,
    ):
        self.layers, self.site, self.model = whole_numbers("layers", layers), site, model
        self.epochs, self.skip_first, self.order = epochs, whole_number("skip_first", skip_first, 0), order_of(key)
        self.forward_batch = whole_number("forward_batch", forward_batch, 1)
        self._cache = None if cache is None else Path(cache)
        tokens, mask = token_rows(config, tokens, mask)
        if wrong := [layer for layer in self.layers if not 0 <= layer < config.n_layers]:
            raise ValueError(f"layers: expected 0..{config.n_layers - 1}, got {wrong}")
        _require_distinct(self.layers)
        if site not in SITES:
            raise ValueError(f"site: expected one of {', '.join(SITES)}, got {site!r}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
        self._dtype = jnp.dtype(dtype)
        self._config, self._params = first_layers(config, params, max(self.layers) + 1)
        order = np.random.default_rng((*self.order, 0)).permutation(len(tokens))
        self._tokens, self._mask = tokens[order], mask[order]
        self._kept = after_first(self._mask, self.skip_first)
        total = int(self._kept.sum())
        batch_size = min(512, max(total, 1)) if batch_size is None else whole_number("batch_size", batch_size, 1)
        self.batch_size = batch_size
        self.buffer_tokens = max(whole_number("buffer_tokens", buffer_tokens), batch_size)
        self._bounds = _split(self._kept.sum(1), self.buffer_tokens, batch_size)
        self.buffer_sizes = tuple(int(self._kept[a:z].sum()) for a, z in self._bounds)
        # Texts of a length run together, so that short ones are not padded to the longest.
        by_length = np.concatenate([a + np.argsort(_ends(self._mask[a:z]), kind="stable") for a, z in self._bounds])
        self._tokens, self._mask, self._kept = (rows[by_length] for rows in (self._tokens, self._mask, self._kept))
        self._check()
        shapes = jax.eval_shape(partial(_read, self._config, self.site, self.layers), self._params, *self._block(0, 1))
        self.d_in = shapes.shape[-1]

    @property
    def tokens_seen(self) -> int:
        """Distinct activations of one pass, that is real tokens less those skipped."""
        return sum(self.buffer_sizes)

    def buffer(self, b: int) -> jax.Array:
        if self._cache is None:
            return jnp.asarray(self._compute(b))
        file = self._cache / f"{self._buffers_hash()[:16]}-{b}.safetensors"
        if not file.is_file():
            _write(file, self._compute(b))
        shape = (len(self.layers), self.buffer_sizes[b], self.d_in)
        return jnp.asarray(_stored(file, shape, self._dtype))

    def _compute(self, b: int) -> np.ndarray:
        first, last = self._bounds[b]
        out, filled = np.empty((len(self.layers), self.buffer_sizes[b], self.d_in), self._dtype), 0
        read = jax.jit(_read, static_argnums=(0, 1, 2))
        for start in range(first, last, self.forward_batch):
            stop = min(start + self.forward_batch, last)
            x = np.asarray(read(self._config, self.site, self.layers, self._params, *self._block(start, stop)))
            x = x[:, : stop - start][:, self._kept[start:stop, : x.shape[2]]]
            out[:, filled : filled + x.shape[1]] = x
            filled += x.shape[1]
        return out

    def contents(self) -> dict[str, Any]:
        # A buffer larger than the texts changes nothing.
        return {
            "buffer_tokens": min(self.buffer_tokens, self.tokens_seen), "dtype": self._dtype.name,
            "tokens_hash": hash_of(self._tokens, self._mask), "weights_hash": hash_of(self._config, *self._probe()),
        }  # fmt: skip

    def _buffers_hash(self) -> str:
        facts = (self._config, self.layers, self.site, self._dtype.name, self._bounds)
        return hash_of(*facts, self._tokens, self._mask, self._kept, *self._probe())

    def _probe(self) -> list[np.ndarray]:
        """A few entries of each leaf, for the parameters: hashing all of them would take as long as using them."""
        return [sample_of(leaf) for leaf in jax.tree.leaves(self._params)]

    def _block(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts start..stop, filled up to one of few shapes, each of which is compiled."""
        rows = np.minimum(np.arange(start, start + self.forward_batch), stop - 1)
        width = -(-_ends(self._mask[rows]).max() // _WIDTHS) * _WIDTHS
        return self._tokens[rows, :width], self._mask[rows, :width]


def _ends(mask: np.ndarray) -> np.ndarray:
    """Where each text's last real token ends, [N] of mask [N,T]."""
    T = mask.shape[1]
    return np.where(mask.any(1), T - mask[:, ::-1].argmax(1), 1)


def order_of(key: jax.Array | None) -> tuple[int, ...]:
    """The numbers of the key that orders a stream."""
    return key_words("key", jax.random.key(0) if key is None else key)


def token_rows(config: ModelConfig, tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """tokens [n,T] int32 and mask [n,T] bool, True everywhere where None is given.

    Raises:
      ValueError: other shapes, no tokens, or tokens that the model does not have.
    """
    shape, mask_shape = np.shape(tokens), None if mask is None else np.shape(mask)
    if len(shape) != 2 or 0 in shape or mask_shape not in (None, shape):
        raise ValueError(f"tokens, mask: expected two arrays [n,T], got shapes {shape} and {mask_shape}")
    tokens, mask = check_tokens(config, tokens, mask)
    return np.asarray(tokens), np.asarray(mask)


def after_first(mask: np.ndarray, n: int) -> np.ndarray:
    """The real tokens of each text but the first n: what dictionaries are trained and measured on. mask [N,T] bool."""
    return mask & (np.cumsum(mask, axis=1) > n)


def _require_distinct(layers: tuple[int, ...]) -> None:
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected distinct layers, at least one, got {layers}")


def first_layers(config: ModelConfig, params: Params, n: int) -> tuple[ModelConfig, Params]:
    """The model cut off after its first n layers: later ones do not affect them."""
    config = dataclasses.replace(config, n_layers=n, is_local=config.is_local[:n])
    return config, {**params, "layers": jax.tree.map(lambda leaf: leaf[:n], params["layers"])}


def _read(config, site, layers, params, tokens, mask):
    """[L',B,T,D] at `site` of `layers`."""
    out = forward(config, params, tokens, mask=mask, taps={"x": Tap(site)}, logits="none")
    return out.taps["x"][np.array(layers)]


@jax.jit
def finite_layers(x: jax.Array) -> jax.Array:
    """[L'], whether every activation of a layer is finite, of [L',n,D]."""
    return jnp.isfinite(x).all((1, 2))


@jax.jit
def _rows(buffer, rows):
    return jnp.take(buffer, rows, axis=1).astype(jnp.float32)


def sample_of(leaf: jax.Array, n: int = 64) -> np.ndarray:
    """n entries spread over a leaf: hashing all of a model would take as long as running it."""
    index = np.unravel_index(np.linspace(0, leaf.size - 1, n).astype(np.int64), leaf.shape)
    return np.asarray(leaf[index].astype(jnp.float32))


def _write(file: Path, x: np.ndarray) -> None:
    with disk_errors(file, "make room, or train without cache"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as temporary:
            save_file({"x": x}, temporary)


def _stored(file: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    try:
        x = load_file(file)["x"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it") from error
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{file}: expected {dtype} {shape}, got {x.dtype} {x.shape}; delete it")
    return x


def _moments(buffer: jax.Array, chunk: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Two passes in float64, a chunk at a time: residual streams have means far larger than their spread."""
    n = buffer.shape[1]
    parts = [slice(start, start + chunk) for start in range(0, n, chunk)]
    mean = sum(np.asarray(buffer[:, part], np.float64).sum(1) for part in parts) / n
    square = sum(((np.asarray(buffer[:, part], np.float64) - mean[:, None]) ** 2).sum(1) for part in parts)
    spread = np.sqrt(square / n)
    if not np.isfinite(spread).all() or not spread.any(axis=1).all():
        raise ValueError("activations: expected finite values that vary, at every layer")
    return mean.astype(np.float32), spread.astype(np.float32)


def _split(sizes: np.ndarray, target: int, at_least: int) -> list[tuple[int, int]]:
    """Cuts texts of the given sizes into runs of about `target` tokens; a short rest joins the last run."""
    bounds, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held and held + size > target:
            bounds.append((start, i))
            start, held = i, 0
        held += size
    if bounds and held < at_least:
        start = bounds.pop()[0]
    return [*bounds, (start, len(sizes))]


def hash_of(*facts: Any) -> str:
    """SHA-256 of arrays and of what else `repr` says all of."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(fact.tobytes() if isinstance(fact, np.ndarray) else repr(fact).encode())
    return digest.hexdigest()
