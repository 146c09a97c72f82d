"""Claims from results: all hold, each condition alone changes its claim, what cannot be told is not denied."""

import pytest

from jaxmech.study.claims import as_json, judge
from tests.report.conftest import changed as changed
from tests.report.conftest import run_of as run_of

NAMES = ("behavior", "features", "cause", "transfer", "dual_process", "proximity")


@pytest.fixture
def judged(changed):
    """`judged(scenario, change)` -> claims by name, the scenario's results changed in place by `change`."""
    return lambda scenario="finding", change=None: judge(*changed(scenario, change))


def put(path, value):
    """A change of one number: `put("patching.recovered_to_plus_ci", [-1, 1])`."""

    def change(results, config):
        *way, last = path.split(".")
        place = config if way and way[0] == "config" else results
        for name in way[1:] if way and way[0] == "config" else way:
            place = place[name]
        place[last] = value

    return change


def test_all_hold_where_all_was_found(judged):
    claims = judged()
    assert {name: claim.answer for name, claim in claims.items()} == dict.fromkeys(NAMES, "yes")
    kept = as_json(claims)
    assert kept["cause"]["answer"] == "yes" and {"name", "met", "value", "ci"} <= set(kept["cause"]["conditions"][0])


LACKING = {
    "behavior": set(NAMES[1:]), "selected": set(NAMES[2:]), "cause": {"transfer"}, "dual_process": {"proximity"},
}  # fmt: skip
"""Claim, or condition, that fails -> claims that are withheld then."""

CHANGES = [
    ("behavior", "shift", put("behavior.ci", [-30.0, -2.0])),
    ("behavior", "shift", lambda r, c: r["behavior"].update(shift_pp=7.0, ci=[5.0, 9.0])),
    ("behavior", "semantic", put("behavior.parts.semantic.ci", [-9.0, -1.0])),
    ("behavior", "small control", put("behavior.controls.placebo.size_pp", 20.0)),
    ("behavior", "small control", put("behavior.controls.valence.shift_pp", -20.0)),
    ("behavior", "exceeds control", put("behavior.controls.valence.excess_ci", [-20.0, -1.0])),
    ("behavior", "exceeds control", put("behavior.controls.number.excess_ci", [-2.0, 2.0])),
    ("behavior", "mass", put("behavior.mass_minus", 0.7)),
    ("behavior", "mass alike", put("behavior.mass_difference.pp", 15.0)),
    ("features", "selected", put("contrast.mode", "budget")),
    ("features", "null", put("contrast.fdr", 0.4)),
    ("features", "null", put("contrast.null_p", 0.3)),
    ("features", "dictionaries", put("fidelity.check.warnings", ["of layer 3"])),
    ("features", "dictionaries", put("fidelity.fvu.worst", 1.7)),
    ("cause", "patching", put("patching.recovered_to_plus_ci", [-0.2, -0.1])),
    ("cause", "patching", put("patching.recovered_to_minus_ci", [-0.1, 0.1])),
    ("cause", "patching", put("patching.p_random_to_plus", 0.2)),
    ("cause", "patching", put("patching.p_directions_to_minus", 0.2)),
    ("cause", "steering", put("steering.at_one_ci", [-5.0, -1.0])),
    ("cause", "steering", put("steering.p_random", 0.12)),
    ("cause", "steering", put("steering.p_random_directions", 0.12)),
    ("cause", "steering", put("steering.p_random_kl", 0.12)),
    ("cause", "held out", put("patching.held_out.heldout.ci", [-0.1, 0.1])),
    ("cause", "exceeds patched control", put("patching.cross.valence.excess_ci", [-1.0, 1.0])),
    ("cause", "moves too", put("steering.specificity.keep.ci", [-45.0, -33.0])),
    ("cause", "moves too", put("steering.specificity.take.ci", [-0.2, 0.2])),
    ("cause", "stays", lambda r, c: r["steering"]["specificity"]["own_accounts"].update(equivalent=False, ci90=[4, 6])),
    ("cause", "home task", put("transfer.dictator_give.ci", [-4.0, -2.0])),
    ("cause", "home task", put("transfer.dictator_give.p_random", 0.2)),
    ("transfer", "other task", lambda r, c: [g.update(p_holm=0.2) for g in r["transfer"].values()]),
    (
        "transfer",
        "other task",
        lambda r, c: [g.update(ci=[-3.0, -1.0]) for g in r["transfer"].values() if not g["home"]],
    ),
    ("dual_process", "classed", lambda r, c: r["dual_process"].update(s1=0, s2=0)),
    ("proximity", "within layers", put("proximity.s2_minus_s1_within_layers.p", 0.4)),
    ("proximity", "within layers", put("proximity.s2_minus_s1_within_layers.difference", -0.3)),
]


