"""Stage contrast: scores every feature of every dictionary on the selection families and applies the rule."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.behavior.behavior import poles
from jaxmech.behavior.scoring import Encoded, encode_table, take
from jaxmech.contrast import selection
from jaxmech.contrast.flips import permutation_p
from jaxmech.contrast.moments import Moments, correlation_with_g, empty_moments
from jaxmech.contrast.statistics import paired_t
from jaxmech.io.progress import progress
from jaxmech.sae.collect import update_moments
from jaxmech.study.cards import feature_cards
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Selects features; falls back to the labelled budget when the rule finds none, and says so."""
    c = ctx.config
    controls = ctx.behavior.gating("selection")
    table = ctx.prompts("selection", *poles(), *(pole for name in controls for pole in poles(name)))
    encoded = encode_table(ctx.lm, table)
    moments, difference = stream_moments(ctx, table, encoded, *poles())
    against = [stream_moments(ctx, table, encoded, *poles(name))[0] for name in controls]
    density = ctx.folder.arrays("fidelity")["density"]
    rule, asked = c.rule, c.selection
    s = selection.feature_stats(moments, against, density)
    permutation = partial(permutation_p, key=ctx.key("contrast.permutations"), R=asked.permutations)
    permuted = permutation(s.difference)
    splits = asked.half_splits
    chosen = selection.select_features(s, rule, permuted, splits=splits, key=ctx.key("contrast.half_splits"))
    draws, key = asked.relabelings, ctx.key("contrast.relabelings")
    false = selection.expected_false(s, rule, permutation, relabelings=draws, splits=splits, key=key)
    budget = selection.top_budget(s, asked.budget)
    frame = feature_table(ctx, s, moments, permuted, chosen, budget)
    mode = asked.mode if chosen.chosen.any() else "budget"
    picked = frame[frame["selected" if mode == "rule" else "in_budget"]]
    if picked.empty:
        raise ValueError(
            "contrast: no feature fires at the decision token of any selection family, so nothing can be selected. "
            "Train the dictionaries longer or at other layers (dictionaries.train.steps, dictionaries.layers)"
        )
    picked = picked.reindex(picked["t"].abs().sort_values(ascending=False, kind="stable").index).reset_index(drop=True)
    return Outcome(
        selection_results(s, chosen, false, budget, mode, picked),
        {
            "features": frame,
            "selected": picked,
            "cards": feature_cards(ctx, picked),
            "criteria": criteria_counts(chosen),
            "budgets": budget_sweep(s, asked.budget),
        },
        {"mean_difference": difference},
    )


