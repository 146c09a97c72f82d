"""Custom behaviours: from a table in a file, or from a function of the user's own module."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxmech.behavior.behavior import (
    COLUMNS,
    POLES,
    Behavior,
    Control,
    Words,
    control_of,
    shared_prefix,
    split_of,
)

FORMATS = (".jsonl", ".csv", ".parquet")
_WORDS = Words()


def is_table(name: str) -> bool:
    """Whether a behaviour's name stands for a file of prompts."""
    return Path(name).suffix in FORMATS


def is_own(name: str) -> bool:
    """Whether it stands for a file or for `module:function`."""
    return is_table(name) or ":" in name


def read_behavior(name: str, *, words: Words = _WORDS, rules_out: Mapping[str, str] | None = None) -> Behavior:
    """A behaviour from a table of prompts (.jsonl, .csv, .parquet), or from `module:function`, which returns one.

    A row has family, condition, answers, score, and either `text` or `prefix` and `query`: see
    `jaxmech.behavior.behavior`. What it may leave out: split (then by a hash of the family), pair (then in the order of
    the rows of a family and condition), id. In a .csv, answers and score are JSON. The lines that all `text`s of a
    family begin with are their prefix.

    Args:
      words: what poles and outcome are called. rules_out: control -> what it rules out, in words.

    Raises:
      ValueError: no such file or function, or prompts that no study can use; names the row.
    """
    made = _tabled(Path(name).expanduser(), words, rules_out or {}) if is_table(name) else _made(name)
    _check_splits(made.prompts)
    return made


def _tabled(path: Path, words: Words, rules_out: Mapping[str, str]) -> Behavior:
    if not path.is_file():
        raise ValueError(f"behavior: no file at {path}")
    prompts = complete(_table(path))
    controls = dict.fromkeys(name for name, _ in map(control_of, prompts["condition"].astype(str)) if name)
    if unknown := sorted(set(rules_out) - set(controls)):
        raise ValueError(
            f"controls: {', '.join(unknown)} have no prompts in {path}; it has {', '.join(controls) or 'none'}"
        )
    return Behavior(path.stem, words, prompts, {name: Control(rules_out.get(name, "")) for name in controls})


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """The prompts of a table, with what it may leave out; a `Behavior` refuses rows that cannot be used.

    Raises:
      ValueError: a column that is missing, or one that cannot be completed.
    """
    table = table.copy()
    if "messages" in table:
        raise ValueError("prompts: messages need a model's chat template, which a study does not render yet; give text")
    if missing := [name for name in ("family", "condition", "answers", "score") if name not in table]:
        raise ValueError(f"prompts: the columns {', '.join(missing)} are missing")
    table["family"] = table["family"].astype(str)
    table["score"], answers = table["score"].map(_plain), table["answers"].map(_plain)
    several = any(isinstance(answer, list) for row in answers if isinstance(row, list) for answer in row)
    table["answers"] = [_as_spellings(row) if several and isinstance(row, list) else row for row in answers]
    table["condition"] = [_condition(name) for name in table["condition"]]
    if "text" in table and "query" not in table:
        if bad := [str(i) for i, text in enumerate(table["text"]) if not isinstance(text, str) or not text]:
            raise ValueError(f"prompt {bad[0]}: text: expected a text that ends right before the answer")
        before = table.groupby("family")["text"].agg(shared_prefix)
        table["prefix"] = table["family"].map(before)
        table["query"] = [text[len(prefix) :] for text, prefix in zip(table["text"], table["prefix"], strict=True)]
        table = table.drop(columns="text")
    if "query" not in table:
        raise ValueError("prompts: expected a column text, or query (with a prefix where prompts share one)")
    if "prefix" not in table:
        table["prefix"] = ""
    if "pair" not in table:
        table["pair"] = table.groupby(["family", "condition"]).cumcount()
    elif table["pair"].isna().any():
        raise ValueError("pair: some rows have one and others none; give it in all rows, or in none")
    if "split" not in table:
        table["split"] = table["family"].map(split_of(table["family"]))
    if "id" not in table:
        table["id"] = table["family"] + "/" + table["condition"].astype(str) + "/" + table["pair"].astype(str)
    others = {str(name): table[name].astype(str) for name in table if name not in COLUMNS}  # of one type, to be saved
    return table.assign(**others).reset_index(drop=True)


def _condition(name: Any) -> Any:
    """A control's name without a pole is its neutral condition."""
    alone = isinstance(name, str) and ":" not in name and name not in POLES
    return f"{name}:neutral" if alone else name


def _check_splits(table: pd.DataFrame) -> None:
    for name in ("selection", "test"):
        part = table[(table["split"] == name) & (table["condition"] == "plus")]
        if (count := part["family"].nunique()) < 2:
            raise ValueError(
                f"split {name}: expected at least two families with a pair of plus and minus, got {count}; families "
                "are the unit of inference"
            )


def _plain(value: Any) -> Any:
    """Lists in place of arrays, at every depth."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple | np.ndarray) else value


def _as_spellings(answers: list) -> list:
    """All answers as lists of spellings, as some of them are: a column has one type."""
    return [answer if isinstance(answer, list) else [answer] for answer in answers]


def _table(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold Unicode's other line ends
            return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        table = pd.read_csv(path, keep_default_na=False)
        listed = [name for name in ("answers", "score") if name in table]
        return table.assign(**{name: [json.loads(cell) for cell in table[name]] for name in listed})
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(f"behavior: cannot read {path}: {error}") from error


def _made(name: str) -> Behavior:
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # the folder that the command is called in, as with python -m
    try:
        make = getattr(importlib.import_module(module), function, None)
        if not callable(make):
            raise ImportError(f"{module} has no function {function!r}")
        made = make()  # its own imports are searched for in the same places
    except (ImportError, ValueError) as error:
        raise ValueError(f"behavior: {name} names no function of a module that can be imported: {error}") from error
    finally:
        sys.path.remove("")
    if not isinstance(made, Behavior):
        raise ValueError(f"behavior: {name} returned {type(made).__name__}, expected a jaxmech Behavior")
    return made
