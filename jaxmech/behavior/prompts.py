"""Parts of prompts: named randomness, amounts, who acts, and the checks of what tokenisation makes of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from typing import Any


def digest(*parts: object) -> int:
    """A number that is the same on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def rng(*parts: object) -> random.Random:
    """A separate random stream for `parts`, so that adding a family changes nothing in the others."""
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


@dataclasses.dataclass(frozen=True)
class Checked:
    """The tokens of `query` after `prefix`, or why they cannot be used (`reason` is "" when they can)."""

    ids: tuple[int, ...]
    reason: str = ""


def check_boundary(tokenizer: Any, prefix: str, query: str, answers: Sequence[str]) -> Checked:
    """Tokens must not straddle prefix and query, nor query and answer: they are encoded separately."""
    # Tokens join neighbours only, so the lines at the two boundaries are enough.
    tail, head = tokenize(tokenizer, query), "\n".join(prefix.split("\n")[-2:])
    if tokenize(tokenizer, head + query) != tokenize(tokenizer, head) + tail:
        return Checked(tuple(tail), "a token straddles the worked examples and the query")
    stem = "\n" + query.rsplit("\n", 1)[-1]
    for answer in answers:
        if tokenize(tokenizer, stem + answer) != tokenize(tokenizer, stem) + tokenize(tokenizer, answer):
            return Checked(tuple(tail), f"a token straddles the query and the answer {answer}")
    return Checked(tuple(tail))


def differ_elsewhere(a: Sequence[int], b: Sequence[int], most: int) -> str:
    """Why two token lists do not differ in one span of at most `most` tokens alone; "" if they do."""
    if len(a) != len(b):
        return f"unequal length: {len(a)} and {len(b)} tokens"
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if not differ:
        return "the two prompts are identical"
    if (span := differ[-1] + 1 - differ[0]) > most:
        return f"tokens differ over {span} positions, the stance has {most}: not one contiguous span"
    return ""
