"""How directly features act on the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import Figure, Section, Table, cells, fixed, need, text
from jaxmech.report.formats import interval, listing, number, percent, points, readable
from jaxmech.report.style import (
    CLASS_STYLE,
    CONTROL,
    EFFECT,
    FEATURE,
    NEUTRAL,
    REFERENCE,
    figure,
    hatch,
    note,
)
from jaxmech.report.verdict import ClaimCard
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder

PROXIMITY_RANGE = (-0.5, 1.5)


def section(folder: RunFolder, results: Mapping[str, Any], claim: ClaimCard) -> Section:
    r, said = results["proximity"], Said.of(results)
    sets = need(folder, "proximity", "sets")
    features = need(folder, "proximity", "features")
    low, high = PROXIMITY_RANGE
    outside = int((~features["proximity"].dropna().between(low, high)).sum())
    undefined = int(features["proximity"].isna().sum())
    left = [f"{outside} outside the range" if outside else "", f"{undefined} without any effect" if undefined else ""]
    left = [part for part in left if part]
    depth = listing([f"{readable(kind)} {number(value, 1)}" for kind, value in r["effect_weighted_depth"].items()])
    effects = r["sets"]["all"]
    blocks: list[Any] = [
        Figure(
            "effects",
            draw_proximity_sets(sets, said),
            f"Total effect of setting features to {said.plus} values on {said.minus} prompts, and its split: direct, "
            "with all later "
            f"sublayers frozen, {points(effects['direct_pp'])}; through later layers {points(effects['indirect_pp'])}.",
            "proximity/sets",
        ),
        Figure(
            "directness",
            draw_proximity_features(features),
            "Single features' direct share by layer (size: total effect). Later layers are more direct by "
            "construction, so "
            f"classes are compared within layers. Mean layer weighted by effect: {depth}."
            + (f" Not drawn: {listing(left)}." if left else ""),
            "proximity/features",
        ),
    ]
    if r.get("mediation"):
        rows = [
            [
                key.upper().replace("_THROUGH_", " through "),
                percent(lost["share"]),
                f"{interval(lost['ci'], 0, scale=100)} %",
            ]
            for key, lost in r["mediation"].items()
        ]
        blocks.append(
            Table(
                "Mediation: the share of one class's effect that is lost while the other class is held at its "
                "base values.",
                ("path", "share", "95 % interval"),
                rows,
            )
        )
    columns = {
        "layer": ("layer", text),
        "feature": ("feature", text),
        "class": ("class", readable),
        "total": ("total, pp", fixed(2, 100)),
        "direct": ("direct, pp", fixed(2, 100)),
        "proximity": ("direct share", percent),
    }
    blocks.append(Table("Single features.", *cells(features, columns), folded=True))
    return Section("proximity", "Nearness to the output", claim.sentence, blocks)


def draw_proximity_sets(sets: pd.DataFrame, said: Said) -> go.Figure:
    """Total, direct and indirect effect of the whole selection and of each class."""
    labels = [{"all": "all in use"}.get(name, readable(name)) for name in sets["set"]]
    error_bars = dict(
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
            error_y=error_bars if name == "total" else None,
            marker=dict(color=colour, pattern=hatch(shape)),
            hovertemplate=f"%{{x}}, {name}: %{{y:.2f}} pp<extra></extra>",
        )
        for column, name, colour, shape in looks
    ]
    return figure(traces, y=f"change of the {said.outcome}, pp", barmode="group", height=360, phone=320)


def draw_proximity_features(features: pd.DataFrame) -> go.Figure:
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
