"""Where a stance is put and who is asked: wordings in the second person, and how forms are dealt to pairs."""

import re

import pytest

from jaxmech.behavior.altruism.dictator import PAIRED, BankConfig, build_bank
from jaxmech.behavior.altruism.forms import _VERBS, FORMS, in_second_person, put
from jaxmech.behavior.altruism.scenarios import OWN_ACCOUNTS, SCENARIOS, TEST_SCENARIOS
from jaxmech.behavior.behavior import poles
from jaxmech.behavior.prompts import differ_elsewhere
from tests.behavior.fake_tokenizer import FakeTokenizer

WORDINGS = [w for s in (*SCENARIOS, *TEST_SCENARIOS) for w in (s.give, s.keep, s.take)] + list(OWN_ACCOUNTS)
BY_HAND = {
    "With {E}, how much does {a} give?": "With {E}, how much do you give?",
    "How much would {the} pass on?": "How much would you pass on?",
    "The coin of {E}: how many for the poor, says {a}?": "The coin of {E}: how many for the poor, say you?",
    "From {E}, how much is given by {a}?": "From {E}, how much is given by you?",
    "On the train, {a} with {E} meets someone.": "On the train, you with {E} meet someone.",
    "{The} carries {E}. What does it show?": "You carry {E}. What does it show?",
    "{A} won {E}, if {a} decides?": "You won {E}, if you decide?",
    "What does {a} count out for himself of the own {E}?": "What do you count out for yourself of your own {E}?",
    "How many do the hungry guests of {a} see?": "How many do your hungry guests see?",
    "What does the porter not get from {a}?": "What does the porter not get from you?",
}


@pytest.mark.parametrize("wording", BY_HAND)
def test_in_second_person(wording):
    assert in_second_person(wording) == BY_HAND[wording]


def test_every_wording_can_be_asked_in_the_second_person():
    third = re.compile(rf"\b[Yy]ou(?: with {{E}})? (?:{'|'.join(_VERBS)}|is|was|does|\w+(?:ses|shes|ches|ies))\b")
    for wording in WORDINGS:
        asked = in_second_person(wording)
        assert set(re.findall(r"{\w+}", asked)) == {"{E}"} and re.search(r"\b[Yy]our?\b", asked), asked
        assert not third.search(asked) and not re.search(r"\bdoes you\b|\bsays you\b|himself|of you\b", asked), asked


def test_forms_of_a_question():
    wording = "The basket has {E}. How many will {a} hand over?"
    asked = {form: put(form, wording, "owner", "very kind") for form in FORMS}
    assert asked == {
        "word": "The basket has {E}. How many will a very kind owner hand over?",
        "sentence": "This is a very kind owner. The basket has {E}. How many will the owner hand over?",
        "you": "You are a very kind owner. The basket has {E}. How many will you hand over?",
    }
    assert put("sentence", wording, "owner").startswith("This is an owner. ")
    assert put("you", wording, "owner", after="who likes large numbers").startswith("You are an owner who likes large")


def test_forms_are_dealt_evenly_and_pairs_differ_in_their_stance_alone():
    tokenizer = FakeTokenizer()
    config = BankConfig(selection=12, development=0, test=2, pairs=3, stakes=(10, 20), forms=FORMS)
    bank = build_bank(config, tokenizer)
    assert bank.exclusions.empty
    own = bank.prompts[(bank.prompts.condition == "plus") & (bank.prompts.split == "selection")]
    assert own.groupby("form").size().to_dict() == dict.fromkeys(FORMS, 12)
    assert own.groupby("form").word.nunique().ge(4).all() and own.groupby("form").stake.nunique().eq(2).all()
    starts = {"word": "", "sentence": "Q: This is a", "you": "Q: You are a"}
    for name in (None, *PAIRED):
        pairs = bank.prompts[bank.prompts.condition.isin(poles(name))].groupby(["family", "pair"])
        for _, pair in pairs:
            assert pair.form.nunique() == pair.stake.nunique() == 1
            a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in pair["query"])
            assert differ_elsewhere(a, b, 2) == ""
    for row in own.itertuples():
        lines = [line for line in row.prefix.split("\n") if line.startswith("Q: ")]
        assert all(line.startswith(starts[row.form]) for line in [*lines, row.query])
        assert (re.search(r"\byou\b", row.query) is not None) == (row.form == "you")


@pytest.mark.parametrize("forms", [(), ("word", "word"), ("aside",)])
def test_forms_that_do_not_exist_are_refused(forms):
    with pytest.raises(ValueError, match="forms: expected .*word, sentence, you"):
        BankConfig(forms=forms)
