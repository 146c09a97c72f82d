"""What a section of the page is made of: figures with captions, tables, feature cards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.formats import NBSP, UNDEFINED, number, p_value
from jaxmech.study.folder import RunFolder
from jaxmech.study.tables import missing_columns


@dataclasses.dataclass(frozen=True)
class Figure:
    """caption says what is seen; source is the table that it can be redrawn from."""

    name: str
    figure: go.Figure
    caption: str
    source: str
    wide: bool = False
    kind = "figure"

    @property
    def json(self) -> str:
        """JSON that is safe inside a script element."""
        return self.figure.to_json().replace("<", "\\u003c")

    @property
    def height(self) -> int:
        return int(self.figure.layout.height)


@dataclasses.dataclass(frozen=True)
class Table:
    """rows are formatted cells; the first column heads its row; narrow ones take one of the two columns."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    narrow: bool = False
    kind = "table"


@dataclasses.dataclass(frozen=True)
class Card:
    """A feature: its numbers and, where the run has them, the tokens it promotes and the contexts it fires in."""

    title: str
    facts: Sequence[tuple[str, str]]
    texts: Sequence[tuple[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Cards:
    caption: str
    cards: Sequence[Card]
    kind = "cards"


class Prompt(NamedTuple):
    """A whole prompt as the model reads it: worked examples, then the question that it answers."""

    title: str
    examples: str
    question: str


@dataclasses.dataclass(frozen=True)
class Prompts:
    caption: str
    prompts: Sequence[Prompt]
    folded: bool = True
    kind = "prompts"


@dataclasses.dataclass(frozen=True)
class Text:
    paragraphs: Sequence[str]
    kind = "text"


@dataclasses.dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    lead: str
    blocks: Sequence[Any]


def level(blocks: Sequence[Any]) -> None:
    """Gives figures side by side the height of the taller one; on a phone each keeps its own height."""
    waiting = None
    for block in blocks:
        if block.kind != "figure" or block.wide:
            waiting = None
        elif waiting is None:
            waiting = block
        else:
            height = max(waiting.height, block.height)
            for beside in (waiting, block):
                beside.figure.update_layout(height=height)
            waiting = None


def need(folder: RunFolder, stage: str, name: str) -> pd.DataFrame:
    """A table that the report cannot do without, with all the columns that its stage declares.

    Raises:
      ValueError: the table or a column is missing; names it and what to do.
    """
    if not folder.has_table(stage, name):
        raise ValueError(
            f"report: the run has no table stages/{stage}/{name}.parquet; delete stages/{stage} and run the study again"
        )
    table = folder.table(stage, name)
    if missing := missing_columns(stage, name, table):
        raise ValueError(
            f"report: stages/{stage}/{name}.parquet lacks the column {', '.join(missing)} (it has "
            f"{', '.join(table.columns)}); "
            f"it was written by another version: delete stages/{stage} and run the study again"
        )
    return table


def cells(
    frame: pd.DataFrame, columns: Mapping[str, tuple[str, Callable[[Any], str]]]
) -> tuple[list[str], list[list[str]]]:
    """Header and formatted rows. columns: column -> (heading, format)."""
    rows = [
        [show(None if missing(row[column]) else row[column]) for column, (_, show) in columns.items()]
        for row in frame.to_dict("records")
    ]
    return [heading for heading, _ in columns.values()], rows


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def text(value: Any) -> str:
    return UNDEFINED if value is None else str(value)


def fixed(digits: int, scale: float = 1.0) -> Callable[[Any], str]:
    return lambda value: number(None if value is None else scale * value, digits)


def short_p(value: Any) -> str:
    """A p-value without its letter."""
    return p_value(value).removeprefix("p").lstrip(f"{NBSP} =")


def first_prompt(asked: pd.DataFrame, condition: str) -> dict[Any, Any] | None:
    part = asked[asked["condition"] == condition].sort_values(["family", "pair"], kind="stable")
    return part.iloc[0].to_dict() if len(part) else None
