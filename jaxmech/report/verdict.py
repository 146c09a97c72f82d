"""The verdict in words: each claim of `jaxmech.study.claims` as a card, with its conditions and their numbers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmech.report.formats import (
    interval,
    known,
    listing,
    number,
    p_value,
    percent,
    plural,
    points,
    readable,
    span,
)
from jaxmech.report.words import Said
from jaxmech.study.claims import STAGES as JUDGED
from jaxmech.study.claims import Claim, Condition, judge, tested

MARKS = {"yes": "✓", "no": "✗", "partly": "◐", "open": "?", "withheld": "–"}
MET = {True: "✓", False: "✗", None: "?"}

STAGES = (*JUDGED, "attribution")
"""The stages whose results the page shows."""


class Fact(NamedTuple):
    """A condition, or another number behind a card, formatted."""

    label: str
    text: str
    mark: str = ""


class ClaimCard(NamedTuple):
    """title: the question; answer: a few words; status: a key of `MARKS`; facts: the conditions."""

    title: str
    answer: str
    status: str
    sentence: str
    facts: tuple[Fact, ...] = ()

    @property
    def mark(self) -> str:
        return MARKS[self.status]


def cards(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[ClaimCard]:
    """A card for each claim: behaviour, features, cause, transfer, System 1 and 2, proximity; then the dictionaries'.

    Args:
      results: a mapping from each of `STAGES` to its results.
      config: the study's settings.
    """
    said, claims = Said.of(results), judge({stage: results[stage] for stage in JUDGED}, config)
    told = {
        "behavior": ("Is there a behaviour?", behaviour(results["behavior"], said)),
        "features": ("Which features go with it?", features(results["contrast"], config, said)),
        "cause": ("Do they cause it?", cause(results, said)),
        "transfer": (f"Does it carry over to other {said.tasks}?", transfer(results["transfer"], said)),
        "dual_process": (
            "Are they heuristic (System 1) or deliberative (System 2)?",
            dual_process(results["dual_process"]),
        ),
        "proximity": ("Do System 2 features act nearer to the output?", proximity(results["proximity"])),
    }
    made = [card(title, claims[name], sentence, said) for name, (title, sentence) in told.items()]
    return [*made, dictionaries(results["fidelity"])]


def card(title: str, claim: Claim, sentence: str, said: Said) -> ClaimCard:
    facts = tuple(
        Fact(label(condition, said), measured(condition), MET[condition.met]) for condition in claim.conditions
    )
    status = {"yes": "yes", "no": "no", "cannot be told": "open", "withheld": "withheld"}[claim.answer]
    if claim.withheld:
        sentence = f"Withheld: {LACKING[claim.withheld]}. Measured all the same: {sentence}"
    return ClaimCard(title, headline(claim, said), status, sentence, facts)


def headline(claim: Claim, said: Said) -> str:
    """The answer, with the conditions that stand in its way."""
    if claim.answer in ("yes", "withheld"):
        return claim.answer.capitalize()
    lacking = claim.failed or claim.undecided
    named = [label(condition, said, short=True) for condition in lacking[:3]]
    if len(lacking) > 3:
        named[2:] = [f"{len(lacking) - 2} more"]
    return f"{'Not shown' if claim.failed else 'Cannot be told'}: {listing(named)}"


LACKING = {
    "behavior": "no behaviour is shown that features could carry",
    "features": "the rule selects no feature, and what follows was taken by budget",
    "cause": "the features are not shown to cause the behaviour",
    "dual_process": "no feature belongs to either system",
}

LABELS = {
    "shift": "shift",
    "semantic": "meaning, not worked examples",
    "mass": "valid answers",
    "mass alike": "valid answers, alike for both",
    "selected": "features by the full rule",
    "null": "false ones expected",
    "dictionaries": "dictionaries that may not fit",
    "second seed": "found again by a second seed",
    "steering": "steered by one gap",
    "classed": "features of either system",
    "within layers": "System 2 − System 1, within layers",
}


def label(condition: Condition, said: Said, *, short: bool = False) -> str:
    """A condition's name for a reader; short: as part of a headline."""
    name, about = condition.name, condition.about
    if name in LABELS:
        return LABELS[name]
    if name == "patching":
        return f"patched {said.towards(about)}"
    if name == "behaves":
        return readable(about).lower() if about else "the model does the items"
    if name == "home task":
        return "the task without examples"
    if name == "other task":
        return f"another {said.tasks.removesuffix('s')}" if short or not about else readable(about)
    control = said.contrast(about).lower()
    return {
        "small control": f"{control}: small",
        "exceeds control": f"more than {control}",
        "held out": control,
        "exceeds patched control": f"patched: more than from {control}",
        "moves too": f"{control}: moves",
        "stays": f"{control}: stays",
    }[name]


