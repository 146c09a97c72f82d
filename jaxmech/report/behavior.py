"""How the model answers: the contrast, its controls and what was sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.behavior.behavior import Control, poles
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
    short_p,
    text,
)
from jaxmech.report.formats import interval, p_value, percent, plural, points, wrapped
from jaxmech.report.style import (
    MINUS,
    NEUTRAL,
    PLUS,
    figure,
    forest,
    hatch,
)
from jaxmech.report.verdict import ClaimCard
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder


def section(folder: RunFolder, results: Mapping[str, Any], claim: ClaimCard) -> Section:
    r, said = results["behavior"], Said.of(results)
    shares = need(folder, "behavior", "distributions")
    effects = need(folder, "behavior", "effects")
    asked = need(folder, "behavior", "prompts")
    edges = r["edges"]
    blocks = [
        *pole_prompts(asked, said),
        *other_examples(asked, said),
        Figure(
            "allocations",
            draw_distributions(shares, said),
            f"The {said.outcome}, by {said.varies}, over {plural(r['families'], 'test family', 'test families')}. "
            f"“{said.levels[0]}” has a probability of {percent(edges['plus']['zero'])} when {said.plus} and "
            f"{percent(edges['minus']['zero'])} when {said.minus}, “{said.levels[1]}” of "
            f"{percent(edges['plus']['half'])} and {percent(edges['minus']['half'])}.",
            "behavior/distributions",
        ),
        Figure(
            "shifts",
            draw_shifts(effects, said),
            f"Each contrast's shift of the {said.outcome}, with its 95 % interval over families. "
            + strongest_control(effects, said)
            + parts_text(r["parts"], said),
            "behavior/effects",
        ),
        Table(
            "The same in numbers. d_z is the mean over families divided by their spread; p is Student's over "
            "family means, two-sided; detectable is the smallest shift found in four of five such studies; size is the "
            "root mean square over pairs; excess is by how much the behaviour's own shift is larger, within families.",
            *cells(
                effects,
                {
                    "contrast": ("contrast", said.contrast),
                    "families": ("families", text),
                    "shift_pp": ("shift, pp", fixed(1)),
                    "low_pp": ("low", fixed(1)),
                    "high_pp": ("high", fixed(1)),
                    "p": ("p", short_p),
                    "d_z": ("d_z", fixed(2)),
                    "mass": ("valid mass", percent),
                    "detectable_pp": ("detectable, pp", fixed(1)),
                    "size_pp": ("size, pp", fixed(1)),
                    "excess_pp": ("excess, pp", fixed(1)),
                    "excess_low_pp": ("its low", fixed(1)),
                    "excess_high_pp": ("its high", fixed(1)),
                },
            ),
        ),
    ]
    by = need(folder, "behavior", "factors")
    if len(by):
        shown = {
            "factor": ("", text), "level": ("", text), "families": ("families", text),
            "shift_pp": ("shift, pp", fixed(1)), "low_pp": ("low", fixed(1)), "high_pp": ("high", fixed(1)),
        }  # fmt: skip
        caption = (
            "The behaviour's own shift by what its pairs differ in from one another, over the families that have it."
        )
        blocks.append(Table(caption, *cells(by, shown), folded=True))
    if rows := sampled(r.get("sampling", {}), said):
        columns = (said.varies, "valid answers", "sampled mean", "exact mean")
        blocks.append(
            Table(
                "Cross-check: answers sampled at temperature 1 and parsed, never imputed, against the exact mean.",
                columns,
                rows,
            )
        )
    return Section("behaviour", "Behaviour", claim.sentence, blocks)


def pole_prompts(asked: pd.DataFrame, said: Said) -> list[Any]:
    """Both whole prompts of a pair, and what is asked in every other condition."""
    plus, minus = (first_prompt(asked, name) for name in ("plus", "minus"))
    if plus is None or minus is None:
        return []
    caption = (
        f"A whole pair of prompts: {said.inside}the questions (bold) "
        f"differ only in the {said.varies}. "
        + ("The text before them is the same for both, so that what is measured is what the model makes of it. "
           if plus["prefix"] and plus["prefix"] == minus["prefix"] else "")
        + "Features are chosen on such pairs of other families; patching, attribution and nearness to the output use "
        "these pairs."
    )  # fmt: skip
    pair = [Prompt(titled(row, said), row["prefix"], row["query"]) for row in (plus, minus)]
    conditions = [name for name in asked["condition"].unique() if name not in ("plus", "minus")]
    firsts = {name: first_prompt(asked, name) for name in sorted(conditions)}
    rows = [[said.condition(name), " ".join(row["query"].split())] for name, row in firsts.items() if row is not None]
    others = Table("What the other prompts ask.", ("condition", "question"), rows, folded=True)
    return [Prompts(caption, pair, folded=False), *([others] if rows else [])]


def other_examples(asked: pd.DataFrame, said: Said) -> list[Any]:
    """A whole prompt of every control that asks the behaviour's own questions after other worked examples."""
    own = first_prompt(asked, "plus")
    rows = [first_prompt(asked, poles(name)[0]) for name in said.controls]
    shown = [
        Prompt(titled(row, said), row["prefix"], row["query"])
        for row in rows
        if own is not None and row is not None and row["query"] == own["query"] and row["prefix"] != own["prefix"]
    ]
    return [Prompts("The same question after other worked examples.", shown)] if shown else []


