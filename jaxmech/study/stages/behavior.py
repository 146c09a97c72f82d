"""Stage behavior: does the stance move the allocation, and do controls leave it alone?"""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.behavior.altruism.dictator import PAIRED
from jaxmech.behavior.parsing import parse_amount
from jaxmech.behavior.scoring import allocate, take
from jaxmech.contrast.statistics import family_means, mean_effect
from jaxmech.io.progress import progress
from jaxmech.models.generate import generate
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Scores every prompt of the test families exactly; samples some as a cross-check."""
    table, encoded = ctx.encoded
    with progress("behaviour", len(table), unit="prompts") as advance:
        test = allocate(ctx.lm, table, encoded, batch=ctx.config.batch, advance=advance)
    effects = contrast_effects(test, seed=ctx.config.seed)
    spread = distributions(test, np.asarray(encoded.values))
    results = summary(test, effects, spread, ctx)
    results["excluded_pairs"] = len(ctx.bank.exclusions)
    results["sampling"] = sampling_check(ctx, test)
    tables = {"prompts": test, "effects": effects, "distributions": spread}
    return Outcome(results, tables | {"exclusions": ctx.bank.exclusions.astype(str)})


def paired_differences(scored: pd.DataFrame, high: str, low: str) -> np.ndarray:
    """Family means of g(high) - g(low), [K]."""
    wide = scored[scored["condition"].isin([high, low])].pivot_table(
        index=["family", "pair"], columns="condition", values="g"
    )
    wide = wide.dropna()
    if wide.empty or not {high, low} <= set(wide.columns):
        return np.array([])
    return family_means((wide[high] - wide[low]).to_numpy(), wide.index.get_level_values("family").to_numpy())


def contrast_effects(scored: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """The stance effect and every control's: shift in percentage points, interval, Wilcoxon p, d_z."""
    rows = []
    for name, (high, low) in PAIRED.items():
        d = paired_differences(scored, high, low)
        if len(d) < 2:
            continue
        effect = mean_effect(d, seed=seed)
        part = scored[scored["condition"].isin([high, low])]
        d_z = d.mean() / d.std(ddof=1) if d.std(ddof=1) > 0 else float("nan")
        rows.append(
            dict(
                contrast=name, high=high, low=low, families=len(d), shift_pp=100 * effect.value,
                low_pp=100 * effect.low, high_pp=100 * effect.high, p=effect.p, d_z=d_z, mass=part["mass"].mean(),
                size_pp=100 * np.abs(d).mean(),
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def distributions(scored: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Mean probability of each share given, a condition: columns condition, share, probability."""
    rows = []
    for condition, part in scored.groupby("condition"):
        probs = np.exp(
            np.stack(part["logprobs"]) - np.logaddexp.reduce(np.stack(part["logprobs"]), axis=1, keepdims=True)
        )
        shares = np.round(values[part.index], 4)
        for share in np.unique(shares):
            rows.append(
                dict(condition=condition, share=share, probability=float((probs * (shares == share)).sum(1).mean()))
            )
    return pd.DataFrame(rows)


def summary(test: pd.DataFrame, effects: pd.DataFrame, spread: pd.DataFrame, ctx: Context) -> dict:
    """The numbers of results.json's `behavior`, and the gate."""
    c = ctx.config
    by = effects.set_index("contrast")
    if missing := [name for name in ("stance", "placebo") if name not in by.index]:
        raise ValueError(
            f"behavior: no pair of {' and '.join(missing)} is left in the test families after the check of pairs; see "
            "the excluded pairs' reasons, and choose words with equally many tokens in this model's tokenizer"
        )
    shift, placebo = by.loc["stance"], by.loc["placebo"]
    high, low = (test[test["condition"] == name] for name in PAIRED["stance"])
    parts = [spread[spread["condition"] == name] for name in PAIRED["stance"]]
    shares, probabilities = [p["share"].to_numpy() for p in parts], [p["probability"].to_numpy() for p in parts]
    small = abs(placebo["shift_pp"]) <= c.gate_placebo_ratio * abs(shift["shift_pp"])
    gate = bool(shift["shift_pp"] >= c.gate_shift_pp and shift["low_pp"] > 0 and small)
    return {
        "mean_generous": high["g"].mean(),
        "mean_selfish": low["g"].mean(),
        "mean_neutral": test.loc[test["condition"] == "neutral", "g"].mean(),
        "shift_pp": shift["shift_pp"],
        "ci": [shift["low_pp"], shift["high_pp"]],
        "p": shift["p"],
        "d_z": shift["d_z"],
        "wasserstein": stats.wasserstein_distance(*shares, *probabilities),
        "placebo_pp": placebo["shift_pp"],
        "placebo_ci": [placebo["low_pp"], placebo["high_pp"]],
        "placebo_size_pp": placebo["size_pp"],
        "mass": test.loc[test["condition"].isin(PAIRED["stance"]), "mass"].mean(),
        "edges": {
            name: {edge: part[f"p_{edge}"].mean() for edge in ("zero", "half", "all")}
            for name, part in (("generous", high), ("selfish", low))
        },
        "families": int(shift["families"]),
        "gate": gate,
        "gate_reasons": {
            f"shift >= {c.gate_shift_pp} pp": bool(shift["shift_pp"] >= c.gate_shift_pp),
            "interval above 0": bool(shift["low_pp"] > 0),
            f"|placebo| <= {c.gate_placebo_ratio} x shift": bool(small),
        },
        "controls_pp": dict(zip(effects["contrast"], effects["shift_pp"], strict=True)),
    }


def sampling_check(ctx: Context, test: pd.DataFrame) -> dict:
    """Samples answers at temperature 1 for one pair a family and parses them, without ever imputing."""
    n = ctx.config.samples
    if n == 0:
        return {"samples": 0}
    rows = np.concatenate([ctx.rows(name, per_family=1) for name in PAIRED["stance"]])
    out, rng = [], jax.random.key(ctx.config.seed)
    tokenizer, encoded = ctx.lm.tokenizer, ctx.encoded[1]
    for start in range(0, len(rows), 4):
        part = rows[np.minimum(np.arange(start, start + 4), len(rows) - 1)]
        prompts, _ = take(encoded, np.repeat(part, n))
        ids = generate(
            ctx.lm.config, ctx.lm.params, prompts.tokens, mask=prompts.mask, cache=prompts.cache, max_new_tokens=6,
            temperature=1.0, key=jax.random.fold_in(rng, start),
        )  # fmt: skip
        texts = tokenizer.batch_decode(np.asarray(ids))
        for i, row in enumerate(np.repeat(part[: len(rows) - start], n)):
            out.append((row, parse_amount(texts[i].split("\n")[0], stake=int(test.loc[row, "stake"]))))
    frame = pd.DataFrame(
        [dict(row=row, amount=p.amount, reason=p.reason, condition=test.loc[row, "condition"]) for row, p in out]
    )
    result: dict = {"samples": len(frame)}
    for condition, part in frame.groupby("condition"):
        valid = part.dropna(subset=["amount"])
        share = valid["amount"].astype(float) / test.loc[valid["row"], "stake"].to_numpy()
        result[condition] = {
            "valid": len(valid) / len(part),
            "mean": float(share.mean()) if len(valid) else None,
            "standard_error": float(share.std(ddof=1) / np.sqrt(len(valid))) if len(valid) > 1 else None,
            "exact_mean": float(test.loc[part["row"].unique(), "g"].mean()),
            "invalid": part["reason"].dropna().value_counts().to_dict(),
        }
    return result
