"""Which of the features in use are heuristic and which deliberative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import Figure, Prompt, Prompts, Section, Table, need
from jaxmech.report.formats import NBSP, interval, percent, readable
from jaxmech.report.style import CLASS_STYLE, FEATURE, NEUTRAL, count_axis, figure
from jaxmech.report.verdict import ClaimCard
from jaxmech.study.folder import RunFolder

# condition -> (what it measures, what its interval must lie above)
CONDITIONS = {
    "accuracy": ("accuracy without a lure", "above 50 %"),
    "lure_cost": ("accuracy lost to a lure", "above 0"),
    "instruction_gain": ("accuracy gained by the instruction to think", "above 0, or that arm does not count"),
}


def section(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: ClaimCard) -> Section:
    r = results["dual_process"]
    blocks: list[Any] = [conditions_table(r)]
    if r["defined"]:
        blocks += class_figures(folder, r, config["dual_process"]["cut"])
    return Section("classes", "System 1 and System 2", claim.sentence, blocks + item_prompts(folder))


def conditions_table(r: Mapping[str, Any]) -> Table:
    """Whether the model behaves on the items, without which there is no index."""
    rows = [
        [
            what,
            percent(found["value"], 1),
            f"{interval(found['ci'], scale=100)}{NBSP}%",
            needed,
            "yes" if found["met"] else "no",
        ]
        for name, (what, needed) in CONDITIONS.items()
        for found in (r["conditions"][name],)
    ]
    caption = "The model itself on the items, over their eleven kinds."
    if not r["defined"]:
        caption += " The index is undefined here, so no feature is put into a class."
    return Table(caption, ("measure", "value", "95 % interval", "needed", "met"), rows)


def class_figures(folder: RunFolder, r: Mapping[str, Any], cut: float) -> list[Figure]:
    table = need(folder, "dual_process", "classes")
    cuts = need(folder, "dual_process", "sensitivity")
    low, high = cuts.iloc[0], cuts.iloc[-1]
    both = "instruction" in r["arms"]
    counted = (
        "A feature is System 2 if both lie above 0, System 1 if both lie below; opposite sides make it mixed."
        if both
        else "The instruction changes no accuracy here, so the demand arm alone decides."
    )
    return [
        Figure(
            "classes",
            draw_class_counts({kind: r[kind] for kind in CLASS_STYLE}),
            f"Features in use by class, at the cut {cut}. Lexical, firing on a few of their trigger tokens in any "
            f"text: {r['lexical']}.",
            "dual_process/classes",
        ),
        Figure(
            "sensitivity",
            draw_sensitivity(cuts, cut),
            f"How the counts depend on the cut: from {low['cut']:g} to {high['cut']:g}, System 2 goes from "
            f"{low['s2']:g} to {high['s2']:g} and System 1 from {low['s1']:g} to {high['s1']:g} (line: the cut in "
            "use).",
            "dual_process/sensitivity",
        ),
        Figure(
            "arms",
            draw_arms(table),
            f"The two arms of the index, with 95 % intervals, of each feature's largest value over the question. "
            f"{counted}",
            "dual_process/classes",
            wide=True,
        ),
    ]


def item_prompts(folder: RunFolder) -> list[Any]:
    """A reasoning item in all its conditions, as whole prompts."""
    items = folder.table("dual_process", "items") if folder.has_table("dual_process", "items") else pd.DataFrame()
    if not {"prefix", "query", "item", "condition"} <= set(items):
        return []
    part = items[items["item"] == items["item"].iloc[0]]
    prompts = [Prompt(readable(row.condition), row.prefix, row.query) for row in part.itertuples()]
    return [Prompts("A whole reasoning item: a pair of prompts in each of two arms, after worked examples.", prompts)]


def draw_class_counts(counts: dict[str, int]) -> go.Figure:
    """Features in use by class."""
    shown = list(CLASS_STYLE)
    out = figure(
        [
            go.Bar(
                y=[CLASS_STYLE[kind][0] for kind in shown],
                x=[counts[kind] for kind in shown],
                orientation="h",
                text=[f" {counts[kind]}" for kind in shown],
                textposition="outside",
                cliponaxis=False,
                marker=dict(color=[CLASS_STYLE[kind][1] for kind in shown]),
                hovertemplate="%{y}: %{x}<extra></extra>",
            )
        ],
        x="features in use",
        height=300,
        margin=dict(l=20, r=36, t=12, b=48),
    )
    return count_axis(out.update_yaxes(autorange="reversed"), max(counts.values()), "x")


def draw_sensitivity(table: pd.DataFrame, cut: float) -> go.Figure:
    """Class counts as the cut on the index moves. Columns cut and the five classes."""
    traces = [
        go.Scatter(
            x=table["cut"],
            y=table[kind],
            name=name,
            mode="lines+markers",
            line=dict(color=colour, dash=dash),
            marker=dict(symbol=symbol, size=9),
            hovertemplate=f"cut %{{x:.2f}}: %{{y}} {name}<extra></extra>",
        )
        for (kind, (name, colour, symbol)), dash in zip(
            CLASS_STYLE.items(), ("solid", "solid", "dash", "dash", "dot"), strict=True
        )
    ]
    out = figure(traces, x="cut on the index", y="features", height=340)
    out.add_vline(x=cut, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return count_axis(out, table[list(CLASS_STYLE)].to_numpy().max())


def draw_arms(classes: pd.DataFrame) -> go.Figure:
    """The two arms of the index against each other, with both intervals."""
    traces = []
    for kind, (name, colour, symbol) in CLASS_STYLE.items():
        part = classes[classes["class"] == kind]
        if part.empty:
            continue
        error = {
            axis: dict(
                type="data",
                symmetric=False,
                array=part[f"{arm}_high"] - part[arm],
                arrayminus=part[arm] - part[f"{arm}_low"],
                thickness=0.8,
                width=0,
                color=colour,
            )
            for axis, arm in (("error_x", "demand"), ("error_y", "instruction"))
        }
        traces.append(
            go.Scatter(
                x=part["demand"],
                y=part["instruction"],
                name=name,
                mode="markers",
                marker=dict(color=colour, symbol=symbol, size=9),
                customdata=part[["layer", "feature"]].to_numpy(np.int32),
                **error,
                hovertemplate=f"{FEATURE} ({name}): demand %{{x:.2f}}, instruction %{{y:.2f}}<extra></extra>",
            )
        )
    out = figure(traces, x="demand arm (conflict − none)", y="instruction arm (think − gut)", height=400, phone=360)
    for add, axis in ((out.add_vline, "x"), (out.add_hline, "y")):
        add(**{axis: 0}, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out
