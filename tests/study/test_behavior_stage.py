"""Stage behavior's numbers and its gate, against SciPy and results that are changed one at a time."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxmech.behavior.behavior import Behavior, Control, Words, control_of
from jaxmech.behavior.scoring import with_outcomes
from jaxmech.study import claims
from jaxmech.study.config import GateSettings
from jaxmech.study.stages.behavior import by_factor, contrast_effects, distributions, semantic_and_mapping, summary

K, PAIRS = 8, 2
CONTROLS = {
    "flipped": Control(flips=True), "again": Control(moves=True), "words": Control(oriented=False), "mood": Control(),
}  # fmt: skip
SHIFTS = {None: 0.3, "flipped": 0.1, "again": 0.2, "words": 0.0, "mood": 0.05}


def scored(shifts=SHIFTS, *, mass=0.9, noise=0.02, seed=0):
    """A behaviour, its prompts with outcomes, and their values; the noise is each family's."""
    rng, rows, g = np.random.default_rng(seed), [], []
    for name, shift in shifts.items():
        for family in range(K):
            moved = shift + noise * rng.normal()
            for pair in range(PAIRS):
                sign = 1 if name != "words" or pair else -1
                for pole, half in (("plus", 0.5), ("minus", -0.5)):
                    condition = f"{name}:{pole}" if name else pole
                    rows.append(
                        dict(
                            id=f"{family}/{condition}/{pair}", family=f"f{family}", split="test", pair=pair,
                            condition=condition, prefix="", query="?", answers=["0", "1"], score=[0.0, 1.0],
                        )
                    )  # fmt: skip
                    g.append(0.5 + sign * half * moved)
    table, g = pd.DataFrame(rows), np.array(g)
    values = np.tile([0.0, 1.0], (len(g), 1))
    mass = np.where(table["condition"].str.endswith("plus"), mass, 0.9)
    logprobs = np.log(np.stack([1 - g, g], 1) * mass[:, None])
    controls = {name: CONTROLS[name] for name in shifts if name}
    behavior = Behavior("made up", Words(varies="stance"), table, controls)
    return behavior, with_outcomes(table, logprobs, values), values


def results(**changes):
    behavior, table, values = scored(**changes)
    ctx = SimpleNamespace(behavior=behavior, config=SimpleNamespace(gate=GateSettings()))
    return summary(table, contrast_effects(table, behavior), distributions(table, values), ctx)


def differences(table, name=None):
    """Plus less minus in percentage points, [families, pairs], by a plain loop."""
    out = np.zeros((K, PAIRS))
    for row in table.itertuples():
        control, pole = control_of(row.condition)
        if control == name:
            out[int(row.family[1:]), row.pair] += 100 * row.g * (1 if pole == "plus" else -1)
    return out


def check(got, low, high, means):
    want = stats.ttest_1samp(means, 0).confidence_interval()
    np.testing.assert_allclose([got, low, high], [means.mean(), *want])


def test_shifts_excesses_and_sizes():
    behavior, table, _ = scored()
    own = differences(table).mean(1)
    for row in contrast_effects(table, behavior).itertuples():
        pairs = differences(table, None if row.contrast == "poles" else row.contrast)
        check(row.shift_pp, row.low_pp, row.high_pp, pairs.mean(1))
        assert row.size_pp == pytest.approx(np.sqrt((pairs**2).mean()))
        t = stats.t.ppf(0.975, K - 1) + stats.t.ppf(0.8, K - 1)
        assert row.detectable_pp == pytest.approx(t * stats.sem(pairs.mean(1)))
        if row.contrast != "poles":
            check(row.excess_pp, row.excess_low_pp, row.excess_high_pp, own - pairs.mean(1))
            assert row.excess_detectable_pp == pytest.approx(t * stats.sem(own - pairs.mean(1)))


