"""What a study may claim: each claim is a table of necessary conditions, judged from the stages' results alone. Pure.

A claim is answered "yes" only if all its conditions hold. A condition that fails makes it "no"; one that could not have
been found, given how much families differ, makes it "cannot be told", never "no". A claim about what is not
there is "withheld", see `NEEDS`: its conditions are still judged and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmech.behavior.behavior import Control

LEVEL = 0.05
"""p-values below this count; intervals are 95 %."""

MASS_DIFFERENCE = 0.1
"""How far the mass on valid answers may differ between the poles."""

POWERED = 1.4
"""Half-widths of an interval that are found in four of five cases: (1.96 + 0.84) / 1.96."""

FOUND_AGAIN = 0.7
"""The share of the selected directions that a second training has to select as well."""

HALF = 0.5
"""A share of the gap that patching has to be able to find before it says that there is none."""

STAGES = (
    "behavior",
    "dictionaries",
    "fidelity",
    "contrast",
    "dual_process",
    "patching",
    "proximity",
    "steering",
    "transfer",
)
"""The stages whose results are judged."""


NEEDS = {
    "features": "behavior", "cause": "features", "dual_process": "features", "transfer": "cause",
    "proximity": "dual_process",
}  # fmt: skip
"""Claim -> what it is about. Of features it is enough that the rule selects some: that they are one draw of a training
leaves open what they are, not what they do."""


class Condition(NamedTuple):
    """One necessary condition.

    met: True, False, or None where the test could not have told. value, ci: what was measured, in `unit` ("pp",
    "share", "count", "index" or ""); p: against its control; detectable: the smallest effect that would have been
    found; about: the control or task that it is of; note: why, where a number does not say it.
    """

    name: str
    met: bool | None
    value: float | None = None
    ci: Sequence[float | None] | None = None
    unit: str = "pp"
    p: float | None = None
    detectable: float | None = None
    about: str = ""
    note: str = ""


class Claim(NamedTuple):
    """name; its conditions; the claim that it is withheld for want of, if any."""

    name: str
    conditions: tuple[Condition, ...]
    withheld: str = ""

    @property
    def answer(self) -> str:
        """ "yes", "no", "cannot be told" or "withheld"."""
        met = [condition.met for condition in self.conditions]
        if self.withheld:
            return "withheld"
        return "no" if False in met else "cannot be told" if None in met else "yes"

    @property
    def failed(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if condition.met is False)

    @property
    def undecided(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if condition.met is None)


def judge(results: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Claim]:
    """Every claim, by name: behavior, features, cause, transfer, dual_process, proximity.

    Args:
      results: a mapping from each of `STAGES` to its results.
      config: the study's settings.
    """
    tables: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], list[Condition]]] = {
        "behavior": behavior, "features": features, "cause": cause, "transfer": transfer,
        "dual_process": dual_process, "proximity": proximity,
    }  # fmt: skip
    claims = {name: Claim(name, tuple(table(results, config))) for name, table in tables.items()}
    for name, needed in NEEDS.items():
        there = claims[needed].answer == "yes" or (needed == "features" and results["contrast"]["mode"] == "rule")
        if claims[needed].withheld or not there:
            claims[name] = claims[name]._replace(withheld=claims[needed].withheld or needed)
    return claims


def as_json(claims: Mapping[str, Claim]) -> dict[str, Any]:
    """As results.json keeps them: name -> answer and conditions."""
    return {
        name: {"answer": claim.answer, "conditions": [condition._asdict() for condition in claim.conditions]}
        for name, claim in claims.items()
    }


def known(*values: float | None) -> bool:
    return all(value is not None and value == value for value in values)


def off_zero(name: str, of: Mapping[str, Any], *, scale: float, **more: Any) -> Condition:
    """A condition that an interval lies above 0. Undecided where it includes 0 and an effect of `scale`, in the same
    unit, would not have been found."""
    measured, (low, high) = of["value"], of["ci"]
    detectable: Any = of.get("detectable_pp")
    if not known(detectable) and known(low, high):
        detectable = POWERED * (high - low) / 2
    met: bool | None
    if not known(measured, low, high):
        met = None
    elif low > 0:
        met = True
    elif high < 0:
        met = False
    else:
        met = False if high < scale or (known(detectable) and detectable <= scale) else None
    return Condition(name, met, measured, (low, high), detectable=detectable, **more)


def behavior(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """The shift; what of it is meaning, not worked examples; its controls; the mass on valid answers."""
    r, gate = results["behavior"], config["gate"]
    shift, out = r["shift_pp"], []
    of = {"value": shift, "ci": r["ci"], "detectable_pp": r["detectable_pp"]}
    out.append(at_least("shift", of, gate["shift_pp"]))
    if r["parts"]:
        semantic = r["parts"]["semantic"]
        out.append(at_least("semantic", semantic | {"value": semantic["pp"]}, gate["semantic_pp"]))
    for name, control in r["controls"].items():
        if not control["gate"]:
            continue
        oriented = Control(**r["words"]["controls"][name]).oriented
        size = control["shift_pp"] if oriented else control["size_pp"]
        met = bool(abs(size) <= gate["control_ratio"] * abs(shift)) if known(size) else None
        out.append(Condition("small control", met, size, control["ci"] if oriented else None, about=name))
        if oriented:
            excess = {"value": control["excess_pp"], "ci": control["excess_ci"]}
            excess["detectable_pp"] = control["excess_detectable_pp"]
            out.append(off_zero("exceeds control", excess, scale=abs(shift), about=name))
    least = min(r["mass_plus"], r["mass_minus"])
    out.append(Condition("mass", bool(least >= gate["mass"]), least, unit="share"))
    difference = r["mass_difference"]["pp"] / 100
    out.append(Condition("mass alike", bool(abs(difference) <= MASS_DIFFERENCE), difference, unit="share"))
    return out


def at_least(name: str, of: Mapping[str, Any], least: float) -> Condition:
    """A condition that an effect is at least so large and its interval above 0."""
    condition = off_zero(name, of, scale=least)
    measured, high = of["value"], of["ci"][1]
    if condition.met and measured < least:
        return condition._replace(met=None if high >= 2 * least else False)
    return condition


def features(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """The rule selects some, more than by chance, in dictionaries that fit and that are not one draw."""
    r, fit = results["contrast"], results["fidelity"]
    chosen = r["mode"] == "rule" and r["selected"] > 0
    out = [Condition("selected", bool(chosen), r["selected"], unit="count")]
    fdr, p, R = r["fdr"], r["null_p"], r["relabelings"]
    beyond_chance = bool(p < LEVEL and known(fdr) and fdr <= LEVEL)
    note = f"{R} relabelings are too few to tell" if 1 / (R + 1) >= LEVEL else ""
    out.append(Condition("null", None if note and chosen else beyond_chance, fdr, unit="share", p=p, note=note))
    warned = len(fit["check"]["warnings"])
    fits = not warned and bool(fit["fvu"]["worst"] < 1)
    out.append(Condition("dictionaries", fits, warned, unit="count"))
    again = r.get("again")
    if results["dictionaries"]["trained"]:
        met = bool(again["share"] >= FOUND_AGAIN) if again else None
        note = "" if again else "not tried with a second seed"
        out.append(Condition("second seed", met, again["share"] if again else None, unit="share", note=note))
    return out


def cause(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """Patching both ways and steering, beyond sets and directions of the same norm; other words; what must move, what
    must not; the task itself without examples of the behaviour."""
    patching, steering, tasks = results["patching"], results["steering"], results["transfer"]
    out = []
    for direction in ("to_plus", "to_minus"):
        share = {"value": patching[f"recovered_{direction}"], "ci": patching[f"recovered_{direction}_ci"]}
        ps = [patching[f"p_random_{direction}"], patching[f"p_directions_{direction}"]]
        sizes = [patching["random_sets"], patching["random_directions"]]
        out.append(beyond(off_zero("patching", share, scale=HALF, unit="share", about=direction), ps, sizes))
    effect = {"value": steering["at_one_pp"], "ci": steering["at_one_ci"], "detectable_pp": steering["detectable_pp"]}
    least = worth_finding(results)
    sizes = [steering["random_sets"], *[steering["random_directions"]] * 2]
    ps = [steering[name] for name in ("p_random", "p_random_directions", "p_random_kl")]
    out.append(beyond(off_zero("steering", effect, scale=least), ps, sizes))
    for name, share in patching["held_out"].items():
        out.append(off_zero("held out", share, scale=HALF, unit="share", about=name))
    for name, crossed in patching["cross"].items():
        excess = {"value": crossed["excess_pp"], "ci": crossed["excess_ci"]}
        out.append(off_zero("exceeds patched control", excess, scale=least, about=name))
    return [*out, *specific(results), home(tasks, least)]


def worth_finding(results: Mapping[str, Any]) -> float:
    """Half of what the words themselves do from the middle to a pole, in percentage points: a study that could not have
    found as much says nothing of its absence."""
    return abs(results["behavior"]["shift_pp"]) / 4


def beyond(condition: Condition, ps: Sequence[float], sizes: Sequence[int]) -> Condition:
    """Besides its interval, p-values that have to fall below the level; undecided where they could not."""
    worst = max((p for p in ps if known(p)), default=None)
    condition = condition._replace(p=worst)
    if condition.met is not True:
        return condition
    if not all(known(p) for p in ps):
        return condition._replace(met=None, note="no random sets of the same norm to compare with")
    if any(1 / (size + 1) >= LEVEL for size in sizes):
        return condition._replace(met=None, note=f"{min(sizes)} random ones are too few to tell")
    return condition._replace(met=bool(worst is not None and worst < LEVEL))


def specific(results: Mapping[str, Any]) -> list[Condition]:
    """Controls that steering should move and that it should leave alone."""
    steering, controls = results["steering"], results["behavior"]["words"]["controls"]
    out = []
    for name, fields in controls.items():
        control, measured = Control(**fields), steering["specificity"].get(name)
        if measured is None:
            if control.needed and control.moves and name not in results["patching"]["held_out"]:
                out.append(Condition("moves too", None, about=name, note="not tried"))
            continue
        effect = {"value": measured["slope_pp"], "ci": measured["ci"], "detectable_pp": measured["detectable_pp"]}
        if control.moves:
            out.append(off_zero("moves too", effect, scale=worth_finding(results), about=name))
            continue
        low, high = measured["ci90"]
        outside = known(low, high) and (low > measured["margin_pp"] or high < -measured["margin_pp"])
        met = True if measured["equivalent"] else False if outside else None
        out.append(Condition("stays", met, measured["slope_pp"], (low, high), about=name,
                             detectable=measured["detectable_pp"]))  # fmt: skip
    return out


def tested(tasks: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tasks that transfer is judged by: not the behaviour's own, with an expected sign, and none of those in which
    giving may serve oneself."""
    return {n: task for n, task in tasks.items() if not task["home"] and task["expected_sign"] and not task["kind"]}


