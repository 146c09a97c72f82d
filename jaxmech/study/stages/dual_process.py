"""Stage dual_process: sorts the selected features into System 1 and System 2 by what the items make them do.

A feature is read as its largest value over the question's tokens and the cue for the answer, and in the instruction arm
over those that both prompts share. Features were found at one format's decision token, and are silent at that of
another; a mean would all but lose one that fires on a single token, and would fall with the question's length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.answers.prompts import Prompts
from jaxmech.behavior.dual_process import index
from jaxmech.behavior.dual_process.prompts import build_items, shared_tail
from jaxmech.behavior.scoring import Encoded, allocate, encode_table, take
from jaxmech.contrast.statistics import Effect, mean_effect
from jaxmech.interventions import edits
from jaxmech.io.progress import progress
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward, unembed
from jaxmech.models.text import token_ids
from jaxmech.study.cards import selection_order
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome
from jaxmech.study.lexical import lexical_flags
from jaxmech.study.tables import TABLES

CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)


def run(ctx: Context) -> Outcome:
    """Asks the model every item; classes are computed only if it behaves on them."""
    c = ctx.config
    items = build_items(per_generator=c.dual_process.items, seed=c.seed)
    encoded = encode_table(ctx.lm, items)
    items = answered(ctx, items, encoded)
    results: dict[str, Any] = behavior(items)
    classes = ctx.selected[["layer", "feature"]].reset_index(drop=True).assign(lexical=lexical_flags(ctx, ctx.selected))
    results |= {"items": int(items["item"].nunique()), "cut": c.dual_process.cut}
    results["lexical"] = int(classes["lexical"].sum())
    if results["defined"]:
        items, z = read(ctx, items, encoded)
        indexed = {
            cut: index.dual_index(items, z, cut=cut, arms=results["arms"]) for cut in (c.dual_process.cut, *CUTS)
        }
        classes = classes.join(indexed[c.dual_process.cut])
        results |= class_counts(classes["class"])
        sensitivity = pd.DataFrame([dict(cut=cut) | class_counts(indexed[cut]["class"]) for cut in CUTS])
    else:
        columns = TABLES["dual_process"]
        items = items.assign(log_likelihood=np.nan)
        classes = classes.reindex(columns=columns["classes"]).assign(**{"class": "undefined"})
        results |= dict.fromkeys(index.CLASSES)
        sensitivity = pd.DataFrame(columns=columns["sensitivity"], dtype=float)
    return Outcome(results, {"classes": classes, "sensitivity": sensitivity, "items": items.drop(columns="text")})


def answered(ctx: Context, items: pd.DataFrame, encoded: Encoded) -> pd.DataFrame:
    """Items with p_correct, log_mass (of both answers) and tokens (of the query)."""
    with progress("dual-process items", len(items), unit="prompts") as advance:
        table = allocate(ctx.lm, items, encoded, batch=ctx.config.batch, advance=advance)
    return items.assign(
        p_correct=table["g"], log_mass=np.log(table["mass"] + 1e-30),
        tokens=[len(token_ids(ctx.lm.tokenizer, query)) for query in items["query"]],
    )  # fmt: skip


def behavior(items: pd.DataFrame) -> dict[str, Any]:
    """Whether the model behaves on the items: above chance without a lure, worse with one; and whether an instruction
    to think helps it, without which that arm does not count. Generators are the units."""
    by = items.pivot_table(index="generator", columns="condition", values="p_correct")
    accuracy = mean_effect(by["no_conflict"].to_numpy())
    cost = mean_effect((by["no_conflict"] - by["conflict"]).to_numpy())
    gain = mean_effect((by["think"] - by["instinct"]).to_numpy())
    conditions = {
        "accuracy": condition(accuracy, above=0.5),
        "lure_cost": condition(cost, above=0.0),
        "instruction_gain": condition(gain, above=0.0),
    }
    reasons = {
        "accuracy": "the model is not above chance on items without conflict",
        "lure_cost": "conflict does not cost it accuracy",
    }
    failed = [reason for name, reason in reasons.items() if not conditions[name]["met"]]
    return {
        "defined": not failed,
        "reason": "; ".join(failed),
        "conditions": conditions,
        "arms": ["demand", "instruction"] if conditions["instruction_gain"]["met"] else ["demand"],
        "behavior": {
            "accuracy_no_conflict": accuracy.value,
            "accuracy_no_conflict_ci": [accuracy.low, accuracy.high],
            "conflict_cost": cost.value,
            "conflict_cost_ci": [cost.low, cost.high],
            "instruction_gain": gain.value,
            "instruction_gain_ci": [gain.low, gain.high],
        },
    }


def condition(effect: Effect, *, above: float) -> dict[str, Any]:
    """A necessary condition: met where the interval lies above a value."""
    return {"value": effect.value, "ci": [effect.low, effect.high], "met": bool(effect.low > above)}


def read(ctx: Context, items: pd.DataFrame, encoded: Encoded) -> tuple[pd.DataFrame, np.ndarray]:
    """Items with log_likelihood (mean over the query's tokens but the first), and the selected features' largest values
    [m,K] over the tokens that count, in the order of `selected`."""
    lm, saes, selection = ctx.lm, ctx.saes, ctx.selection()
    encoder, _ = edits.gather(saes, selection)
    valid, batch = np.asarray(selection.valid), ctx.config.batch
    tail = shared_tail(items, [token_ids(lm.tokenizer, query) for query in items["query"]])
    counts = np.stack([items["tokens"].to_numpy(), tail])
    likelihood, largest = [], []
    with progress("features on the items", len(items), unit="prompts") as advance:
        for start in range(0, len(items), batch):
            rows = np.minimum(np.arange(start, start + batch), len(items) - 1)
            keep = min(batch, len(items) - start)
            prompts, _ = take(encoded, rows)
            said, z = _read(lm.config, lm.params, prompts, jnp.asarray(counts[:, rows]), encoder, site=saes.config.site)
            likelihood.append(np.asarray(said)[:keep])
            largest.append(np.moveaxis(np.asarray(z), 1, 0)[:keep][:, valid])
            advance(keep)
    listed = np.concatenate(largest)
    z = np.empty_like(listed)
    z[:, [row.Index for row in selection_order(ctx.selected.reset_index(drop=True))]] = listed
    return items.assign(log_likelihood=np.concatenate(likelihood)), z


@partial(jax.jit, static_argnames=("config", "site"))
def _read(
    config: ModelConfig, params: Params, prompts: Prompts, counts: jax.Array, encoder: Any, *, site: str
) -> tuple[jax.Array, jax.Array]:
    """Mean log-likelihood [B] of each prompt's last counts[0] tokens but the first of them, and the largest value
    [L,B,K] of each feature over its last counts[1] tokens; counts [2,B]."""
    B, T = prompts.tokens.shape
    asked, counted = (jnp.arange(T) >= T - count[:, None] for count in counts)
    taps = {"z": Tap(site, _largest, (encoder, jnp.broadcast_to(counted, (config.n_layers, B, T))))}
    out = forward(config, params, prompts.tokens, mask=prompts.mask, cache=prompts.cache, taps=taps, logits="none")

    def said(row):
        final, tokens, scored = row
        logits = unembed(config, params, final[:-1])  # [T-1,V], of one prompt: a vocabulary is long
        right = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        return jnp.sum(jnp.where(scored[:-1], right, 0.0)) / jnp.maximum(scored[:-1].sum(), 1)

    return jax.lax.map(said, (out.final, prompts.tokens, asked)), out.taps["z"]


def _largest(args, x):
    encoder, counted = args
    return jnp.where(counted[..., None], encoder.encode(x.astype(jnp.float32)), -jnp.inf).max(1)


def class_counts(classes: Any) -> dict[str, int]:
    return {name: int((np.asarray(classes) == name).sum()) for name in index.CLASSES}
