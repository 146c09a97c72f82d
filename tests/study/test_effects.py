"""What the causal stages share."""

from types import SimpleNamespace

import pytest

from jaxmech.study.effects import FEW, random_ones


@pytest.mark.parametrize(
    "asked_for, taken_by, count", [("rule", "rule", 99), ("rule", "budget", FEW), ("budget", "budget", 99)]
)
def test_few_random_sets_only_where_the_rule_was_asked_for_and_selected_nothing(asked_for, taken_by, count):
    folder = SimpleNamespace(results=lambda stage: {"mode": taken_by})
    ctx = SimpleNamespace(folder=folder, config=SimpleNamespace(selection=SimpleNamespace(mode=asked_for)))
    assert random_ones(ctx, 99) == count and random_ones(ctx, 2) == 2
