"""The pieces every prompt is made of."""

import pytest

from jaxmech.behavior.prompts import allowed_amounts, check_boundary, differ_elsewhere, person
from jaxmech.behavior.rendering import PLAIN
from tests.behavior.fake_tokenizer import FakeTokenizer


def test_amounts():
    assert allowed_amounts(20) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert allowed_amounts(9) == list(range(10)) and len(allowed_amounts(1000)) == 11
    for stake in (0, 25, -10):
        with pytest.raises(ValueError, match="stake"):
            allowed_amounts(stake)


def test_person():
    assert person("miller", "kind") == {"a": "a kind miller", "the": "the kind miller", "A": "A kind miller",
                                        "The": "The kind miller"}  # fmt: skip
    assert person("angler")["a"] == "an angler" and person("angler", "tall")["a"] == "a tall angler"
    assert person("miller", "altruistic")["A"] == "An altruistic miller"
    assert person("baker", after="who likes small numbers")["the"] == "the baker who likes small numbers"


def test_plain_text():
    assert PLAIN.examples([("How many?", "3 coins")], " ") == "Q: How many?\nA: 3 coins\n"
    assert PLAIN.query("How much?", " $") == "Q: How much?\nA: $"


@pytest.mark.parametrize(
    ("a", "b", "words", "expected"),
    [
        ([1, 2, 3], [1, 9, 3], 1, ""),
        ([1, 2, 3, 4], [1, 9, 8, 4], 2, ""),
        ([1, 2, 3], [1, 2, 3, 4], 1, "unequal length"),
        ([1, 2, 3], [1, 2, 3], 1, "identical"),
        ([2, 5, 5, 5, 2], [9, 5, 5, 5, 9], 2, "not one contiguous span"),
    ],
)
def test_span(a, b, words, expected):
    found = differ_elsewhere(a, b, words)
    assert expected in found and bool(found) == bool(expected)


def test_a_token_over_the_boundary_is_named():
    assert check_boundary(FakeTokenizer(), "Q: a\nA: 1\n", "Q: b\nA: $", ["0", "10"]).reason == ""
    assert "prefix" not in check_boundary(FakeTokenizer(), "", "Q: b\nA: ", ["0"]).reason
    assert "worked examples and the query" in check_boundary(FakeTokenizer(), "Q: a\nA: on", "e\nA: ", ["0"]).reason
