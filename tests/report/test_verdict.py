"""The verdict says what the numbers say: findings, nulls, a failed gate, a budget, controls too coarse to decide."""

import copy
import dataclasses

import pytest

from jaxmech.report import formats as fm
from jaxmech.report.verdict import STAGES, judge, side_questions


@pytest.fixture
def judged(run_of):
    """`judged(name, change)` -> the six claims of a scenario, its results changed in place by `change`."""

    def run(name, change=None):
        folder, config, _ = run_of(name)
        results = {stage: copy.deepcopy(folder.results(stage)) for stage in STAGES}
        settings = dataclasses.asdict(config)
        if change:
            change(results, settings)
        return [*judge(results, settings), *side_questions(results)]

    return run


def test_findings_hold_and_carry_number_interval_control(judged):
    claims = judged("finding")
    assert [c.holds for c in claims] == [True] * 6
    behaviour, features, cause, games = (plain(c.sentence) for c in claims[:4])
    assert "+26.8 pp" in behaviour and "95 % interval" in behaviour and "Placebo words" in behaviour
    assert "pass every criterion" in features and "selects 0.04 on average" in features
    assert "41 % of the shift towards generous (95 % interval 34 to 48; matched random sets" in cause
    assert "p = 0.005" in cause and "usable range −2 to 2" in cause and "exploratory" not in cause
    assert "4 of 4 other games" in games and "dictator (give)" not in games


def test_a_null_is_said_plainly(judged):
    behaviour, features, cause, games, _, proximity = judged("null")
    assert behaviour.holds and features.holds
    assert cause.holds is False and cause.answer == "Not shown"
    assert "patching towards generous has an interval that includes 0" in cause.sentence
    assert games.holds is False
    assert proximity.holds is None and "not identifiable beyond depth" in proximity.sentence
    assert "direct share is undefined" in proximity.sentence


def test_a_failed_gate_withholds_the_rest_with_its_numbers(judged):
    behaviour, *later = judged("no_behaviour")
    assert behaviour.holds is False and behaviour.answer == "No behaviour to explain"
    assert "“shift ≥ 10.0 pp”" in behaviour.sentence and "interval above 0”" not in behaviour.sentence
    assert all(c.holds is None and c.status == "withheld" and c.answer == "Withheld" for c in later)
    assert "2 % of the shift towards generous" in plain(later[1].sentence)
    assert later[1].facts


def test_a_failed_gate_withholds_even_strong_numbers(judged):
    claims = judged("finding", lambda r, c: r["behavior"].update(gate=False))
    assert [c.holds for c in claims] == [False] + [None] * 5


def test_a_fallback_budget_is_exploratory_throughout(judged):
    _, features, cause, games, *_ = judged("fallback")
    assert features.holds is False and "No feature by the full rule" in features.answer
    assert all("exploratory" in c.sentence for c in (features, cause, games))
    assert cause.holds is None and cause.answer == "In part, exploratory"
    assert "no usable range" in cause.sentence and "outside any usable range" in cause.sentence
    assert games.answer == "Yes, exploratory"


def test_a_configured_budget_is_not_a_test(judged):
    features = judged("finding", lambda r, c: r["contrast"].update(mode="budget"))[1]
    assert features.holds is None and "exploratory" in features.answer and "As configured" in features.sentence


def test_a_selection_with_many_expected_false_is_uncertain(judged):
    features = judged("finding", lambda r, c: r["contrast"].update(fdr=0.4, expected_false=4.4))[1]
    assert features.holds is None and "40 %" in plain(features.sentence)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p_random_to_selfish": 0.2}, "patching towards selfish is not larger than matched random sets give"),
        (
            {"recovered_to_generous": -0.3, "recovered_to_generous_ci": [-0.4, -0.2]},
            "towards generous goes the wrong way",
        ),
        ({"recovered_to_generous": None, "recovered_to_generous_ci": [None, None]}, "towards generous is undefined"),
    ],
)
def test_each_shortfall_of_patching_is_named(judged, change, said):
    cause = judged("finding", lambda r, c: r["patching"].update(change))[2]
    assert cause.holds is None and cause.answer == "In part" and said in cause.sentence


def test_games_no_better_than_random_directions_are_not_shown(judged):
    games = judged("coarse")[3]
    assert games.holds is False and games.answer == "Not shown" and "none of them also" in games.sentence


def test_a_strong_control_is_named_beside_the_behaviour(judged):
    def change(results, config):
        results["behavior"]["controls_pp"] = {"stance": 20.0, "valence": -14.0, "number": 2.0}

    behaviour = judged("finding", change)[0]
    assert "cheerful or gloomy moves it most" in behaviour.sentence and "may be that, not giving" in behaviour.sentence


def test_steering_that_moves_the_non_social_split_says_so(judged):
    def change(results, config):
        results["steering"]["specificity"] = {"own_accounts_neutral": {"slope_pp": 2.3, "ci": [1.7, 2.9]}}

    assert "not purely social" in judged("finding", change)[2].sentence


def test_an_undefined_index_is_said_to_be(judged):
    dual = judged("coarse")[4]
    assert dual.holds is None and dual.answer == "Undefined" and "not above chance" in dual.sentence


def test_games_that_move_against_expectation_are_named(judged):
    def change(results, config):
        results["games"]["trust_returner"].update(slope=-3.0, ci=[-4.0, -2.0])

    games = judged("finding", change)[3]
    assert games.holds is None and games.answer == "To 3 of 4 games"
    assert "Against expectation: trust (returner) −3.0" in games.sentence


def test_open_signs_and_the_home_game_do_not_count(judged):
    def change(results, config):
        for name in list(results["games"]):
            if name not in ("dictator_give", "public_goods"):
                del results["games"][name]
        results["games"]["public_goods"]["expected_sign"] = 0

    assert judged("finding", change)[3].answer == "Not tested"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "p < 0.001"), (0.025, "p = 0.025"), (0.5, "p = 0.50"), (None, "p n/a"), (float("nan"), "p n/a")],
)
def test_p_values(value, text):
    assert plain(fm.p_value(value)) == text


@pytest.mark.parametrize(("value", "text"), [(-0.04, "0.0 pp"), (3.14, "+3.1 pp"), (-2.0, "−2.0 pp"), (None, "n/a")])
def test_points(value, text):
    assert plain(fm.points(value)) == text


def test_numbers():
    assert fm.number(-1234.5, 1) == "−1,234.5" and fm.number(-0.0001) == "0.00"
    assert fm.significant(0.00024) == "0.000240" and fm.significant(1240) == "1,240"
    assert fm.listing(["a", "b", "c"]) == "a, b and c" and fm.listing([]) == "none"


def plain(text):
    return text.replace(fm.NBSP, " ")


def test_too_few_random_sets_are_no_evidence_of_their_effect(judged):
    change = {"random_sets": 3, "p_random_to_generous": 0.25, "p_random_to_selfish": 0.25}
    cause = judged("finding", lambda r, c: r["patching"].update(change))[2]
    assert cause.holds is None and "with 3 random sets p cannot fall below 0.25" in cause.sentence
