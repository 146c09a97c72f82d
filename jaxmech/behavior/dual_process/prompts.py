"""Dual-process items as prompts, in two arms: *demand* (conflict against no conflict) and *instruction*.

The instruction arm asks the same conflict item after "think it through" or after "first instinct"; the instruction
stands before the item, so that both prompts end in the same tokens.
"""

from __future__ import annotations

import pandas as pd

from jaxmech.behavior import prompts
from jaxmech.behavior.dual_process.items import GENERATORS, Generator, Twins
from jaxmech.behavior.rendering import PLAIN, Rendering

# (think, instinct)
INSTRUCTIONS: tuple[tuple[str, str], ...] = (
    ("Think it through carefully.", "Answer with your first instinct."),
    ("Take your time and reason.", "Be quick and just guess."),
    ("Work it out step by step.", "Say what springs to mind."),
    ("Use logic, not your gut.", "Use your gut, not logic."),
    ("Deliberate before you answer.", "Answer before you deliberate."),
    ("Check the numbers slowly.", "Go with the first feeling."),
)

COLUMNS = (
    "id", "item", "family", "generator", "arm", "condition", "prefix", "query", "text", "correct", "lure", "answers",
    "score", "digits", "words", "option",
)  # fmt: skip


def build_items(*, per_generator: int = 16, seed: int = 0, rendering: Rendering = PLAIN) -> pd.DataFrame:
    """`per_generator` distinct items of every generator, four prompts each.

    Returns:
      Columns: item, shared by the two prompts of an arm that are compared; family (generator x wording of the story in
      the demand arm, generator x wording of the instruction in the instruction arm), generator, arm ("demand" |
      "instruction"), condition ("conflict" | "no_conflict", or "think" | "instinct"), prefix (worked plain questions,
      shared within a generator), query (ends right before the answer), text (both), correct, lure (equal in
      "no_conflict"), answers ([right, wrong]: what the model chooses between) with score [1, 0], and the covariates
      digits and words (of the query) and option (which of the offered options is right: -1 first, 1 second, 0 where
      the question offers none).

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


def _distinct(generator: Generator, count: int, seed: int) -> list[tuple[int, Twins]]:
    """Items whose conflict questions all differ, wordings in turn."""
    random, seen = prompts.rng("dual process", seed, generator.name), set()
    out: list[tuple[int, Twins]] = []
    missed = 0
    while len(out) < count and missed < 50 * (len(out) + 20):  # draws in a row without a new item: there are no more
        missed += 1
        wording = len(out) % generator.wordings
        twins = generator.make(random, wording)
        if twins.conflict not in seen and twins.correct != twins.lure and twins.easy != twins.foil:
            seen.add(twins.conflict)
            missed = 0
            out.append((wording, twins))
    if len(out) < count:
        raise ValueError(f"per_generator: {generator.name} has only about {len(out)} distinct items, got {count}")
    return out


def _demand(rendering: Rendering, generator: Generator, index: int, wording: int, twins: Twins) -> list[dict]:
    asked = {
        "conflict": (twins.conflict, twins.correct, twins.lure, twins.lure),
        "no_conflict": (twins.no_conflict, twins.easy, twins.easy, twins.foil),
    }
    return [_row(rendering, generator, index, "demand", name, wording, *parts) for name, parts in asked.items()]


def _instruction(rendering: Rendering, generator: Generator, index: int, twins: Twins) -> list[dict]:
    wording = index % len(INSTRUCTIONS)
    answers = twins.correct, twins.lure, twins.lure
    return [
        _row(rendering, generator, index, "instruction", name, wording, f"{said} {twins.conflict}", *answers)
        for name, said in zip(("think", "instinct"), INSTRUCTIONS[wording], strict=True)
    ]


def _row(
    rendering: Rendering, generator: Generator, index: int, arm: str, condition: str, wording: int, question: str,
    correct: str, lure: str, wrong: str,
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
        "option": _option(generator, question, correct, wrong),
    }  # fmt: skip


def _option(generator: Generator, question: str, correct: str, wrong: str) -> int:
    """-1 when the right answer is offered before the wrong one, 1 after it, 0 when neither is offered."""
    if generator.numeric:
        return 0
    return -1 if question.rfind(f" {correct}") < question.rfind(f" {wrong}") else 1
