"""The page's sections on interventions: patching, attribution, proximity, steering and games."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from jaxmech.report import causal_figures as fig
from jaxmech.report import formats as fm
from jaxmech.report.blocks import Figure, Prompt, Prompts, Section, Table, cells, fixed, need, short_p, text
from jaxmech.report.sections import first_prompt
from jaxmech.report.verdict import Claim
from jaxmech.study.folder import RunFolder

DIRECTIONS = ("to_generous", "to_selfish")


def patching(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r, attribution = results["patching"], results["attribution"]
    bars = need(folder, "patching", "bars", ("direction", "name", "kind", "recovered", "low", "high", "change_pp"))
    null = need(folder, "patching", "null", ("direction", "recovered"))
    audit = need(folder, "attribution", "audit", ("layer", "feature", "attribution", "patched", "group"))
    blocks = []
    for direction in DIRECTIONS:
        base, donor = ("selfish", "generous") if direction == "to_generous" else ("generous", "selfish")
        here = bars[bars["direction"] == direction].set_index("name")["recovered"]
        others = {
            "whole residual": "the whole residual stream",
            "reconstruction error only": "the dictionaries' error alone",
        }
        also = [f"{words} {fm.percent(here[name])}" for name, words in others.items() if name in here]
        blocks.append(
            Figure(
                f"patching-{direction}",
                fig.patching_bars(bars, direction),
                f"{donor.capitalize()} donors' values put into {base} prompts: the features recover "
                f"{fm.percent(r[f'recovered_{direction}'])} of the shift, matched random sets "
                f"{', '.join([fm.percent(r[f'random_{direction}']), *also])}."
                " Error bars: 95 % over families; for random sets, 95 % of the sets.",
                "patching/bars",
            )
        )
    for direction in DIRECTIONS:
        values = 100 * null.loc[null["direction"] == direction, "recovered"].to_numpy(float)
        observed, p = 100 * r[f"recovered_{direction}"], r[f"p_random_{direction}"]
        blocks.append(
            Figure(
                f"null-{direction}",
                fig.null_histogram(values, observed, x="shift recovered, %"),
                f"The null {fm.name(direction)}: {fm.plural(len(values), 'random feature set')} of the same layers, as "
                "near as there are any in firing rate and strength (their change may be smaller), from"
                f" {fm.number(values.min(), 0)} to {fm.number(values.max(), 0)} %; the features: "
                f"{fm.number(observed, 0)} % ({fm.p_value(p)}, one-sided; "
                f"the smallest possible is {1 / (len(values) + 1):.3f}).",
                "patching/null",
            )
        )
    rank, agree, count = attribution["spearman"], attribution["sign_agreement"], attribution["audited"]
    integrated = attribution["spearman_integrated"]
    blocks.append(
        Figure(
            "audit",
            fig.audit(audit),
            "Attribution, one backward pass for all features, against patching each alone, over "
            f"{fm.plural(attribution['families'], 'family', 'families')}: rank correlation "
            f"{fm.number(rank['top'])} for the top {count['top']} and {fm.number(rank['random'])} for "
            f"{count['random']} random features "
            f"({fm.number(integrated['top'])} and {fm.number(integrated['random'])} for integrated gradients); "
            f"the signs agree for {fm.percent(agree['top'])} and {fm.percent(agree['random'])}.",
            "attribution/audit",
            wide=True,
        )
    )
    lead = (
        f"Only the features' own part of the residual stream is exchanged; the dictionaries' error stays. Over "
        f"{fm.plural(r['families'], 'test family', 'test families')}, the features recover "
        f"{fm.percent(r['recovered_to_generous'])} of the shift "
        f"towards generous ({fm.p_value(r['p_random_to_generous'])}) and {fm.percent(r['recovered_to_selfish'])} "
        "towards selfish "
        f"({fm.p_value(r['p_random_to_selfish'])})."
    )
    return Section("patching", "Patching", lead, blocks)


def proximity(folder: RunFolder, results: Mapping[str, Any], claim: Claim) -> Section:
    r = results["proximity"]
    sets = need(folder, "proximity", "sets", ("set", "total_pp", "total_low", "total_high", "direct_pp", "indirect_pp"))
    features = need(folder, "proximity", "features", ("layer", "feature", "class", "total", "direct", "proximity"))
    low, high = fig.PROXIMITY_RANGE
    outside = int((~features["proximity"].dropna().between(low, high)).sum())
    undefined = int(features["proximity"].isna().sum())
    left = [f"{outside} outside the range" if outside else "", f"{undefined} without any effect" if undefined else ""]
    left = [part for part in left if part]
    depth = fm.listing([f"{fm.name(kind)} {fm.number(value, 1)}" for kind, value in r["effect_weighted_depth"].items()])
    one = r["sets"]["all"]
    blocks = [
        Figure(
            "effects",
            fig.proximity_sets(sets),
            "Total effect of setting features to generous values on selfish prompts, and its split: direct, with "
            "all later "
            f"sublayers frozen, {fm.points(one['direct_pp'])}; through later layers {fm.points(one['indirect_pp'])}.",
            "proximity/sets",
        ),
        Figure(
            "directness",
            fig.proximity_features(features),
            "Single features' direct share by layer (size: total effect). Later layers are more direct by "
            "construction, so "
            f"classes are compared within layers. Mean layer weighted by effect: {depth}."
            + (f" Not drawn: {fm.listing(left)}." if left else ""),
            "proximity/features",
        ),
    ]
    if r.get("mediation"):
        rows = [
            [
                key.upper().replace("_THROUGH_", " through "),
                fm.percent(one["share"]),
                f"{fm.interval(one['ci'], 0, scale=100)} %",
            ]
            for key, one in r["mediation"].items()
        ]
        blocks.append(
            Table(
                "Mediation: the share of one class's effect that is lost while the other class is held at its "
                "base values.",
                ("path", "share", "95 % interval"),
                rows,
            )
        )
    columns = {
        "layer": ("layer", text),
        "feature": ("feature", text),
        "class": ("class", fm.name),
        "total": ("total, pp", fixed(2, 100)),
        "direct": ("direct, pp", fixed(2, 100)),
        "proximity": ("direct share", fm.percent),
    }
    blocks.append(Table("Single features.", *cells(features, columns), folded=True))
    return Section("proximity", "Nearness to the output", claim.sentence, blocks)


def steering(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r = results["steering"]
    low, high = usable = tuple(r["usable_range"])
    dose = need(
        folder,
        "steering",
        "dose",
        (
            "alpha",
            "g",
            "g_low",
            "g_high",
            "mass",
            "p_zero",
            "p_half",
            "p_all",
            "perplexity",
            "kl",
            "accuracy",
            "usable",
        ),
    )
    others = need(folder, "steering", "comparators", ("name", "kind", "slope_pp"))
    zero = float(dose.loc[dose["alpha"] == 0, "g"].iloc[0])
    if low < high:
        ends = [float(dose.loc[dose["alpha"] == alpha, "g"].iloc[0]) for alpha in usable]
        lead = (
            f"Inside the usable range, coefficients {fm.span(*usable)}, the share given goes from "
            f"{fm.percent(ends[0], 1)} to {fm.percent(ends[1], 1)} "
            f"({fm.points(r['effect_in_range_pp'])}; unsteered {fm.percent(zero, 1)}), {fm.points(r['slope_pp'])} "
            f"a unit (95 % interval {fm.interval(r['slope_ci'])})."
        )
    else:
        lead = (
            "There is no usable range: every coefficient tried but 0 passes a limit on perplexity, KL, "
            "arithmetic or valid mass. "
            f"Read over ±1 all the same, the slope is {fm.points(r['slope_pp'])} a unit (95 % interval "
            f"{fm.interval(r['slope_ci'])})."
        )
    shape = r.get("dose_response") or {}
    monotone = (
        f" Spearman {fm.number(shape['spearman'])}, isotonic R² {fm.number(shape['isotonic_r2'])} within it."
        if shape
        else ""
    )
    shaded = " Shaded: the usable range." if low < high else ""
    blocks = [
        Figure(
            "dose",
            fig.dose(dose, usable),
            f"Dose-response on neutral prompts, {fm.plural(r['families'], 'family', 'families')}; unsteered "
            f"{fm.percent(zero, 1)} (dotted).{shaded}{monotone}",
            "steering/dose",
        ),
        Figure(
            "outcomes",
            fig.outcomes(dose, usable),
            "What the answers become. Between the ends of the sweep the probability of giving nothing goes from "
            f"{fm.percent(dose['p_zero'].iloc[0])} to {fm.percent(dose['p_zero'].iloc[-1])}; valid answers hold "
            f"at least {fm.percent(dose['mass'].min())}.",
            "steering/dose",
        ),
        Figure("costs", fig.cost_limits(dose, usable), costs_caption(dose), "steering/dose"),
        Figure("comparators", fig.comparators(others), comparators_caption(r, others), "steering/comparators"),
    ]
    if r.get("specificity"):
        says = [
            f"“{fm.name(name).lower()}” {fm.points(one['slope_pp'])} ({fm.interval(one['ci'])})"
            for name, one in r["specificity"].items()
        ]
        blocks.append(
            Figure(
                "specificity",
                fig.specificity(r["specificity"]),
                "Is it giving, or saying larger numbers? Share given in other frames, where the number said must "
                "go down for it to go up, and between one's own accounts, where nothing should move: "
                f"{fm.listing(says)}.",
                "steering/results.json",
                wide=True,
            )
        )
    columns = {
        "alpha": ("coefficient", fm.coefficient),
        "g": ("share given", lambda v: fm.percent(v, 1)),
        "g_low": ("low", lambda v: fm.percent(v, 1)),
        "g_high": ("high", lambda v: fm.percent(v, 1)),
        "mass": ("valid mass", lambda v: fm.percent(v, 1)),
        "perplexity": ("perplexity", fixed(2)),
        "kl": ("KL, nat", fixed(3)),
        "accuracy": ("arithmetic", fm.percent),
        "usable": ("within limits", lambda v: "yes" if v else "no"),
    }
    blocks.append(Table("Every coefficient.", *cells(dose, columns), folded=True))
    blocks += steered_prompts(folder)
    return Section("steering", "Steering", lead, blocks)


def steered_prompts(folder: RunFolder) -> list[Prompts]:
    """A prompt of every condition that is steered, whole."""
    asked = need(folder, "behavior", "prompts", ("family", "pair", "condition", "prefix", "query"))
    rows = [first_prompt(asked, name) for name in ("neutral", "keep", "take", "own_accounts_neutral")]
    prompts = [Prompt(fm.name(row["condition"]), row["prefix"], row["query"]) for row in rows if row is not None]
    caption = "What is steered, whole: no stance is asked for, yet the worked examples name stances."
    return [Prompts(caption, prompts)] if prompts else []


def costs_caption(dose: pd.DataFrame) -> str:
    out = [fm.coefficient(alpha) for alpha in dose.loc[~dose["usable"].astype(bool), "alpha"]]
    said = f"Too costly: {fm.listing(out)}." if out else "No coefficient tried is too costly."
    return (
        "What steering costs on neutral text and on sums that follow three worked ones, steered at every token; above "
        "the line a coefficient is out. "
        f"{said} Triangles lie beyond the axis; valid mass is that of the prompts."
    )


def comparators_caption(r: Mapping[str, Any], others: pd.DataFrame) -> str:
    null = others[others["kind"] == "null"]
    ranges = [
        f"{len(part)} {name.replace('random features', 'random feature sets')} from "
        f"{fm.number(part['slope_pp'].min(), 1)} to "
        f"{fm.number(part['slope_pp'].max(), 1)}"
        for name, part in null.groupby("name")
    ]
    rest = [f"{name} {fm.points(value)}" for name, value in (r.get("comparators_pp") or {}).items()]
    text = (
        f"Directions of the same norm at coefficient 1: the selected features {fm.points(r['slope_at_one_pp'])}; "
        f"{fm.listing(ranges)} pp "
        f"(one-sided {fm.p_value(r['p_random'])} against feature sets"
    )
    text += (
        f", {fm.p_value(r['p_random_directions'])} against directions)."
        if r.get("p_random_directions") is not None
        else ")."
    )
    return text + (f" For comparison: {fm.listing(rest)}." if rest else "")


def games(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: Claim) -> Section:
    table = need(
        folder,
        "games",
        "games",
        (
            "game",
            "expected_sign",
            "families",
            "baseline",
            "slope_pp",
            "low_pp",
            "high_pp",
            "p_random",
            "p_holm",
            "null_sd_pp",
            "mass",
        ),
    )
    curves = need(folder, "games", "curves", ("game", "alpha", "score"))
    beyond = int((table["slope_pp"].abs() > 1.96 * table["null_sd_pp"]).sum())
    columns = {
        "game": ("game", fm.name),
        "expected_sign": ("expected", lambda v: {1: "up", -1: "down"}.get(v, "open")),
        "families": ("families", text),
        "baseline": ("unsteered score", fm.percent),
        "slope_pp": ("slope, pp", fixed(1)),
        "low_pp": ("low", fixed(1)),
        "high_pp": ("high", fixed(1)),
        "p_random": ("p, random", short_p),
        "p_holm": ("p, Holm", short_p),
        "mass": ("valid mass", fm.percent),
        "people": ("people, for context", text),
    }
    columns = {key: value for key, value in columns.items() if key in table}
    blocks = [
        Figure(
            "games",
            fig.games(table),
            "Slope of each game's score, with 95 % intervals over wordings, beside 1.96 standard deviations of what "
            f"{config['game_directions']} random directions of the same norm do at coefficient 1 (band). {beyond} of "
            f"{len(table)} lie outside their band. P-values are one-sided.",
            "games/games",
        ),
        Figure(
            "game-curves",
            fig.game_curves(curves),
            "Mean score over the coefficient; 0 is the unsteered model.",
            "games/curves",
        ),
        Table(
            "All games. A score is 1 where everything is given, returned or contributed. What people do is "
            "context, not a test.",
            *cells(table, columns),
        ),
        *game_prompts(folder),
    ]
    return Section("games", "Other games", claim.sentence, blocks)


def game_prompts(folder: RunFolder) -> list[Prompts]:
    """A prompt of every game, whole, where the run kept them."""
    if not folder.has_table("games", "prompts"):
        return []
    first = folder.table("games", "prompts").groupby("game", sort=False).first().reset_index()
    prompts = [Prompt(fm.name(row.game), row.prefix, row.query) for row in first.itertuples()]
    return [Prompts("A prompt of each game, whole: no worked example names a stance.", prompts)]
