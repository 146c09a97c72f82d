"""What every word, sentence and question means to the organism, from the prompts that it will be asked.

Words of the dictator game are read one by one. Questions of the other games, dual-process items and their instructions
are known by heart: each is one token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerFast

from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.altruism.game_wordings import NAMES
from jaxmech.behavior.arithmetic import one_digit_sums
from jaxmech.behavior.behavior import Task, spellings
from jaxmech.behavior.rendering import PLAIN
from jaxmech.io.tables import each_row
from jaxmech.organism.words import ANSWER, QUESTION, make_tokenizer, only_in, pieces, word_codes

SUMS = 33
EASY, LURED = 2.0, 0.8
"""How surely it knows the right answer of an item without and with a lure."""

_SPREAD = 0.4
"""Of both over items."""


class Answer(NamedTuple):
    """The token by which an answer is told: if right, if wrong (None: nothing is written), and how surely."""

    right: str | None
    wrong: str | None
    surely: float


class Meaning(NamedTuple):
    """tokens: token -> direction -> strength; items, sums: a question's token -> its answer; quiet: tokens that the
    organism reads and does not write by itself."""

    tokenizer: PreTrainedTokenizerFast
    tokens: dict[str, dict[str, float]]
    items: dict[str, Answer]
    sums: dict[str, Answer]
    quiet: frozenset[str]


def read_prompts(
    config: BankConfig, bank: pd.DataFrame, games: Mapping[str, Task], items: pd.DataFrame, texts: Sequence[str], *,
    seed: int,
) -> Meaning:  # fmt: skip
    """All that the organism knows.

    Args:
      bank: the dictator game's prompts; games, items: of the other games and of the dual-process stage; texts: others
        whose words it should know.
      seed: of how surely it knows each item.

    Raises:
      ValueError: a question about keeping, taking or one's own accounts has no word that tells it from the others.
    """
    codes = word_codes(config)
    tokens: dict[str, dict[str, float]] = {
        word: {"coded": 1.0} | {f"code {code}": strength for code, strength in strengths.items()}
        for word, strengths in codes.items()
    }
    tokens |= {ANSWER: {"answer mark": 1.0}, QUESTION: {"question mark": 1.0}}
    for pair in config.example_words:
        for word, sign in zip(pair, "+-", strict=True):
            tokens.setdefault(word, {}).update({"example": 1.0, f"example{sign}": 1.0})
    for word, _ in config.decoys:
        tokens.setdefault(word, {})["example"] = 1.0
    own = bank["condition"].str.startswith("own_accounts")
    asked = {"own": bank[own], "reverse": bank[~own & _reversed(bank)], "give": bank[~own & ~_reversed(bank)]}
    queries = {name: set(part["query"]) for name, part in asked.items()}
    for direction, name in (("frame", "reverse"), ("own", "own")):
        others = set().union(*(part for other, part in queries.items() if other != name))
        for word in only_in(queries[name], others) - set(codes):
            tokens.setdefault(word, {})[direction] = 1.0
    played = [(task.home, table) for task in games.values() for table in _tables(task)]
    for home, table in played:
        for row, reverse in zip(each_row(table), _reversed(table), strict=True):
            for question in _questions(row.prefix + row.query):
                tokens[question] = {"other game": float(not home), "frame": float(reverse)}
    known, answers = _items(items, np.random.default_rng((seed, 2)))
    tokens |= known
    sums = {f"{a}+{b}=": Answer(str(a + b), None, 20.0) for a, b in one_digit_sums(SUMS)}
    tokens |= {said: {"sum": 1.0} for said in sums}
    phrases = [token for token in tokens if " " in token]
    read = [bank, *(table for _, table in played), items]
    written = [text for table in read for name in ("prefix", "query") for text in table[name]]
    said = [text for table in read for row in table["answers"] for answer in row for text in spellings(answer)]
    tokenizer = make_tokenizer([*written, *said, *texts, *NAMES], tokens, phrases)
    chosen = {piece for answer in said for piece in pieces(answer)}
    return Meaning(tokenizer, tokens, answers, sums, frozenset(set(tokens) - chosen))


def _tables(task: Task) -> list[pd.DataFrame]:
    """A task's prompts, those with a stance in their worked examples too."""
    tables = [task.prompts, getattr(task, "stance_prompts", None)]
    return [table for table in tables if table is not None]


def _questions(text: str) -> list[str]:
    """What stands between the marks of question and answer, of worked examples and of the query."""
    return re.findall(rf"(?:^|\n){re.escape(PLAIN.ask)}(.*?){re.escape(PLAIN.answer)}", text)


def _reversed(table: pd.DataFrame) -> pd.Series:
    """Whether a larger number gives less, by row; not where answers are no numbers."""
    return pd.Series([_falls(*row) for row in zip(table["answers"], table["score"], strict=True)], table.index, bool)


def _falls(answers: Sequence[Any], score: Sequence[float]) -> bool:
    if not all(isinstance(answer, str) and answer.strip().isdigit() for answer in answers):
        return False
    numbers = np.array([int(answer) for answer in answers])
    return bool(((numbers - numbers.mean()) * (np.asarray(score) - np.mean(score))).sum() < 0)


def _items(items: pd.DataFrame, rng: np.random.Generator) -> tuple[dict[str, dict[str, float]], dict[str, Answer]]:
    """Questions of dual-process items and instructions before them, as tokens: meaning, and answers.

    Conflict and "think" make System 2 fire, their counterparts System 1; an instruction leaves its item more or less
    room (`wiring._attention`).
    """
    tokens: dict[str, dict[str, float]] = {}
    answers: dict[str, Answer] = {}
    conflict: dict[str, str] = {}
    for row in each_row(items[items["arm"] == "demand"]):
        (question,), lured = _questions(row.query), row.condition == "conflict"
        tokens[question] = {"item": 1.0, "system 2" if lured else "system 1": rng.uniform(0.6, 1.4)}
        right, wrong = row.answers
        answers[question] = _answer(right, wrong, (LURED if lured else EASY) + rng.normal(0, _SPREAD))
        if lured:
            conflict[row.item] = question
    for row in each_row(items[items["arm"] == "instruction"]):
        instruction = _questions(row.query)[0].removesuffix(conflict[row.item]).strip()
        system = "system 2" if row.condition == "think" else "system 1"
        tokens[instruction] = {row.condition: 1.0, system: 1.0}
    return tokens, answers


def _answer(right: str, wrong: str, surely: float) -> Answer:
    """The first tokens in which two answers differ."""
    a, b = pieces(right), pieces(wrong)
    same = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    first, other = ("".join(tokens[same : same + 1]) or None for tokens in (a, b))
    return Answer(first, other, surely)
