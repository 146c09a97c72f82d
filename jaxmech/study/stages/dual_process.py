"""Stage dual_process: sorts the selected features into System 1 and System 2 by what the items make them do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxmech.behavior.dual_process import index
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.statistics import mean_effect
from jaxmech.interventions import edits
from jaxmech.interventions.patching import donor_values
from jaxmech.io.progress import progress
from jaxmech.models.text import token_ids
from jaxmech.sae.collect import run_decision
from jaxmech.study.cards import lexical
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome

ARMS = {"demand": ("conflict", "no_conflict"), "instruction": ("think", "instinct")}
COVARIATES = ("digits", "words", "tokens", "option", "log_mass")


def run(ctx: Context) -> Outcome:
    """Runs every item once; classes come from activations, their validity from the model's own answers."""
    c = ctx.config
    items = build_items(per_generator=c.dual_process.items, seed=c.seed)
    items, z = answered(ctx, items)
    features = ctx.selected[["layer", "feature"]]
    arms = {name: matched(items, z, *conditions) for name, conditions in ARMS.items()}
    fires = (z > 0).mean(0)
    classes = features.assign(
        **{"class": index.classify(arms["demand"], arms["instruction"], fires, cut=c.dual_process.cut)},
        index=(arms["demand"].index + arms["instruction"].index) / 2,
        silent_share=1 - fires,
    )
    for name, arm in arms.items():
        classes[name], classes[f"{name}_low"], classes[f"{name}_high"] = arm.index, arm.low, arm.high
    classes["lexical"] = lexical_flags(ctx, features)
    counts = [
        dict(cut=cut) | class_counts(index.classify(arms["demand"], arms["instruction"], fires, cut=cut))
        for cut in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    behavior = behaviour(items)
    results = (
        class_counts(classes["class"]) | behavior | {"items": int(items["item"].nunique()), "cut": c.dual_process.cut}
    )
    tables = {"classes": classes, "sensitivity": pd.DataFrame(counts), "items": items.drop(columns="text")}
    return Outcome(results, tables)


def answered(ctx: Context, items: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Items with p_correct, log_mass and tokens, and the selected features' activations [n, features]."""
    lm, saes, selection = ctx.lm, ctx.saes, ctx.selection()
    encoded = encode_table(lm, items)
    encoder, _ = edits.gather(saes, selection)
    valid, batch = np.asarray(selection.valid), ctx.config.batch
    p_correct, mass, z = [], [], []
    with progress("dual-process items", len(items), unit="prompts") as advance:
        for start in range(0, len(items), batch):
            rows = np.minimum(np.arange(start, start + batch), len(items) - 1)
            keep = min(batch, len(items) - start)
            prompts, values = take(encoded, rows)
            decision = run_decision(lm.config, lm.params, prompts, site=saes.config.site)
            p_correct.append(np.asarray(decision.choices.expected(values))[:keep])
            mass.append(np.asarray(decision.choices.mass)[:keep])
            z.append(np.asarray(donor_values(encoder, decision.resid)).transpose(1, 0, 2)[:keep][:, valid])
            advance(keep)
    tokens = [len(token_ids(lm.tokenizer, query)) for query in items["query"]]
    items = items.assign(
        p_correct=np.concatenate(p_correct), log_mass=np.log(np.concatenate(mass) + 1e-30), tokens=tokens
    )
    # The selection lists features by layer, then in the order of `selected` within the layer.
    order = ctx.selected.reset_index().sort_values("layer", kind="stable")["index"].to_numpy()
    listed = np.concatenate(z)
    out = np.empty_like(listed)
    out[:, order] = listed
    return items, out


def matched(items: pd.DataFrame, z: np.ndarray, high: str, low: str) -> index.Arm:
    """An arm's index from the two prompts of every item."""
    wide = (
        items.reset_index(drop=True).reset_index().pivot(index="item", columns="condition", values="index")[[high, low]]
    )
    a, b = (wide.dropna()[name].to_numpy(int) for name in (high, low))
    covariates = items[list(COVARIATES)].to_numpy(float)
    return index.arm_index(z[a], z[b], (covariates[a], covariates[b]), items["family"].to_numpy()[a])


def lexical_flags(ctx: Context, features: pd.DataFrame) -> np.ndarray:
    """Whether each feature fires on its trigger tokens wherever they occur."""
    cards = ctx.folder.table("contrast", "cards")
    flags = cards[["layer", "feature"]].assign(lexical=lexical(ctx, cards))
    return features.merge(flags, on=["layer", "feature"], how="left")["lexical"].to_numpy(bool)


def class_counts(classes: Any) -> dict[str, int]:
    return {name: int((np.asarray(classes) == name).sum()) for name in index.CLASSES}


def behaviour(items: pd.DataFrame) -> dict:
    """Whether the model answers the items at all: above chance without a lure, worse with one."""
    demand = items[items["arm"] == "demand"]
    by = demand.pivot_table(index="family", columns="condition", values="p_correct")
    accuracy = mean_effect(by["no_conflict"].to_numpy() - 0.5)
    cost = mean_effect((by["no_conflict"] - by["conflict"]).to_numpy())
    think = items[items["arm"] == "instruction"].pivot_table(index="family", columns="condition", values="p_correct")
    gain = mean_effect((think["think"] - think["instinct"]).to_numpy())
    able, lured = accuracy.low > 0, cost.low > 0
    reasons = [] if able else ["the model is not above chance on items without conflict"]
    reasons += [] if lured else ["conflict does not cost it accuracy"]
    return {
        "defined": bool(able and lured),
        "reason": "; ".join(reasons),
        "behavior": {
            "accuracy_no_conflict": 0.5 + accuracy.value,
            "accuracy_no_conflict_ci": [0.5 + accuracy.low, 0.5 + accuracy.high],
            "conflict_cost": cost.value,
            "conflict_cost_ci": [cost.low, cost.high],
            "instruction_gain": gain.value,
            "instruction_gain_ci": [gain.low, gain.high],
        },
    }
