"""Metrics of a training on disk: a CSV without duplicate or missing rows after a resume, and TensorBoard events."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmech.io.files import disk_errors, whole

CSV_FILE, EVENTS_FOLDER = "metrics.csv", "tensorboard"
_LABELS = ("step", "tokens", "layer", "sparsity")
_REMEDY = "make room, or choose another folder"

Rows = Sequence[Mapping[str, Any]]


class MetricsLog:
    """Writes rows that carry `_LABELS` and a number for every other name.

    Args:
      folder: made if missing; gets metrics.csv.
      rows: those from before the training was resumed: the file starts with exactly these, whatever a killed run had
        written after them.
      tensorboard: whether to write events under folder/tensorboard, too.

    Raises:
      ValueError: tensorboardX is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, rows: Rows, *, tensorboard: bool = False):
        self._path = Path(folder) / CSV_FILE
        last = rows[-1]["step"] if rows else 0
        writer = event_writer() if tensorboard else None
        with disk_errors(self._path, _REMEDY):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # TensorBoard drops what a killed run wrote after the last of these steps.
            self._events = writer and writer(str(Path(folder) / EVENTS_FOLDER), purge_step=last + 1)
            with whole(self._path) as temporary:
                _append(temporary, rows)

    def add(self, rows: Rows) -> None:
        with disk_errors(self._path, _REMEDY):
            _append(self._path, rows)
        if self._events:
            for row in rows:
                for name in row.keys() - set(_LABELS):
                    tag = f"{name}/layer {row['layer']}, sparsity {row['sparsity']:g}"
                    self._events.add_scalar(tag, row[name], row["step"])

    def close(self) -> None:
        if self._events:
            self._events.close()


def _append(path: Path, rows: Rows) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        if not rows:
            return
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def event_writer() -> type:
    """The class that writes events.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard: writing events needs the tensorboardX package: pip install 'jaxmech[tensorboard]';"
            " metrics.csv is written without it"
        ) from None
    return SummaryWriter
