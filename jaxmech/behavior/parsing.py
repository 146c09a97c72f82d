"""From free-form sampled answers to amounts, or to the reason why there is none. Nothing is ever imputed.

An answer is *invalid*, and counted as such, when it names no amount, several, a range, a percentage, one below zero or
above the stake, or when it refuses. What a reader would have to guess is invalid.
"""

from __future__ import annotations

import re
from typing import NamedTuple

REASONS = ("empty", "no number", "refusal", "range", "several amounts", "percentage", "negative", "above stake")

_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_SIGN = r"[$€£]?\s*"
_NUMBERS = re.compile(rf"(?<![\w.])(-\s*)?{_SIGN}(-)?({_NUMBER})(\s*%|\s*percent\b)?")
_RANGE = re.compile(
    rf"({_NUMBER})\s*(?:-|–|—|\bto\b|\bor\b|\buntil\b)\s*{_SIGN}({_NUMBER})|\bbetween\b|\bat (?:least|most)\b|"
    r"\b(?:up to|more than|less than|about|around)\b",
    re.IGNORECASE,
)
_OF_STAKE = re.compile(
    rf"({_NUMBER})(?:\s+\w+)?\s*(?:/|\bout of\b|\bof\b)\s*(?:the\s+)?{_SIGN}({_NUMBER})", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"\b(?:can't|cannot|can not|won't|will not|refuse|decline|unable|not able|as an ai|i'm sorry|i am sorry|don't know|"
    r"do not know|not sure)\b",
    re.IGNORECASE,
)


class Parsed(NamedTuple):
    """amount: what was answered, None when invalid; reason: one of `REASONS`, None when valid."""

    amount: float | None
    reason: str | None


def parse_amount(text: str, *, stake: int) -> Parsed:
    """The amount that `text`, the continuation of a query, names.

    "5", "$5.", "5 coins", "I give 5 of the 10" (with a stake of 10) and "5, yes 5" are valid; anything that leaves a
    choice is not.
    """
    text = text.strip().replace("’", "'")
    if not text:
        return Parsed(None, "empty")
    if _REFUSAL.search(text):
        return Parsed(None, "refusal")
    text = _OF_STAKE.sub(lambda m: m[1] if _value(m[2]) == stake else m[0], text)
    if not re.search(r"\d", text):
        return Parsed(None, "no number")
    if _RANGE.search(text):
        return Parsed(None, "range")
    matches = list(_NUMBERS.finditer(text))
    if any(m[4] for m in matches):
        return Parsed(None, "percentage")
    amounts = {-_value(m[3]) if m[1] or m[2] else _value(m[3]) for m in matches}
    if not amounts:
        return Parsed(None, "no number")
    if len(amounts) > 1:
        return Parsed(None, "several amounts")
    amount = amounts.pop()
    if amount < 0:
        return Parsed(None, "negative")
    return Parsed(None, "above stake") if amount > stake else Parsed(amount, None)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
