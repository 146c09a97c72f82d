"""The verdict: from a study's numbers to four claims in plain words, and two side questions. Pure; no tables, no files.

A claim holds (True), does not (False), or is left open (None): withheld, partly shown, or not decidable. What is said
comes from the numbers alone, so the page and the terminal say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxmech.report import formats as fm

LEVEL = 0.05
"""p and FDR below this count; intervals are 95 %."""

HOME_GAMES = ("dictator_give", "dictator")
"""The game the direction was found in: it is no evidence of transfer."""

MARKS = {"yes": "✓", "no": "✗", "partly": "◐", "open": "?", "withheld": "–"}

STAGES = ("behavior", "contrast", "dual_process", "patching", "attribution", "proximity", "steering", "games")
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
    behaviour = judge_behaviour(results["behavior"])
    later = [
        judge_features(results["contrast"], config),
        judge_cause(results["patching"], results["steering"], exploratory(results["contrast"])),
        judge_games(results["games"], exploratory(results["contrast"])),
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
        ("variance unexplained", f"{fm.percent(r['fvu']['mean'])}, at worst {fm.percent(r['fvu']['worst'])}"),
        ("warned of", f"{len(warnings)} of {count}"),
    )
    if not warnings:
        sentence = (
            "On general text they are as sparse as declared where that is known, explain more than the mean does, and "
            "do no better read at another site or layer."
        )
        return claim(title, "yes", "Yes", sentence, *facts)
    more = f" {len(warnings) - 1} more are in the section on dictionaries." if len(warnings) > 1 else ""
    sentence = f"What follows from features holds of them as they were used. {warnings[0]}{more}"
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


def judge_behaviour(r: Mapping[str, Any]) -> Claim:
    title = "Is there a behaviour?"
    facts = (
        ("shift", fm.points(r["shift_pp"])),
        ("95 % interval", f"{fm.interval(r['ci'])} pp"),
        ("placebo words", f"{fm.points(r['placebo_pp'])} ({fm.interval(r.get('placebo_ci'))})"),
        ("test", f"{fm.p_value(r.get('p'))}, {fm.plural(r['families'], 'family', 'families')}"),
    )
    seen = (
        f"Told that the player is generous, the model gives {fm.percent(r['mean_generous'], 1)} of the stake; "
        "told that "
        f"the player is selfish, {fm.percent(r['mean_selfish'], 1)}: a shift of {fm.points(r['shift_pp'])} "
        f"(95 % interval {fm.interval(r['ci'])}). Placebo words shift it by {fm.points(r['placebo_pp'])}. "
        f"Valid answers hold {fm.percent(r['mass'])} of the probability.{strongest_control(r)}"
    )
    if r["gate"]:
        return claim(title, "yes", "Yes", seen, *facts)
    failed = [spell(reason) for reason, met in r["gate_reasons"].items() if not met]
    sentence = f"{seen} This fails the gate: {fm.listing(failed)} {'is' if len(failed) == 1 else 'are'} not met."
    return claim(title, "no", "No behaviour to explain", sentence, *facts)


def strongest_control(r: Mapping[str, Any]) -> str:
    """The control that moves the answer most: what the stance effect may be confounded with."""
    controls = {k: v for k, v in r["controls_pp"].items() if k not in ("stance", "heldout", "placebo") and fm.known(v)}
    if not controls:
        return ""
    name = max(controls, key=lambda k: abs(controls[k]))
    share = abs(controls[name] / r["shift_pp"]) if r["shift_pp"] else float("inf")
    warning = ", so that part of what follows may be that, not giving." if share > 0.5 else ""
    seen = f" Of the other controls, {fm.name(name).lower()} moves it most, by {fm.points(controls[name])}"
    return f"{seen}{warning or '.'}"


def spell(reason: str) -> str:
    return f"“{reason.replace('>=', '≥').replace('<=', '≤').replace(' x ', ' × ').replace('-', '−')}”"


def judge_features(r: Mapping[str, Any], config: Mapping[str, Any]) -> Claim:
    title = "Which features go with it?"
    layers = [int(layer) for layer in r["by_layer"]]
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {min(layers)} to {max(layers)}"
    facts = (
        ("by the full rule", f"{r['selected']:,} of {r['features_total']:,}"),
        ("share of all features", f"{fm.significant(100 * r['share'])} %"),
        ("expected by chance", f"{fm.number(r['expected_false'], 2)} (at most {r['expected_false_max']} in one draw)"),
        ("in use", f"{r['used']:,}, {where}"),
    )
    if not exploratory(r):
        found = (
            f"{fm.plural(r['selected'], 'feature')} of {r['features_total']:,} ({fm.percent(r['share'], 3)}) "
            f"{'passes' if r['selected'] == 1 else 'pass'} every criterion, in {where}. With the stances "
            "relabelled at random "
            f"by family, the same rule selects {fm.number(r['expected_false'], 2)} on average"
        )
        if fm.known(r["fdr"]) and r["fdr"] <= LEVEL:
            return claim(title, "yes", fm.plural(r["selected"], "feature"), f"{found}.", *facts)
        sentence = f"{found}: up to {fm.percent(r['fdr'])} of those found may be false."
        return claim(title, "partly", f"{fm.plural(r['selected'], 'feature')}, uncertain", sentence, *facts)
    share = fm.percent(config["budget_share"], 3)
    budget = f"the {fm.plural(r['used'], 'feature')} with the largest |t| ({share} of all), in {where}"
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


def above(pair, p: float | None) -> bool:
    """Whether an interval lies above 0 and its p counts."""
    return fm.known(pair[0]) and pair[0] > 0 and fm.known(p) and p < LEVEL


def shortfall(pair, p: float | None, sets: int) -> str:
    """Why an effect does not count; too few random sets are no evidence that they do as well."""
    if not fm.known(pair[0]) or not fm.known(pair[1]):
        return "is undefined"
    if pair[1] < 0:
        return "goes the wrong way"
    if pair[0] <= 0:
        return "has an interval that includes 0"
    if 1 / (sets + 1) >= LEVEL:
        return f"cannot be told from random: with {sets} random sets p cannot fall below {1 / (sets + 1):.2f}"
    return f"is not larger than matched random sets give ({fm.p_value(p)})"


def judge_cause(patching: Mapping[str, Any], steering: Mapping[str, Any], explore: bool) -> Claim:
    title = "Do they cause it?"
    parts, facts, sets = [], [], patching["random_sets"]
    missing = {}  # which of the three tests falls short, and why
    for direction in ("to_generous", "to_selfish"):
        value, ci = patching[f"recovered_{direction}"], patching[f"recovered_{direction}_ci"]
        random, p = patching[f"random_{direction}"], patching[f"p_random_{direction}"]
        where = fm.name(direction)
        parts.append(
            f"{fm.percent(value)} of the shift {where} (95 % interval {fm.interval(ci, 0, scale=100)}; matched "
            "random sets "
            f"{fm.percent(random)}, {fm.p_value(p)})"
        )
        facts.append((f"patched {where}", f"{fm.percent(value)} ({fm.interval(ci, 0, scale=100)}), {fm.p_value(p)}"))
        if not above(ci, p):
            missing[direction] = f"patching {where} {shortfall(ci, p, sets)}"
    slope, ci, p, (low, high) = (steering[key] for key in ("slope_pp", "slope_ci", "p_random", "usable_range"))
    usable = low < high
    facts += [
        ("steered, a unit", f"{fm.points(slope)} ({fm.interval(ci)}), {fm.p_value(p)}"),
        ("usable coefficients", fm.span(low, high) if usable else "none but 0"),
    ]
    if not above(ci, p):
        missing["steering"] = f"steering {shortfall(ci, p, sets)}"
    elif not usable:
        missing["steering"] = "steering has no usable range: every coefficient tried but 0 costs too much"
    held = f"inside the usable range {fm.span(low, high)}" if usable else "read over ±1, outside any usable range"
    sentence = (
        f"Set to the other stance's values, the features carry {parts[0]} and {parts[1]}. Steered along them on "
        "neutral "
        f"prompts, the share given changes by {fm.points(slope)} a unit of coefficient ({fm.interval(ci)}), {held}; "
        f"against random feature sets of the same norm at coefficient 1, {fm.p_value(p)}."
    )
    if missing:
        sentence += f" Not shown: {fm.listing(list(missing.values()))}."
    sentence += unspecific(steering)
    if explore:
        sentence += " The set was taken by budget, so this is exploratory."
    status = {0: "yes", 3: "no"}.get(len(missing), "partly")
    answer = {"yes": "Yes", "no": "Not shown", "partly": "In part"}[status]
    return claim(title, status, answer + (", exploratory" if explore and status != "no" else ""), sentence, *facts)


def unspecific(steering: Mapping[str, Any]) -> str:
    """What steering moves although it is not social, said beside the claim."""
    control = (steering.get("specificity") or {}).get("own_accounts_neutral")
    if not control or not fm.known(control["ci"][0]) or control["ci"][0] <= 0 <= control["ci"][1]:
        return ""
    moved = f"{fm.points(control['slope_pp'])} a unit ({fm.interval(control['ci'])})"
    return f" It is not purely social: the split between one's own two accounts moves as well, by {moved}."


def judge_games(r: Mapping[str, Any], explore: bool) -> Claim:
    """Transfer: games other than the home game that move the expected way, off zero and beyond random directions."""
    title = "Does it carry over to other games?"
    games = {name: game for name, game in r.items() if isinstance(game, Mapping) and "slope" in game}
    others = {name: g for name, g in games.items() if name not in HOME_GAMES}
    signed = {name: g for name, g in others.items() if g["expected_sign"]}
    moved = [name for name, g in signed.items() if off_zero(g, g["expected_sign"])]
    wrong = [name for name, g in signed.items() if off_zero(g, -g["expected_sign"])]
    confirmed = [name for name in moved if fm.known(games[name]["p_holm"]) and games[name]["p_holm"] < LEVEL]
    best = max(signed, key=lambda name: abs(signed[name]["slope"] or 0.0), default=None)
    facts = [
        ("move as expected", f"{len(moved)} of {len(signed)}, interval off 0"),
        ("beyond random directions", f"{len(confirmed)} of {len(signed)}, Holm p < {LEVEL}"),
    ]
    if best is not None:
        g = signed[best]
        facts.append(
            (fm.name(best), f"{fm.points(g['slope'])} ({fm.interval(g['ci'])}), {fm.p_value(g['p_holm'])} (Holm)")
        )
    if moved:
        sentence = (
            f"With the same direction, {len(moved)} of {len(signed)} other games move as expected with an interval off "
            f"0 ({fm.listing([slope_of(name, signed[name]) for name in moved])}); {len(confirmed) or 'none'} of them "
            f"also {'moves' if len(confirmed) < 2 else 'move'} more than under random directions after Holm's "
            "correction."
        )
    else:
        sentence = (
            f"With the same direction, none of {len(signed)} other games moves as expected with an interval off 0."
        )
    if wrong:
        sentence += f" Against expectation: {fm.listing([slope_of(name, signed[name]) for name in wrong])}."
    if not signed:
        return claim(title, "open", "Not tested", "No other game with an expected sign was played.", *facts)
    also = ", exploratory" if explore else ""
    if explore:
        sentence += " The direction is that of a set taken by budget, so this is exploratory."
    if len(confirmed) == len(signed):
        return claim(title, "yes", "Yes" + also, sentence, *facts)
    if confirmed:
        return claim(title, "partly", f"To {len(confirmed)} of {len(signed)} games{also}", sentence, *facts)
    return claim(title, "no", "Not shown", sentence, *facts)


def off_zero(game: Mapping[str, Any], sign: float) -> bool:
    low, high = game["ci"]
    return fm.known(low) and fm.known(high) and (low > 0 if sign > 0 else high < 0)


def slope_of(name: str, game: Mapping[str, Any]) -> str:
    return f"{fm.name(name).lower()} {fm.points(game['slope'])}"


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
        f"Of {fm.plural(total, 'feature')}, {counts['s1']} {verb(counts['s1'])} with System 1 and {counts['s2']} with "
        f"System 2; {counts['mixed']} mixed, {counts['neither']} neither, {counts['silent']} silent on the items."
    )
    facts = [(fm.name(kind), str(count)) for kind, count in counts.items()]
    if counts["s1"] and counts["s2"]:
        return claim(title, "yes", "Both kinds", sentence, *facts)
    if counts["s1"] or counts["s2"]:
        return claim(title, "partly", "Only System 1" if counts["s1"] else "Only System 2", sentence, *facts)
    return claim(title, "no", "Neither", sentence, *facts)


def verb(count: int) -> str:
    return "goes" if count == 1 else "go"


def judge_proximity(r: Mapping[str, Any], defined: bool) -> Claim:
    title = "Do System 2 features act nearer to the output?"
    one = r["sets"]["all"]
    if fm.known(one["pi"]):
        near = (
            f"Of the whole set's effect ({fm.points(one['total_pp'])}), {fm.percent(one['pi'])} is direct "
            f"(95 % interval {fm.interval((one['pi_low'], one['pi_high']), 0, scale=100)}). "
        )
    else:
        near = (
            f"The whole set's total effect ({fm.points(one['total_pp'])}) has an interval that includes 0, so its "
            "direct share is undefined. "
        )
    test = r["s2_minus_s1_within_layers"]
    facts = [("direct share", fm.percent(one["pi"])), ("S2 − S1 within layers", fm.number(test["difference"]))]
    if not defined:
        return claim(title, "open", "Cannot be told", f"{near}S2 against S1: the index is undefined.", *facts)
    if not test["layers"]:
        return claim(title, "open", "Cannot be told", f"{near}S2 against S1: {test['verdict']}.", *facts)
    facts.append(("permutation", f"{fm.p_value(test['p'])}, {fm.plural(test['layers'], 'layer')}"))
    sentence = (
        f"{near}Within layers, System 2 features are {fm.number(abs(test['difference']))} "
        f"{'more' if test['difference'] > 0 else 'less'} direct than System 1 features ({fm.p_value(test['p'])})."
    )
    holds = fm.known(test["p"]) and test["p"] < LEVEL and test["difference"] > 0
    return claim(title, "yes" if holds else "no", "Yes" if holds else "Not shown", sentence, *facts)
