"""The parse table: what counts as an answer, and why the rest does not."""

import pytest

from jaxmech.behavior.parsing import REASONS, parse_amount

VALID = [
    ("5", 5), ("$5", 5), (" 5.", 5), ("5 coins", 5), ("€10", 10), ("10\n", 10), ("0", 0), ("I give 5.", 5),
    ("5.50", 5.5), ("5 of the 10", 5), ("5 out of 10", 5), ("$3 of $10", 3), ("5/10", 5), ("5, yes, 5", 5),
    ("4 coins of 10", 4),
]  # fmt: skip
INVALID = [
    ("", "empty"), ("   ", "empty"), ("half", "no number"), ("nothing at all", "no number"), ("$", "no number"),
    ("4-5", "range"), ("4 - 5", "range"), ("4 to 5", "range"), ("$4–$5", "range"), ("between 2 and 5", "range"),
    ("4 or 5", "range"), ("up to 5", "range"), ("about 5", "range"), ("at least 2", "range"),
    ("5, then 3", "several amounts"), ("5 of 20", "several amounts"), ("3 4", "several amounts"),
    ("50%", "percentage"), ("50 percent", "percentage"), ("-5", "negative"), ("$-5", "negative"), ("-$5", "negative"),
    ("11", "above stake"), ("1,000", "above stake"), ("100", "above stake"),
    ("I cannot give any of the 10", "refusal"), ("I won’t say", "refusal"), ("Sorry, I don't know", "refusal"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "amount"), VALID)
def test_valid(text, amount):
    assert parse_amount(text, stake=10) == (amount, None)


@pytest.mark.parametrize(("text", "reason"), INVALID)
def test_invalid(text, reason):
    assert parse_amount(text, stake=10) == (None, reason)
    assert reason in REASONS


def test_thousands():
    assert parse_amount("$1,000", stake=1000) == (1000, None)
