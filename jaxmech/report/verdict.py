"""The verdict: from a study's numbers to four claims in plain words, and two side questions. Pure; no tables, no files.

A claim holds (True), does not (False), or is left open (None): withheld, partly shown, or not decidable. What is said
comes from the numbers alone, so the page and the terminal say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmech.behavior.behavior import Control
from jaxmech.report.formats import (
    NBSP,
    interval,
    known,
    listing,
    number,
    p_value,
    percent,
    plural,
    points,
    readable,
    significant,
    span,
)
from jaxmech.report.words import Said

LEVEL = 0.05
"""p and FDR below this count; intervals are 95 %."""

CONFOUND = 0.5
"""A control that moves the answer by more than this share of the behaviour's own shift may be what was found."""

MARKS = {"yes": "✓", "no": "✗", "partly": "◐", "open": "?", "withheld": "–"}

STAGES = ("behavior", "contrast", "dual_process", "patching", "attribution", "proximity", "steering", "transfer")
"""The stages whose results are judged."""


class Fact(NamedTuple):
    """A number behind a claim, formatted."""

    label: str
    text: str


class Claim(NamedTuple):
    """title: the question; answer: a few words; status: a key of `MARKS`; facts: number, interval, control, p."""

    title: str
    holds: bool | None
    sentence: str
    answer: str
    status: str
    facts: tuple[Fact, ...] = ()

    @property
    def mark(self) -> str:
        return MARKS[self.status]


