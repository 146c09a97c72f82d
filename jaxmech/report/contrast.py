"""Which features carry the contrast, how they were chosen, and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from jaxmech.report.blocks import (
    Card,
    Cards,
    Figure,
    Section,
    Table,
    cells,
    fixed,
    need,
    short_p,
    text,
)
from jaxmech.report.formats import UNDEFINED, known, number, p_value, percent, readable, wrapped
from jaxmech.report.style import (
    CONTROL,
    EFFECT,
    FEATURE,
    MINUS,
    NEUTRAL,
    PLUS,
    count_axis,
    figure,
    hatch,
    note,
)
from jaxmech.report.verdict import ClaimCard, by_chance
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder

CRITERIA = {
    "max_t": "largest |t| of all, sign flips",
    "q": "FDR q",
    "d_z": "effect size d_z",
    "sign": "sign consistency",
    "words": "sign, by pairs of words",
    "fires": "fires often enough",
    "density": "rare on neutral text",
    "control": "larger than under controls",
    "flipped": "sign under flipped examples",
    "permutation": "sign-flip permutation",
    "auroc": "AUROC",
    "half_splits": "half-splits",
}


BACKGROUND_POINTS = 1500
"""Unselected features drawn in the volcano: the page stays small, and the cloud keeps its shape."""


TEXT_COLUMNS = {
    "promoted": "promotes",
    "promoted_tokens": "promotes",
    "promotes": "promotes",
    "suppressed": "suppresses",
    "suppressed_tokens": "suppresses",
    "suppresses": "suppresses",
    "top_tokens": "fires on",
    "tokens": "fires on",
    "fires_on": "fires on",
    "top_contexts": "contexts",
    "contexts": "contexts",
}
"""Optional columns of the table `cards`, by any name they may have."""


ENOUGH_TOKENS = 5000
"""Of neutral text, for the share on which a feature fires."""


ROWS = 60


CARDS = 12


def section(folder: RunFolder, results: Mapping[str, Any], config: Mapping[str, Any], claim: ClaimCard) -> Section:
    r, said = results["contrast"], Said.of(results)
    features = need(folder, "contrast", "features")
    used = need(folder, "contrast", "selected")
    criteria = need(folder, "contrast", "criteria")
    budgets = need(folder, "contrast", "budgets")
    classes = need(folder, "dual_process", "classes")
    layers = sorted(int(layer) for layer in features["layer"].unique())
    plus = int((used["dz"] > 0).sum())
    drawn = min(r["features_live"], BACKGROUND_POINTS + len(used))
    thinned = f" {drawn:,} of {r['features_live']:,} live features are drawn." if drawn < r["features_live"] else ""
    stable = used["stability"].median()
    blocks = [
        Figure(
            "volcano",
            draw_volcano(features, used),
            f"All live features: how strongly and how surely they differ between {said.plus} and "
            f"{said.minus}. The {len(used)} in use "
            f"have |d_z| from {number(used['d_z'].abs().min(), 1)} to "
            f"{number(used['d_z'].abs().max(), 1)}.{thinned}",
            "contrast/features",
        ),
        Figure(
            "layers",
            draw_layer_histogram(used, layers, said),
            f"Where the features in use lie. {plus} are more active when {said.plus}, {len(used) - plus} when "
            f"{said.minus}.",
            "contrast/selected",
        ),
        Figure(
            "funnel",
            draw_funnel(criteria),
            f"The rule, criterion by criterion: {r['features_total']:,} features, {r['features_live']:,} live, "
            f"{r['selected']:,} pass all. {null_text(r, config)} {density_text(r)} {positions_text(r)}{again_text(r)}",
            "contrast/criteria",
        ),
        Figure(
            "stability",
            draw_stability(features, used, needed=config["rule"]["half_splits"]),
            "Of the features that reach the last criterion: how well each alone separates the poles, and how "
            "often half "
            f"the families select it again (line: {percent(config['rule']['half_splits'])} needed)."
            + (f" The median of those in use is {percent(stable)}." if known(stable) else ""),
            "contrast/features",
        ),
        feature_table(used, classes, said),
        feature_cards(folder, used, classes, said),
        Table(
            "What other budgets would take: the labelled budget mode, for comparison.",
            *cells(
                budgets,
                {
                    "share": ("share of all features", lambda v: percent(v, 4)),
                    "features": ("features", text),
                    "smallest_t": ("smallest |t|", fixed(1)),
                },
            ),
            folded=True,
        ),
    ]
    return Section("features", "Features", claim.sentence, blocks)


def null_text(r: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What the whole rule selects under relabelings, and how often it may at most."""
    return (
        f"Relabelled at random by family, the whole rule passes {by_chance(r)}. That it would pass as many as "
        f"it does here has {p_value(r['null_p'])}; it passes any in at most {percent(r['null_upper'], 1)} of such "
        "relabelings (upper 95 % limit)."
    )


