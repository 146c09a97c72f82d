"""What steering along the features moves, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.io.tables import each_row
from jaxmech.report.blocks import (
    Figure,
    Prompt,
    Prompts,
    Section,
    Table,
    cells,
    first_prompt,
    fixed,
    need,
)
from jaxmech.report.formats import (
    coefficient,
    interval,
    listing,
    number,
    p_value,
    percent,
    plural,
    points,
    readable,
    span,
    wrapped,
)
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    KIND_STYLE,
    MINUS,
    NEUTRAL,
    REFERENCE,
    SHADE,
    SOFT,
    figure,
    forest,
)
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder

COST_TOP = 3.0


def section(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r, said = results["steering"], Said.of(results)
    low, high = usable = tuple(r["usable_range"])
    dose = need(folder, "steering", "dose")
    others = need(folder, "steering", "comparators")
    zero = float(dose.loc[dose["alpha"] == 0, "g"].iloc[0])
    costs = (
        f"Coefficients {span(*usable)} stay within the limits on perplexity, KL, arithmetic and valid mass; over those "
        f"tried in that range the {said.outcome} changes by {points(r['effect_in_range_pp'])}."
        if low < high
        else "There is no usable range: every coefficient but 0 passes a limit on perplexity, KL, arithmetic or valid "
        "mass."
    )
    lead = (
        f"The features are set to what they are plus a dose of their own gap between {said.plus} and {said.minus}, at "
        "every layer after the layers below have acted, so that coefficient 1 is one gap. It moves the "
        f"{said.outcome} by {points(r['at_one_pp'])} (95 % interval {interval(r['at_one_ci'])}; half the difference "
        f"between coefficients 1 and −1). {costs}"
    )
    shape = r.get("dose_response") or {}
    monotone = (
        f" Spearman {number(shape['spearman'])}, isotonic R² {number(shape['isotonic_r2'])} within it." if shape else ""
    )
    shaded = " Shaded: the usable range." if low < high else ""
    blocks: list[Any] = [
        Figure(
            "dose",
            draw_dose(dose, usable, said),
            f"Dose-response on {' and '.join(map(said.pole, r['steered']))} prompts, "
            f"{plural(r['families'], 'family', 'families')}; unsteered "
            f"{percent(zero, 1)} (dotted).{shaded}{monotone}",
            "steering/dose",
        ),
        Figure(
            "outcomes",
            draw_outcomes(dose, usable, said),
            f"How the answers change. Between the ends of the sweep the probability of “{said.levels[0]}” goes from "
            f"{percent(dose['p_zero'].iloc[0])} to {percent(dose['p_zero'].iloc[-1])}; valid answers hold "
            f"at least {percent(dose['mass'].min())}.",
            "steering/dose",
        ),
        Figure("costs", draw_cost_limits(dose, usable), costs_caption(dose), "steering/dose"),
        Figure("comparators", draw_comparators(others), comparators_caption(r, others), "steering/comparators"),
    ]
    if r.get("specificity"):
        says = [
            f"“{said.contrast(name).lower()}” {points(slope['slope_pp'])} ({interval(slope['ci'])})"
            for name, slope in r["specificity"].items()
        ]
        blocks.append(
            Figure(
                "specificity",
                draw_specificity(r["specificity"], said),
                f"Specificity: the {said.outcome} on the neutral prompts of controls at coefficient 1, some of which "
                f"should move as the behaviour does, and others stay within a third of it: {listing(says)}.",
                "steering/results.json",
                wide=True,
            )
        )
    if len(ways := need(folder, "steering", "ways")):
        blocks.append(Figure("ways", draw_ways(ways, said), ways_caption(ways, r, said), "steering/ways", wide=True))
    columns = {
        "alpha": ("coefficient", coefficient),
        "g": (said.outcome, lambda v: percent(v, 1)),
        "g_low": ("low", lambda v: percent(v, 1)),
        "g_high": ("high", lambda v: percent(v, 1)),
        "mass": ("valid mass", lambda v: percent(v, 1)),
        "perplexity": ("perplexity", fixed(2)),
        "kl": ("KL, nat", fixed(3)),
        "accuracy": ("arithmetic", percent),
        "usable": ("within limits", lambda v: "yes" if v else "no"),
    }
    blocks.append(Table("Every coefficient.", *cells(dose, columns), folded=True))
    blocks += steered_prompts(folder, said, r)
    return Section("steering", "Steering", lead, blocks)


def steered_prompts(folder: RunFolder, said: Said, r: Mapping[str, Any]) -> list[Prompts]:
    """A whole prompt of every condition that is steered."""
    asked = need(folder, "behavior", "prompts")
    steered = [*r["steered"], *(f"{name}:neutral" for name in r.get("specificity") or {})]
    rows = [first_prompt(asked, name) for name in steered]
    prompts = [Prompt(said.condition(row["condition"]), row["prefix"], row["query"]) for row in rows if row is not None]
    caption = f"Whole prompts that are steered: {said.inside}the questions (bold) of each condition."
    return [Prompts(caption, prompts)] if prompts else []


def costs_caption(dose: pd.DataFrame) -> str:
    out = [coefficient(alpha) for alpha in dose.loc[~dose["usable"].astype(bool), "alpha"]]
    said = f"Too costly: {listing(out)}." if out else "No coefficient tried is too costly."
    return (
        "What the same doses cost on text and on sums that follow three worked ones, set at every token; above "
        "the line a coefficient is not usable. "
        f"{said} Triangles lie beyond the axis; valid mass is that of the prompts."
    )


def comparators_caption(r: Mapping[str, Any], others: pd.DataFrame) -> str:
    null = others[others["kind"] == "null"]
    ranges = [
        f"{len(part)} {str(name).replace('random features', 'random feature sets')} from "
        f"{number(part['slope_pp'].min(), 1)} to "
        f"{number(part['slope_pp'].max(), 1)}"
        for name, part in null.groupby("name")
    ]
    compared = [f"{name} {points(value)}" for name, value in (r.get("comparators_pp") or {}).items()]
    text = (
        f"Directions of the norm that coefficient 1 writes: the selected features {points(r['slope_at_one_pp'])}; "
        f"{listing(ranges)} pp "
        f"(two-sided {p_value(r['p_random'])} against feature sets, which reach {percent(r['random_ratio'])} of the "
        f"norm; {p_value(r['p_random_directions'])} against directions, {p_value(r['p_random_kl'])} where these have "
        "the same KL divergence on text). Effects are half the difference between either sign: degradation cancels."
    )
    return text + (f" For comparison: {listing(compared)}." if compared else "")


WAYS = {
    "set": "set to a dose of the gap",
    "add": "the same dose added",
    "multiply": "doubled or silenced",
}
"""How features are changed -> as a figure says it."""


def ways_caption(ways: pd.DataFrame, r: Mapping[str, Any], said: Said) -> str:
    window = r.get("window")
    text = (
        "Other ways of steering by the same features, half the difference between coefficients 1 and −1. What is set "
        "at a layer need not be set again above it, what is added adds up; multiplying moves nothing where features "
        "are silent. Tokens: the direction that the features write, added at every layer."
    )
    if window:
        many = "s" if len(window["layers"]) > 1 else ""
        text += (
            f" Of the windows of layers, layer{many} {listing(list(map(str, window['layers'])))} moved most on "
            f"development families; on test families {points(window['at_one_pp'])} ({interval(window['at_one_ci'])})."
        )
    if (lost := ways["mass"].min()) < 0.8:
        text += (
            f" Valid answers hold as little as {percent(lost)} of the probability: the model is no longer answering."
        )
    return text


def draw_ways(ways: pd.DataFrame, said: Said) -> go.Figure:
    """A line per way, with its interval over families."""
    kinds = {"how": "effect", "layers": "reference", "tokens": "control"}
    rows = [
        dict(label=wrapped(WAYS.get(row.name, row.name)), value=row.change_pp, low=row.low_pp, high=row.high_pp,
             kind=kinds[row.kind], note=f", valid answers {percent(row.mass)}")
        for row in each_row(ways)
    ]  # fmt: skip
    names = {name: KIND_STYLE[kind][0] for name, kind in kinds.items()}
    shown = {names["how"]: "how", names["layers"]: "at which layers, set", names["tokens"]: "on which tokens, added"}
    out = forest(rows, x=f"change of the {said.outcome}, pp")
    return out.for_each_trace(lambda trace: trace.update(name=shown.get(trace.name, trace.name)))


def shade(out: go.Figure, usable: tuple[float, float]) -> go.Figure:
    """Shades the usable range, and names it in the legend, for print and for colour-blind readers."""
    if usable[0] < usable[1]:
        out.add_vrect(x0=usable[0], x1=usable[1], fillcolor=SHADE, line_width=0, layer="below")
        out.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                name="usable range",
                marker=dict(symbol="square", size=13, color=SHADE, line=dict(width=1, color=NEUTRAL)),
            )
        )
    return out


def draw_dose(table: pd.DataFrame, usable: tuple[float, float], said: Said) -> go.Figure:
    """Mean score over the coefficient, with its interval over families."""
    band = dict(mode="lines", line=dict(width=0), hoverinfo="skip", showlegend=False)
    zero = float(table.loc[table["alpha"] == 0, "g"].iloc[0])
    traces = [
        go.Scatter(x=table["alpha"], y=100 * table["g_high"], **band),
        go.Scatter(x=table["alpha"], y=100 * table["g_low"], fill="tonexty", fillcolor=SOFT, **band),
        go.Scatter(
            x=table["alpha"],
            y=100 * table["g"],
            name="mean, 95 % interval",
            mode="lines+markers",
            line=dict(color=EFFECT, width=2.5),
            marker=dict(symbol="diamond", size=9),
            hovertemplate=f"coefficient %{{x}}: {said.outcome} %{{y:.1f}} %<extra></extra>",
        ),
    ]
    x = "coefficient (1 = each feature's own gap between the poles)"
    out = figure(traces, x=x, y=f"{said.outcome}, %", height=380, phone=340)
    out.add_hline(y=100 * zero, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return shade(out, usable)


def draw_outcomes(table: pd.DataFrame, usable: tuple[float, float], said: Said) -> go.Figure:
    """How the distribution changes: scores of 0, one half and 1; and the mass on valid answers."""
    looks = (
        ("p_zero", said.levels[0], MINUS, "circle", "solid"),
        ("p_half", said.levels[1], REFERENCE, "square", "dash"),
        ("p_all", said.levels[2], EFFECT, "diamond", "solid"),
        ("mass", "any valid answer", NEUTRAL, "x", "dot"),
    )
    traces = [
        go.Scatter(
            x=table["alpha"],
            y=100 * table[column],
            name=name,
            mode="lines+markers",
            line=dict(color=colour, dash=dash),
            marker=dict(symbol=symbol, size=8),
            hovertemplate=f"coefficient %{{x}}, {name}: %{{y:.1f}} %<extra></extra>",
        )
        for column, name, colour, symbol, dash in looks
    ]
    return shade(
        figure(traces, x="coefficient", y="probability, %", height=380, phone=360).update_yaxes(range=[-3, 103]), usable
    )


def draw_cost_limits(table: pd.DataFrame, usable: tuple[float, float]) -> go.Figure:
    """Each cost in units of its limit, so that all share an axis; at 1 a coefficient falls out of the usable range."""
    base = table.loc[table["alpha"] == 0].iloc[0]
    costs = (
        ("perplexity (limit +10 %)", (table["perplexity"] / base["perplexity"] - 1) / 0.1, MINUS, "circle", "solid"),
        ("KL (limit 0.1 nat)", table["kl"] / 0.1, EFFECT, "diamond", "dash"),
        ("arithmetic (limit −2 pp)", (base["accuracy"] - table["accuracy"]) / 0.02, REFERENCE, "square", "dashdot"),
        ("valid mass (limit −5 %)", (1 - table["mass"] / base["mass"]) / 0.05, NEUTRAL, "x", "dot"),
    )
    traces, low = [], -0.15
    for name, cost, colour, symbol, dash in costs:
        drawn = cost.clip(-1, COST_TOP)
        beyond = cost > COST_TOP
        hover = f"coefficient %{{x}}, {name}: %{{customdata:.2f}} times the limit<extra></extra>"
        traces.append(
            go.Scatter(
                x=table["alpha"],
                y=drawn,
                name=name,
                mode="lines+markers",
                line=dict(color=colour, dash=dash),
                customdata=cost,
                marker=dict(symbol=symbol, size=np.where(beyond, 0, 9), color=colour, line=dict(width=0)),
                legendgroup=name,
                hovertemplate=hover,
            )
        )
        traces.append(
            go.Scatter(
                x=table["alpha"][beyond],
                y=drawn[beyond],
                mode="markers",
                marker=dict(symbol="triangle-up", size=11, color=colour),
                customdata=cost[beyond],
                legendgroup=name,
                showlegend=False,
                hovertemplate=hover,
            )
        )
        low = min(low, float(drawn.min()) - 0.1)
    out = figure(traces, x="coefficient", y="cost, in units of its limit", height=400, phone=420)
    out.add_hline(y=1, line=dict(color=NEUTRAL, width=1.5))
    return shade(out.update_yaxes(range=[low, COST_TOP + 0.25]), usable)


def draw_comparators(table: pd.DataFrame) -> go.Figure:
    """Slopes of other directions of the same norm: the two nulls as clouds, the others as marks."""
    order = [*table.loc[table["kind"] != "null", "name"], *table.loc[table["kind"] == "null", "name"].unique()]
    rng, traces = np.random.default_rng(0), []
    for place, name in enumerate(order):
        part = table[table["name"] == name]
        kind = part["kind"].iloc[0]
        colour, symbol, size = {"effect": (EFFECT, "diamond", 13), "null": (CONTROL, "circle-open", 6)}.get(
            kind, (REFERENCE, "square", 11)
        )
        spread = rng.uniform(-0.28, 0.28, len(part)) if kind == "null" else np.zeros(len(part))
        traces.append(
            go.Scatter(
                x=part["slope_pp"],
                y=place + spread,
                mode="markers",
                showlegend=False,
                marker=dict(color=colour, symbol=symbol, size=size),
                hovertemplate=f"{name}: %{{x:.2f}} pp<extra></extra>",
            )
        )
    out = figure(traces, x="change at coefficient 1, pp", height=90 + 56 * len(order))
    out.add_vline(x=0, line=dict(color=NEUTRAL, width=1, dash="dot"))
    labels = [wrapped(readable(name), 16) for name in order]
    return out.update_yaxes(
        tickvals=list(range(len(order))), ticktext=labels, range=[len(order) - 0.5, -0.5], showgrid=False
    )


def draw_specificity(slopes: Mapping[str, Mapping], said: Said) -> go.Figure:
    """Slopes on the neutral prompts of controls."""
    rows = [
        dict(
            label=wrapped(said.contrast(name)),
            value=slope["slope_pp"],
            low=slope["ci"][0],
            high=slope["ci"][1],
            kind="effect" if said.controls[name].moves else "control",
        )
        for name, slope in slopes.items()
    ]
    out = forest(rows, x=f"change of the {said.outcome}, pp")
    names = {"control": "must not move", "selected features": "must move up"}
    return out.for_each_trace(lambda t: t.update(name=names.get(t.name, t.name)))
