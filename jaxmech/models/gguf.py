"""Reading GGUF files: metadata, tensors as float32, and the Hugging Face style configuration they imply.

The metadata is parsed here and not with `gguf.GGUFReader`, which takes fifteen seconds over a vocabulary of 262,144
tokens and wants one file; a model that is shipped in parts is read in place. Dequantisation is the `gguf` package's.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmech.models.convert import aligned_empty

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FIRST_READ = 32 << 20
_ROWS_AT_ONCE = 4096  # dequantisation makes temporaries several times its input


class _OutOfBytes(Exception):
    """The header goes on beyond the bytes at hand."""


class TensorInfo(NamedTuple):
    """A tensor in the file. shape is in NumPy order; kind is the name of its quantisation; start counts from byte 0."""

    shape: tuple[int, ...]
    kind: str
    start: int
    n_bytes: int


class _Header:
    """A cursor over little-endian GGUF header bytes."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def unpack(self, form: str) -> tuple:
        form = "<" + form
        end = self.at + struct.calcsize(form)
        if end > len(self.data):
            raise _OutOfBytes
        values = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        end = self.at + length
        if end > len(self.data):
            raise _OutOfBytes
        text = self.data[self.at : end].decode("utf-8")
        self.at = end
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
            raise ValueError(f"metadata of type {kind} at byte {self.at} is not GGUF; the file is damaged")
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
            raw[name] = (dims[::-1], *header.unpack("IQ"))
        align = metadata.get("general.alignment", 32)
        base = -(-header.at // align) * align
        return metadata, {name: self._info(name, base, *rest) for name, rest in raw.items()}

    def _info(self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import _type_traits

        known = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits}
        if kind not in {int(k) for k in known}:
            names = {int(k): k.name for k in GGMLQuantizationType}
            raise ValueError(
                f"{self.name}: tensor {name!r} has quantisation {names.get(kind, kind)}, which cannot be read; "
                f"expected one of {', '.join(sorted(k.name for k in known))}"
            )
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * width
        return TensorInfo(shape, GGMLQuantizationType(kind).name, base + offset, n_bytes)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

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


# Configuration ------------------------------------------------------------------------------------------------------

_SHARED_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_INERT_PREFIXES = ("general.", "tokenizer.", "quantize.", "split.")


class _Keys:
    """The `{architecture}.*` keys of a file; asking for one marks it as handled."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix, self.seen = file, f"{architecture}.", set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.prefix + key)
        return self.file.metadata.get(self.prefix + key, default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.file.name}: metadata key {self.prefix + key!r} is missing")
        return value

    def finish(self) -> None:
        left = [k for k in self.file.metadata if k not in self.seen and not k.startswith(_INERT_PREFIXES)]
        if left:
            listed = ", ".join(f"{k}={self.file.metadata[k]!r}" for k in sorted(left))
            raise ValueError(f"{self.file.name}: metadata not understood, so the model might come out wrong: {listed}")


def _scaled(keys: _Keys) -> dict[str, Any]:
    """The RoPE scaling of the file, in Hugging Face's words."""
    kind, factor = keys.get("rope.scaling.type"), keys.get("rope.scaling.factor")
    if kind in (None, "none"):
        return {"rope_type": "default"}
    if kind != "linear":
        raise ValueError(f"{keys.file.name}: RoPE scaling {kind!r} is not supported from GGUF; expected 'linear'")
    return {"rope_type": "linear", "factor": factor}


def _plain_heads(keys: _Keys, config: dict[str, Any]) -> None:
    """Refuses heads whose values have another width than their keys, and partly rotated ones."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, config["head_dim"]) != config["head_dim"]:
            raise ValueError(f"{keys.file.name}: {keys.prefix}{key}={keys.get(key)} differs from the head's width "
                             f"{config['head_dim']}; such heads are not supported")  # fmt: skip


def _llama(keys: _Keys, config: dict[str, Any]) -> None:
    config["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    _plain_heads(keys, config)
    config["rope_parameters"] = {"rope_theta": keys.need("rope.freq_base"), **_scaled(keys)}
    config |= {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
    config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
    for key in ("expert_count", "expert_used_count"):
        if keys.get(key, 0):
            raise ValueError(f"{keys.file.name}: {keys.prefix}{key}={keys.get(key)}; mixtures of experts are not "
                             "supported")  # fmt: skip


def _gemma3(keys: _Keys, config: dict[str, Any]) -> None:
    """What llama.cpp keeps in its code and not in the file: local RoPE base, 5:1 pattern, the 27B's query scale."""
    if config["head_dim"] is None:
        raise ValueError(f"{keys.file.name}: metadata key 'gemma3.attention.key_length' is missing")
    _plain_heads(keys, config)
    pattern, layers = keys.get("attention.sliding_window_pattern", 6), config["num_hidden_layers"]
    if isinstance(pattern, list):
        local = [bool(p) for p in pattern]
    else:
        local = [bool((i + 1) % pattern) for i in range(layers)]
    # llama.cpp tells the 27B, whose query scale is not the head's width, by its number of layers.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    config |= {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local],
        "attention_bias": False,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "rope_parameters": {
            "full_attention": {"rope_theta": keys.need("rope.freq_base"), **_scaled(keys)},
            "sliding_attention": {"rope_theta": keys.get("rope.freq_base_swa", 10_000.0), "rope_type": "default"},
        },
    }


_ARCHITECTURES: dict[str, Callable[[_Keys, dict[str, Any]], None]] = {"llama": _llama, "gemma3": _gemma3}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face configuration that the file's metadata describe.

    Raises:
      ValueError: an architecture without an entry here, a missing key, or one that is not understood.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{file.name}: GGUF architecture {architecture!r} is not supported; "
                         f"expected one of {', '.join(sorted(_ARCHITECTURES))}")  # fmt: skip
    keys = _Keys(file, architecture)
    config = {hf: keys.get(key) for key, hf in _SHARED_KEYS.items()}
    missing = [
        key for key, hf in _SHARED_KEYS.items() if config[hf] is None and hf not in ("head_dim", "num_key_value_heads")
    ]
    if missing or "token_embd.weight" not in file.tensors:
        named = ", ".join(keys.prefix + key for key in missing) or "the tensor token_embd.weight"
        raise ValueError(f"{file.name} lacks {named}")
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    config["vocab_size"] = file.shape("token_embd.weight")[0]
    keys.get("vocab_size")  # the embedding decides: it may be padded
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = sorted({end for end in ends if end is not None})
    config["bos_token_id"] = file.metadata.get("tokenizer.ggml.bos_token_id")
    _ARCHITECTURES[architecture](keys, config)
    keys.finish()
    return config
