"""How the model answers: the contrast, its controls and what was sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from jaxmech.report import formats as fm
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
    short_p,
    text,
)
from jaxmech.report.style import (
    GENEROUS,
    NEUTRAL,
    SELFISH,
    figure,
    forest,
    hatch,
)
from jaxmech.study.folder import RunFolder


def section(folder: RunFolder, results: Mapping[str, Any]) -> Section:
    r = results["behavior"]
    shares = need(folder, "behavior", "distributions", ("condition", "share", "probability"))
    effects = need(folder, "behavior", "effects", ("contrast", "shift_pp", "low_pp", "high_pp", "p", "d_z", "mass"))
    asked = need(folder, "behavior", "prompts", ("family", "pair", "condition", "stance", "prefix", "query"))
    edges = r["edges"]
    blocks = [
        *stance_prompts(asked),
        Figure(
            "allocations",
            draw_distributions(shares),
            f"How much is given, by stance, over {fm.plural(r['families'], 'test family', 'test families')}. "
            "Nothing is given "
            f"with probability {fm.percent(edges['generous']['zero'])} when generous and "
            f"{fm.percent(edges['selfish']['zero'])} "
            f"when selfish, half with {fm.percent(edges['generous']['half'])} and "
            f"{fm.percent(edges['selfish']['half'])}.",
            "behavior/distributions",
        ),
        Figure(
            "shifts",
            draw_shifts(effects),
            "Each contrast's shift of the share given, with its 95 % interval over families. "
            + strongest_control(effects),
            "behavior/effects",
        ),
        Table(
            "The same in numbers. d_z is the mean over families divided by their spread; p is Wilcoxon's over "
            "family means, two-sided.",
            *cells(
                effects,
                {
                    "contrast": ("contrast", fm.name),
                    "families": ("families", text),
                    "shift_pp": ("shift, pp", fixed(1)),
                    "low_pp": ("low", fixed(1)),
                    "high_pp": ("high", fixed(1)),
                    "p": ("p", short_p),
                    "d_z": ("d_z", fixed(2)),
                    "mass": ("valid mass", fm.percent),
                },
            ),
        ),
    ]
    if rows := sampled(r.get("sampling", {})):
        columns = ("stance", "valid answers", "sampled mean", "exact mean")
        blocks.append(
            Table(
                "Cross-check: answers sampled at temperature 1 and parsed, never imputed, against the exact mean.",
                columns,
                rows,
            )
        )
    gate = "The gate is passed: " if r["gate"] else "The gate is not passed: "
    reasons = "; ".join(
        f"{reason.replace('>=', '≥').replace('<=', '≤').replace(' x ', ' × ')}: {'met' if met else 'NOT met'}"
        for reason, met in r["gate_reasons"].items()
    )  # noqa: E501
    return Section("behaviour", "Behaviour", f"{gate}{reasons}.", blocks)


def stance_prompts(asked: pd.DataFrame) -> list[Any]:
    """Both prompts of a pair, whole, and what is asked in every other condition of the same scenario."""
    generous, selfish = (first_prompt(asked, name) for name in ("generous", "selfish"))
    if generous is None or selfish is None:
        return []
    examples = generous["prefix"].count("\nA:")
    caption = (
        f"A pair of prompts, whole. Both begin with the same {examples} worked examples, which name stances in other "
        "words and answer by them, so that what is measured is what the model makes of these examples; the questions "
        "(bold) differ in the stance alone. Features are chosen on such pairs of other families; patching, attribution "
        "and nearness to the output use these pairs."
    )
    pair = [
        Prompt(f"{fm.name(row['condition'])}, in the word “{row['stance']}”", row["prefix"], row["query"])
        for row in (generous, selfish)
    ]
    rest = [name for name in asked["condition"].unique() if name not in ("generous", "selfish")]
    rows = [[fm.name(name), " ".join(first_prompt(asked, name)["query"].split())] for name in sorted(rest)]
    others = "What the other prompts ask, after worked examples too."
    return [Prompts(caption, pair, folded=False), Table(others, ("condition", "question"), rows, folded=True)]


def strongest_control(effects: pd.DataFrame) -> str:
    controls = effects[~effects["contrast"].isin(["stance", "heldout"])]
    if controls.empty:
        return "No control was played."
    top = controls.loc[controls["shift_pp"].abs().idxmax()]
    return f"The largest control shift is that of “{fm.name(top['contrast']).lower()}”, {fm.points(top['shift_pp'])}."


def sampled(sampling: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            condition,
            fm.percent(one["valid"]),
            f"{fm.percent(one['mean'], 1)} ± {fm.percent(one['standard_error'], 1)}",
            fm.percent(one["exact_mean"], 1),
        ]
        for condition, one in sampling.items()
        if isinstance(one, Mapping)
    ]


def draw_distributions(table: pd.DataFrame) -> go.Figure:
    """Mean probability of each share of the stake given, by stance. Columns condition, share, probability."""
    by = {name: part.sort_values("share") for name, part in table.groupby("condition")}
    bars = (("generous", GENEROUS, ""), ("selfish", SELFISH, "/"))
    traces = [
        go.Bar(
            x=100 * by[name]["share"],
            y=100 * by[name]["probability"],
            name=name,
            marker=dict(color=colour, pattern=hatch(shape)),
            hovertemplate=f"{name}: gives %{{x:.0f}} % with probability %{{y:.1f}} %<extra></extra>",
        )
        for name, colour, shape in bars
        if name in by
    ]
    if "neutral" in by:
        traces.append(
            go.Scatter(
                x=100 * by["neutral"]["share"],
                y=100 * by["neutral"]["probability"],
                name="neutral",
                mode="lines+markers",
                line=dict(color=NEUTRAL, width=2, dash="dot"),
                marker=dict(symbol="circle-open", size=7),
                hovertemplate="neutral: gives %{x:.0f} % with probability %{y:.1f} %<extra></extra>",
            )
        )
    return figure(traces, x="share of the stake given, %", y="probability, %", barmode="group", height=380, phone=340)


def draw_shifts(effects: pd.DataFrame) -> go.Figure:
    """The stance's shift and every control's, with intervals."""
    rows = [
        dict(
            label=fm.wrapped(fm.name(row.contrast)),
            value=row.shift_pp,
            low=row.low_pp,
            high=row.high_pp,
            kind="effect" if row.contrast in ("stance", "heldout") else "control",
            note=f", {fm.p_value(row.p)}",
        )
        for row in effects.itertuples()
    ]
    out = forest(rows, x="shift of the share given, pp")
    return out.for_each_trace(lambda t: t.update(name="stance") if t.name != "control" else None)
