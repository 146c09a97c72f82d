"""What a behaviour is: a table of prompts with their allowed answers and what each answer is worth.

A row of `prompts`: id, family (prompts that share a wording; the unit of every inference), split ("selection",
"development" or "test"), pair (its number within the family), condition, prefix and query (`prefix + query` ends right
before the answer; a prefix that several rows share is computed once), answers (a list; an entry may be a list of
strings that mean the same) and score (a list, what each answer is worth, from 0 to 1). Other columns are kept.

A condition is "plus" or "minus", the two poles, which differ only in what is studied; "neutral", neither; or a
control's pole, such as "valence:plus", "valence:minus", "valence:neutral".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxmech.behavior.prompts import digest

COLUMNS = ("id", "family", "split", "pair", "condition", "prefix", "query", "answers", "score")
SPLITS = ("selection", "development", "test")
POLES = ("plus", "minus", "neutral")
EXCLUDED = ("family", "split", "pair", "condition", "words", "reason")
"""Columns of `exclusions`."""


class Parsed(NamedTuple):
    """What a sampled text says: a score, or None and the reason."""

    score: float | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Control:
    """Prompts that tell the behaviour from something else.

    Attributes:
      rules_out: what the behaviour might be instead, in words: "that it is ...".
      label, poles: display names of it and of its two poles.
      moves: whether it should move as the behaviour does (held-out words), rather than not at all.
      gate: whether the behaviour's gate and the rule for features compare with it.
      needed: whether a cause is claimed only if it was tried.
      flips: whether it asks the behaviour's own pairs after worked examples that teach the reverse. What the examples
        teach then changes its sign, and what the poles mean to the model does not.
      oriented: whether its poles have an order; where they have none, only the size of a difference means something.
    """

    rules_out: str = ""
    label: str = ""
    poles: tuple[str, str] = ("plus", "minus")
    moves: bool = False
    gate: bool = True
    needed: bool = False
    flips: bool = False
    oriented: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """Another task to which the behaviour may carry over.

    Attributes:
      prompts: neutral ones, with a column `family`, one a family.
      expected_sign: of the score's change towards plus; 0 where that is open.
      human: what people do, for the reader.
      home: whether it is the behaviour's own task in other words, which is not transfer.
      label: its display name.
      kind: of tasks that are reported apart, such as "strategic"; "" for the others.
      stance_prompts: the same families after worked examples that show both poles, or None.

    Raises:
      ValueError: another expected_sign, or stance_prompts of other families.
    """

    prompts: pd.DataFrame
    expected_sign: int = 1
    human: str = ""
    home: bool = False
    label: str = ""
    kind: str = ""
    stance_prompts: pd.DataFrame | None = None

    def __post_init__(self):
        if self.expected_sign not in (-1, 0, 1):
            raise ValueError(f"expected_sign: expected -1, 0 or 1, got {self.expected_sign!r}")
        if self.stance_prompts is None:
            return
        check_prompts(self.stance_prompts, "stance prompt", ("family", "prefix", "query", "answers", "score"))
        if list(self.stance_prompts["family"]) != list(self.prompts["family"]):
            raise ValueError("stance_prompts: expected the families of prompts, in their order")


@dataclasses.dataclass(frozen=True)
class Words:
    """What things are called.

    Attributes:
      plus, minus: the two poles.
      varies: what the two prompts of a pair differ in.
      outcome: what the score means; it is shown in per cent.
      levels: what scores of 0, one half and 1 are called.
      tasks: what other tasks are called.
      setting: how the poles are put to the model, as the beginning of a sentence, ending in ", ".
      about: whose method and prompts these are, a paragraph of the report.
    """

    plus: str = "plus"
    minus: str = "minus"
    varies: str = "condition"
    outcome: str = "score"
    levels: tuple[str, str, str] = ("score 0", "score one half", "score 1")
    tasks: str = "tasks"
    setting: str = ""
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Behavior:
    """A behaviour as data: all that a study and its report know of it.

    Attributes:
      prompts: see above. exclusions: pairs that were built and left out, with the columns of `EXCLUDED`.
      controls: name -> what it rules out. transfer: name -> another task.
      parse: (row, text) -> the score of a sampled answer.
      factors: columns of prompts that pairs differ in from one another, such as a stake: the shift is shown by each.

    Raises:
      ValueError: prompts that no study can use; names the row.
    """

    name: str
    words: Words
    prompts: pd.DataFrame
    controls: Mapping[str, Control] = dataclasses.field(default_factory=dict)
    transfer: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    exclusions: pd.DataFrame = dataclasses.field(default_factory=lambda: pd.DataFrame(columns=EXCLUDED))
    parse: Callable[[Mapping[str, Any], str], Parsed] = dataclasses.field(default_factory=lambda: parse_choice)
    factors: tuple[str, ...] = ()

    def __post_init__(self):
        check_prompts(self.prompts)
        check_families(self.prompts)
        if missing := [name for name in EXCLUDED if name not in self.exclusions]:
            raise ValueError(f"exclusions: the columns {', '.join(missing)} are missing")
        if missing := [name for name in self.factors if name not in self.prompts]:
            raise ValueError(f"factors: the prompts have no column {', '.join(missing)}")
        for name, task in self.transfer.items():
            check_prompts(task.prompts, f"transfer {name}, prompt", ("family", "prefix", "query", "answers", "score"))
            if twice := task.prompts["family"][task.prompts["family"].duplicated()].tolist():
                raise ValueError(f"transfer {name}: family {twice[0]} has several prompts; a family has one")
        unsaid = {name for name, _ in map(control_of, self.prompts["condition"]) if name} - set(self.controls)
        if unsaid:
            raise ValueError(f"controls: {', '.join(sorted(unsaid))} has prompts, but not what it rules out")
        if len(flipping := [name for name, control in self.controls.items() if control.flips]) > 1:
            raise ValueError(f"controls: expected at most one that flips, got {', '.join(flipping)}")

    def __repr__(self) -> str:
        families, controls = self.prompts["family"].nunique(), len(self.controls)
        return f"Behavior({self.name!r}: {len(self.prompts)} prompts in {families} families, {controls} controls)"

    def paired(self, split: str) -> list[str]:
        """The controls that have pairs in at least two families of a split."""
        part = self.prompts[self.prompts["split"] == split]
        count = part.groupby("condition")["family"].nunique()
        return [name for name in self.controls if count.get(poles(name)[0], 0) >= 2]

    def gating(self, split: str) -> list[str]:
        """Those of them that the gate and the rule compare with: which should not move."""
        controls = {name: self.controls[name] for name in self.paired(split)}
        return [name for name, c in controls.items() if c.gate and not c.moves and not c.flips]

    def said(self) -> dict[str, Any]:
        """Its name, its words and what its controls rule out, as JSON keeps them."""
        controls = {name: dataclasses.asdict(control) for name, control in self.controls.items()}
        return {"name": self.name, **dataclasses.asdict(self.words), "controls": controls}


def poles(control: str | None = None) -> tuple[str, str]:
    """The conditions of the two poles, of the behaviour itself or of a control."""
    return (f"{control}:plus", f"{control}:minus") if control else ("plus", "minus")


def control_of(condition: str) -> tuple[str | None, str]:
    """A condition's control (None for the behaviour itself) and its pole."""
    if condition in POLES:
        return None, condition
    name, _, pole = condition.partition(":")
    return name, pole


