"""The run folder: stages kept under the hash of what they depend on, written whole or not at all.

run_dir/
  manifest.json           versions, devices, seeds, hashes, wall time and peak memory of each stage, exclusions
  results.json            the numbers
  report.html             the page
  stages/<name>/          key.json, results.json, *.parquet, arrays.safetensors; dictionaries: saes/ too
  training/               checkpoints of dictionaries that are being trained
  .lock                   held by the process that computes here
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmech.io import files
from jaxmech.study.tables import check_tables


class Outcome(NamedTuple):
    """What a stage produces: results (JSON), tables (Parquet), small arrays (safetensors), and folders (moved).

    done_with: folders that are removed once the stage is kept.
    """

    results: dict[str, Any]
    tables: dict[str, pd.DataFrame] = {}  # noqa: RUF012 - never mutated
    arrays: dict[str, np.ndarray] = {}  # noqa: RUF012
    folders: dict[str, Path] = {}  # noqa: RUF012
    done_with: tuple[Path, ...] = ()


class RunFolder:
    """Reads and writes one run.

    Args:
      create: whether to make the folder; without it, a missing one reads as a run with nothing finished.
      reads: the stages that may be read; any other is refused. All of them by default.
    """

    def __init__(self, path: str | Path, create: bool = True, reads: Collection[str] | None = None):
        self.path, self._reads = Path(path), reads
        if create:
            try:
                (self.path / "stages").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"run_dir: cannot write to {self.path}: {error.strerror}") from error

    def sweep(self) -> None:
        """Removes what a killed run left half written."""
        for leftover in (self.path / "stages").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def stage(self, name: str) -> Path:
        """Where a stage's results are.

        Raises:
          ValueError: a stage that may not be read.
        """
        if self._reads is not None and name not in self._reads:
            raise ValueError(
                f"stage {name} is read by a stage whose key does not hold it; declare it in jaxmech.study.keys.STAGES"
            )
        return self.path / "stages" / name

    def key(self, name: str) -> dict[str, Any] | None:
        """The record of a finished stage: its hash, seconds and peak memory; None when there is none."""
        file = self.stage(name) / "key.json"
        return read_json(file) if file.is_file() else None

    def save(self, name: str, outcome: Outcome, record: dict[str, Any]) -> None:
        """Writes a stage atomically: into a hidden folder first, then renamed into place.

        Raises:
          ValueError: a table without a column that the stage declares, or a folder that cannot be written to.
        """
        check_tables(name, outcome.tables)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.path / "stages"))
        try:
            write_json(temporary / "results.json", outcome.results)
            for table, frame in outcome.tables.items():
                frame.to_parquet(temporary / f"{table}.parquet", index=False)
            if outcome.arrays:
                save_file(
                    {k: np.ascontiguousarray(v) for k, v in outcome.arrays.items()}, temporary / "arrays.safetensors"
                )
            for folder, made in outcome.folders.items():
                shutil.move(made, temporary / folder)
            write_json(temporary / "key.json", record)
            shutil.rmtree(self.stage(name), ignore_errors=True)
            temporary.rename(self.stage(name))
            for done in outcome.done_with:
                shutil.rmtree(done, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"stage {name}: cannot write to {self.path}: {reason}. Earlier stages are kept; {way_out(error)} and "
                "run the same command again"
            ) from error

    def results(self, name: str) -> dict[str, Any]:
        return read_json(self._existing(name, "results.json"))

    def table(self, stage: str, name: str) -> pd.DataFrame:
        file = self._existing(stage, f"{name}.parquet")
        try:
            return pd.read_parquet(file)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} is damaged ({error}); {_AGAIN}") from error

    def has_table(self, stage: str, name: str) -> bool:
        return (self.stage(stage) / f"{name}.parquet").is_file()

    def arrays(self, stage: str) -> dict[str, np.ndarray]:
        file = self._existing(stage, "arrays.safetensors")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); {_AGAIN}") from error

    def _existing(self, stage: str, name: str) -> Path:
        if not (file := self.stage(stage) / name).is_file():
            raise ValueError(f"{file} is missing; {_AGAIN}")
        return file


def way_out(error: Exception) -> str:
    """What to do about a file that could not be written: there is no room, or no permission."""
    refused = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    return "choose a run_dir that may be written" if refused else "make room"


def digest(*parts: Any) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NumPy numbers become plain ones and what is not finite becomes null."""
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1) + "\n")


_AGAIN = "delete its folder and run again"
read_json = partial(files.read_json, remedy=_AGAIN)


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
