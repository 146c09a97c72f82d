"""Rows of the benchmark: in a JSON file, on the terminal, as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison, or one figure of jaxmech alone.

    Attributes:
      workload: "W1", ...; what: the work, in words; peer: what it is compared with, "" for nothing.
      seconds, peer_seconds: all timings, of the whole work; compile_seconds: of jaxmech, apart from them.
      difference: the largest one between the two results, relative to the largest value; None where nothing is
        compared.
      required: the least ratio asked for.
      flops: floating-point operations that the work cannot do without; share: of the matmul peak of the same run.
      figures: further ones, by name; note: what a reader must know.
    """

    workload: str
    what: str
    peer: str
    seconds: list[float]
    peer_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float | None = None
    difference: float | None = None
    required: float | None = None
    flops: float | None = None
    share: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        return _median(self.seconds)

    @property
    def peer_median(self) -> float | None:
        return _median(self.peer_seconds) if self.peer_seconds else None

    @property
    def ratio(self) -> float | None:
        return self.peer_median / self.median if self.peer_seconds else None


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def store(path: Path, workload: str, rows: Sequence[Row], machine: dict[str, Any], peak: dict[str, float]) -> None:
    """Writes the rows of one workload, in place of those that the file may have of it, and what they were measured on.

    Args:
      peak: what the machine could do in the same run, by name.
    """
    workloads = json.loads(path.read_text()) if path.exists() else {}
    written = [
        dataclasses.asdict(row) | {"median": row.median, "peer_median": row.peer_median, "ratio": row.ratio}
        for row in rows
    ]
    workloads[workload] = {"machine": machine, "peak": peak, "rows": written}
    path.write_text(json.dumps(dict(sorted(workloads.items())), indent=1) + "\n")


def load(path: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """The machines of a file, each with the rows that were measured on it."""
    names = {field.name for field in dataclasses.fields(Row)}
    groups: list[tuple[dict[str, Any], list[Row]]] = []
    for workload in json.loads(path.read_text()).values():
        rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in workload["rows"]]
        if not groups or groups[-1][0] != workload["machine"]:
            groups.append((workload["machine"], []))
        groups[-1][1].extend(rows)
    return groups


COLUMNS = ("", "against", "jaxmech", "peer", "ratio", "asked", "compiled in", "share of peak", "difference")


def _cells(row: Row) -> tuple[str, ...]:
    def cell(value, form: str) -> str:
        return "" if value is None else format(value, form)

    times = lambda value: "" if value is None else f"{value:.3g}×"  # noqa: E731
    return (
        f"{row.workload} {row.what}",
        row.peer,
        _duration(row.median),
        "" if row.peer_median is None else _duration(row.peer_median),
        times(row.ratio),
        times(row.required),
        "" if row.compile_seconds is None else _duration(row.compile_seconds),
        cell(row.share, ".0%"),
        cell(row.difference, ".0e"),
    )


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """All rows' cells; what a row shares with the one above is said once."""
    lines, above = [], None
    for row in rows:
        cells = _cells(row)
        lines.append(("", *cells[1:]) if cells[0] == above else cells)
        above = cells[0]
    return lines


def _duration(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Notes and further figures, each said once."""
    remarks = []
    for row in rows:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in row.figures.items())
        about = f"{row.workload} {row.what}" + (f" against {row.peer}" if row.peer else "")
        remarks += [f"{about}: {text}" for text in (row.note, figures) if text]
    return remarks


def show(console: Console, rows: Sequence[Row]) -> None:
    table = Table()
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for cells in _lines(rows):
        table.add_row(*cells)
    console.print(table)
    for remark in _remarks(rows):
        console.print(remark, highlight=False)


def markdown(path: Path) -> str:
    """The file's rows as Markdown, a table for each machine and what it is below."""
    return "\n\n".join(_section(machine, rows) for machine, rows in load(path))


def _section(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * 2 + "---:|" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _lines(rows)]
    facts = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_gib']:.0f} GiB"]
    facts += [machine["device"]] if "device" in machine else []
    facts += [f"{name} {version}" for name, version in machine["versions"].items()]
    remarks = [f"- {remark}." for remark in _remarks(rows)]
    return "\n".join([*lines, "", f"On {', '.join(facts)}; {machine['date']}.", *([""] if remarks else []), *remarks])
