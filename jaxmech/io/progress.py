"""Progress of long work: a bar with a rate and the time left; a line now and then where there is no terminal."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from html import escape
from typing import Any, TypeVar

import rich.progress as rp
from rich.console import Console

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BEFORE_A_BAR = 0.5  # work that is done by then needs none
_SECONDS_BETWEEN_UPDATES = 0.2  # of a notebook, where each is a message to the browser
_WIDTH = 100  # characters, in a notebook

T = TypeVar("T")

_shown = True
_drawing = threading.Lock()


def show_progress(on: bool) -> None:
    """Switches the progress bars of all functions on (the default) or off, in this process.

    They show in a terminal and in a notebook, on standard error; where it is neither, such as in a log, a line is
    printed every half minute.
    """
    global _shown
    _shown = bool(on)


def console() -> Console:
    """Where progress goes: standard error, so that standard output stays clean."""
    return Console(file=sys.stderr)


@contextmanager
def progress(what: str, total: int | None, *, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`. Work inside another bar shows none of its own.

    Args:
      what: shown before the bar; total: the work in `unit`s, None if it is not known.
    """
    if not _shown or not _drawing.acquire(blocking=False):
        yield _silent
        return
    try:
        out = console()
        show = _in_notebook if out.is_jupyter else _in_terminal if out.is_terminal else _in_lines
        with show(out, what, total) as update:
            begun, done = time.monotonic(), 0

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal done
                done += n
                rate = done / max(time.monotonic() - begun, 1e-9)
                update(done, rate, ", ".join(part for part in (f"{rate:.3g} {unit}/s", note) if part))

            yield advance
    finally:
        _drawing.release()


def counted(items: Iterable[T], advance: Callable[[], None]) -> Iterator[T]:
    """The same items; `advance` is called when the next one is asked for."""
    for item in items:
        yield item
        advance()


def _silent(n: int = 1, note: str = "") -> None:
    """Shows nothing."""


def _bar(what: str, total: int | None, **options: Any) -> tuple[rp.Progress, rp.TaskID]:
    columns = (
        f"[bold]{what}",
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TimeRemainingColumn(),
        "{task.fields[note]}",
    )
    bar = rp.Progress(*columns, **options)
    return bar, bar.add_task(what, total=total, note="starting")


@contextmanager
def _after_a_while(start: Callable[[], None]) -> Iterator[None]:
    """Calls `start` from another thread after a short time, unless the work inside is done before."""
    timer = threading.Timer(_SECONDS_BEFORE_A_BAR, copy_context().run, (start,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


_Update = Callable[[int, float, str], None]
"""Called with how much is done, how much per second, and a note."""


@contextmanager
def _in_terminal(out: Console, what: str, total: int | None) -> Iterator[_Update]:
    bar, task = _bar(what, total, console=out, transient=True)
    try:
        with _after_a_while(bar.start):
            yield lambda done, rate, note: bar.update(task, completed=done, note=note)
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _in_notebook(out: Console, what: str, total: int | None) -> Iterator[_Update]:
    """Through IPython alone: rich itself shows no bar there without ipywidgets."""
    from IPython.display import display

    paper = Console(file=io.StringIO(), width=_WIDTH, no_color=True, force_jupyter=False, force_terminal=False)
    bar, task = _bar(what, total, console=paper, auto_refresh=False)
    handle, last = None, 0.0

    def text() -> dict[str, str]:
        with paper.capture() as captured:
            paper.print(bar.get_renderable())
        return {"text/plain": captured.get(), "text/html": f"<pre>{escape(captured.get())}</pre>"}

    def start() -> None:
        nonlocal handle
        handle = display(text(), raw=True, display_id=True)

    def update(done: int, rate: float, note: str) -> None:
        nonlocal last
        bar.update(task, completed=done, note=note)
        if handle is not None and time.monotonic() - last > _SECONDS_BETWEEN_UPDATES:
            last = time.monotonic()
            handle.update(text(), raw=True)

    try:
        with _after_a_while(start):
            yield update
    finally:
        if handle is not None:
            handle.update({"text/plain": "", "text/html": ""}, raw=True)


@contextmanager
def _in_lines(out: Console, what: str, total: int | None) -> Iterator[_Update]:
    last = time.monotonic()

    def update(done: int, rate: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = f" of {total}, {note}, about {(total - done) / rate:.0f} s left" if total else f", {note}"
            out.print(f"  {what}: {done}{left}", soft_wrap=True, highlight=False)

    yield update
