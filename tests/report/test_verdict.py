"""The verdict says what the claims say: answer, what stands in its way, numbers, and what would have been found."""

import pytest

from jaxmech.report import formats
from jaxmech.report.verdict import cards


@pytest.fixture
def told(changed):
    """`told(name, change)` -> the seven cards of a scenario, its results changed in place by `change`."""
    return lambda name, change=None: cards(*changed(name, change))


def facts(card):
    return {fact.label: f"{fact.mark} {plain(fact.text)}" for fact in card.facts}


def test_findings_carry_number_interval_and_control(told):
    made = told("finding")
    assert [card.status for card in made] == ["yes"] * 7 and {card.answer for card in made} == {"Yes"}
    behaviour, features, cause, games = (plain(card.sentence) for card in made[:4])
    assert "a shift of +26.8 pp over 16 families" in behaviour and "turns round with the examples" in behaviour
    assert "After worked examples in which kind players give much" in behaviour
    assert "pass every criterion" in features and "selects 0.04 on average" in features
    assert "41 % of the shift towards generous" in cause and "the dictionaries' error alone 24 %" in cause
    assert "are passengers" in cause and "exploratory" not in cause
    assert "4 of 4 other games" in games and "dictator (give)" not in games
    listed = facts(made[2])
    assert listed["patched towards generous"] == "✓ 41 % (34 to 48), p = 0.010"
    assert listed["asked what to keep: moves"].startswith("✓ +4.5 pp (")
    assert {"own two accounts: stays", "held-out stance words", "the task without examples"} <= set(listed)
    assert listed["patched: more than from cheerful or gloomy"].startswith("✓ +9.0 pp")
    assert facts(made[0])["meaning, not worked examples"].startswith("✓ +16.1 pp")


def test_what_fails_is_named_in_the_answer(told):
    def two(results, config):
        results["steering"]["p_random_kl"] = 0.3
        results["steering"]["specificity"]["keep"]["ci"] = [-45.0, -33.0]

    cause = told("finding", two)[2]
    assert cause.status == "no" and cause.answer == "Not shown: steered by one gap and asked what to keep: moves"
    assert facts(cause)["steered by one gap"] == "✗ +5.0 pp (4.1 to 5.9), p = 0.30"

    def many(results, config):
        two(results, config)
        results["transfer"]["dictator_give"]["p_random"] = 0.5
        results["patching"]["cross"]["valence"]["excess_ci"] = [-1.0, 1.0]

    assert told("finding", many)[2].answer.endswith(" and 2 more")


def test_what_could_not_be_found_is_left_open_with_what_would_have_been(told):
    def change(results, config):
        results["behavior"].update(ci=[-5.0, 50.0], detectable_pp=30.0)

    behaviour, *later = told("finding", change)
    assert behaviour.status == "open" and behaviour.answer == "Cannot be told: shift"
    assert facts(behaviour)["shift"].endswith("only 30.0 pp or more would have been found")
    assert all(card.status == "withheld" for card in later[:5])


def test_no_behaviour_withholds_the_rest_with_its_numbers(told):
    behaviour, *later = told("no_behaviour")
    assert behaviour.status == "no" and behaviour.answer.startswith("Not shown: shift")
    assert all(card.status == "withheld" and card.answer == "Withheld" for card in later[:5])
    assert "2 % of the shift towards generous" in plain(later[1].sentence) and later[1].facts


def test_a_set_taken_by_budget_is_exploratory(told):
    _, features, cause, games, *_ = told("fallback")
    assert "No feature of" in features.sentence and "exploratory" in features.sentence
    assert "exploratory" in cause.sentence and "no coefficient but 0 does" in cause.sentence
    assert cause.answer == games.answer == "Withheld" and "taken by budget" in cause.sentence
    configured = told("finding", lambda r, c: r["contrast"].update(mode="budget"))[1]
    assert "As configured" in configured.sentence


def test_what_no_draw_showed_is_not_said_to_be_nothing(told):
    none = {"expected_false": 0.0, "expected_false_max": 0}
    features = told("finding", lambda r, c: r["contrast"].update(none))[1]
    assert "the same rule selects none in" in features.sentence and "0.00" not in features.sentence


def test_games_that_move_against_expectation_are_named(told):
    def change(results, config):
        results["transfer"]["trust_returner"].update(slope=-3.0, ci=[-4.0, -2.0])

    assert "Against expectation: trust (returner) −3.0" in told("finding", change)[3].sentence


def test_an_undefined_index_is_said_to_be(told):
    dual, proximity = told("coarse")[4:6]
    assert dual.status == "open" and "not above chance" in dual.sentence
    assert proximity.answer == "Withheld" and "no feature belongs to either system" in proximity.sentence


@pytest.mark.parametrize("worst", [1.7, float("nan")])
def test_dictionaries_worse_than_the_mean_do_not_fit(told, worst):
    card = told("finding", lambda r, c: r["fidelity"]["fvu"].update(worst=worst))[6]
    assert card.answer == "Not on held-out text" and card.status == "partly"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "p < 0.001"), (0.025, "p = 0.025"), (0.5, "p = 0.50"), (None, "p n/a"), (float("nan"), "p n/a")],
)
def test_p_values(value, text):
    assert plain(formats.p_value(value)) == text


@pytest.mark.parametrize(("value", "text"), [(-0.04, "0.0 pp"), (3.14, "+3.1 pp"), (-2.0, "−2.0 pp"), (None, "n/a")])
def test_points(value, text):
    assert plain(formats.points(value)) == text


def test_numbers():
    assert formats.number(-1234.5, 1) == "−1,234.5" and formats.number(-0.0001) == "0.00"
    assert formats.significant(0.00024) == "0.000240" and formats.significant(1240) == "1,240"
    assert formats.listing(["a", "b", "c"]) == "a, b and c" and formats.listing([]) == "none"


def plain(text):
    return text.replace(formats.NBSP, " ")
