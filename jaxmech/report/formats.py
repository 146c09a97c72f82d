"""Numbers as a reader wants them: real minus signs, no false precision, and a mark for what is undefined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

UNDEFINED = "n/a"
NBSP = "\u00a0"
"""Keeps a number and its unit on one line."""


def known(value: float | None) -> TypeGuard[float]:
    """Whether a number is present and finite; undefined numbers come back from JSON as None."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 2) -> str:
    """Fixed decimals with thousands separated: −1,234.50."""
    if not known(value):
        return UNDEFINED
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", "−")


def significant(value: float | None, digits: int = 3) -> str:
    """Some significant digits, whatever the size: 0.00024, 1,240."""
    if not known(value):
        return UNDEFINED
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return number(value, min(decimals, 8))


def percent(share: float | None, digits: int = 0) -> str:
    """0.413 -> 41 %."""
    return f"{number(100 * share, digits)}{NBSP}%" if known(share) else UNDEFINED


def points(value: float | None) -> str:
    """Percentage points, signed."""
    if not known(value):
        return UNDEFINED
    text = number(value, 1)
    return f"{'+' if value > 0 and text.strip('0.') else ''}{text}{NBSP}pp"


def interval(pair: Sequence[float | None] | None, digits: int = 1, *, scale: float = 1.0) -> str:
    """[0.21, 0.34] with scale 100 -> "21.0 to 34.0"."""
    if pair is None:
        return UNDEFINED
    shown = [number(scale * v, digits) for v in pair if known(v)]
    return " to ".join(shown) if len(shown) == len(pair) else UNDEFINED


def coefficient(value: float) -> str:
    """As short as it can be, to two decimals: −0.5, 2."""
    return f"{round(value, 2):g}".replace("-", "−")


def span(low: float, high: float) -> str:
    return f"{coefficient(low)} to {coefficient(high)}"


def p_value(p: float | None) -> str:
    """With its relation: "p = 0.025", "p < 0.001"."""
    if not known(p):
        return f"p {UNDEFINED}"
    if p < 0.001:
        return f"p{NBSP}<{NBSP}0.001"
    return f"p{NBSP}={NBSP}{p:.3f}" if p < 0.1 else f"p{NBSP}={NBSP}{p:.2f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listing(items: Sequence[str]) -> str:
    """a, b and c."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


NAMES = {"s1": "System 1", "s2": "System 2"}


def readable(key: str) -> str:
    """A reader's name for an identifier of the tables."""
    return NAMES.get(key, key.replace("_", " ")[:1].upper() + key.replace("_", " ")[1:])


def wrapped(text: str, width: int = 18) -> str:
    """Line breaks for axis labels, so that a phone keeps room for the data."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)
