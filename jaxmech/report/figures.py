"""Figures of behaviour, selection, classes and dictionaries: each a pure function from a table to a plotly figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report import formats as fm
from jaxmech.report.style import (
    CLASS_STYLE,
    CONTROL,
    EFFECT,
    FEATURE,
    GENEROUS,
    NEUTRAL,
    REFERENCE,
    SELFISH,
    SOFT,
    count_axis,
    figure,
    forest,
    hatch,
    note,
)

BACKGROUND_POINTS = 1500
"""Unselected features drawn in the volcano: the page stays small, and the cloud keeps its shape."""


CRITERIA = {
    "q": "FDR q",
    "d_z": "effect size d_z",
    "sign": "sign consistency",
    "fires": "fires often enough",
    "density": "rare on neutral text",
    "placebo": "larger than placebo",
    "auroc": "AUROC",
    "permutation": "sign-flip permutation",
    "half_splits": "half-splits",
}


def distributions(table: pd.DataFrame) -> go.Figure:
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


def shifts(effects: pd.DataFrame) -> go.Figure:
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


def volcano(features: pd.DataFrame, in_use: pd.DataFrame, *, seed: int = 0) -> go.Figure:
    """Effect size against -log10 p of live features; those in use are marked, the others thinned at random."""
    live = features[features["live"]]
    height = -np.log10(np.maximum(live["p"].to_numpy(float), 1e-300))
    frame = live.assign(height=height, d_z=live["d_z"].clip(-50, 50))
    used = pd.MultiIndex.from_frame(frame[["layer", "feature"]]).isin(
        pd.MultiIndex.from_frame(in_use[["layer", "feature"]])
    )
    rest = frame[~used]
    if len(rest) > BACKGROUND_POINTS:
        top = rest.nlargest(BACKGROUND_POINTS // 5, "height")  # the strongest unselected stay: why they failed matters
        rest = pd.concat([top, rest.drop(top.index).sample(BACKGROUND_POINTS - len(top), random_state=seed)])
    traces = []
    for name, part, marker in (
        ("not in use", rest, dict(color=CONTROL, size=4, opacity=0.45)),
        ("in use", frame[used], dict(color=EFFECT, size=10, symbol="diamond", line=dict(width=1, color="white"))),
    ):
        traces.append(
            go.Scatter(
                x=part["d_z"].round(3),
                y=part["height"].round(2),
                name=name,
                mode="markers",
                marker=marker,
                customdata=part[["layer", "feature"]].to_numpy(np.int32),
                hovertemplate=FEATURE + ": d_z %{x:.2f}, −log₁₀ p %{y:.1f}<extra></extra>",
            )
        )
    return figure(traces, x="effect size d_z over families", y="−log₁₀ p", height=400, phone=360)


def layer_histogram(in_use: pd.DataFrame, layers: list[int]) -> go.Figure:
    """Features in use, by layer and by the stance under which they are more active."""
    traces = []
    for name, part, colour, shape in (
        ("more active when generous", in_use[in_use["dz"] > 0], GENEROUS, ""),
        ("more active when selfish", in_use[in_use["dz"] <= 0], SELFISH, "/"),
    ):
        counts = part["layer"].value_counts().reindex(layers, fill_value=0)
        traces.append(
            go.Bar(
                x=[str(layer) for layer in layers],
                y=counts.to_numpy(),
                name=name,
                marker=dict(color=colour, pattern=hatch(shape)),
                hovertemplate=f"layer %{{x}}: %{{y}} {name}<extra></extra>",
            )
        )
    out = figure(traces, x="layer", y="features in use", barmode="stack", height=400, phone=320)
    most = in_use["layer"].value_counts().max() if len(in_use) else 1
    return count_axis(out.update_xaxes(type="category"), most)


def funnel(criteria: pd.DataFrame) -> go.Figure:
    """How many features each criterion alone lets through, and how many are left after each in turn."""
    labels = [fm.wrapped(CRITERIA.get(name, fm.name(name)), 18) for name in criteria["criterion"]]
    traces = [
        go.Bar(
            y=labels,
            x=np.maximum(criteria[column], 0.6),
            orientation="h",
            name=name,
            text=[f" {n:,}" for n in criteria[column]],
            textposition="outside",
            cliponaxis=False,
            marker=dict(color=colour, pattern=hatch(shape)),
            hovertemplate=f"%{{y}}, {name}: %{{text}}<extra></extra>",
        )
        for column, name, colour, shape in (
            ("alone", "pass this criterion", CONTROL, "/"),
            ("remaining", "left after it and all above", EFFECT, ""),
        )
    ]
    top = float(np.log10(max(criteria["alone"].max(), 10)))
    out = figure(
        traces,
        x="features (log scale)",
        barmode="group",
        height=90 + 42 * len(labels),
        phone=90 + 46 * len(labels),
        margin=dict(l=20, r=24, t=12, b=52),
    )
    return out.update_xaxes(
        type="log", range=[np.log10(0.5), top + 0.3 * (top + 0.3)], dtick=1, tickformat=",d"
    ).update_yaxes(autorange="reversed")


def stability(features: pd.DataFrame, in_use: pd.DataFrame, *, needed: float) -> go.Figure:
    """Separation of the stances (AUROC) against the share of half-splits of the families that select a feature "
    "again."""
    frame = features.dropna(subset=["stability"])
    if frame.empty:
        return note(figure([], height=340), "No feature passed the cheaper criteria,<br>so no half-split was taken.")
    used = pd.MultiIndex.from_frame(frame[["layer", "feature"]]).isin(
        pd.MultiIndex.from_frame(in_use[["layer", "feature"]])
    )
    jitter = np.random.default_rng(0).uniform(-0.004, 0.004, len(frame))  # many features share both values exactly
    traces = []
    for name, mask, colour, symbol in (
        ("not in use", ~used, CONTROL, "circle-open"),
        ("in use", used, EFFECT, "diamond"),
    ):
        part = frame[mask]
        traces.append(
            go.Scatter(
                x=(part["auroc"] - 0.5).abs() + 0.5 + jitter[mask],
                y=100 * part["stability"],
                name=name,
                mode="markers",
                marker=dict(color=colour, symbol=symbol, size=8, opacity=0.8),
                customdata=part[["layer", "feature"]].to_numpy(np.int32),
                hovertemplate=FEATURE + ": AUROC %{x:.2f}, %{y:.0f} % of half-splits<extra></extra>",
            )
        )
    out = figure(
        traces, x="separation of stances (AUROC, folded)", y="selected again, % of half-splits", height=400, phone=340
    )
    out.add_hline(y=100 * needed, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out.update_yaxes(range=[100 * min(frame["stability"].min(), needed) - 8, 104])


def class_counts(counts: dict[str, int]) -> go.Figure:
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


def sensitivity(table: pd.DataFrame, cut: float) -> go.Figure:
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


def arms(classes: pd.DataFrame) -> go.Figure:
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
    for add, at in ((out.add_vline, "x"), (out.add_hline, "y")):
        add(**{at: 0}, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out


def by_layer(
    layers: pd.DataFrame, columns: dict[str, str], *, y: str, scale: float = 1.0, zero: bool = True
) -> go.Figure:
    """Columns of the fidelity table over layers. columns: column -> name."""
    looks = ((EFFECT, "circle", "solid"), (SELFISH, "diamond", "dash"), (REFERENCE, "square", "dot"))
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


def training(history: pd.DataFrame) -> go.Figure:
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


def density(histogram: pd.DataFrame) -> go.Figure:
    """How many features fire how often, a line a layer. Columns layer, low, high (log10 of the density), features."""
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
