"""What patching features from one prompt into the other moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import Figure, Section, Table, need
from jaxmech.report.formats import interval, number, p_value, percent, plural, points, readable, wrapped
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    FEATURE,
    NEUTRAL,
    REFERENCE,
    figure,
    forest,
)
from jaxmech.report.words import Said
from jaxmech.study.effects import DIRECTIONS
from jaxmech.study.folder import RunFolder

NULLS = ("matched sets", "random directions")
"""Of table patching/null."""


def section(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r, attribution, said = results["patching"], results["attribution"], Said.of(results)
    bars = need(folder, "patching", "bars")
    null = need(folder, "patching", "null")
    singles = need(folder, "patching", "singles")
    audit = need(folder, "attribution", "audit")
    blocks: list[Any] = []
    for direction in DIRECTIONS:
        base, donor = (said.minus, said.plus) if direction == "to_plus" else (said.plus, said.minus)
        recovered = bars[bars["direction"] == direction].set_index("name")["recovered"]
        others = {
            "whole residual": "the whole residual stream",
            "all features": "all features",
            "reconstruction error only": "the dictionaries' error alone",
        }
        also = [f"{words} {percent(recovered[name])}" for name, words in others.items() if name in recovered]
        blocks.append(
            Figure(
                f"patching-{direction}",
                draw_patching_bars(bars, direction),
                f"Values from {donor} prompts put into {base} ones: the features recover "
                f"{percent(r[f'recovered_{direction}'])} of the shift; at the same layers {', '.join(also)}. "
                "Error bars: 95 % over families.",
                "patching/bars",
            )
        )
    for direction in DIRECTIONS:
        part = null[null["direction"] == direction]
        sets, noise = (100 * part.loc[part["null"] == name, "recovered"].to_numpy(float) for name in NULLS)
        observed, p = 100 * r[f"recovered_{direction}"], r[f"p_random_{direction}"]
        blocks.append(
            Figure(
                f"null-{direction}",
                draw_nulls({"matched random sets": sets, "random directions": noise}, observed),
                f"What else does {said.towards(direction)} with the features' norm at every layer: "
                f"{plural(len(sets), 'random feature set')} of the same layers, as close as available in firing rate "
                f"and strength, rescaled (they reach {percent(r[f'random_ratio_{direction}'])} of the norm), from "
                f"{number(sets.min(), 0)} to {number(sets.max(), 0)} % ({p_value(p)}), and "
                f"{plural(len(noise), 'random direction')}, from {number(noise.min(), 0)} to "
                f"{number(noise.max(), 0)} % ({p_value(r[f'p_directions_{direction}'])}); the features: "
                f"{number(observed, 0)} %. One-sided; the smallest p possible is {1 / (len(sets) + 1):.3f}.",
                "patching/null",
            )
        )
    blocks.append(
        Figure(
            "singles",
            draw_singles(singles),
            f"Each feature alone, both ways taken together: {r['movers']} of {len(singles)} move the answer towards "
            "the donor after Holm's correction, by at least 1 % of the shift. The others are passengers: they go with "
            "the behaviour and do not carry it.",
            "patching/singles",
        )
    )
    if r["held_out"] or r["cross"]:
        blocks.append(other_pairs(r, said))
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


def other_pairs(r: Mapping[str, Any], said: Said) -> Table:
    """The selection patched between the poles of controls."""
    show = lambda share: f"{percent(share['value'])} ({interval(share['ci'], 0, scale=100)})"  # noqa: E731
    rows = [[said.contrast(name), show(share), "", ""] for name, share in r["held_out"].items()]
    rows += [
        [
            said.contrast(name), show(crossed["own"]), show(crossed["poles"]),
            f"{points(crossed['excess_pp'])} ({interval(crossed['excess_ci'])})",
        ]
        for name, crossed in r["cross"].items()
    ]  # fmt: skip
    return Table(
        f"The same features, other donors: what they recover between a control's own two prompts, and what of the "
        f"{said.varies}'s shift they recover when the control's prompts are the donors of the {said.varies}'s.",
        ["donors", "of their own shift", f"of the {said.varies}'s shift", f"less than the {said.varies}'s own donors"],
        rows,
    )


def draw_singles(table: pd.DataFrame) -> go.Figure:
    """What each feature moves alone; passengers hollow."""
    traces = []
    for passenger, name, colour, symbol in (
        (False, "moves the answer", EFFECT, "diamond"),
        (True, "passenger", CONTROL, "circle-open"),
    ):
        part = table[table["passenger"] == passenger]
        traces.append(
            go.Scatter(
                x=part["change_pp"],
                y=part.index,
                name=name,
                mode="markers",
                marker=dict(color=colour, symbol=symbol, size=9),
                error_x=dict(
                    type="data", symmetric=False, array=part["high_pp"] - part["change_pp"],
                    arrayminus=part["change_pp"] - part["low_pp"], thickness=1,
                ),
                customdata=part[["layer", "feature"]].to_numpy(np.int32),
                hovertemplate=FEATURE + ": %{x:.2f} pp<extra></extra>",
            )
        )  # fmt: skip
    out = figure(traces, x="change towards the donor, pp", y="rank by |t|", height=max(280, 120 + 12 * len(table)))
    out.add_vline(x=0, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out.update_yaxes(autorange="reversed")


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


def draw_nulls(nulls: Mapping[str, np.ndarray], observed: float) -> go.Figure:
    """Null distributions, and where the selection lies."""
    out = figure(
        [
            *(
                go.Histogram(
                    x=null,
                    name=name,
                    nbinsx=30,
                    opacity=0.75,
                    marker=dict(color=colour, line=dict(width=1, color="rgba(255,255,255,0.5)")),
                    hovertemplate=f"{name}, %{{x}}: %{{y}}<extra></extra>",
                )
                for (name, null), colour in zip(nulls.items(), (CONTROL, REFERENCE), strict=True)
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
        x="shift recovered, %",
        y="number",
        height=300,
        bargap=0.06,
        barmode="overlay",
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