def judge(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[Claim]:
    """The four claims: behaviour, features, cause, transfer.

    Args:
      results: a mapping from each of `STAGES` to its results.
      config: the study's settings.
    """
    said = Said.of(results)
    behaviour = judge_behaviour(results["behavior"], said)
    later = [
        judge_features(results["contrast"], config, said),
        judge_cause(results, exploratory(results["contrast"])),
        judge_transfer(results["transfer"], said, exploratory(results["contrast"])),
    ]
    return [behaviour, *(later if behaviour.holds else map(withhold, later))]


def side_questions(results: Mapping[str, Any]) -> list[Claim]:
    """Two readings beside the four claims: System 1 and System 2, and nearness to the output."""
    claims = [
        judge_dual_process(results["dual_process"]),
        judge_proximity(results["proximity"], results["dual_process"]["defined"]),
    ]
    return claims if results["behavior"]["gate"] else [withhold(claim) for claim in claims]


def judge_dictionaries(r: Mapping[str, Any]) -> Claim:
    """Whether the dictionaries fit the model as they are declared, from the results of stage fidelity."""
    title = "Do the dictionaries fit the model?"
    count, warnings = r["check"]["dictionaries"], r["check"]["warnings"]
    facts = (
        ("variance unexplained", f"{percent(r['fvu']['mean'])}, at worst {percent(r['fvu']['worst'])}"),
        ("with warnings", f"{len(warnings)} of {count}"),
    )
    if not warnings and not r["fvu"]["worst"] < 1:
        sentence = (
            "When they were loaded they fitted as declared, but on held-out text the worst of them leaves "
            f"{percent(r['fvu']['worst'])} of the variance unexplained: giving the mean would be better."
        )
        return claim(title, "partly", "Not on held-out text", sentence, *facts)
    if not warnings:
        sentence = (
            "On general text they are as sparse as declared where that is known, explain more than the mean does, and "
            "do no better when read at another site or layer."
        )
        return claim(title, "yes", "Yes", sentence, *facts)
    more = f" {len(warnings) - 1} more are in the section on dictionaries." if len(warnings) > 1 else ""
    sentence = f"What follows from features holds for them as they were used. {warnings[0]}{more}"
    answer = f"{len(warnings)} of {count} may not"
    return claim(title, "no" if len(warnings) == count else "partly", answer, sentence, *facts)


def claim(title: str, status: str, answer: str, sentence: str, *facts: tuple[str, str]) -> Claim:
    holds = {"yes": True, "no": False}.get(status)
    return Claim(title, holds, sentence, answer, status, tuple(Fact(*fact) for fact in facts))


def withhold(one: Claim) -> Claim:
    """The same numbers without the conclusion."""
    sentence = f"Withheld, because there is no behaviour to explain. Measured all the same: {one.sentence}"
    return one._replace(holds=None, status="withheld", answer="Withheld", sentence=sentence)


def exploratory(selection: Mapping[str, Any]) -> bool:
    """Whether the features in use were taken by budget, not by the rule."""
    return selection["mode"] != "rule"


def judge_behaviour(r: Mapping[str, Any], said: Said) -> Claim:
    title = "Is there a behaviour?"
    gating = {name: control for name, control in r["controls"].items() if control["gate"]}
    facts = (
        ("shift", points(r["shift_pp"])),
        ("95 % interval", f"{interval(r['ci'])} pp"),
        *(
            (said.contrast(name).lower(), f"{points(control['shift_pp'])} ({interval(control['ci'])})")
            for name, control in gating.items()
        ),
        ("test", f"{p_value(r.get('p'))} (two-sided), {plural(r['families'], 'family', 'families')}"),
    )
    seen = (
        f"{said.setting}{the(said)} is {percent(r['mean_plus'], 1)} where the {said.varies} is {said.plus} and "
        f"{percent(r['mean_minus'], 1)} where it is {said.minus}: a shift of "
        f"{points(r['shift_pp'])} (95 % interval {interval(r['ci'])}). "
        f"{''.join(control_moves(said.contrast(name), control) for name, control in gating.items())}"
        f"Valid answers hold {percent(r['mass'])} of the probability.{strongest_control(r, said)}"
    )
    if r["gate"]:
        return claim(title, "yes", "Yes", seen, *facts)
    failed = [spell(reason) for reason, met in r["gate_reasons"].items() if not met]
    sentence = f"{seen} This fails the gate: {listing(failed)} {'is' if len(failed) == 1 else 'are'} not met."
    return claim(title, "no", "No behaviour to explain", sentence, *facts)


def the(said: Said) -> str:
    """The outcome at the beginning of a sentence, or after the setting."""
    return f"{'the' if said.setting else 'The'} {said.outcome}"


def control_moves(label: str, one: Mapping[str, Any]) -> str:
    size = one["size_pp"]
    single = f" on average, by {number(size, 1)}{NBSP}pp either way in a single family" if known(size) else ""
    return f"{label}: a shift of {points(one['shift_pp'])}{single}. "


def strongest_control(r: Mapping[str, Any], said: Said) -> str:
    """The control that moves the answer most: what the behaviour may be confounded with."""
    shares = control_shares(r, said)
    if not shares:
        return ""
    name = max(shares, key=lambda k: shares[k])
    ruled = said.controls[name].rules_out
    warning = f", so that it is not ruled out {ruled}" if shares[name] > CONFOUND and ruled else ""
    moved = points(r["controls"][name]["shift_pp"])
    return f" Of the other controls, {said.contrast(name).lower()} moves it most, by {moved}{warning}."


def control_shares(r: Mapping[str, Any], said: Said) -> dict[str, float]:
    """Control -> the size of its shift as a share of the behaviour's, of those that should not move and are not in the
    gate."""
    shifts = {
        name: control["shift_pp"]
        for name, control in r["controls"].items()
        if not (control["gate"] or said.controls[name].moves or said.controls[name].flips)
        and known(control["shift_pp"])
    }
    return {k: abs(shift / r["shift_pp"]) if r["shift_pp"] else float("inf") for k, shift in shifts.items()}


def spell(reason: str) -> str:
    return f"“{reason.replace('>=', '≥').replace('<=', '≤').replace(' x ', ' × ').replace('-', '−')}”"


def judge_features(r: Mapping[str, Any], config: Mapping[str, Any], said: Said) -> Claim:
    title = "Which features go with it?"
    layers = [int(layer) for layer in r["by_layer"]]
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {min(layers)} to {max(layers)}"
    facts = (
        ("by the full rule", f"{r['selected']:,} of {r['features_total']:,}"),
        ("share of all features", f"{significant(100 * r['share'])} %"),
        ("relabelled at random", by_chance(r, config)),
        ("in use", f"{r['used']:,}, {where}"),
    )
    if not exploratory(r):
        finding = (
            f"{plural(r['selected'], 'feature')} of {r['features_total']:,} ({percent(r['share'], 3)}) "
            f"{'passes' if r['selected'] == 1 else 'pass'} every criterion, in {where}. With {said.plus} and "
            f"{said.minus} relabelled at random by family, the same rule selects {by_chance(r, config)}"
        )
        # What R draws did not show once may still come once in R.
        fdr = max(r["fdr"], 1 / (config["selection"]["relabelings"] * r["selected"])) if known(r["fdr"]) else None
        if known(fdr) and fdr <= LEVEL:
            return claim(title, "yes", plural(r["selected"], "feature"), f"{finding}.", *facts)
        sentence = f"{finding}: up to {percent(fdr)} of those found may be false."
        return claim(title, "partly", f"{plural(r['selected'], 'feature')}, uncertain", sentence, *facts)
    share = percent(config["selection"]["budget"], 3)
    budget = f"the {plural(r['used'], 'feature')} with the largest |t| ({share} of all), in {where}"
    if r["selected"] == 0:
        sentence = (
            f"No feature of {r['features_total']:,} passes every criterion. What follows uses {budget}, and is "
            "exploratory: these features were taken by budget, not by a test."
        )
        return claim(title, "no", "No feature by the full rule; exploratory set", sentence, *facts)
    sentence = (
        f"As configured, the study uses a budget, not the rule: {budget}; {r['budget_and_rule']} of them pass every "
        f"criterion, as do {r['selected']} features in all. What follows is exploratory."
    )
    return claim(title, "partly", "A budget, exploratory", sentence, *facts)


def by_chance(r: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What the rule selects where there is nothing to find. No draw can show a mean below one in their number."""
    draws = plural(config["selection"]["relabelings"], "draw")
    if not r["expected_false_max"]:
        return f"none in {draws}"
    return f"{number(r['expected_false'], 2)} on average over {draws} (at most {r['expected_false_max']})"


def above(pair: Sequence[float | None], p: float | None) -> bool:
    """Whether an interval lies above 0 and its p counts."""
    return known(pair[0]) and pair[0] > 0 and known(p) and p < LEVEL


def shortfall(pair: Sequence[float | None], p: float | None, sets: int) -> str:
    """Why an effect does not count; too few random sets are no evidence that they do as well."""
    if not known(pair[0]) or not known(pair[1]):
        return "is undefined"
    if pair[1] < 0:
        return "goes the wrong way"
    if pair[0] <= 0:
        return "has an interval that includes 0"
    if 1 / (sets + 1) >= LEVEL:
        return f"cannot be told from random: with {sets} random sets p cannot fall below {1 / (sets + 1):.2f}"
    return f"is not larger than matched random sets give ({p_value(p)})"


def judge_cause(results: Mapping[str, Any], explore: bool) -> Claim:
    """Three tests, two of patching and one of steering; "Yes" only where nothing else would explain all three."""
    title, said = "Do they cause it?", Said.of(results)
    patching, steering = results["patching"], results["steering"]
    parts, facts, sets = [], [], patching["random_sets"]
    missing = {}  # which of the three tests falls short, and why
    for direction in ("to_plus", "to_minus"):
        value, ci = patching[f"recovered_{direction}"], patching[f"recovered_{direction}_ci"]
        random, p = patching[f"random_{direction}"], patching[f"p_random_{direction}"]
        where = said.towards(direction)
        parts.append(
            f"{percent(value)} of the shift {where} (95 % interval {interval(ci, 0, scale=100)}; matched "
            "random sets "
            f"{percent(random)}, {p_value(p)})"
        )
        facts.append(
            (
                f"patched {where}",
                f"{percent(value)} ({interval(ci, 0, scale=100)}), {p_value(p)}",
            )
        )
        if not above(ci, p):
            missing[direction] = f"patching {where} {shortfall(ci, p, sets)}"
    slope, ci, p, (low, high) = (steering[key] for key in ("slope_pp", "slope_ci", "p_random", "usable_range"))
    usable = low < high
    facts += [
        ("steered, per unit", f"{points(slope)} ({interval(ci)}), {p_value(p)}"),
        ("usable coefficients", span(low, high) if usable else "none but 0"),
    ]
    if not above(ci, p):
        missing["steering"] = f"steering {shortfall(ci, p, sets)}"
    elif not usable:
        missing["steering"] = "steering has no usable range: every coefficient tried but 0 costs too much"
    doubts = []
    if len(missing) < 3:  # else there is no effect to doubt
        doubts += [*confounds(results["behavior"], said), *as_good_at_random(steering), *unspecific(steering, said)]
        doubts += no_home_effect(results["transfer"])
    status = "no" if len(missing) == 3 else "partly" if missing or doubts else "yes"
    answer = {"yes": "Yes", "no": "Not shown", "partly": "In part"}[status]
    reasons = "; ".join([*missing.values(), *doubts])
    held = f"inside the usable range {span(low, high)}" if usable else "read over ±1, outside any usable range"
    sentence = (
        f"{f'{answer}: {reasons}. ' if reasons else ''}"
        f"Set to the other pole's values, the features carry {parts[0]} and {parts[1]}. Steered along them on "
        f"{' and '.join(map(said.pole, steering['steered']))} prompts, the {said.outcome} changes by "
        f"{points(slope)} per unit of coefficient ({interval(ci)}), {held}; "
        f"against random feature sets of the same norm at coefficient 1, {p_value(p)}. These p-values are one-sided."
    )
    if explore:
        sentence += " The set was taken by budget, so this is exploratory."
    return claim(title, status, answer + (", exploratory" if explore and status != "no" else ""), sentence, *facts)


def confounds(behaviour: Mapping[str, Any], said: Said) -> list[str]:
    """Controls that move the answer nearly as the behaviour does: what the features carry may be that."""
    shares = control_shares(behaviour, said)
    moved = [
        f"“{said.contrast(name).lower()}” moves the answer by {points(behaviour['controls'][name]['shift_pp'])}, "
        f"{percent(share)} of the {said.varies}'s shift, so that the features may carry that"
        for name, share in shares.items()
        if share > CONFOUND
    ]
    return moved + [untried(name, said) for name in needed(said, moves=False) if name not in behaviour["controls"]]


def needed(said: Said, *, moves: bool) -> list[str]:
    """Controls without which no cause is claimed."""
    return [name for name, control in said.controls.items() if control.needed and control.moves == moves]


def untried(name: str, said: Said) -> str:
    return f"“{said.contrast(name).lower()}” was not tried{open_to(said.controls[name])}"


def open_to(control: Control) -> str:
    """What a control that came out otherwise leaves open."""
    return f", so that it is not ruled out {control.rules_out}" if control.rules_out else ""


def as_good_at_random(steering: Mapping[str, Any]) -> list[str]:
    """Whether random directions of the same norm steer as far; random sets of features are the other control."""
    p = steering.get("p_random_directions")
    if not known(p):
        return ["no random directions of the same norm were steered along"]
    return [] if p < LEVEL else [f"random directions of the same norm do as well ({p_value(p)})"]


def unspecific(steering: Mapping[str, Any], said: Said) -> list[str]:
    """Controls that steering should move and does not, and others that it moves."""
    conditions, doubts = steering.get("specificity") or {}, []
    for name, control in said.controls.items():
        low, high = conditions.get(name, {}).get("ci", (None, None))
        if not known(low) or not known(high):
            doubts += [untried(name, said)] if name in needed(said, moves=True) else []
        elif control.moves and low <= 0:
            doubts.append(
                f"under “{said.contrast(name).lower()}” the {said.outcome} "
                f"{'goes down' if high < 0 else 'does not go up'} ({slope_text(conditions[name])})"
                f"{open_to(control)}"
            )
        elif not control.moves and not low <= 0 <= high:
            doubts.append(
                f"“{said.contrast(name).lower()}” moves as well ({slope_text(conditions[name])}){open_to(control)}"
            )
    return doubts


def slope_text(one: Mapping[str, Any]) -> str:
    return f"{points(one['slope_pp'])} per unit, {interval(one['ci'])}"


def no_home_effect(tasks: Mapping[str, Any]) -> list[str]:
    """Whether the behaviour's own task moves without examples of it: else it is the examples that are steered."""
    task = next((task for task in tasks.values() if isinstance(task, Mapping) and task.get("home")), None)
    if task is None:
        return ["the same task was not tried in prompts without any example of the behaviour"]
    seen = f"the same task without examples of the behaviour ({points(task['slope'])}, {interval(task['ci'])})"
    if not off_zero(task, 1):
        return [f"{seen} {'goes the other way' if off_zero(task, -1) else 'does not move'}"]
    if not (known(task["p_random"]) and task["p_random"] < LEVEL):
        return [f"{seen} moves no more than along random directions ({p_value(task['p_random'])})"]
    return []


def judge_transfer(r: Mapping[str, Any], said: Said, explore: bool) -> Claim:
    """Transfer: tasks other than the home task that move the expected way, off zero and beyond random directions."""
    title = f"Does it carry over to other {said.tasks}?"
    tasks = {name: task for name, task in r.items() if isinstance(task, Mapping) and "slope" in task}
    others = {name: g for name, g in tasks.items() if not g["home"]}
    signed = {name: g for name, g in others.items() if g["expected_sign"]}
    moved = [name for name, g in signed.items() if off_zero(g, g["expected_sign"])]
    wrong = [name for name, g in signed.items() if off_zero(g, -g["expected_sign"])]
    confirmed = [name for name in moved if known(tasks[name]["p_holm"]) and tasks[name]["p_holm"] < LEVEL]
    best = max(signed, key=lambda name: abs(signed[name]["slope"] or 0.0), default=None)
    facts = [
        ("move as expected", f"{len(moved)} of {len(signed)}, interval off 0"),
        ("beyond random directions", f"{len(confirmed)} of {len(signed)}, Holm p < {LEVEL}"),
    ]
    if best is not None:
        g = signed[best]
        facts.append(
            (
                task_name(best, g),
                f"{points(g['slope'])} ({interval(g['ci'])}), {p_value(g['p_holm'])} (Holm)",
            )
        )
    if moved:
        verb = "moves" if len(moved) == 1 else "move"
        sentence = (
            f"With the same direction, {len(moved)} of {len(signed)} other {said.tasks} {verb} as expected with an "
            f"interval off 0 ({listing([slope_of(name, signed[name]) for name in moved])}); "
            f"{len(confirmed) or 'none'} of them also {'moves' if len(confirmed) < 2 else 'move'} more than under "
            "random directions after Holm's correction."
        )
    else:
        sentence = (
            f"With the same direction, none of {len(signed)} other {said.tasks} moves as expected with an interval "
            "off 0."
        )
    if wrong:
        sentence += f" Against expectation: {listing([slope_of(name, signed[name]) for name in wrong])}."
    if not signed:
        return claim(title, "open", "Not tested", f"No other {said.tasks} with an expected sign were tried.", *facts)
    also = ", exploratory" if explore else ""
    if explore:
        sentence += " The direction is that of a set taken by budget, so this is exploratory."
    if len(confirmed) == len(signed):
        return claim(title, "yes", "Yes" + also, sentence, *facts)
    if confirmed:
        return claim(title, "partly", f"To {len(confirmed)} of {len(signed)} {said.tasks}{also}", sentence, *facts)
    return claim(title, "no", "Not shown", sentence, *facts)


def off_zero(game: Mapping[str, Any], sign: float) -> bool:
    low, high = game["ci"]
    return known(low) and known(high) and (low > 0 if sign > 0 else high < 0)


def slope_of(name: str, game: Mapping[str, Any]) -> str:
    return f"{task_name(name, game).lower()} {points(game['slope'])}"


def task_name(name: str, task: Mapping[str, Any]) -> str:
    return task.get("label") or readable(name)


def judge_dual_process(r: Mapping[str, Any]) -> Claim:
    title = "Are they heuristic (System 1) or deliberative (System 2)?"
    if not r["defined"]:
        reason = f" ({r['reason']})" if r.get("reason") else ""
        sentence = (
            f"The index is undefined: the model itself does not behave on the reasoning items{reason}, so an index of "
            "its features would mean nothing."
        )
        return claim(title, "open", "Undefined", sentence)
    counts = {kind: r[kind] for kind in ("s1", "s2", "mixed", "neither", "silent")}
    total = sum(counts.values())
    sentence = (
        f"Of {plural(total, 'feature')}, {counts['s1']} {verb(counts['s1'])} with System 1 and {counts['s2']} with "
        f"System 2; {counts['mixed']} mixed, {counts['neither']} neither, {counts['silent']} silent on the items."
    )
    facts = [(readable(kind), str(count)) for kind, count in counts.items()]
    if counts["s1"] and counts["s2"]:
        return claim(title, "yes", "Both kinds", sentence, *facts)
    if counts["s1"] or counts["s2"]:
        return claim(title, "partly", "Only System 1" if counts["s1"] else "Only System 2", sentence, *facts)
    return claim(title, "no", "Neither", sentence, *facts)


def verb(count: int) -> str:
    return "goes" if count == 1 else "go"


def judge_proximity(r: Mapping[str, Any], defined: bool) -> Claim:
    title = "Do System 2 features act nearer to the output?"
    effect = r["sets"]["all"]
    if known(effect["pi"]):
        near = (
            f"Of the whole set's effect ({points(effect['total_pp'])}), {percent(effect['pi'])} is direct "
            f"(95 % interval {interval((effect['pi_low'], effect['pi_high']), 0, scale=100)}). "
        )
    else:
        near = (
            f"The whole set's total effect ({points(effect['total_pp'])}) has an interval that includes 0, so its "
            "direct share is undefined. "
        )
    test = r["s2_minus_s1_within_layers"]
    facts = [
        ("direct share", percent(effect["pi"])),
        ("S2 − S1 within layers", number(test["difference"])),
    ]
    if not defined:
        return claim(title, "open", "Cannot be told", f"{near}S2 against S1: the index is undefined.", *facts)
    if not test["layers"]:
        return claim(title, "open", "Cannot be told", f"{near}S2 against S1: {test['verdict']}.", *facts)
    facts.append(("permutation", f"{p_value(test['p'])}, {plural(test['layers'], 'layer')}"))
    sentence = (
        f"{near}Within layers, System 2 features are {number(abs(test['difference']))} "
        f"{'more' if test['difference'] > 0 else 'less'} direct than System 1 features ({p_value(test['p'])})."
    )
    holds = known(test["p"]) and test["p"] < LEVEL and test["difference"] > 0
    return claim(title, "yes" if holds else "no", "Yes" if holds else "Not shown", sentence, *facts)
