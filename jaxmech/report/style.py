"""What all figures share: one palette legible on light and dark, symbols beside colours, and a bare layout.

Text, grid and background colours are left out: the page sets them from its own style sheet, for light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from jaxmech.report.formats import known

# Each has a contrast of at least 3:1 on the page's white and on its near-black.
PLUS, MINUS, NEUTRAL, EFFECT, CONTROL, REFERENCE = (
    "#2a80c4",
    "#c8641b",
    "#7b8591",
    "#2a80c4",
    "#7b8591",
    "#8a6fb8",
)
SOFT = "rgba(42,128,196,0.18)"
SHADE = "rgba(123,133,145,0.16)"

CLASS_STYLE = {
    "s2": ("System 2", "#2a80c4", "circle"),
    "s1": ("System 1", "#c8641b", "diamond"),
    "mixed": ("mixed", "#8a6fb8", "cross"),
    "neither": ("neither", "#7b8591", "circle-open"),
    "silent": ("silent", "#7b8591", "x-thin-open"),
}
"""Class -> (name, colour, symbol)."""

KIND_STYLE = {
    "effect": ("selected features", EFFECT, "diamond"),
    "control": ("control", CONTROL, "circle-open"),
    "reference": ("reference", REFERENCE, "square"),
    "comparator": ("comparator", REFERENCE, "square"),
}


FEATURE = "layer %{customdata[0]}, feature %{customdata[1]}"
"""What a point is called on hover; its customdata begins with layer and feature."""


def figure(
    traces: Sequence[Any], *, x: str = "", y: str = "", height: int = 340, phone: int | None = None, **layout: Any
) -> go.Figure:
    """A figure with axis titles, its legend below, and its height on a phone in `layout.meta`."""
    out = go.Figure(list(traces))
    out.update_layout(
        template="none",
        height=height,
        meta={"phone": phone or height},
        margin=dict(l=56, r=16, t=12, b=52),
        font=dict(size=13),
        legend=dict(orientation="h", yref="container", y=0, yanchor="bottom", x=0, xanchor="left"),
        hovermode="closest",
        bargap=0.25,
        dragmode=False,
    )
    out.update_xaxes(title=dict(text=x, standoff=8, font=dict(size=13)), automargin=True, zeroline=False)
    out.update_yaxes(title=dict(text=y, standoff=8, font=dict(size=13)), automargin=True, zeroline=False)
    out.update_layout(**layout)
    return out


def hatch(shape: str) -> dict:
    """A bar's pattern over its colour, so that bars differ in print and to colour-blind readers."""
    return dict(shape=shape, fillmode="overlay", fgcolor="rgba(255,255,255,0.75)", size=6, solidity=0.25)


def count_axis(out: go.Figure, largest: float, axis: str = "y") -> go.Figure:
    """Whole numbers only, from 0."""
    update = out.update_yaxes if axis == "y" else out.update_xaxes
    return update(rangemode="tozero", tick0=0, dtick=max(1, -(-int(largest) // 6)), tickformat="d")


def forest(rows: Sequence[dict], *, x: str, unit: str = "pp", digits: int = 1) -> go.Figure:
    """Estimates with intervals, one per line, the first on top.

    Args:
      rows: label, value, low, high, kind (a key of `KIND_STYLE`), and optionally note, shown on hover.
    """
    shown = [row for row in rows if all(known(row[key]) for key in ("value", "low", "high"))]
    traces, seen = [], set()
    for row in shown:
        name, colour, symbol = KIND_STYLE[row["kind"]]
        ends = f"[{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        label = row["label"].replace("<br>", " ")
        hover = f"{label}: %{{x:.{digits}f}} {unit} {ends}{row.get('note', '')}<extra></extra>"
        traces.append(
            go.Scatter(
                x=[row["value"]],
                y=[row["label"]],
                name=name,
                legendgroup=name,
                showlegend=name not in seen,
                mode="markers",
                marker=dict(color=colour, symbol=symbol, size=11, line=dict(width=2, color=colour)),
                error_x=dict(
                    type="data",
                    symmetric=False,
                    array=[max(row["high"] - row["value"], 0)],
                    arrayminus=[max(row["value"] - row["low"], 0)],
                    color=colour,
                    thickness=2,
                    width=5,
                ),
                hovertemplate=hover,
            )
        )
        seen.add(name)
    out = figure(traces, x=x, height=96 + 44 * max(len(shown), 1), showlegend=len(seen) > 1)
    out.add_vline(x=0, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=[row["label"] for row in shown], ticks=""
    )


def note(out: go.Figure, text: str) -> go.Figure:
    """A sentence in place of data, so that an empty figure says why it is empty."""
    out.add_annotation(text=text, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5, font=dict(size=13))
    return out.update_xaxes(visible=False).update_yaxes(visible=False)
