"""What is known of a model before its weights are read: its configuration, and its tokenizer when asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxmech.io.files import read_json
from jaxmech.models import load, saved
from jaxmech.models import tokenizer as tokenizers
from jaxmech.models.config import ModelConfig
from jaxmech.models.families import config_from_hf
from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_config import hf_config


class Outline(NamedTuple):
    """config: sizes as `load_model` gives them (special tokens may differ: they are the tokenizer's); tokenizer()."""

    config: ModelConfig
    tokenizer: Callable[[], Any]


def outline(name_or_path: str | Path) -> Outline:
    """Reads a model's outline in seconds, whatever its size; only small files are fetched from the hub.

    Args:
      name_or_path: as `load_model` takes it.

    Raises:
      ValueError: no such model, an installed package missing, an unsupported or damaged configuration.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in load._PACKAGED:
        paths, sha256 = load.packaged_files(name)
        kept = f"{name}-{sha256[:16]}-*-v{load.CONVERTER_VERSION}/{saved.MANIFEST}" if sha256 else ""
        if kept and (manifests := sorted((load.cache_dir() / "models").glob(kept))):
            return _saved(manifests[0].parent)
        return _gguf(paths)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf([path])
    if (path / saved.MANIFEST).is_file():
        return _saved(path)
    if not (path / "config.json").is_file():
        load.require_hub_id(name)
        path = load.download(name, weights=False)
    if adapter := load._adapter(path):
        raise ValueError(f"{path}: {adapter}")
    try:
        config = config_from_hf(read_json(path / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    return Outline(config, cache(partial(tokenizers.from_folder, path)))


def _gguf(paths) -> Outline:
    file = GGUFFile(paths)
    return Outline(config_from_hf(hf_config(file)), cache(partial(tokenizers.from_gguf, file.metadata)))


def _saved(folder: Path) -> Outline:
    config = saved.config_from_json(read_json(folder / saved.MANIFEST)["config"])
    return Outline(config, cache(partial(tokenizers.load_saved, folder / "tokenizer")))