def again_text(r: Mapping[str, Any]) -> str:
    """Whether dictionaries trained from a second seed tell of the same directions."""
    if (again := r.get("again")) is None:
        return ""
    return (
        f" In dictionaries trained from a second seed the rule selects {again['selected']:,}; of the {r['used']:,} "
        f"directions in use {percent(again['share'])} are in use there too (cosine of at least {again['same_from']}; "
        f"the median of the best is {number(again['cosine'], 2)})."
    )


def density_text(r: Mapping[str, Any]) -> str:
    tokens = r["density_tokens"]
    few = f", fewer than the {ENOUGH_TOKENS:,} that this takes" if tokens < ENOUGH_TOKENS else ""
    return f"How rare features are on neutral text was measured on {tokens:,} tokens{few}."


def positions_text(r: Mapping[str, Any]) -> str:
    """The same rule where the answer is not yet decided."""
    after = r["positions"]["after"]
    if after is None:
        return "Not all pairs share tokens after what they differ in, so only the decision token was read."
    return (
        f"As a mean over the tokens that both prompts of a pair share after what they differ in, {after:,} pass, where "
        f"{r['positions']['decision']:,} do at the decision token, by which features are selected."
    )


def feature_table(used: pd.DataFrame, classes: pd.DataFrame, said: Said) -> Table:
    frame = used.merge(classes[["layer", "feature", "class"]], on=["layer", "feature"], how="left").head(ROWS)
    cut = f" The first {ROWS} of {len(used)}; the others are in contrast/selected.parquet." if len(used) > ROWS else ""
    columns = {
        "layer": ("layer", text),
        "feature": ("feature", text),
        "class": ("class", lambda v: readable(v) if v else UNDEFINED),
        "d_z": ("d_z", fixed(2)),
        "d_z_after": ("d_z, mean after", fixed(2)),
        "p_max": ("p, of all", short_p),
        "q": ("q", short_p),
        "min_f": ("min F′", fixed(1)),
        "auroc": ("AUROC", fixed(2)),
        "stability": ("half-splits", percent),
        "fires_plus": (f"fires, {said.plus}", percent),
        "fires_minus": (f"fires, {said.minus}", percent),
        "density": ("on neutral text", lambda v: percent(v, 1)),
        "control": ("strongest control", lambda name: said.contrast(name) if name else UNDEFINED),
        "control_d_z": ("its size, in SD", fixed(2)),
        "correlation_plus": (f"r with {said.outcome}, {said.plus}", fixed(2)),
        "correlation_minus": (f"r with {said.outcome}, {said.minus}", fixed(2)),
    }
    columns = {key: value for key, value in columns.items() if key in frame}
    return Table(f"Features in use, strongest first.{cut}", *cells(frame, columns), folded=len(frame) > 12)


