"""Whether the direction carries over to other games."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from jaxmech.report import formats as fm
from jaxmech.report.blocks import Figure, Prompt, Prompts, Section, Table, cells, fixed, need, short_p, text
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    REFERENCE,
    SELFISH,
    SHADE,
    figure,
    forest,
)
from jaxmech.report.verdict import Claim
from jaxmech.study.folder import RunFolder

GAME_COLOURS = (EFFECT, SELFISH, REFERENCE, "#2f8f6b", "#b0518a", "#7b8591", "#9a7a1c")


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


def section(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: Claim) -> Section:
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
            draw_games(table),
            "Slope of each game's score, with 95 % intervals over wordings, beside 1.96 standard deviations of what "
            f"{config['game_directions']} random directions of the same norm do at coefficient 1 (band). {beyond} of "
            f"{len(table)} lie outside their band. P-values are one-sided.",
            "games/games",
        ),
        Figure(
            "game-curves",
            draw_game_curves(curves),
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


def draw_games(table: pd.DataFrame) -> go.Figure:
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


def draw_game_curves(curves: pd.DataFrame) -> go.Figure:
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
