"""What patching features from one prompt into the other moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import Figure, Section, need
from jaxmech.report.formats import number, p_value, percent, plural, points, readable, wrapped
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    FEATURE,
    NEUTRAL,
    figure,
    forest,
)
from jaxmech.report.words import Said
from jaxmech.study.effects import DIRECTIONS
from jaxmech.study.folder import RunFolder


def section(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r, attribution, said = results["patching"], results["attribution"], Said.of(results)
    bars = need(folder, "patching", "bars")
    null = need(folder, "patching", "null")
    audit = need(folder, "attribution", "audit")
    blocks = []
    for direction in DIRECTIONS:
        base, donor = (said.minus, said.plus) if direction == "to_plus" else (said.plus, said.minus)
        recovered = bars[bars["direction"] == direction].set_index("name")["recovered"]
        others = {
            "whole residual": "the whole residual stream",
            "reconstruction error only": "the dictionaries' error alone",
        }
        also = [f"{words} {percent(recovered[name])}" for name, words in others.items() if name in recovered]
        blocks.append(
            Figure(
                f"patching-{direction}",
                draw_patching_bars(bars, direction),
                f"Values from {donor} prompts put into {base} ones: the features recover "
                f"{percent(r[f'recovered_{direction}'])} of the shift, matched random sets "
                f"{', '.join([percent(r[f'random_{direction}']), *also])}."
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
                draw_null_histogram(values, observed, x="shift recovered, %"),
                f"The null {said.towards(direction)}: {plural(len(values), 'random feature set')} of the same "
                "layers, as close as available in firing rate and strength (their change may be smaller), from"
                f" {number(values.min(), 0)} to {number(values.max(), 0)} %; the features: "
                f"{number(observed, 0)} % ({p_value(p)}, one-sided; "
                f"the smallest possible is {1 / (len(values) + 1):.3f}).",
                "patching/null",
            )
        )
    rank, agree, count = attribution["spearman"], attribution["sign_agreement"], attribution["audited"]
    integrated = attribution["spearman_integrated"]
    blocks.append(
        Figure(
            "audit",
            draw_audit(audit),
            "Attribution, one backward pass for all features, against patching each alone, over "
            f"{plural(attribution['families'], 'family', 'families')}: rank correlation "
            f"{number(rank['top'])} for the top {count['top']} and {number(rank['random'])} for "
            f"{count['random']} random features "
            f"({number(integrated['top'])} and {number(integrated['random'])} for integrated gradients); "
            f"the signs agree for {percent(agree['top'])} and {percent(agree['random'])}.",
            "attribution/audit",
            wide=True,
        )
    )
    lead = (
        f"Only the features' own part of the residual stream is exchanged; the dictionaries' error stays. Over "
        f"{plural(r['families'], 'test family', 'test families')}, the features recover "
        f"{percent(r['recovered_to_plus'])} of the shift {said.towards('to_plus')} "
        f"({p_value(r['p_random_to_plus'])}) and {percent(r['recovered_to_minus'])} {said.towards('to_minus')} "
        f"({p_value(r['p_random_to_minus'])})."
    )
    return Section("patching", "Patching", lead, blocks)


def draw_patching_bars(bars: pd.DataFrame, direction: str) -> go.Figure:
    """Recovered share of the gap: the selection, its controls, and reference bars."""
    order = {"effect": 0, "control": 1, "reference": 2}
    part = bars[bars["direction"] == direction].sort_values("kind", key=lambda kind: kind.map(order), kind="stable")
    rows = [
        dict(
            label=wrapped(readable(row["name"]), 16),
            value=100 * row["recovered"],
            low=100 * row["low"],
            high=100 * row["high"],
            kind=row["kind"],
            note=f", a change of {points(row['change_pp'])}",
        )
        for row in part.to_dict("records")
    ]
    out = forest(rows, x="shift recovered, %", unit="%", digits=0)
    out.add_vline(x=100, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out


def draw_null_histogram(null: np.ndarray, observed: float, *, x: str, what: str = "matched random sets") -> go.Figure:
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


def draw_audit(table: pd.DataFrame) -> go.Figure:
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
