"""Figures of interventions (patching, attribution, proximity, steering, games), each a pure function of a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report import formats as fm
from jaxmech.report.style import (
    CLASS_STYLE,
    CONTROL,
    EFFECT,
    FEATURE,
    NEUTRAL,
    REFERENCE,
    SELFISH,
    SHADE,
    SOFT,
    figure,
    forest,
    hatch,
    note,
)

GAME_SYMBOLS = (
    "circle",
    "diamond",
    "square",
    "cross",
    "triangle-up",
    "star",
    "x",
    "hexagon",
    "pentagon",
    "triangle-down",
)
GAME_COLOURS = (EFFECT, SELFISH, REFERENCE, "#2f8f6b", "#b0518a", "#7b8591", "#9a7a1c")


def patching_bars(bars: pd.DataFrame, direction: str) -> go.Figure:
    """Recovered share of the stance gap: the selection, its controls, and bars of reference."""
    order = {"effect": 0, "control": 1, "reference": 2}
    part = bars[bars["direction"] == direction].sort_values("kind", key=lambda kind: kind.map(order), kind="stable")
    rows = [
        dict(
            label=fm.wrapped(fm.name(row["name"]), 16),
            value=100 * row["recovered"],
            low=100 * row["low"],
            high=100 * row["high"],
            kind=row["kind"],
            note=f", a change of {fm.points(row['change_pp'])}",
        )
        for row in part.to_dict("records")
    ]
    out = forest(rows, x="shift recovered, %", unit="%", digits=0)
    out.add_vline(x=100, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out


def null_histogram(null: np.ndarray, observed: float, *, x: str, what: str = "matched random sets") -> go.Figure:
    """A null distribution and where the selection lies."""
    out = figure(
        [
            go.Histogram(
                x=null,
                name=what,
                nbinsx=30,
                marker=dict(color=CONTROL, line=dict(width=1, color="rgba(255,255,255,0.5)")),
                hovertemplate="%{x}: %{y} sets<extra></extra>",
            ),
            go.Scatter(
                x=[observed, observed],
                y=[0, 1],
                yaxis="y2",
                name="selected features",
                mode="lines+markers",
                line=dict(color=EFFECT, width=3),
                marker=dict(symbol="diamond", size=[0, 12]),
                hovertemplate=f"selected features: {observed:.1f}<extra></extra>",
            ),
        ],
        x=x,
        y="sets",
        height=300,
        bargap=0.06,
        yaxis2=dict(overlaying="y", range=[0, 1.08], visible=False),
    )
    return out


def audit(table: pd.DataFrame) -> go.Figure:
    """Attribution against true patching, in percentage points; the diagonal is perfect agreement."""
    traces = []
    for group, name, colour, symbol in (
        ("random", "random features", CONTROL, "circle-open"),
        ("top", "top by attribution", EFFECT, "diamond"),
    ):
        part = table[table["group"] == group]
        traces.append(
            go.Scatter(
                x=100 * part["attribution"],
                y=100 * part["patched"],
                name=name,
                mode="markers",
                marker=dict(color=colour, symbol=symbol, size=8, opacity=0.8),
                customdata=part[["layer", "feature"]].to_numpy(np.int32),
                hovertemplate=FEATURE + ": attributed %{x:.2f}, patched %{y:.2f} pp<extra></extra>",
            )
        )
    both = 100 * table[["attribution", "patched"]].to_numpy(float)
    low, high = (float(np.nanmin(both)), float(np.nanmax(both))) if len(both) else (-1.0, 1.0)
    traces.append(
        go.Scatter(
            x=[low, high],
            y=[low, high],
            name="equal",
            mode="lines",
            line=dict(color=NEUTRAL, width=1, dash="dot"),
            hoverinfo="skip",
        )
    )
    return figure(traces, x="attributed effect, pp", y="effect when patched, pp", height=400, phone=360)


def proximity_sets(sets: pd.DataFrame) -> go.Figure:
    """Total, direct and indirect effect of the whole selection and of each class."""
    labels = [{"all": "all in use"}.get(name, fm.name(name)) for name in sets["set"]]
    interval = dict(
        type="data",
        symmetric=False,
        array=sets["total_high"] - sets["total_pp"],
        arrayminus=sets["total_pp"] - sets["total_low"],
        color=NEUTRAL,
        thickness=2,
    )
    looks = (
        ("total_pp", "total", EFFECT, ""),
        ("direct_pp", "direct", REFERENCE, "x"),
        ("indirect_pp", "indirect", CONTROL, "/"),
    )
    traces = [
        go.Bar(
            x=labels,
            y=sets[column],
            name=name,
            error_y=interval if name == "total" else None,
            marker=dict(color=colour, pattern=hatch(shape)),
            hovertemplate=f"%{{x}}, {name}: %{{y:.2f}} pp<extra></extra>",
        )
        for column, name, colour, shape in looks
    ]
    return figure(traces, y="change of the share given, pp", barmode="group", height=360, phone=320)


PROXIMITY_RANGE = (-0.5, 1.5)


def proximity_features(features: pd.DataFrame) -> go.Figure:
    """Direct share of single features over layers, by class; what lies outside the range is left to the table."""
    low, high = PROXIMITY_RANGE
    frame = features.dropna(subset=["proximity"])
    frame = frame[frame["proximity"].between(low, high)]
    largest = max(float(frame["total"].abs().max()) if len(frame) else 0.0, 1e-12)
    traces = []
    for kind, (name, colour, symbol) in CLASS_STYLE.items():
        part = frame[frame["class"] == kind]
        if part.empty:
            continue
        shift = {"s2": -0.12, "s1": 0.12}.get(kind, 0.0)
        traces.append(
            go.Scatter(
                x=part["layer"] + shift,
                y=100 * part["proximity"],
                name=name,
                mode="markers",
                marker=dict(
                    color=colour,
                    symbol=symbol,
                    size=7 + 11 * np.sqrt(part["total"].abs() / largest),
                    opacity=0.85,
                    line=dict(width=0 if symbol == "circle" or symbol == "diamond" else 1.5),
                ),
                customdata=np.column_stack([part["layer"], part["feature"], 100 * part["total"]]),
                hovertemplate=FEATURE + ": %{y:.0f} % direct, total %{customdata[2]:.2f} pp<extra></extra>",
            )
        )
    if not traces:
        return note(figure([], height=360, phone=200), "No single feature has a direct share in range.")
    out = figure(traces, x="layer", y="direct share of the effect, %", height=360, phone=340)
    for y in (0, 100):
        out.add_hline(y=y, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out.update_yaxes(range=[100 * low, 100 * high])


def shade(out: go.Figure, usable: tuple[float, float]) -> go.Figure:
    """Shades the usable range, and says so in the legend, which colour-blind readers and printers share."""
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


def dose(table: pd.DataFrame, usable: tuple[float, float]) -> go.Figure:
    """Mean share given over the coefficient, with its interval over families."""
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
            hovertemplate="coefficient %{x}: gives %{y:.1f} %<extra></extra>",
        ),
    ]
    out = figure(
        traces, x="coefficient (1 = each feature's own gap of the stances)", y="share given, %", height=380, phone=340
    )
    out.add_hline(y=100 * zero, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return shade(out, usable)


def outcomes(table: pd.DataFrame, usable: tuple[float, float]) -> go.Figure:
    """How the distribution changes: giving nothing, half, everything; and the mass on valid answers."""
    looks = (
        ("p_zero", "nothing", SELFISH, "circle", "solid"),
        ("p_half", "half", REFERENCE, "square", "dash"),
        ("p_all", "everything", EFFECT, "diamond", "solid"),
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


COST_TOP = 3.0


def cost_limits(table: pd.DataFrame, usable: tuple[float, float]) -> go.Figure:
    """Each cost in units of its limit, so that all share an axis; at 1 a coefficient falls out of the usable range."""
    base = table.loc[table["alpha"] == 0].iloc[0]
    costs = (
        ("perplexity (limit +10 %)", (table["perplexity"] / base["perplexity"] - 1) / 0.1, SELFISH, "circle", "solid"),
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


def comparators(table: pd.DataFrame) -> go.Figure:
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
    labels = [fm.wrapped(fm.name(name), 16) for name in order]
    return out.update_yaxes(
        tickvals=list(range(len(order))), ticktext=labels, range=[len(order) - 0.5, -0.5], showgrid=False
    )


def specificity(slopes: Mapping[str, Mapping]) -> go.Figure:
    """Slopes where giving is not saying a larger number, and where there is nobody to give to."""
    rows = [
        dict(
            label=fm.wrapped(fm.name(condition)),
            value=one["slope_pp"],
            low=one["ci"][0],
            high=one["ci"][1],
            kind="control" if condition.startswith("own_accounts") else "effect",
        )
        for condition, one in slopes.items()
    ]
    out = forest(rows, x="change of the share given, pp")
    names = {"control": "must not move", "selected features": "must move up"}
    return out.for_each_trace(lambda t: t.update(name=names.get(t.name, t.name)))


def games(table: pd.DataFrame) -> go.Figure:
    """Slope of each game's score with its interval; the grey band is 1.96 standard deviations of random directions."""
    labels = [fm.wrapped(fm.name(name), 14) for name in table["game"]]
    rows = [
        dict(
            label=label,
            value=row.slope_pp,
            low=row.low_pp,
            high=row.high_pp,
            kind="effect",
            note=f", {fm.p_value(row.p_holm)} (Holm)",
        )
        for label, row in zip(labels, table.itertuples(), strict=True)
    ]
    out = forest(rows, x="score change, pp a unit")
    band = go.Bar(
        y=labels,
        x=3.92 * table["null_sd_pp"],
        base=-1.96 * table["null_sd_pp"],
        orientation="h",
        name="random directions, ±1.96 sd",
        marker=dict(color=SHADE, line=dict(width=1, color=CONTROL)),
        hoverinfo="skip",
        width=0.5,
    )
    out.add_trace(band)
    out.for_each_trace(lambda t: t.update(name="selected features") if t.name != band.name else None)
    return out.update_layout(showlegend=True, height=130 + 46 * len(labels), meta={"phone": 150 + 46 * len(labels)})


def game_curves(curves: pd.DataFrame) -> go.Figure:
    """Mean score of each game over the coefficient."""
    traces = []
    for number, (name, part) in enumerate(curves.groupby("game", sort=False)):
        traces.append(
            go.Scatter(
                x=part["alpha"],
                y=100 * part["score"],
                name=fm.name(name),
                mode="lines+markers",
                line=dict(color=GAME_COLOURS[number % len(GAME_COLOURS)]),
                marker=dict(symbol=GAME_SYMBOLS[number % len(GAME_SYMBOLS)], size=9),
                hovertemplate=f"{fm.name(name)}, coefficient %{{x}}: score %{{y:.1f}} %<extra></extra>",
            )
        )
    return figure(traces, x="coefficient", y="score, %", height=400, phone=420)
