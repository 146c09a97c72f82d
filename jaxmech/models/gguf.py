"""Reading GGUF files: metadata, and tensors as float32.

The metadata is parsed here and not with `gguf.GGUFReader`, which takes fifteen seconds over a vocabulary of 262,144
tokens and wants a single file; a model shipped in parts is read in place. Dequantisation is the `gguf` package's.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmech.models.convert import aligned_empty

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FIRST_READ = 32 << 20
_ROWS_AT_ONCE = 4096  # dequantisation makes temporaries several times its input

QUANTISATIONS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
"""The kinds of tensor that can be read, by ggml's names."""


class _OutOfBytes(Exception):
    """The header continues beyond the bytes read."""


class TensorInfo(NamedTuple):
    """A tensor in the file. shape is in NumPy order; kind is the name of its quantisation; start counts from byte 0."""

    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int


class _Header:
    """A cursor over little-endian GGUF header bytes."""

    def __init__(self, data: bytes):
        self.data, self.offset = data, 0

    def unpack(self, form: str) -> tuple:
        form = "<" + form
        try:
            end = self.offset + struct.calcsize(form)
        except struct.error:  # a damaged count, beyond anything that fits
            raise _OutOfBytes from None
        if end > len(self.data):
            raise _OutOfBytes
        values = struct.unpack_from(form, self.data, self.offset)
        self.offset = end
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        end = self.offset + length
        if end > len(self.data):
            raise _OutOfBytes
        try:
            text = self.data[self.offset : end].decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {self.offset} is not UTF-8; the file is damaged") from None
        self.offset = end
        return text

    def value(self, kind: int) -> Any:
        if kind == 6:
            # The shortest decimal of a float32, so that an epsilon written as 1e-6 is read as 1e-6.
            return float(str(np.float32(self.unpack("f")[0])))
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind} at byte {self.offset} is not GGUF; the file is damaged")
        inner, count = self.unpack("IQ")
        if inner in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[inner]}"))
        return [self.value(inner) for _ in range(count)]


class GGUFFile:
    """An open GGUF file, or one split into consecutive parts.

    Attributes:
      metadata: key -> value, arrays as lists.
      tensors: name -> `TensorInfo`.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        """Parses the header; tensor data stay on disk.

        Raises:
          ValueError: not a GGUF file, truncated, or holding a quantisation that cannot be read.
        """
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more parts)"
        self._parts = [np.memmap(path, np.uint8, "r") for path in paths if Path(path).stat().st_size]
        self._ends = np.cumsum([part.size for part in self._parts]).tolist()
        self.size = self._ends[-1] if self._ends else 0
        size = _FIRST_READ
        while True:
            try:
                self.metadata, self.tensors = self._parse(_Header(self._bytes(0, min(size, self.size)).tobytes()))
                break
            except _OutOfBytes:
                if size >= self.size:
                    raise ValueError(self._truncated("its header is incomplete")) from None
                size *= 4
        end = max((info.start + info.n_bytes for info in self.tensors.values()), default=0)
        if end > self.size:
            raise ValueError(self._truncated(f"its tensors need {end:,} bytes"))

    def _truncated(self, why: str) -> str:
        return f"{self.name} is truncated: {why}, the file has {self.size:,}. Download or copy it again."

    def _bytes(self, start: int, count: int) -> np.ndarray:
        """`count` bytes from `start`, a view unless they span parts."""
        pieces, end = [], start + count
        while start < end:
            part = bisect.bisect_right(self._ends, start)
            base = self._ends[part] - self._parts[part].size
            stop = min(end, self._ends[part])
            pieces.append(self._parts[part][start - base : stop - base])
            start = stop
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, np.uint8)])

    def _parse(self, header: _Header) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self.size >= 4 and header.data[:4] != b"GGUF":
            raise ValueError(f"{self.name} is not a GGUF file: it starts with {header.data[:4]!r}, not b'GGUF'")
        _, version, n_tensors, n_keys = header.unpack("4sIQQ")
        if version not in (2, 3):
            raise ValueError(f"{self.name} is GGUF version {version}; versions 2 and 3 can be read")
        metadata = {}
        for _ in range(n_keys):
            key = header.string()
            metadata[key] = header.value(*header.unpack("I"))
        raw = {}
        for _ in range(n_tensors):
            name = header.string()
            dims = header.unpack(f"{header.unpack('I')[0]}Q")
            if name in raw:
                raise ValueError(f"{self.name} holds two tensors named {name!r}")
            raw[name] = (dims[::-1] or (1,), *header.unpack("IQ"))
        align = metadata.get("general.alignment", 32)
        base = -(-header.offset // align) * align
        return metadata, _tensor_infos(self.name, raw, base)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def kind(self, name: str) -> str:
        """The type of the numbers that `read` returns."""
        return "F32"

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, dequantised."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        kind = GGMLQuantizationType[info.kind]
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        data = self._bytes(info.start, info.n_bytes).reshape(rows, -1)
        out = aligned_empty((rows, info.shape[-1]), np.float32)
        for first in range(0, rows, _ROWS_AT_ONCE):
            piece = slice(first, first + _ROWS_AT_ONCE)
            out[piece] = dequantize(np.ascontiguousarray(data[piece]), kind)
        return out.reshape(info.shape)


def _tensor_infos(where: str, raw: Mapping[str, tuple], base: int) -> dict[str, TensorInfo]:
    """Shapes, kinds and places of tensors given as (shape, number of the kind, offset from base)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {int(kind): kind.name for kind in GGMLQuantizationType}
    infos, bad = {}, []
    for name, (shape, number, offset) in raw.items():
        kind = names.get(number, str(number))
        if kind not in QUANTISATIONS:
            bad.append(f"{name} ({kind})")
            continue
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if shape[-1] % block:
            bad.append(f"{name} ({kind}, whose rows of {shape[-1]} are not a whole number of blocks of {block})")
            continue
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * width
        infos[name] = TensorInfo(shape, kind, base + offset, n_bytes)
    if bad:
        raise ValueError(
            f"{where}: {len(bad)} of {len(raw)} tensors have a quantisation that cannot be read: {', '.join(bad)}. "
            f"Get the model in one of {', '.join(QUANTISATIONS)}."
        )
    return infos