def check_prompts(prompts: pd.DataFrame, row: str = "prompt", columns: Sequence[str] = COLUMNS) -> None:
    """Refuses a table that cannot be a behaviour's prompts.

    Raises:
      ValueError: a column that is missing, no prompts of a pole, or a row with a value that cannot be used.
    """
    if missing := [name for name in columns if name not in prompts]:
        raise ValueError(f"{row}s: the columns {', '.join(missing)} are missing; a prompt has {', '.join(columns)}")
    for i, record in enumerate(prompts.to_dict("records")):
        if fault := _fault(record):
            raise ValueError(f"{row} {record.get('id', i)}: {fault}")
    if "condition" in columns and (none := [pole for pole in poles() if pole not in set(prompts["condition"])]):
        raise ValueError(f"{row}s: none has the condition {' or '.join(none)}; a behaviour needs both poles")


def check_families(prompts: pd.DataFrame) -> None:
    """Refuses prompts that are not whole pairs, one of a kind, each family in one split.

    Raises:
      ValueError: names the prompt or the family.
    """
    place = ["family", "condition", "pair"]
    if twice := prompts["id"][prompts["id"].duplicated() | prompts.duplicated(place)].tolist():
        raise ValueError(f"prompt {twice[0]}: occurs twice; an id, or a family's pair in a condition, names one prompt")
    split = prompts.groupby("family")["split"].nunique()
    if len(torn := split[split > 1]):
        raise ValueError(f"family {torn.index[0]}: is in several splits; prompts that share a wording belong in one")
    where = {
        str(name): set(map(tuple, part[["family", "pair"]].to_numpy())) for name, part in prompts.groupby("condition")
    }
    for control in dict.fromkeys(control_of(condition)[0] for condition in where):
        plus, minus = poles(control)
        if alone := where.get(plus, set()) ^ where.get(minus, set()):
            family, pair = min(alone, key=str)
            raise ValueError(
                f"family {family}, pair {pair}: expected a prompt of both {plus} and {minus}, got one of them"
            )


