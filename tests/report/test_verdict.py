"""The verdict says what the numbers say: findings, nulls, a failed gate, a budget, controls too coarse to decide."""

import copy

import pytest

from jaxmech.report import formats
from jaxmech.report.verdict import STAGES, judge, judge_dictionaries, side_questions


@pytest.fixture
def judged(run_of):
    """`judged(name, change)` -> the six claims of a scenario, its results changed in place by `change`."""

    def run(name, change=None):
        folder, manifest = run_of(name)
        results = {stage: copy.deepcopy(folder.results(stage)) for stage in STAGES}
        settings = copy.deepcopy(manifest["config"])
        if change:
            change(results, settings)
        return [*judge(results, settings), *side_questions(results)]

    return run


def controls(**shifts):
    """Results of controls that are not in the gate."""
    return {
        name: {"shift_pp": shift, "ci": [shift, shift], "size_pp": 1.0, "gate": False} for name, shift in shifts.items()
    }


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
        ({"p_random_to_minus": 0.2}, "patching towards selfish is not larger than matched random sets give"),
        (
            {"recovered_to_plus": -0.3, "recovered_to_plus_ci": [-0.4, -0.2]},
            "towards generous goes the wrong way",
        ),
        ({"recovered_to_plus": None, "recovered_to_plus_ci": [None, None]}, "towards generous is undefined"),
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
        results["behavior"].update(shift_pp=20.0, controls=controls(valence=-14.0, number=2.0))

    behaviour = judged("finding", change)[0]
    assert (
        "cheerful or gloomy moves it most" in behaviour.sentence
        and "not ruled out that it is mood, not giving" in behaviour.sentence
    )


def test_steering_that_moves_the_non_social_split_says_so(judged):
    def change(results, config):
        results["steering"]["specificity"] = {"own_accounts": {"slope_pp": 2.3, "ci": [1.7, 2.9]}}

    assert "not ruled out that it is the amount moved, whoever gains" in judged("finding", change)[2].sentence


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        (
            "transfer",
            {"dictator_give": {"slope": 1.2, "ci": [-0.5, 2.4], "p_random": 0.01, "home": True}},
            "the same task without examples of the behaviour (+1.2 pp, −0.5 to 2.4) does not move",
        ),
        (
            "transfer",
            {"dictator_give": {"slope": 1.2, "ci": [0.5, 2.4], "p_random": 0.2, "home": True}},
            "moves no more than along random directions (p = 0.20)",
        ),
        (
            "transfer",
            {"dictator_give": {"slope": -3.0, "ci": [-4.0, -2.0], "p_random": 0.99, "home": True}},
            "without examples of the behaviour (−3.0 pp, −4.0 to −2.0) goes the other way",
        ),
        ("transfer", {"dictator_give": None}, "the same task was not tried in prompts without any example"),
        (
            "behavior",
            {"shift_pp": 23.4, "controls": controls(valence=19.1)},
            "“cheerful or gloomy” moves the answer by +19.1 pp, 82 % of the stance's shift",
        ),
        (
            "behavior",
            {"shift_pp": 20.0, "controls": controls(valence=-1.0, number=-14.0)},
            "“likes large numbers” moves the answer by −14.0 pp, 70 %",
        ),
        ("behavior", {"controls": controls(number=1.0)}, "“cheerful or gloomy” was not tried, so that it is not ruled"),
        ("steering", {"p_random_directions": 0.12}, "random directions of the same norm do as well (p = 0.12)"),
        ("steering", {"p_random_directions": None}, "no random directions of the same norm were steered along"),
        (
            "steering",
            {"specificity": {name: {"slope_pp": -39.0, "ci": [-45.0, -33.0]} for name in ("keep", "take")}},
            "under “asked what to keep” the share given goes down (−39.0 pp per unit, −45.0 to −33.0)",
        ),
        ("steering", {"specificity": {}}, "“asked what to take” was not tried"),
    ],
)
def test_a_cause_is_only_shown_in_part_where_something_else_would_explain_it(judged, stage, change, reason):
    cause = judged("finding", lambda r, c: r[stage].update(change))[2]
    assert cause.holds is None and cause.status == "partly" and cause.answer == "In part"
    assert plain(cause.sentence).startswith("In part: ") and reason in plain(cause.sentence)


def test_every_reason_is_given_and_none_where_nothing_was_caused(judged):
    def doubtful(results, config):
        results["behavior"]["controls"]["valence"]["shift_pp"] = 25.0
        results["steering"]["p_random_directions"] = 0.12
        results["transfer"]["dictator_give"].update(slope=0.1, ci=[-1.0, 1.0])

    cause = judged("finding", doubtful)[2]
    assert all(word in cause.sentence for word in ("cheerful or gloomy", "random directions", "does not move"))
    assert "random directions" not in judged("null", doubtful)[2].sentence


def test_what_no_draw_showed_is_not_said_to_be_nothing(judged):
    none = {"expected_false": 0.0, "expected_false_max": 0, "fdr": 0.0}
    features = judged("finding", lambda r, c: r["contrast"].update(none))[1]
    assert features.holds and "the same rule selects none in 200 draws" in features.sentence
    assert "0.00" not in features.sentence + str(features.facts)

    def one_draw(results, config):
        results["contrast"].update(none, selected=2)
        config["selection"]["relabelings"] = 1

    few = judged("finding", one_draw)[1]
    assert few.holds is None and "50 %" in plain(few.sentence)


def test_the_behaviour_says_what_its_worked_examples_show_and_how_far_single_families_move(judged):
    behaviour = judged("finding")[0]
    assert "After worked examples in which kind players give much" in behaviour.sentence
    assert "by 2.0 pp either way in a single family" in plain(behaviour.sentence)


def test_an_undefined_index_is_said_to_be(judged):
    dual = judged("coarse")[4]
    assert dual.holds is None and dual.answer == "Undefined" and "not above chance" in dual.sentence


def test_games_that_move_against_expectation_are_named(judged):
    def change(results, config):
        results["transfer"]["trust_returner"].update(slope=-3.0, ci=[-4.0, -2.0])

    games = judged("finding", change)[3]
    assert games.holds is None and games.answer == "To 3 of 4 games"
    assert "Against expectation: trust (returner) −3.0" in games.sentence


def test_open_signs_and_the_home_game_do_not_count(judged):
    def change(results, config):
        for name in list(results["transfer"]):
            if name not in ("dictator_give", "public_goods"):
                del results["transfer"][name]
        results["transfer"]["public_goods"]["expected_sign"] = 0

    assert judged("finding", change)[3].answer == "Not tested"


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


def test_too_few_random_sets_are_no_evidence_of_their_effect(judged):
    change = {"random_sets": 3, "p_random_to_plus": 0.25, "p_random_to_minus": 0.25}
    cause = judged("finding", lambda r, c: r["patching"].update(change))[2]
    assert cause.holds is None and "with 3 random sets p cannot fall below 0.25" in cause.sentence


def test_dictionaries_worse_than_the_mean_do_not_fit(run_of):
    results = copy.deepcopy(run_of("finding")[0].results("fidelity"))
    assert judge_dictionaries(results).answer == "Yes"
    for worst in (1.7, float("nan")):
        results["fvu"]["worst"] = worst
        claim = judge_dictionaries(results)
        assert claim.answer == "Not on held-out text" and claim.holds is None
