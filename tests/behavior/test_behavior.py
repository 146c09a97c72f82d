"""What a study knows of a behaviour's controls."""

import dataclasses

import pytest

from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from tests.behavior.fake_tokenizer import FakeTokenizer


@pytest.fixture(scope="module")
def behavior():
    return altruism(BankConfig(selection=2, development=0, test=2), FakeTokenizer())


def test_the_gate_and_the_rule_compare_with_controls_that_should_not_move(behavior):
    assert behavior.gating("selection") == ["placebo", "valence", "number"]
    assert {"flipped", "unstanced", "heldout"} <= set(behavior.paired("test")) - set(behavior.gating("test"))


def test_two_controls_that_flip_are_refused(behavior):
    controls = behavior.controls | {"unstanced": dataclasses.replace(behavior.controls["unstanced"], flips=True)}
    with pytest.raises(ValueError, match="at most one that flips, got flipped, unstanced"):
        dataclasses.replace(behavior, controls=controls)
