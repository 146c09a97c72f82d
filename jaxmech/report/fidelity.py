"""How good the dictionaries are, and how they were trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import (
    Figure,
    Section,
    Table,
    Text,
    cells,
    fixed,
    need,
    text,
)
from jaxmech.report.formats import listing, number, percent, significant
from jaxmech.report.style import (
    EFFECT,
    MINUS,
    REFERENCE,
    SOFT,
    figure,
)
from jaxmech.report.verdict import ClaimCard
from jaxmech.study.folder import RunFolder

SHARES = {
    "dead": "dead features",
    "recovered_zero": "loss recovered, against zeros",
    "recovered_mean": "loss recovered, against the mean",
}
"""Shares by layer, under the names that results.json has."""


def section(folder: RunFolder, fit: ClaimCard) -> Section:
    layers = need(folder, "fidelity", "layers")
    index: Any = layers["fvu"].idxmax()
    worst = layers.loc[index]
    lead = (
        f"The dictionaries leave {percent(layers['fvu'].mean())} of the variance unexplained on average, at worst "
        f"{percent(worst['fvu'])} in layer {worst['layer']:g}, with {number(layers['l0'].mean(), 0)} "
        "features active per token."
        f"{'' if fit.status == 'yes' else ' Not all of them fit this model as they are declared.'}"
    )
    histogram = need(folder, "fidelity", "density")
    names = {"fvu": "held-out text"} | ({"fvu_decision": "decision tokens"} if "fvu_decision" in layers else {})
    blocks: list[Any] = [
        Figure(
            "fvu",
            draw_by_layer(layers, names, y="variance unexplained, %", scale=100),
            "Fraction of variance unexplained (FVU) by layer. Interventions keep the error term, so it is never lost, "
            "but what is in it cannot be selected.",
            "fidelity/layers",
        ),
        Figure(
            "l0",
            draw_by_layer(
                layers,
                {"l0": "held-out text"} | ({"l0_decision": "decision tokens"} if "l0_decision" in layers else {}),
                y="features active per token",
            ),
            f"Sparsity (L0) by layer: from {number(layers['l0'].min(), 0)} to "
            f"{number(layers['l0'].max(), 0)} on held-out text.",
            "fidelity/layers",
        ),
    ]
    blocks.append(
        Figure(
            "density",
            draw_density(histogram),
            "How often features fire on held-out text, later layers darker: "
            f"{percent(layers['dense'].mean(), 1)} fire on more than a tenth of the tokens. Dead ones are left out.",
            "fidelity/density",
        )
    )
    shares = {column: label for column, label in SHARES.items() if column in layers}
    if shares:
        says = [f"{percent(layers[column].mean())} {label}" for column, label in shares.items()]
        blocks.append(
            Figure(
                "shares",
                draw_by_layer(layers, shares, y="share, %", scale=100),
                "Dead features, and the share of the model's loss recovered when a layer is replaced by its "
                "reconstruction, where zeros, or the layer's mean, in its place recover none: on average "
                f"{listing(says)}.",
                "fidelity/layers",
            )
        )
    if folder.has_table("dictionaries", "training"):
        history = folder.table("dictionaries", "training")
        if {"step", "fvu"} <= set(history):
            last = history[history["step"] == history["step"].max()]["fvu"].mean()
            blocks.append(
                Figure(
                    "training",
                    draw_training(history),
                    f"Training: the mean FVU ends at {percent(last)} of the training tokens' variance.",
                    "dictionaries/training",
                )
            )
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        column: (column.replace("_", " "), text if column == "layer" else significant) for column in layers.columns
    }
    blocks.append(Table("All measures by layer.", *cells(layers, columns), folded=True))
    blocks += checked(folder, folder.results("fidelity")["check"]["warnings"])
    return Section("fidelity", "Dictionaries", lead, blocks)


def checked(folder: RunFolder, warnings: Sequence[str]) -> list[Any]:
    """The check of the dictionaries against the model: its warnings, and its numbers."""
    table = need(folder, "fidelity", "check")
    columns = {
        "layer": ("layer", text),
        "l0_declared": ("L0 declared", significant),
        "l0": ("L0", significant),
        "fvu": ("FVU", significant),
        "cosine_centred": ("cosine, centred", fixed(2)),
        "likely_cause": ("likely cause", lambda value: value or "fits"),
    }
    caption = f"Checked on {table['tokens'].iloc[0]:,} tokens of general text: do the dictionaries fit as declared?"
    numbers = Table(caption, *cells(table, columns), folded=not warnings)
    return [Text(warnings), numbers] if warnings else [numbers]


def draw_by_layer(
    layers: pd.DataFrame, columns: dict[str, str], *, y: str, scale: float = 1.0, zero: bool = True
) -> go.Figure:
    """Columns of the fidelity table over layers. columns: column -> name."""
    looks = ((EFFECT, "circle", "solid"), (MINUS, "diamond", "dash"), (REFERENCE, "square", "dot"))
    traces = [
        go.Scatter(
            x=layers["layer"],
            y=scale * layers[column],
            name=name,
            mode="lines+markers",
            line=dict(color=colour, dash=dash),
            marker=dict(symbol=symbol, size=8),
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3~g}}<extra></extra>",
        )
        for (column, name), (colour, symbol, dash) in zip(columns.items(), looks, strict=False)
    ]
    out = figure(traces, x="layer", y=y, height=300, showlegend=True)
    out.update_xaxes(tickvals=layers["layer"].tolist() if len(layers) <= 12 else None)
    return out.update_yaxes(rangemode="tozero") if zero else out


def draw_training(history: pd.DataFrame) -> go.Figure:
    """FVU while training: the mean over layers, and the best and worst layer. Columns step, layer, fvu."""
    spread = history.groupby("step")["fvu"].agg(["mean", "min", "max"]).reset_index()
    spread = spread.iloc[:: max(1, len(spread) // 200)]
    band = dict(mode="lines", line=dict(width=0), hoverinfo="skip")
    traces = [
        go.Scatter(x=spread["step"], y=spread["max"], showlegend=False, **band),
        go.Scatter(
            x=spread["step"], y=spread["min"], name="best to worst layer", fill="tonexty", fillcolor=SOFT, **band
        ),
        go.Scatter(
            x=spread["step"],
            y=spread["mean"],
            name="mean of layers",
            mode="lines",
            line=dict(color=EFFECT, width=2),
            hovertemplate="step %{x}: FVU %{y:.3f}<extra></extra>",
        ),
    ]
    return figure(traces, x="training step", y="FVU", height=300).update_yaxes(rangemode="tozero")


def draw_density(histogram: pd.DataFrame) -> go.Figure:
    """How many features fire how often, one line per layer. Columns layer, low and high (log10 density), features."""
    layers = sorted(histogram["layer"].unique())
    traces = []
    for place, layer in enumerate(layers):
        part = histogram[histogram["layer"] == layer]
        traces.append(
            go.Scatter(
                x=(part["low"] + part["high"]) / 2,
                y=part["features"],
                name=f"layer {layer}",
                mode="lines",
                line=dict(color=EFFECT, shape="hvh", width=1 + 1.5 * (place + 1) / len(layers)),
                opacity=0.35 + 0.65 * (place + 1) / len(layers),
                customdata=100 * 10.0 ** part[["low", "high"]].to_numpy(),
                hovertemplate=f"layer {layer}: %{{y}} features fire on %{{customdata[0]:.2~g}} to "
                "%{customdata[1]:.2~g} % of the tokens<extra></extra>",
            )
        )
    out = figure(traces, x="share of tokens on which a feature fires (log10)", y="features", height=300)
    out.update_layout(showlegend=False)
    return out.update_yaxes(rangemode="tozero")