def moves_as_expected(name: str, task: str, r: Mapping[str, Any], *, scale: float, p: str) -> Condition:
    """A condition that a task moves in its expected direction, more than along random directions."""
    sign = r["expected_sign"] or 1
    low, high = sorted(sign * end for end in r["ci"]) if known(*r["ci"]) else (None, None)
    of = {"value": sign * r["slope"], "ci": (low, high), "detectable_pp": r["detectable_pp"]}
    condition = off_zero(name, of, scale=scale, about=task)._replace(value=r["slope"], ci=r["ci"], p=r[p])
    if condition.met is True and not known(r[p]):
        return condition._replace(met=None)
    return condition._replace(met=bool(r[p] < LEVEL)) if condition.met is True else condition


def home(results: Mapping[str, Any], scale: float) -> Condition:
    """Whether the behaviour's own task moves without examples of it: else it is the examples that are steered."""
    found = next(((name, task) for name, task in results.items() if task["home"]), None)
    if found is None:
        return Condition("home task", None, note="not tried")
    return moves_as_expected("home task", *found, scale=scale, p="p_random")


def transfer(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """At least one task that is not the behaviour's own, after Holm's correction over all."""
    tried = [
        moves_as_expected("task", name, task, scale=worth_finding(results), p="p_holm")
        for name, task in tested(results["transfer"]).items()
    ]
    if not tried:
        return [Condition("other task", None, note="not tried")]
    met = [condition.met for condition in tried]
    best = max(tried, key=lambda c: (c.met is True, c.met is None, abs(c.value or 0.0)))
    moved = sum(m is True for m in met)
    return [best._replace(name="other task", note=f"{moved} of {len(tried)}")]


def dual_process(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """The model behaves on the items, and some feature belongs to a system."""
    r = results["dual_process"]
    # Where the model itself does not do the items, an index of its features says nothing, neither yes nor no.
    out = [
        Condition("behaves", True if c["met"] else None, c["value"], c["ci"], unit="share", about=name)
        for name, c in r["conditions"].items()
    ]
    if not r["defined"]:
        return out
    classed = r["s1"] + r["s2"]
    return [*out, Condition("classed", classed > 0, classed, unit="count")]


def proximity(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Condition]:
    """System 2 features are more direct than System 1 features of the same layers."""
    test = results["proximity"]["s2_minus_s1_within_layers"]
    if not results["dual_process"]["defined"] or not test["layers"]:
        why = "no layer holds both kinds" if results["dual_process"]["defined"] else "the index is undefined"
        return [Condition("within layers", None, note=why)]
    met = bool(test["p"] < LEVEL and test["difference"] > 0) if known(test["p"], test["difference"]) else None
    return [Condition("within layers", met, test["difference"], unit="index", p=test["p"])]