def pair_rows(table: pd.DataFrame, high: str, low: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of both members of every pair and their family's number, families in ascending order."""
    keyed = table.reset_index().set_index(["family", "pair", "condition"])["index"].unstack("condition")
    keyed = keyed[[high, low]].dropna().astype(int).sort_index()
    families = keyed.index.get_level_values("family")
    return keyed[high].to_numpy(), keyed[low].to_numpy(), np.unique(families, return_inverse=True)[1]


def stream_moments(
    ctx: Context, table: pd.DataFrame, encoded: Encoded, high: str, low: str
) -> tuple[Moments, np.ndarray]:
    """One pass over the pairs of a contrast, folded batch by batch.

    Returns:
      Moments, and the mean difference of residuals at the decision token [L,D]: the comparator without a dictionary.
    """
    plus, minus, family = pair_rows(table, high, low)
    K, batch = family.max() + 1, max(ctx.config.batch // 2, 1)
    saes = ctx.saes
    moments = empty_moments(len(saes.config.layers), K, saes.config.d_sae)
    difference = np.zeros((ctx.lm.config.n_layers, ctx.lm.config.d_model), np.float32)
    with progress(f"contrast {high} - {low}", len(plus), unit="pairs") as advance:
        for start in range(0, len(plus), batch):
            rows = np.arange(start, start + batch)
            real, rows = rows < len(plus), np.minimum(rows, len(plus) - 1)
            member = (np.arange(K) == family[rows][:, None]) * real[:, None] * 1.0
            prompts, values = take(encoded, np.concatenate([plus[rows], minus[rows]]))
            moments, decision = update_moments(
                ctx.lm.config,
                ctx.lm.params,
                prompts,
                saes=saes,
                values=values,
                member=jnp.asarray(member, jnp.float32),
                moments=moments,
            )
            plus_resid, minus_resid = np.split(np.asarray(decision.resid), 2, axis=1)
            difference += (plus_resid - minus_resid)[:, real].sum(1)
            advance(int(real.sum()))
    return moments, difference / len(plus)


def feature_table(
    ctx: Context,
    s: selection.FeatureStats,
    m: Moments,
    permuted: np.ndarray,
    chosen: selection.Selected,
    budget: np.ndarray,
) -> pd.DataFrame:
    """One row per feature of every layer, dead ones included."""
    layers, F = ctx.saes.config.layers, ctx.saes.config.d_sae
    tests = selection.family_tests(s)
    norm = np.linalg.norm(np.asarray(ctx.saes.params["W_dec"]), axis=-1).reshape(-1)
    correlation = correlation_with_g(m).reshape(2, -1)
    frame = pd.DataFrame(
        dict(
            layer=np.repeat(layers, F), feature=np.tile(np.arange(F), len(layers)), live=s.fires.max(0) > 0,
            dz=s.difference.mean(0), strength=np.abs(s.difference.mean(0)) * norm, **tests._asdict(),
            permutation_p=permuted,
            auroc=selection.auroc(s.plus, s.minus), fires_plus=s.fires[0], fires_minus=s.fires[1], density=s.density,
            control_d_z=s.control_d_z, correlation_plus=correlation[0], correlation_minus=correlation[1],
            stability=chosen.stability, selected=chosen.chosen, in_budget=budget,
        )
    )  # fmt: skip
    chosen.passed["auroc"] = np.abs(frame["auroc"].to_numpy() - 0.5) >= ctx.config.rule.auroc - 0.5
    return frame.assign(**{f"passes_{name}": passed for name, passed in chosen.passed.items()})


def criteria_counts(chosen: selection.Selected) -> pd.DataFrame:
    """How many features each criterion alone lets through, and how many are left after each in turn."""
    left, rows = np.ones(len(chosen.chosen), bool), []
    for name, passed in chosen.passed.items():
        left = left & passed
        rows.append(dict(criterion=name, alone=int(passed.sum()), remaining=int(left.sum())))
    return pd.DataFrame(rows)


def budget_sweep(s: selection.FeatureStats, share: float) -> pd.DataFrame:
    """What larger and smaller budgets would take: number of features and the smallest |t| among them."""
    t, rows = np.abs(np.nan_to_num(paired_t(s.difference)[0], posinf=np.inf)), []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        taken = selection.top_budget(s, share * factor)
        rows.append(
            dict(
                share=share * factor,
                features=int(taken.sum()),
                smallest_t=float(t[taken].min()) if taken.any() else None,
            )
        )
    return pd.DataFrame(rows)


def selection_results(
    s: selection.FeatureStats,
    chosen: selection.Selected,
    false: np.ndarray,
    budget: np.ndarray,
    mode: str,
    picked: pd.DataFrame,
) -> dict:
    live, selected = int((s.fires.max(0) > 0).sum()), int(chosen.chosen.sum())
    return {
        "features_total": len(chosen.chosen),
        "features_live": live,
        "selected": selected,
        "share": selected / len(chosen.chosen),
        "expected_false": float(false.mean()),
        "expected_false_max": int(false.max()),
        "fdr": float(min(1.0, false.mean() / selected)) if selected else None,
        "mode": mode,
        "used": len(picked),
        "budget": int(budget.sum()),
        "budget_and_rule": int((budget & chosen.chosen).sum()),
        "by_layer": picked["layer"].value_counts().sort_index().to_dict(),
    }