def _fault(row: Mapping[Any, Any]) -> str:
    answers, score = row["answers"], row["score"]
    if not isinstance(row["query"], str) or not row["query"]:
        return f"query: expected a text that ends right before the answer, got {row['query']!r}"
    if not isinstance(row["prefix"], str):
        return f"prefix: expected a text, or '' for none, got {row['prefix']!r}"
    if not _several(answers) or len(answers) < 2:
        return f"answers: expected at least two in a list, got {answers!r}"
    if not _several(score) or len(score) != len(answers):
        return f"score: expected a number for each of {len(answers)} answers, got {score!r}"
    if not all(isinstance(s, int | float | np.number) and not isinstance(s, bool) and 0 <= s <= 1 for s in score):
        return f"score: expected numbers from 0 to 1, got {list(score)}; bring another scale to that range"
    if "split" in row and row["split"] not in SPLITS:
        return f"split: expected one of {', '.join(SPLITS)}, got {row['split']!r}"
    if "condition" in row and (not isinstance(row["condition"], str) or control_of(row["condition"])[1] not in POLES):
        return (
            f"condition: expected plus, minus, neutral or a control's, such as valence:plus, got {row['condition']!r}"
        )
    return ""


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def spellings(answer: str | Sequence[str]) -> Sequence[str]:
    """The strings that an answer stands for."""
    return [answer] if isinstance(answer, str) else answer


def parse_choice(row: Mapping[str, Any], text: str) -> Parsed:
    """The score of the allowed answer that a sampled text begins with: the longest one not followed by more of a
    word."""
    text, matches = text.strip(), []
    for score, answer in zip(row["score"], row["answers"], strict=True):
        for spelling in spellings(answer):
            said = str(spelling).strip()
            if text.startswith(said) and not text[len(said) : len(said) + 1].isalnum():
                matches.append((len(said), float(score)))
    if not matches:
        return Parsed(None, "no allowed answer" if text else "empty")
    return Parsed(max(matches)[1], None)


def shared_prefix(texts: Iterable[str]) -> str:
    """What all texts begin with, up to the end of a line and leaving something of each; "" if there is no such line."""
    texts = list(texts)
    same = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        same += 1
    same = min(same, min(map(len, texts)) - 1)
    return texts[0][: texts[0].rfind("\n", 0, max(same, 0)) + 1]


def split_of(families: Iterable[str]) -> dict[str, str]:
    """A split for each family, by a hash of its name: half select, a tenth develop, the rest test.

    A family keeps its split whatever others there are, as long as there are enough: where selection or test would have
    fewer than two, the nearest by hash are moved there.
    """
    place = {name: digest("split of a family", name) % 10_000 / 10_000 for name in sorted(set(families))}
    out = {name: "selection" if x < 0.5 else "development" if x < 0.6 else "test" for name, x in place.items()}
    for short, goal in (("selection", 0.5), ("test", 0.6)):
        while len(place) >= 4 and list(out.values()).count(short) < 2:
            spare = [name for name, split in out.items() if split == "development"] or [
                name for name, split in out.items() if split != short
            ]
            out[min(spare, key=lambda name: abs(place[name] - goal))] = short
    return out
