"""The progress bar of a training: rate, time left, FVU, L0 and share of dead features over the layers."""

from __future__ import annotations

import sys
import time
from typing import Any

import rich.progress as rp
from rich.console import Console


class Progress:
    """A context manager around `rich`; on an output that is no terminal it prints a line every half minute."""

    def __init__(self, steps: int, batch_size: int, enabled: bool = True):
        self._steps, self._batch, self._enabled = steps, batch_size, enabled
        self._console = Console(file=sys.stderr)
        self._bar = rp.Progress(
            "[bold]training SAEs", rp.BarColumn(), rp.MofNCompleteColumn(), rp.TimeRemainingColumn(),
            "{task.fields[note]}", console=self._console, disable=not (enabled and self._console.is_terminal),
        )  # fmt: skip
        self._first: tuple[int, float] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        self._task = self._bar.add_task("train", total=self._steps, note="compiling")
        return self

    def __exit__(self, *exc) -> None:
        self._bar.__exit__(*exc)

    def update(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Shows the logged `rows` of one step, one a layer."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)  # everything before it includes the compilation
        done, seconds = step - self._first[0], now - self._first[1]
        rate = f"{done * self._batch / seconds:,.0f} tokens/s, " if done and seconds else ""
        fvu = [row["fvu"] for row in rows]
        l0, dead = (sum(row[name] for row in rows) / len(rows) for name in ("l0", "dead"))
        note = f"{rate}FVU {min(fvu):.3f} to {max(fvu):.3f}, L0 {l0:.0f}, dead {dead:.1%}"
        self._bar.update(self._task, completed=step, note=note)
        if self._enabled and not self._console.is_terminal and (now - self._printed > 30 or step == self._steps):
            self._printed = now
            self._console.print(f"training SAEs: step {step} of {self._steps}, {note}", soft_wrap=True)
