"""Stage behavior: do the poles move the outcome, and do controls leave it alone?"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.behavior.behavior import Behavior, poles
from jaxmech.behavior.scoring import allocate, take
from jaxmech.contrast.statistics import family_means, mean_effect
from jaxmech.io.progress import progress
from jaxmech.models.generate import generate
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Scores every prompt of the test families exactly; samples some as a cross-check."""
    behavior, (table, encoded) = ctx.behavior, ctx.encoded
    with progress("behaviour", len(table), unit="prompts") as advance:
        test = allocate(ctx.lm, table, encoded, batch=ctx.config.batch, advance=advance)
    effects = contrast_effects(test, behavior)
    spread = distributions(test, np.asarray(encoded.values))
    results = {"words": behavior.said()} | summary(test, effects, spread, ctx)
    results["excluded_pairs"] = len(behavior.exclusions)
    results["sampling"] = sampling_check(ctx, test)
    tables = {"prompts": test, "effects": effects, "distributions": spread}
    return Outcome(results, tables | {"exclusions": behavior.exclusions.astype(str)})


def paired_differences(scored: pd.DataFrame, plus: str, minus: str) -> np.ndarray:
    """Family means of g(plus) - g(minus), [K]."""
    wide = scored[scored["condition"].isin([plus, minus])].pivot_table(
        index=["family", "pair"], columns="condition", values="g"
    )
    wide = wide.dropna()
    if wide.empty or not {plus, minus} <= set(wide.columns):
        return np.array([])
    return family_means((wide[plus] - wide[minus]).to_numpy(), wide.index.get_level_values("family").to_numpy())


def contrast_effects(scored: pd.DataFrame, behavior: Behavior) -> pd.DataFrame:
    """The behaviour's own effect ("poles") and every control's: shift in percentage points, interval, p, d_z."""
    rows = []
    for name in (None, *behavior.controls):
        plus, minus = poles(name)
        d = paired_differences(scored, plus, minus)
        if len(d) < 2:
            continue
        effect = mean_effect(d)
        part = scored[scored["condition"].isin([plus, minus])]
        d_z = d.mean() / d.std(ddof=1) if d.std(ddof=1) > 0 else float("nan")
        rows.append(
            dict(
                contrast=name or "poles", families=len(d), shift_pp=100 * effect.value, low_pp=100 * effect.low,
                high_pp=100 * effect.high, p=effect.p, d_z=d_z, mass=part["mass"].mean(),
                size_pp=100 * np.abs(d).mean(),
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def distributions(scored: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Mean probability of each score, by condition: columns condition, share, probability."""
    rows = []
    for condition, part in scored.groupby("condition"):
        logprobs = np.stack(list(part["logprobs"]))
        probs = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True))
        shares = np.round(values[part.index], 4)
        for share in np.unique(shares):
            rows.append(
                dict(condition=condition, share=share, probability=float((probs * (shares == share)).sum(1).mean()))
            )
    return pd.DataFrame(rows)


def summary(test: pd.DataFrame, effects: pd.DataFrame, spread: pd.DataFrame, ctx: Context) -> dict:
    """The numbers of results.json's `behavior`, and the gate."""
    gate = ctx.config.gate
    by: Any = effects.set_index("contrast") if len(effects) else effects
    gating = ctx.behavior.gating("test")
    if missing := [name for name in ("poles", *gating) if name not in by.index]:
        lost = ctx.behavior.words.varies if "poles" in missing else missing[0]
        raise ValueError(
            f"behavior: no pair of {lost} is left in two test families after the check of pairs; see the excluded "
            "pairs' reasons"
        )
    shift = by.loc["poles"]
    plus, minus = (test[test["condition"] == name] for name in poles())
    parts = [spread[spread["condition"] == name] for name in poles()]
    scores, probabilities = [p["share"].to_numpy() for p in parts], [p["probability"].to_numpy() for p in parts]
    small = {
        name: bool(abs(by.loc[name, "shift_pp"]) <= gate.control_ratio * abs(shift["shift_pp"])) for name in gating
    }
    reasons = {
        f"shift >= {gate.shift_pp} pp": bool(shift["shift_pp"] >= gate.shift_pp),
        "interval above 0": bool(shift["low_pp"] > 0),
        **{f"|{name}| <= {gate.control_ratio} x shift": met for name, met in small.items()},
    }
    neutral = test.loc[test["condition"] == "neutral", "g"]
    return {
        "mean_plus": plus["g"].mean(),
        "mean_minus": minus["g"].mean(),
        "mean_neutral": neutral.mean() if len(neutral) else None,
        "shift_pp": shift["shift_pp"],
        "ci": [shift["low_pp"], shift["high_pp"]],
        "p": shift["p"],
        "d_z": shift["d_z"],
        "wasserstein": stats.wasserstein_distance(*scores, *probabilities),
        "controls": {
            name: {"shift_pp": row["shift_pp"], "ci": [row["low_pp"], row["high_pp"]], "size_pp": row["size_pp"],
                   "gate": name in gating}
            for name, row in by.drop(index="poles").iterrows()
        },
        "mass": test.loc[test["condition"].isin(poles()), "mass"].mean(),
        "edges": {
            name: {edge: part[f"p_{edge}"].mean() for edge in ("zero", "half", "all")}
            for name, part in (("plus", plus), ("minus", minus))
        },
        "families": int(shift["families"]),
        "gate": all(reasons.values()),
        "gate_reasons": reasons,
    }  # fmt: skip


def sampling_check(ctx: Context, test: pd.DataFrame) -> dict:
    """Samples answers at temperature 1 for one pair per family and parses them, without ever imputing."""
    n = ctx.config.gate.samples
    if n == 0:
        return {"samples": 0}
    rows = np.concatenate([ctx.rows(name, per_family=1) for name in poles()])
    out, rng = [], ctx.key("behavior.samples")
    tokenizer, encoded = ctx.lm.tokenizer, ctx.encoded[1]
    for start in range(0, len(rows), 4):
        part = rows[np.minimum(np.arange(start, start + 4), len(rows) - 1)]
        prompts, _ = take(encoded, np.repeat(part, n))
        longest = max(6, int(np.asarray(prompts.trie.depth).max()) + 2)
        ids = generate(
            ctx.lm.config, ctx.lm.params, prompts.tokens, mask=prompts.mask, cache=prompts.cache,
            max_new_tokens=longest, temperature=1.0, key=jax.random.fold_in(rng, start),
        )  # fmt: skip
        texts = tokenizer.batch_decode(np.asarray(ids))
        for i, row in enumerate(np.repeat(part[: len(rows) - start], n)):
            out.append((row, *ctx.behavior.parse(test.loc[row], texts[i])))
    frame = pd.DataFrame(out, columns=["row", "score", "reason"])
    frame["condition"] = test.loc[frame["row"], "condition"].to_numpy()
    result: dict = {"samples": len(frame)}
    for condition, group in frame.groupby("condition"):
        valid = group["score"].dropna().astype(float)
        result[condition] = {
            "valid": len(valid) / len(group),
            "mean": float(valid.mean()) if len(valid) else None,
            "standard_error": float(valid.std(ddof=1) / np.sqrt(len(valid))) if len(valid) > 1 else None,
            "exact_mean": float(test.loc[group["row"].unique(), "g"].mean()),
            "invalid": group["reason"].dropna().value_counts().to_dict(),
        }
    return result