def test_the_shift_by_what_pairs_differ_in():
    behavior, table, _ = scored()
    table["stake"], table["word"] = 10 * (1 + table["pair"]), table["condition"].str.replace("plus", "kind")
    table["form"] = "word"
    behavior = dataclasses.replace(behavior, prompts=table, factors=("word", "stake", "form"))
    pairs, rows = differences(table), by_factor(table, behavior)
    assert list(rows["factor"]) == ["stake", "stake"] and list(rows["level"]) == ["10", "20"]  # others have one level
    for row in rows.itertuples():
        assert row.families == K
        check(row.shift_pp, row.low_pp, row.high_pp, pairs[:, row.Index])
    table.loc[table["family"] == "f0", "word"] += "ly"
    word = by_factor(table, behavior).query("factor == 'word'").set_index("level")
    assert word["families"].to_dict() == {"kind / minus": K - 1, "kindly / minusly": 1}
    assert word.loc["kindly / minusly", "shift_pp"] == pytest.approx(pairs[0].mean())
    assert np.isnan(word.loc["kindly / minusly", "low_pp"])
    with pytest.raises(ValueError, match="factors: the prompts have no column mood"):
        dataclasses.replace(behavior, factors=("mood",))


def test_semantic_and_mapping_parts():
    behavior, table, _ = scored()
    own, flipped = differences(table), differences(table, "flipped")
    parts = semantic_and_mapping(table, behavior)
    for name, pairs in (("semantic", (own + flipped) / 2), ("mapping", (own - flipped) / 2)):
        check(parts[name]["pp"], *parts[name]["ci"], pairs.mean(1))
    behavior, table, _ = scored({None: 0.3})
    assert semantic_and_mapping(table, behavior) is None


def conditions(r):
    """What the claim of a behaviour asks for, "name about" -> met."""
    judged = claims.behavior({"behavior": r | {"words": {"controls": {
        name: dataclasses.asdict(control) for name, control in CONTROLS.items()}}}},
        {"gate": dataclasses.asdict(GateSettings())},
    )  # fmt: skip
    return {f"{condition.name} {condition.about}".strip(): condition.met for condition in judged}


def test_all_that_a_behaviour_is_asked_for():
    r = results()
    assert conditions(r) == dict.fromkeys(
        (
            "shift", "semantic", "small control words", "small control mood", "exceeds control mood", "mass",
            "mass alike",
        ),
        True,
    )  # fmt: skip
    assert r["parts"]["semantic"]["pp"] == pytest.approx(20, abs=2) and r["controls"]["mood"]["gate"]
    assert not r["controls"]["flipped"]["gate"] and not r["controls"]["again"]["gate"]
    assert (r["mass_plus"], r["mass_minus"], r["mass_difference"]["pp"]) == pytest.approx((0.9, 0.9, 0))
    assert results(mass=0.85)["mass_difference"]["pp"] == pytest.approx(-5)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"shifts": SHIFTS | {None: 0.09, "flipped": 0.14, "mood": 0.0}}, {"shift"}),
        ({"shifts": SHIFTS | {"flipped": -0.15}}, {"semantic"}),
        ({"shifts": SHIFTS | {"flipped": -0.3}}, {"semantic"}),
        ({"shifts": SHIFTS | {"words": 0.15}}, {"small control words"}),
        ({"shifts": SHIFTS | {"mood": 0.15}}, {"small control mood"}),
        ({"shifts": SHIFTS | {"mood": 0.35}}, {"small control mood", "exceeds control mood"}),
        ({"mass": 0.7}, {"mass", "mass alike"}),
    ],
)
def test_each_condition_alone_fails(change, failed):
    judged = conditions(results(**change))
    assert {name for name, met in judged.items() if met is False} == failed


def test_what_families_differ_too_much_for_cannot_be_told():
    judged = conditions(results(shifts=SHIFTS | {None: 0.0, "flipped": 0.15}, noise=0.25))
    assert judged["shift"] is None and judged["semantic"] is None


def test_a_behaviour_without_such_controls_is_asked_for_less():
    r = results(shifts={None: 0.3})
    assert r["parts"] is None and conditions(r) == dict.fromkeys(("shift", "mass", "mass alike"), True)
