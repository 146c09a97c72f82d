"""Files of a dictionary: where they are (path or hub id), what tensors they hold, and what the caller says of them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np

from jaxmech.io.files import is_lfs_pointer, read_json

T = TypeVar("T")

TENSOR_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


class Given(NamedTuple):
    """What the caller says of a dictionary: used where the file is silent, refused where it contradicts (`agree`)."""

    site: str | None = None
    layer: int | None = None
    k: int | None = None
    model: str | None = None
    batch_topk: bool = False


@overload
def agree(where: str | Path, name: str, said: T | None, given: T | None, needed: Literal[True]) -> T: ...
@overload
def agree(where: str | Path, name: str, said: T, given: T | None) -> T: ...
@overload
def agree(where: str | Path, name: str, said: T | None, given: T | None, needed: bool) -> T | None: ...
def agree(where: str | Path, name: str, said: T | None, given: T | None, needed: bool = False) -> T | None:
    """What the file says, or else the caller.

    Raises:
      ValueError: they contradict each other, or `needed` and neither says it.
    """
    if said is None and given is None and needed:
        raise ValueError(f"{where}: nothing in it says its {name}; pass load_sae(..., {name}=)")
    same: Callable[[Any, Any], bool] = _same_model if name == "model" else lambda a, b: a == b
    if said is not None and given is not None and not same(said, given):
        raise ValueError(f"{where}: {name}: the files say {said!r}, asked for {given!r}")
    return given if said is None else said


def refuse_rank(where: str | Path, given: Given, activation: str) -> None:
    """Refuses k and `batch_topk` for dictionaries that do not keep k features.

    Raises:
      ValueError: the caller gives one of them.
    """
    said = [name for name, value in (("k", given.k), ("batch_topk", given.batch_topk or None)) if value is not None]
    if said:
        raise ValueError(
            f"{where}: {' and '.join(said)}: for TopK dictionaries, and this is {activation}; leave it out"
        )


def _same_model(said: str, given: str) -> bool:
    """Owners, capitals and "-pt" are often left out of names."""
    short = [name.rsplit("/", 1)[-1].lower().removesuffix("-pt") for name in (said, given)]
    return short[0] == short[1]


def described(path: Path) -> str:
    """The path as readers take names from it: "owner/repository/path" for files in the hub's cache."""
    text = path.absolute().as_posix()
    if match := re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+(?:/(.*))?$", text):
        return "/".join(part for part in match.groups() if part)
    return text


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object without which the weights beside it cannot be read.

    Raises:
      ValueError: it is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; the weights beside it cannot be read without it; copy or download it too")
    return read_json(path)


# Tensors ------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors`, `.npz`, `.pt` or `.pth` file, as stored (a `.pt`'s half floats as float32).

    A `.pt` may also hold numbers and strings (arrays without axes here) and nested dictionaries (names joined by
    dots). It is opened without running code, and needs torch.

    Raises:
      ValueError: no such file, an unknown kind, damaged or truncated, Python objects inside, torch missing.
    """
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".pt": _read_torch, ".pth": _read_torch}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected one of {', '.join(TENSOR_SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: a Git LFS pointer; run: git lfs pull")
    return readers[path.suffix](path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise _damaged(path, error) from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}: holds numbers of an unsupported kind ({error})") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                raise zipfile.BadZipFile("not a zip archive")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path}: holds Python objects, which run code when opened; refused") from None
        raise _damaged(path, error) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise _damaged(path, error) from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: reading it needs torch; pip install 'jaxmech[pt]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own message recommends running the code.
        if match := re.search(r"(?:GLOBAL|global|class|type) [`']?([\w.]+\.[\w.]+|[\w]+ [\w.]+)", str(error)):
            raise ValueError(f"{path}: holds {match[1]} besides tensors; opening that runs code, so it is refused. "
                             "Save the state dict alone, or as safetensors") from None  # fmt: skip
        raise ValueError(f"{path} is damaged or truncated, or holds Python objects, which run code when opened; "
                         "refused. Download it again, or save the state dict alone") from None  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return _flat(path, content)


def _flat(path: Path, content: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    import torch

    tensors = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            value = value.detach()
            half = value.dtype in (torch.bfloat16, torch.float16)
            try:
                tensors[name] = (value.float() if half else value).contiguous().numpy()
            except (RuntimeError, TypeError) as error:  # sparse, quantised, 8-bit
                raise ValueError(f"{path}: {name}: an unsupported kind of tensor ({error})") from None
        elif isinstance(value, Mapping):
            tensors |= _flat(path, value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            tensors[name] = np.asarray(value)
        elif value is not None:
            raise ValueError(f"{path}: {name}: expected a tensor, got {type(value).__name__}")
    return tensors


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or truncated ({str(error).splitlines()[0] if str(error) else error!r}); "
                      "download or copy it again")  # fmt: skip