def measured(condition: Condition) -> str:
    """A condition's number, its interval, its p; what would have been found, where nothing was decided."""
    value, digits, scale = condition.value, 1, 1.0
    if condition.unit == "pp":
        text = points(value)
    elif condition.unit == "share":
        text, digits, scale = percent(value, 1 if known(value) and abs(value) < 0.1 else 0), 0, 100.0
    elif condition.unit == "count":
        text = f"{int(value):,}" if known(value) else ""
    else:
        text, digits = number(value), 2
    parts = [text if known(value) else ""]
    if condition.ci is not None and known(condition.ci[0]):
        parts[0] += f" ({interval(condition.ci, digits, scale=scale)})"
    if known(condition.p):
        parts.append(p_value(condition.p))
    if condition.note:
        parts.append(condition.note)
    if condition.met is None and known(condition.detectable):
        least = percent(condition.detectable) if condition.unit == "share" else points(condition.detectable).lstrip("+")
        parts.append(f"only {least} or more would have been found")
    return ", ".join(part for part in parts if part)


def behaviour(r: Mapping[str, Any], said: Said) -> str:
    seen = (
        f"{said.setting}{'the' if said.setting else 'The'} {said.outcome} is {percent(r['mean_plus'], 1)} where the "
        f"{said.varies} is {said.plus} and {percent(r['mean_minus'], 1)} where it is {said.minus}: a shift of "
        f"{points(r['shift_pp'])} over {plural(r['families'], 'family', 'families')}."
    )
    if not r["parts"]:
        return seen
    semantic, mapping = (r["parts"][name] for name in ("semantic", "mapping"))
    return (
        f"{seen} With worked examples turned round, {points(semantic['pp'])} ({interval(semantic['ci'])}) stays: what "
        f"the words mean. {points(mapping['pp'])} ({interval(mapping['ci'])}) turns round with the examples: a "
        "mapping from words to answers that they teach."
    )


def features(r: Mapping[str, Any], config: Mapping[str, Any], said: Said) -> str:
    layers = [int(layer) for layer in r["by_layer"]]
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {min(layers)} to {max(layers)}"
    if r["mode"] == "rule":
        return (
            f"{plural(r['selected'], 'feature')} of {r['features_total']:,} ({percent(r['share'], 3)}) "
            f"{'passes' if r['selected'] == 1 else 'pass'} every criterion, in {where}. With {said.plus} and "
            f"{said.minus} relabelled at random by family, the same rule selects {by_chance(r)}."
        )
    budget = (
        f"the {plural(r['used'], 'feature')} with the largest |t| "
        f"({percent(config['selection']['budget'], 3)} of all), "
        f"in {where}"
    )
    if r["selected"] == 0:
        return (
            f"No feature of {r['features_total']:,} passes every criterion. What follows uses {budget}, and is "
            "exploratory: these features were taken by budget, not by a test, and are set beside few random ones."
        )
    return (
        f"As configured, the study uses a budget, not the rule: {budget}; {r['budget_and_rule']} of them pass every "
        f"criterion, as do {r['selected']} features in all. What follows is exploratory."
    )


def by_chance(r: Mapping[str, Any]) -> str:
    """What the rule selects where there is nothing to find. No draw can show a mean below one in their number."""
    draws = plural(r["relabelings"], "draw")
    if not r["expected_false_max"]:
        return f"none in {draws}"
    return f"{number(r['expected_false'], 2)} on average over {draws} (at most {r['expected_false_max']})"


def cause(results: Mapping[str, Any], said: Said) -> str:
    patching, steering = results["patching"], results["steering"]
    shares = [
        f"{percent(patching[f'recovered_{direction}'])} of the shift {said.towards(direction)} (the whole residual "
        f"there {percent(patching[f'bars_{direction}']['whole residual'])}, the dictionaries' error alone "
        f"{percent(patching[f'bars_{direction}']['reconstruction error only'])})"
        for direction in ("to_plus", "to_minus")
    ]
    low, high = steering["usable_range"]
    held = (
        f"coefficients {span(low, high)} stay within the limits of cost" if low < high else "no coefficient but 0 does"
    )
    alone = (
        f"Alone, {patching['movers']} of {plural(patching['movers'] + patching['passengers'], 'feature')} "
        f"{'moves' if patching['movers'] == 1 else 'move'} the answer; the others are passengers. "
    )
    exploratory = "" if results["contrast"]["mode"] == "rule" else " The set was taken by budget: this is exploratory."
    return (
        f"Set to the other pole's values, the features carry {shares[0]} and {shares[1]}. {alone}Set to a dose of one "
        f"gap either way on {' and '.join(map(said.pole, steering['steered']))} prompts, they move the {said.outcome} "
        f"by {points(steering['at_one_pp'])}; {held}.{exploratory}"
    )