def parts_text(parts: Mapping[str, Any] | None, said: Said) -> str:
    """What of the shift is left when the worked examples teach the reverse."""
    if parts is None:
        return ""
    semantic, mapping = (f"{points(parts[name]['pp'])} ({interval(parts[name]['ci'])})" for name in parts)
    return (
        f" Of the {said.varies}'s shift {semantic} stay when the worked examples teach the reverse, its semantic part, "
        f"and {mapping} turn round with them, a mapping from words to answers that the examples teach."
    )


def titled(row: Mapping[str, Any], said: Said) -> str:
    word = row.get("word")
    return said.condition(row["condition"]) + (f", in the word “{word}”" if isinstance(word, str) and word else "")


def strongest_control(effects: pd.DataFrame, said: Said) -> str:
    still = [name == "poles" or expected_to_move(said.controls[name]) for name in effects["contrast"]]
    controls = effects[~np.array(still)]
    if controls.empty:
        return "No control was tried."
    strongest: Any = controls["shift_pp"].abs().idxmax()
    top = controls.loc[strongest]
    label = said.contrast(top["contrast"]).lower()
    return f"The largest control shift is that of “{label}”, {points(top['shift_pp'])}."


def expected_to_move(control: Control) -> bool:
    return control.moves or control.flips


def sampled(sampling: Mapping[str, Any], said: Said) -> list[list[str]]:
    return [
        [
            said.pole(condition),
            percent(sample["valid"]),
            f"{percent(sample['mean'], 1)} ± {percent(sample['standard_error'], 1)}",
            percent(sample["exact_mean"], 1),
        ]
        for condition, sample in sampling.items()
        if isinstance(sample, Mapping)
    ]


def draw_distributions(table: pd.DataFrame, said: Said) -> go.Figure:
    """Mean probability of each score, by pole. Columns condition, share, probability."""
    by = {name: part.sort_values("share") for name, part in table.groupby("condition")}
    bars = (("plus", PLUS, ""), ("minus", MINUS, "/"))
    traces = [
        go.Bar(
            x=100 * by[name]["share"],
            y=100 * by[name]["probability"],
            name=said.pole(name),
            marker=dict(color=colour, pattern=hatch(shape)),
            hovertemplate=f"{said.pole(name)}: {said.outcome} %{{x:.0f}} %, probability %{{y:.1f}} %<extra></extra>",
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
                hovertemplate=f"neutral: {said.outcome} %{{x:.0f}} %, probability %{{y:.1f}} %<extra></extra>",
            )
        )
    return figure(traces, x=f"{said.outcome}, %", y="probability, %", barmode="group", height=380, phone=340)


def draw_shifts(effects: pd.DataFrame, said: Said) -> go.Figure:
    """The behaviour's shift and every control's, with intervals."""
    rows = [
        dict(
            label=wrapped(said.contrast(row.contrast)),
            value=row.shift_pp,
            low=row.low_pp,
            high=row.high_pp,
            kind="effect" if row.contrast == "poles" or expected_to_move(said.controls[row.contrast]) else "control",
            note=f", {p_value(row.p)}",
        )
        for row in each_row(effects)
    ]
    out = forest(rows, x=f"shift of the {said.outcome}, pp")
    return out.for_each_trace(lambda t: t.update(name=said.varies) if t.name != "control" else None)
