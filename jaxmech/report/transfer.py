"""Whether the direction carries over to other tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from jaxmech.io.tables import each_row
from jaxmech.report.blocks import Figure, Prompt, Prompts, Section, Table, cells, fixed, need, short_p, text
from jaxmech.report.formats import p_value, percent, readable, wrapped
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    MINUS,
    REFERENCE,
    SHADE,
    figure,
    forest,
)
from jaxmech.report.verdict import ClaimCard
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder

TASK_COLOURS = (EFFECT, MINUS, REFERENCE, "#2f8f6b", "#b0518a", "#7b8591", "#9a7a1c")


TASK_SYMBOLS = (
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


def section(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: ClaimCard) -> Section:
    said = Said.of(results)
    title = f"Other {said.tasks}"
    if not results["transfer"]:
        return Section("transfer", title, f"No other {said.tasks} were tried.", [])
    table = need(folder, "transfer", "tasks")
    labels = [label or readable(task) for task, label in table[["task", "label"]].to_numpy(str)]
    table = table.assign(label=labels)
    names = dict(zip(table["task"], table["label"], strict=True))
    curves = need(folder, "transfer", "curves")
    prompts = need(folder, "transfer", "prompts")
    drawn = next(iter(results["transfer"].values()))["random_directions"]
    beyond = int((table["slope_pp"].abs() > 1.96 * table["null_sd_pp"]).sum())
    columns = {
        "label": ("task", text),
        "kind": ("kind", text),
        "expected_sign": ("expected", lambda v: {1: "up", -1: "down"}.get(v, "open")),
        "families": ("families", text),
        "baseline": ("unsteered score", percent),
        "slope_pp": ("change, pp", fixed(1)),
        "low_pp": ("low", fixed(1)),
        "high_pp": ("high", fixed(1)),
        "p_random": ("p, random", short_p),
        "p_holm": ("p, Holm", short_p),
        "stance_pp": ("change after stance examples, pp", fixed(1)),
        "mass": ("valid mass", percent),
        "human": ("people, for context", text),
    }
    blocks = [
        Figure(
            "tasks",
            draw_tasks(table),
            "What coefficient 1 does to each score, half the difference to −1, with 95 % intervals over families, "
            f"beside 1.96 standard deviations of what {drawn} random directions of "
            f"the same norm do (band). {beyond} of {len(table)} lie outside their band. P-values are two-sided.",
            "transfer/tasks",
        ),
        Figure(
            "task-curves",
            draw_task_curves(curves, names),
            "Mean score over the coefficient; 0 is the unsteered model.",
            "transfer/curves",
        ),
        Table(
            "All of them. A score is 1 where an answer is entirely the behaviour's. What people do is context, not a "
            "test.",
            *cells(table, columns),
        ),
        task_prompts(prompts, names),
    ]
    return Section("transfer", title, claim.sentence, blocks)


def task_prompts(asked: pd.DataFrame, names: Mapping[str, str]) -> Prompts:
    """A whole prompt of every task."""
    first = asked.groupby("task", sort=False).first().reset_index()
    prompts = [Prompt(names[row.task], row.prefix, row.query) for row in each_row(first)]
    return Prompts("A whole prompt of each.", prompts)


def draw_tasks(table: pd.DataFrame) -> go.Figure:
    """Slope of each task's score with its interval; the grey band is 1.96 standard deviations of random directions."""
    labels = [wrapped(name, 14) for name in table["label"]]
    rows = [
        dict(
            label=label,
            value=row.slope_pp,
            low=row.low_pp,
            high=row.high_pp,
            kind="effect",
            note=f", {p_value(row.p_holm)} (Holm)",
        )
        for label, row in zip(labels, each_row(table), strict=True)
    ]
    out = forest(rows, x="score change at coefficient 1, pp")
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


def draw_task_curves(curves: pd.DataFrame, names: Mapping[str, str]) -> go.Figure:
    """Mean score of each task over the coefficient."""
    traces = []
    for number, (name, part) in enumerate(curves.groupby("task", sort=False)):
        traces.append(
            go.Scatter(
                x=part["alpha"],
                y=100 * part["score"],
                name=names[str(name)],
                mode="lines+markers",
                line=dict(color=TASK_COLOURS[number % len(TASK_COLOURS)]),
                marker=dict(symbol=TASK_SYMBOLS[number % len(TASK_SYMBOLS)], size=9),
                hovertemplate=f"{names[str(name)]}, coefficient %{{x}}: score %{{y:.1f}} %<extra></extra>",
            )
        )
    return figure(traces, x="coefficient", y="score, %", height=400, phone=420)
