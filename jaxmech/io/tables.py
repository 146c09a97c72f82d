"""Rows of tables, for type checkers, which know nothing of what columns hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd


def each_row(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples: `row.column`."""
    yield from table.itertuples()