def transfer(r: Mapping[str, Any], said: Said) -> str:
    signed = tested(r)
    if not signed:
        return f"No other {said.tasks} with an expected sign were tried."
    moved = [name for name, task in signed.items() if off_zero(task, task["expected_sign"])]
    wrong = [name for name, task in signed.items() if off_zero(task, -task["expected_sign"])]
    sentence = (
        f"Set to the same doses, {len(moved) or 'none'} of {len(signed)} other {said.tasks} "
        f"{'moves' if len(moved) == 1 else 'move'} as expected with an interval off 0"
        f"{f' ({effects(moved, signed)})' if moved else ''}."
    )
    return sentence + (f" Against expectation: {effects(wrong, signed)}." if wrong else "")


def effects(names: Sequence[str], tasks: Mapping[str, Any]) -> str:
    return listing([f"{task_name(name, tasks[name]).lower()} {points(tasks[name]['slope'])}" for name in names])


def off_zero(task: Mapping[str, Any], sign: float) -> bool:
    low, high = task["ci"]
    return known(low) and known(high) and (low > 0 if sign > 0 else high < 0)


def task_name(name: str, task: Mapping[str, Any]) -> str:
    return task.get("label") or readable(name)


def dual_process(r: Mapping[str, Any]) -> str:
    if not r["defined"]:
        reason = f" ({r['reason']})" if r.get("reason") else ""
        return (
            f"The index is undefined: the model itself does not behave on the reasoning items{reason}, so an index of "
            "its features would mean nothing."
        )
    counts = {kind: r[kind] for kind in ("s1", "s2", "mixed", "neither", "silent")}
    return (
        f"Of {plural(sum(counts.values()), 'feature')}, {counts['s1']} go with System 1 and {counts['s2']} with System "
        f"2; {counts['mixed']} mixed, {counts['neither']} neither, {counts['silent']} silent on the items."
    )


def proximity(r: Mapping[str, Any]) -> str:
    effect, test = r["sets"]["all"], r["s2_minus_s1_within_layers"]
    if known(effect["pi"]):
        near = (
            f"Of the whole set's effect ({points(effect['total_pp'])}), {percent(effect['pi'])} is direct "
            f"(95 % interval {interval((effect['pi_low'], effect['pi_high']), 0, scale=100)})."
        )
    else:
        near = (
            f"The whole set's total effect ({points(effect['total_pp'])}) has an interval that includes 0, so its "
            "direct share is undefined."
        )
    if not test["layers"]:
        return f"{near} System 2 against System 1: {test['verdict']}."
    more = "more" if test["difference"] > 0 else "less"
    return (
        f"{near} Within layers, System 2 features are {number(abs(test['difference']))} {more} direct than System 1 "
        f"features."
    )


def dictionaries(r: Mapping[str, Any]) -> ClaimCard:
    """Whether the dictionaries fit the model as they are declared, from the results of stage fidelity."""
    title = "Do the dictionaries fit the model?"
    count, warnings = r["check"]["dictionaries"], r["check"]["warnings"]
    facts = (
        Fact("variance unexplained", f"{percent(r['fvu']['mean'])}, at worst {percent(r['fvu']['worst'])}"),
        Fact("with warnings", f"{len(warnings)} of {count}"),
    )
    if not warnings and not r["fvu"]["worst"] < 1:
        sentence = (
            "When they were loaded they fitted as declared, but on held-out text the worst of them leaves "
            f"{percent(r['fvu']['worst'])} of the variance unexplained: giving the mean would be better."
        )
        return ClaimCard(title, "Not on held-out text", "partly", sentence, facts)
    if not warnings:
        sentence = (
            "On general text they are as sparse as declared where that is known, explain more than the mean does, and "
            "do no better when read at another site or layer."
        )
        return ClaimCard(title, "Yes", "yes", sentence, facts)
    more = f" {len(warnings) - 1} more are in the section on dictionaries." if len(warnings) > 1 else ""
    sentence = f"What follows from features holds for them as they were used. {warnings[0]}{more}"
    status = "no" if len(warnings) == count else "partly"
    return ClaimCard(title, f"{len(warnings)} of {count} may not", status, sentence, facts)