def feature_cards(folder: RunFolder, used: pd.DataFrame, classes: pd.DataFrame, said: Said) -> Cards:
    """The strongest features as cards; tokens and contexts only where the run has a table `cards`."""
    stage = next((s for s in ("contrast", "fidelity", "dual_process") if folder.has_table(s, "cards")), None)
    words = folder.table(stage, "cards") if stage else pd.DataFrame(columns=["layer", "feature"])
    frame = used.head(CARDS).merge(classes, on=["layer", "feature"], how="left", suffixes=("", "_class"))
    frame = frame.merge(
        words[[c for c in words if c in ("layer", "feature") or c in TEXT_COLUMNS]], on=["layer", "feature"], how="left"
    )
    cards = []
    for row in frame.to_dict("records"):
        kind = row.get("class")
        facts = [
            ("more active", f"when {said.plus if row['dz'] > 0 else said.minus}"),
            ("d_z", number(row["d_z"], 2)),
            ("AUROC", number(row["auroc"], 2)),
            ("on neutral text", percent(row["density"], 1)),
            ("class", readable(kind) if isinstance(kind, str) else UNDEFINED),
        ]
        if row.get("lexical") is True:
            facts.append(("note", "lexical: fires on its trigger words anywhere"))
        texts = [
            (name, as_list(row[column]))
            for column, name in TEXT_COLUMNS.items()
            if column in row and len(as_list(row[column]))
        ]
        cards.append(Card(f"Layer {row['layer']}, feature {row['feature']}", facts, texts))
    caption = f"The {len(cards)} strongest features in use." if len(used) > len(cards) else "The features in use."
    return Cards(caption, cards)


def as_list(value: Any) -> Sequence[str]:
    """Tokens or contexts as strings, visible spaces included; a missing value is none."""
    if value is None or isinstance(value, float):
        return []
    items = [value] if isinstance(value, str) else list(value)
    return [str(item).replace("\n", "⏎") for item in items]


def draw_volcano(features: pd.DataFrame, in_use: pd.DataFrame, *, seed: int = 0) -> go.Figure:
    """Effect size against -log10 p of live features; those in use are marked, the others thinned at random."""
    live = features[features["live"]]
    height = -np.log10(np.maximum(live["p"].to_numpy(float), 1e-300))
    frame = live.assign(height=height, d_z=live["d_z"].clip(-50, 50))
    used = pd.MultiIndex.from_frame(frame[["layer", "feature"]]).isin(
        pd.MultiIndex.from_frame(in_use[["layer", "feature"]])
    )
    unused = frame[~used]
    if len(unused) > BACKGROUND_POINTS:
        top = unused.nlargest(BACKGROUND_POINTS // 5, "height")  # the strongest stay: why they failed matters
        unused = pd.concat([top, unused.drop(top.index).sample(BACKGROUND_POINTS - len(top), random_state=seed)])
    traces = []
    for name, part, marker in (
        ("not in use", unused, dict(color=CONTROL, size=4, opacity=0.45)),
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


def draw_layer_histogram(in_use: pd.DataFrame, layers: list[int], said: Said) -> go.Figure:
    """Features in use, by layer and by the pole under which they are more active."""
    traces = []
    for name, part, colour, shape in (
        (f"more active when {said.plus}", in_use[in_use["dz"] > 0], PLUS, ""),
        (f"more active when {said.minus}", in_use[in_use["dz"] <= 0], MINUS, "/"),
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


def draw_funnel(criteria: pd.DataFrame) -> go.Figure:
    """How many features each criterion alone lets through, and how many are left after each in turn."""
    labels = [wrapped(CRITERIA.get(name, readable(name)), 18) for name in criteria["criterion"]]
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


def draw_stability(features: pd.DataFrame, in_use: pd.DataFrame, *, needed: float) -> go.Figure:
    """Separation of the poles (AUROC) against the share of half-splits of the families that select a feature again."""
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
        traces, x="separation of the poles (AUROC, folded)", y="selected again, % of half-splits", height=400, phone=340
    )
    out.add_hline(y=100 * needed, line=dict(color=NEUTRAL, width=1, dash="dot"))
    return out.update_yaxes(range=[100 * min(frame["stability"].min(), needed) - 8, 104])