@pytest.mark.parametrize(
    ("claim", "condition", "change"), CHANGES, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(CHANGES)]
)
def test_each_condition_alone_changes_its_claim(judged, claim, condition, change):
    claims = judged("finding", change)
    assert claims[claim].answer == "no" and [c.name for c in claims[claim].failed] == [condition]
    withheld = {name for name in NAMES if claims[name].answer == "withheld"}
    assert withheld == LACKING.get(condition, LACKING.get(claim, set()))
    assert all(claims[name].answer == "yes" for name in set(NAMES) - withheld - {claim})


def test_every_condition_is_changed_by_some_test(judged):
    seen = {(claim, condition.name) for claim, made in judged().items() for condition in made.conditions}
    assert seen - {("dual_process", "behaves")} == {(claim, name) for claim, name, _ in CHANGES}


UNDECIDED = [
    ("behavior", "shift", lambda r, c: r["behavior"].update(ci=[-5.0, 50.0], detectable_pp=30.0)),
    ("cause", "patching", put("patching.recovered_to_plus_ci", [-0.5, 0.9])),
    ("cause", "patching", put("patching.recovered_to_plus_ci", [None, None])),
    ("cause", "patching", put("patching.p_random_to_plus", None)),
    ("cause", "patching", put("patching.random_sets", 3)),
    ("cause", "steering", put("steering.random_directions", 10)),
    ("cause", "steering", lambda r, c: r["steering"].update(at_one_ci=[-9.0, 19.0], detectable_pp=20.0)),
    ("cause", "moves too", lambda r, c: r["steering"]["specificity"]["keep"].update(ci=[-9.0, 19.0], detectable_pp=20)),
    ("cause", "moves too", lambda r, c: r["steering"]["specificity"].pop("take")),
    ("cause", "stays", lambda r, c: r["steering"]["specificity"]["own_accounts"].update(equivalent=False)),
    ("cause", "home task", lambda r, c: r["transfer"].pop("dictator_give")),
    ("cause", "home task", lambda r, c: r["transfer"]["dictator_give"].update(ci=[-9.0, 19.0], detectable_pp=20.0)),
    (
        "transfer",
        "other task",
        lambda r, c: [r["transfer"].pop(n) for n in list(r["transfer"]) if n != "dictator_give"],
    ),
    ("features", "second seed", put("dictionaries.trained", True)),
    ("features", "null", put("contrast.relabelings", 10)),
    ("dual_process", "behaves", put("dual_process.conditions.accuracy.met", False)),
    ("proximity", "within layers", put("proximity.s2_minus_s1_within_layers.layers", 0)),
]


@pytest.mark.parametrize(
    ("claim", "condition", "change"), UNDECIDED, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(UNDECIDED)]
)
def test_what_could_not_have_been_found_is_not_denied(judged, claim, condition, change):
    made = judged("finding", change)[claim]
    assert made.answer == "cannot be told" and condition in [c.name for c in made.undecided]


def test_a_set_taken_by_budget_is_no_cause(judged):
    claims = judged("fallback")
    assert claims["features"].answer == "no" and {claims[name].answer for name in NAMES[2:]} == {"withheld"}
    assert claims["transfer"].withheld == "features"


def test_a_null_is_a_no(judged):
    claims = judged("null")
    assert claims["behavior"].answer == claims["features"].answer == "yes"
    assert claims["cause"].answer == "no" and claims["transfer"].withheld == "cause"
    assert [c.met for c in claims["transfer"].conditions] == [False]


def test_games_with_an_open_sign_and_the_home_game_do_not_count(judged):
    def change(results, config):
        for name in list(results["transfer"]):
            if name not in ("dictator_give", "public_goods"):
                del results["transfer"][name]
        results["transfer"]["public_goods"]["expected_sign"] = 0

    assert judged("finding", change)["transfer"].answer == "cannot be told"
