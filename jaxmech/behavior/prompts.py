"""Question-and-answer prompts: worked examples, queries, and the check that a pair differs in its stance only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "id", "family", "scenario", "split", "pair", "condition", "stance", "frame", "stake", "prefix", "query",
    "amounts", "score", "reverse", "span_start", "span_end",
)  # fmt: skip


def digest(*parts: object) -> int:
    """A number that is the same on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def rng(*parts: object) -> random.Random:
    """A random stream of its own for `parts`, so that adding a family changes nothing in the others."""
    return random.Random(digest(*parts))


def allowed_amounts(stake: int) -> list[int]:
    """11 equal steps 0..stake; every whole number when a stake below 20 has no such steps."""
    if stake < 1:
        raise ValueError(f"stake: expected a whole number of at least 1, got {stake}")
    if stake % 10 == 0:
        return [stake * i // 10 for i in range(11)]
    if stake < 20:
        return list(range(stake + 1))
    raise ValueError(f"stake: expected a multiple of 10, or any whole number below 20, got {stake}")


def memoized(tokenizer: Any) -> Any:
    """The same tokenizer, remembering what it has seen: prompts repeat their last lines and answers."""
    ids = functools.cache(lambda text: tokenizer(text, add_special_tokens=False))
    return lambda text, add_special_tokens=False: ids(text)


def tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def person(noun: str, stance: str = "", after: str = "") -> dict[str, str]:
    """The four ways a wording may name who decides: `{a}`, `{the}` and, at the start of a sentence, `{A}`, `{The}`."""
    core = " ".join(part for part in (stance, noun, after) if part)
    article = "an" if core[0] in "aeiou" else "a"
    return {"a": f"{article} {core}", "the": f"the {core}", "A": f"{article.capitalize()} {core}", "The": f"The {core}"}


def line(question: str, sign: str = "") -> str:
    """A query, ending right before the digits of its answer."""
    return f"Q: {question}\nA: {sign}"


def worked(question_and_answers: Sequence[tuple[str, int]], sign: str, unit: str = "") -> str:
    """Worked examples, one after the other; `unit` follows the number where no sign stands before it."""
    tail = f" {unit}" if unit and not sign else ""
    return "".join(f"{line(q, sign)}{a}{tail}\n" for q, a in question_and_answers)


@dataclasses.dataclass(frozen=True)
class Checked:
    """The tokens of `query` behind `prefix`, or why they cannot be used (`reason` is "" when they can)."""

    ids: tuple[int, ...]
    reason: str = ""


def check_boundary(tokenizer: Any, prefix: str, query: str, amounts: Sequence[int]) -> Checked:
    """Tokens must not straddle prefix and query, nor query and answer: both are scored apart from each other."""
    # Tokens join neighbours only, so the lines at the two boundaries are enough to look at.
    tail, head = tokenize(tokenizer, query), "\n".join(prefix.split("\n")[-2:])
    if tokenize(tokenizer, head + query) != tokenize(tokenizer, head) + tail:
        return Checked(tuple(tail), "a token straddles the worked examples and the query")
    stem = "\n" + query.rsplit("\n", 1)[-1]
    for amount in amounts:
        if tokenize(tokenizer, stem + str(amount)) != tokenize(tokenizer, stem) + tokenize(tokenizer, str(amount)):
            return Checked(tuple(tail), f"a token straddles the query and the answer {amount}")
    return Checked(tuple(tail))


def stance_span(a: Sequence[int], b: Sequence[int], max_tokens: int) -> tuple[int, int] | str:
    """[start, end) of the one span in which two token lists differ, or the reason there is no such span."""
    if len(a) != len(b):
        return f"unequal length: {len(a)} and {len(b)} tokens"
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if not differ:
        return "the two prompts are identical"
    start, end = differ[0], differ[-1] + 1
    if end - start > max_tokens:
        return f"tokens differ over {end - start} positions, the stance has {max_tokens}: not one contiguous span"
    return start, end
