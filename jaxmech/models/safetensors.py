"""Reading the safetensors of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.io.files import is_lfs_pointer, read_json


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, else with shards and their index."""

    def __init__(self, folder: str | Path):
        """Opens the files; tensors are read on request.

        Raises:
          ValueError: naming every file that is missing or damaged and every tensor stored twice.
        """
        from safetensors import SafetensorError, safe_open

        self.name = str(folder)
        self._files: dict[str, Any] = {}
        problems = []
        for path in _files_of(Path(folder)):
            if not path.is_file():
                problems.append(f"{path.name} is missing (safetensors are read, not .bin or .pt)")
                continue
            try:
                file = safe_open(path, "np")
            except SafetensorError as error:
                why = "a Git LFS pointer; run: git lfs pull" if is_lfs_pointer(path) else error
                problems.append(f"{path.name} is damaged or truncated ({why})")
                continue
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                if name in self._files:
                    problems.append(f"{path.name} holds {name!r}, which another shard holds too")
                self._files[name] = file
        if problems:
            raise ValueError(f"{folder} cannot be loaded; download or copy it again:\n  " + "\n  ".join(problems))

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def _files_of(folder: Path) -> list[Path]:
    """One file, which wins over an index that an earlier save left beside it, as in transformers; or the shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if shards := sorted(path.name for path in folder.glob("model-*.safetensors")):
            raise ValueError(
                f"{index} is missing, which says what the shards hold ({', '.join(shards)}); download or copy it too"
            )
        return [single]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files; download it again")
    return [folder / name for name in sorted(set(listed.values()))]
