"""Stage behavior: do the poles move the outcome, and do controls leave it alone?"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.behavior.behavior import Behavior, poles
from jaxmech.behavior.scoring import allocate, take
from jaxmech.contrast.statistics import detectable, mean_effect
from jaxmech.io.progress import progress
from jaxmech.models.generate import generate
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome
from jaxmech.study.tables import TABLES


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
    tables = {"prompts": test, "effects": effects, "factors": by_factor(test, behavior), "distributions": spread}
    return Outcome(results, tables | {"exclusions": behavior.exclusions.astype(str)})


def pair_differences(scored: pd.DataFrame, control: str | None = None, value: str = "g") -> pd.Series:
    """What the two poles differ by in every pair, of the behaviour itself or of a control; indexed by family, pair."""
    plus, minus = poles(control)
    part = scored[scored["condition"].isin([plus, minus])]
    wide = part.astype({value: float}).pivot(index=["family", "pair"], columns="condition", values=value)
    return wide[plus] - wide[minus] if len(wide) else pd.Series(dtype=float)


def by_family(pairs: pd.Series) -> pd.Series:
    return pairs.groupby("family").mean()


def effect_pp(means: pd.Series) -> dict[str, Any]:
    """The mean of family means, its 95 % interval, p and the minimum detectable effect, in percentage points."""
    effect = mean_effect(means.to_numpy())
    return {
        "pp": 100 * effect.value, "ci": [100 * effect.low, 100 * effect.high], "p": effect.p,
        "detectable_pp": 100 * detectable(means.to_numpy()),
    }  # fmt: skip


def contrast_effects(scored: pd.DataFrame, behavior: Behavior) -> pd.DataFrame:
    """The behaviour's own effect ("poles") and every control's: shift in percentage points, interval, p, d_z; size, the
    root mean square over pairs; excess, by how much the behaviour's own shift is larger within families."""
    own: pd.Series = by_family(pair_differences(scored))
    rows: list[dict[str, Any]] = []
    for name in (None, *behavior.controls):
        pairs = pair_differences(scored, name)
        if pairs.empty or len(means := by_family(pairs)) < 2:
            continue
        shift = effect_pp(means)
        more: pd.Series = (own - means).dropna() if name else pd.Series(dtype=float)
        excess: Any = effect_pp(more) if len(more) >= 2 else {"pp": np.nan, "ci": [np.nan] * 2, "detectable_pp": np.nan}
        spread = means.std()
        rows.append(
            dict(
                contrast=name or "poles", families=len(means), shift_pp=shift["pp"], low_pp=shift["ci"][0],
                high_pp=shift["ci"][1], p=shift["p"], d_z=means.mean() / spread if spread > 0 else np.nan,
                mass=scored.loc[scored["condition"].isin(poles(name)), "mass"].mean(),
                size_pp=100 * np.sqrt((pairs**2).mean()), detectable_pp=shift["detectable_pp"], excess_pp=excess["pp"],
                excess_low_pp=excess["ci"][0], excess_high_pp=excess["ci"][1],
                excess_detectable_pp=excess["detectable_pp"],
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def by_factor(scored: pd.DataFrame, behavior: Behavior) -> pd.DataFrame:
    """The behaviour's own shift at each level of each factor that has several, over the families that have it."""
    plus, minus = (scored[scored["condition"] == pole].set_index(["family", "pair"]) for pole in poles())
    pairs, rows = pair_differences(scored), []
    for factor in behavior.factors:
        both = plus[factor].astype(str).to_frame("plus").join(minus[factor].astype(str).rename("minus"))
        level = both["plus"].where(both["plus"] == both["minus"], both["plus"] + " / " + both["minus"])
        if level.nunique() < 2:
            continue
        for name, part in pairs.groupby(level):
            means = by_family(part)
            shift = effect_pp(means)
            rows.append(
                dict(factor=factor, level=name, families=len(means), shift_pp=shift["pp"], low_pp=shift["ci"][0],
                     high_pp=shift["ci"][1])
            )  # fmt: skip
    return pd.DataFrame(rows, columns=TABLES["behavior"]["factors"])


def semantic_and_mapping(scored: pd.DataFrame, behavior: Behavior) -> dict[str, Any] | None:
    """What of the shift stays when the worked examples teach the reverse, (shift + flipped) / 2, and what turns round
    with them, (shift - flipped) / 2; None where no control flips.

    Raises:
      ValueError: fewer than two families have pairs of both.
    """
    flipping = [name for name in behavior.paired("test") if behavior.controls[name].flips]
    if not flipping:
        return None
    own, flipped = pair_differences(scored), pair_differences(scored, flipping[0])
    parts = {"semantic": (own + flipped) / 2, "mapping": (own - flipped) / 2}
    means = {name: by_family(part.dropna()) for name, part in parts.items()}
    if (families := len(means["semantic"])) < 2:
        raise ValueError(f"behavior: {flipping[0]} asks pairs of {families} test families again, expected at least 2")
    return {name: effect_pp(part) for name, part in means.items()}


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
    """The numbers of results.json's `behavior`."""
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
    shares = [spread[spread["condition"] == name] for name in poles()]
    scores, probabilities = [p["share"].to_numpy() for p in shares], [p["probability"].to_numpy() for p in shares]
    parts = semantic_and_mapping(test, ctx.behavior)
    mass = {name: part["mass"].mean() for name, part in (("plus", plus), ("minus", minus))}
    mass_difference = effect_pp(by_family(pair_differences(test, value="mass")))
    neutral = test.loc[test["condition"] == "neutral", "g"]
    return {
        "mean_plus": plus["g"].mean(),
        "mean_minus": minus["g"].mean(),
        "mean_neutral": neutral.mean() if len(neutral) else None,
        "shift_pp": shift["shift_pp"],
        "ci": [shift["low_pp"], shift["high_pp"]],
        "p": shift["p"],
        "detectable_pp": shift["detectable_pp"],
        "d_z": shift["d_z"],
        "parts": parts,
        "wasserstein": stats.wasserstein_distance(*scores, *probabilities),
        "controls": {
            name: {
                "shift_pp": row["shift_pp"], "ci": [row["low_pp"], row["high_pp"]], "size_pp": row["size_pp"],
                "detectable_pp": row["detectable_pp"], "excess_pp": row["excess_pp"],
                "excess_ci": [row["excess_low_pp"], row["excess_high_pp"]],
                "excess_detectable_pp": row["excess_detectable_pp"], "gate": name in gating,
            }
            for name, row in by.drop(index="poles").iterrows()
        },
        "mass": shift["mass"],
        "mass_plus": mass["plus"],
        "mass_minus": mass["minus"],
        "mass_difference": {name: mass_difference[name] for name in ("pp", "ci")},
        "edges": {
            name: {edge: part[f"p_{edge}"].mean() for edge in ("zero", "half", "all")}
            for name, part in (("plus", plus), ("minus", minus))
        },
        "families": int(shift["families"]),
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
