"""Dual-process items as prompts, in two arms: *demand* (conflict against no conflict) and *instruction*.

The instruction arm asks the same conflict item after "think it through" or after "first instinct"; the instruction
stands before the item, so that both prompts end in the same tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxmech.behavior import prompts
from jaxmech.behavior.dual_process.items import GENERATORS, Generator
from jaxmech.behavior.dual_process.twins import Twins
from jaxmech.behavior.rendering import PLAIN, Rendering

# (think, instinct), as many words in either
INSTRUCTIONS: tuple[tuple[str, str], ...] = (
    ("Think it through very carefully.", "Answer with your first instinct."),
    ("Take your time and reason.", "Be quick and just guess."),
    ("Work it out step by step.", "Say at once what you feel."),
    ("Use logic, not your gut.", "Use your gut, not logic."),
    ("Deliberate before you answer.", "Answer before you deliberate."),
    ("Check every part slowly twice.", "Go with the first feeling."),
)

ARMS = {"demand": ("conflict", "no_conflict"), "instruction": ("think", "instinct")}
"""The two conditions of each arm, first the one that asks for System 2."""

COLUMNS = (
    "id", "item", "family", "generator", "arm", "condition", "prefix", "query", "text", "correct", "lure", "answers",
    "score", "digits", "words", "option", "level",
)  # fmt: skip


def build_items(*, per_generator: int = 16, seed: int = 0, rendering: Rendering = PLAIN) -> pd.DataFrame:
    """`per_generator` distinct items of every generator, four prompts each.

    Returns:
      Columns: item, shared by the two prompts of an arm that are compared; family (generator x wording of the story in
      the demand arm, generator x wording of the instruction in the instruction arm), generator, arm ("demand" |
      "instruction"), condition ("conflict" | "no_conflict", or "think" | "instinct"), prefix (worked plain questions,
      shared within a generator), query (ends right before the answer), text (both), correct, lure (equal in
      "no_conflict"), answers ([right, wrong]: what the model chooses between) with score [1, 0], the covariates
      digits and words (of the query) and option (which of the offered options is right: -1 first, 1 second, 0 where
      the question offers none), and level (steps of arithmetic, 1 to 5; 0 elsewhere).

    Raises:
      ValueError: a generator has fewer than `per_generator` distinct items.
    """
    if per_generator < 1:
        raise ValueError(f"per_generator: expected at least 1, got {per_generator}")
    rows = []
    for generator in GENERATORS:
        for index, (wording, twins) in enumerate(_distinct(generator, per_generator, seed)):
            rows += _demand(rendering, generator, index, wording, twins)
            rows += _instruction(rendering, generator, index, twins)
    return pd.DataFrame(rows, columns=COLUMNS)


def shared_tail(items: pd.DataFrame, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """How many of each query's last tokens are read, [n]: all of them in the demand arm, and in the instruction arm
    those that both prompts of the pair end in, which leaves the instruction itself out.

    Args:
      tokens: the ids of each row's query.
    """
    counts = np.array([len(ids) for ids in tokens])
    rows = pd.Series(range(len(items)))[(items["arm"] == "instruction").to_numpy()]
    for _, (first, second) in rows.groupby(items["item"].to_numpy()[rows]):
        shared = len(os.path.commonprefix([list(tokens[first])[::-1], list(tokens[second])[::-1]]))
        counts[[first, second]] = shared
    return counts


def _distinct(generator: Generator, count: int, seed: int) -> list[tuple[int, Twins]]:
    """Items whose questions all differ, wordings in turn."""
    random = prompts.rng("dual process", seed, generator.name)
    seen: set[str] = set()
    out: list[tuple[int, Twins]] = []
    missed = 0
    while len(out) < count and missed < 50 * (len(out) + 20):  # draws in a row without a new item: there are no more
        missed += 1
        wording = len(out) % generator.wordings
        twins = generator.make(random, wording)
        asked = {twins.conflict, twins.no_conflict}
        if twins.distinct and not asked & seen:
            seen |= asked
            missed = 0
            out.append((wording, twins))
    if len(out) < count:
        raise ValueError(f"per_generator: {generator.name} has only about {len(out)} distinct items, got {count}")
    return out


def _demand(rendering: Rendering, generator: Generator, index: int, wording: int, twins: Twins) -> list[dict]:
    asked = (
        ("conflict", twins.conflict, twins.correct, twins.lure, twins.lure, twins.level),
        ("no_conflict", twins.no_conflict, twins.easy, twins.easy, twins.foil, min(twins.level, 1)),
    )
    return [_row(rendering, generator, index, "demand", wording, *parts) for parts in asked]


def _instruction(rendering: Rendering, generator: Generator, index: int, twins: Twins) -> list[dict]:
    wording = index % len(INSTRUCTIONS)
    answers = twins.correct, twins.lure, twins.lure, twins.level
    return [
        _row(rendering, generator, index, "instruction", wording, name, f"{said} {twins.conflict}", *answers)
        for name, said in zip(ARMS["instruction"], INSTRUCTIONS[wording], strict=True)
    ]


def _row(
    rendering: Rendering, generator: Generator, index: int, arm: str, wording: int, condition: str, question: str,
    correct: str, lure: str, wrong: str, level: int,
) -> dict:  # fmt: skip
    # Digits stand after a space of their own; a word carries its space as part of its first token.
    lead, space = (" ", "") if generator.numeric else ("", " ")
    query = rendering.query(question, lead)
    prefix = rendering.examples([(q, space + a) for q, a in generator.examples], lead)
    item = f"{generator.name}.{index}"
    return {
        "id": f"{item}/{arm}/{condition}", "item": item, "family": f"{generator.name}.{arm}.{wording}",
        "generator": generator.name, "arm": arm, "condition": condition, "prefix": prefix, "query": query,
        "text": prefix + query, "correct": correct, "lure": lure, "answers": [space + correct, space + wrong],
        "score": [1.0, 0.0], "digits": sum(c.isdigit() for c in query), "words": len(query.split()),
        "option": _option(generator, question, correct, wrong), "level": level,
    }  # fmt: skip


def _option(generator: Generator, question: str, correct: str, wrong: str) -> int:
    """-1 when the right answer is offered before the wrong one, 1 after it, 0 when neither is offered."""
    if not generator.offers:
        return 0
    first, second = (max(m.start() for m in re.finditer(rf"\b{answer}\b", question)) for answer in (correct, wrong))
    return -1 if first < second else 1
