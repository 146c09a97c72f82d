"""Progress of long work: a bar with a rate and the time left; a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as rp
from rich.console import Console

_SECONDS_BETWEEN_LINES = 30.0


def console() -> Console:
    """Where progress goes: standard error, so that standard output stays clean."""
    return Console(file=sys.stderr)


@contextmanager
def progress(what: str, total: int, *, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`.

    Args:
      what: shown before the bar; total: the work in `unit`s.
    """
    out, begun, done = console(), time.monotonic(), 0
    last = begun
    columns = (
        f"[bold]{what}",
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TimeRemainingColumn(),
        "{task.fields[note]}",
    )
    with rp.Progress(*columns, console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total, note="compiling")

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            rate = done / max(now - begun, 1e-9)
            note = ", ".join(part for part in (f"{rate:.3g} {unit}/s", note) if part)
            bar.update(task, completed=done, note=note)
            if not out.is_terminal and now - last > _SECONDS_BETWEEN_LINES:
                last = now
                left = (total - done) / rate
                out.print(
                    f"  {what}: {done} of {total}, {note}, about {left:.0f} s left", soft_wrap=True, highlight=False
                )

        yield advance
