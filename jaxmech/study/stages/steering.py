"""Stage steering: does the feature direction move the outcome by dose, in a usable range, more than others?"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.answers.score import Choices, before_last
from jaxmech.answers.trie import answer_ids
from jaxmech.behavior.arithmetic import one_digit_sums
from jaxmech.behavior.behavior import poles
from jaxmech.behavior.scoring import take, with_outcomes
from jaxmech.contrast.statistics import family_means, mean_effect, p_from_normal_null, p_from_null
from jaxmech.interventions import steering
from jaxmech.interventions.controls import matched_sets, random_directions
from jaxmech.interventions.sweep import in_chunks
from jaxmech.io.arguments import Array, rng_of
from jaxmech.io.progress import progress
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import encode_prompts
from jaxmech.sae.collect import run_decision
from jaxmech.study.context import Context
from jaxmech.study.effects import CHUNK, expected, pairs_of
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Dose-response on neutral prompts, usable range, comparators at matched norm, and what must not move."""
    alphas = np.asarray(ctx.config.steering.alphas)
    vector = direction(ctx)
    # Where a behaviour has no neutral prompts, those of both poles are steered.
    conditions = ("neutral",) if len(ctx.rows("neutral")) else poles()
    neutral = Steered(ctx, *conditions)
    doses = neutral.sweep(alphas[:, None, None] * np.asarray(vector), what="steering")
    dose = dose_table(neutral, alphas, doses)
    cost = costs(ctx, vector, alphas)
    baseline = dose.loc[dose["alpha"] == 0, "mass"].iloc[0]
    usable = (dose["mass"].to_numpy() >= 0.95 * baseline) & cost["usable"].to_numpy()
    usable |= alphas == 0
    low, high = steering.usable_range(alphas, usable)
    inside = (alphas >= low) & (alphas <= high)
    effects = comparators(ctx, neutral, vector)
    slopes = family_slopes(alphas, doses, neutral, inside if inside.sum() >= 2 else np.abs(alphas) <= 1)
    slope = mean_effect(slopes)
    specific = specificity(ctx, vector)
    results: dict[Any, Any] = {
        "steered": list(conditions),
        "slope_pp": 100 * slope.value,
        "slope_ci": [100 * slope.low, 100 * slope.high],
        "usable_range": [low, high],
        "effect_in_range_pp": 100 * float(dose["g"][inside].iloc[-1] - dose["g"][inside].iloc[0]),
        "dose_response": {k: v for k, v in steering.dose_response(alphas[inside], dose["g"][inside].to_numpy()).items()}
        if inside.sum() >= 3
        else None,
        **effects.attrs,
        "specificity": specific,
        "families": len(set(ctx.families(neutral.rows))),
        "norm_share": norm_share(ctx, vector, neutral),
    }
    tables = {"dose": dose.merge(cost, on="alpha"), "comparators": effects.reset_index(drop=True)}
    tables["comparators"].attrs = {}
    return Outcome(results, tables, {"direction": np.asarray(vector)})


class Steered:
    """Prompts of some conditions of the test families, one per family, to be steered at the decision token."""

    def __init__(self, ctx: Context, *conditions: str):
        self.ctx, self.rows = ctx, np.concatenate([ctx.rows(name, per_family=1) for name in conditions])
        if not len(self.rows):
            raise ValueError(f"steering: the test families have no prompt of {', '.join(conditions)}")
        prompts, self.values = take(ctx.encoded[1], self.rows)
        self.prompts = before_last(ctx.lm.config, ctx.lm.params, prompts)

    def sweep(self, vectors: Array, *, what: str, chunk: int = CHUNK) -> Choices:
        """Choices, logprobs [S,B,N], for vectors [S,L,D]."""
        lm, site = self.ctx.lm, self.ctx.saes.config.site_out
        with progress(what, len(vectors), unit="points") as advance:
            return steering.steer(
                lm.config,
                lm.params,
                self.prompts,
                np.asarray(vectors, np.float32),
                site=site,
                chunk=chunk,
                advance=advance,
            )

    def expected(self, choices: Choices) -> np.ndarray:
        return expected(choices, self.values)

    def by_family(self, values: np.ndarray) -> np.ndarray:
        """Means within families of values [B]: where both poles are steered, a family has two prompts."""
        return family_means(values, self.ctx.families(self.rows))


def direction(ctx: Context, features: pd.DataFrame | None = None) -> jax.Array:
    """v_l = sum_j mean(dz_j) D_j of the selected features (or some of them), [L,D], from the selection families."""
    features = ctx.selected if features is None else features
    selection = ctx.selection(features)
    return steering.feature_direction(ctx.saes, selection, jnp.asarray(ctx.per_feature(selection, features, "dz")))


def dose_table(prompts: Steered, alphas: np.ndarray, doses: Choices) -> pd.DataFrame:
    """A row per coefficient: mean score with its interval over families, mass, P(0), P(half), P(all)."""
    rows = []
    for alpha, logprobs in zip(alphas, doses.logprobs, strict=True):
        out = with_outcomes(pd.DataFrame(index=prompts.rows), logprobs, np.asarray(prompts.values))
        effect = mean_effect(prompts.by_family(out["g"].to_numpy()))
        rows.append(
            dict(alpha=alpha, g=effect.value, g_low=effect.low, g_high=effect.high)
            | out[["mass", "p_zero", "p_half", "p_all"]].mean().to_dict()
        )
    return pd.DataFrame(rows)


def family_slopes(alphas: np.ndarray, doses: Choices, prompts: Steered, inside: np.ndarray) -> np.ndarray:
    """Least-squares slope of the score per unit of alpha, by family, [B]."""
    return prompts.by_family(np.polyfit(alphas[inside], prompts.expected(doses)[inside], 1)[0])


def costs(ctx: Context, vector: jax.Array, alphas: np.ndarray) -> pd.DataFrame:
    """Perplexity and KL on neutral text and arithmetic accuracy, steered at every token; whether all stay in bounds.

    Bounds: perplexity + 10 %, KL 0.1 nat per token, accuracy - 2 points.
    """
    c, lm = ctx.config, ctx.lm
    arrays = ctx.folder.arrays("text")
    tokens, mask = arrays["heldout_tokens"][: c.fidelity.rows], arrays["heldout_mask"][: c.fidelity.rows].astype(bool)
    vectors = (alphas[:, None, None] * np.asarray(vector)).astype(np.float32)
    model, size = (lm.config, lm.params), 3
    with progress("cost on text", len(alphas), unit="points") as advance:
        cost = partial(steering.language_cost, *model, tokens, mask=mask)
        nll, kl = in_chunks(cost, vectors, size=size, advance=advance)
    questions, answers = arithmetic(lm, c.steering.sums, key=ctx.key("steering.sums"))
    with progress("cost on arithmetic", len(alphas), unit="points") as advance:
        likeliest = partial(steering.next_token, *model, questions[0], mask=questions[1])
        predicted = in_chunks(likeliest, vectors, size=size, advance=advance)
    accuracy = (predicted == answers).mean(1)
    zero = int(np.flatnonzero(alphas == 0)[0])
    perplexity = np.exp(nll)
    usable = (perplexity <= 1.1 * perplexity[zero]) & (kl <= 0.1) & (accuracy >= accuracy[zero] - 0.02 - 1e-9)
    return pd.DataFrame(dict(alpha=alphas, perplexity=perplexity, kl=kl, accuracy=accuracy, usable=usable))


def arithmetic(lm: LanguageModel, items: int, *, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], np.ndarray]:
    """Different one-digit sums after three worked ones, and the first token of each right answer, [items]."""
    sums = one_digit_sums(items)
    pairs = rng_of(key).permutation(sums)[:items]
    texts = [f"2+3=5\n4+1=5\n1+7=8\n{a}+{b}=" for a, b in pairs]
    answers = [answer_ids(lm.tokenizer, text, str(a + b))[0] for text, (a, b) in zip(texts, pairs, strict=True)]
    return encode_prompts(lm, texts), np.asarray(answers)


def comparators(ctx: Context, neutral: Steered, vector: jax.Array) -> pd.DataFrame:
    """Slopes of other directions at the same norm per layer: mean difference, random ones, random feature sets, S1, S2.

    Each is steered by one unit of coefficient and compared with no steering; attrs holds the p-values.
    """
    c, saes = ctx.config, ctx.saes
    features = ctx.folder.table("contrast", "features")
    layers, F = saes.config.layers, saes.config.d_sae
    fires = features[["fires_plus", "fires_minus"]].max(axis=1).to_numpy().reshape(len(layers), F)
    strength = features["strength"].to_numpy().reshape(len(layers), F)
    sets = matched_sets(
        pairs_of(ctx.selected),
        fires=fires,
        strength=strength,
        layers=layers,
        sets=c.patching.random_sets,
        key=ctx.key("steering.sets"),
    )
    lookup = features.set_index(["layer", "feature"])
    named = [("selected features", "effect", vector)]
    mean_difference = jnp.asarray(ctx.folder.arrays("contrast")["mean_difference"])
    named.append(("mean difference", "comparator", match_norm(mean_difference, vector)))
    classes = ctx.folder.table("dual_process", "classes")
    for name in ("s1", "s2"):
        part = classes[classes["class"] == name]
        if len(part):
            part_vector = direction(ctx, ctx.selected.merge(part[["layer", "feature"]], on=["layer", "feature"]))
            named.append((f"{name.upper()} features only", "comparator", match_total_norm(part_vector, vector)))
    for chosen in sets:
        frame = lookup.loc[chosen].reset_index()
        named.append(("matched random features", "null", match_norm(direction(ctx, frame), vector)))
    for noise in random_directions(vector, key=ctx.key("steering.directions"), count=c.steering.random_directions):
        named.append(("random directions", "null", noise))
    vectors = np.stack([np.zeros_like(vector), *(np.asarray(v) for *_, v in named)])
    g = neutral.expected(neutral.sweep(vectors, what="comparators"))
    slopes = g[1:] - g[0]
    frame = pd.DataFrame(
        [dict(name=n, kind=k, slope_pp=100 * s.mean()) for (n, k, _), s in zip(named, slopes, strict=True)]
    )
    observed: Any = frame.loc[0, "slope_pp"]
    null = {name: part["slope_pp"].to_numpy() for name, part in frame[frame["kind"] == "null"].groupby("name")}
    frame.attrs = {
        "slope_at_one_pp": observed,
        "p_random": p_from_null(observed, null["matched random features"]),
        "p_random_directions": p_from_normal_null(observed, null["random directions"]),
        "comparators_pp": frame[frame["kind"] == "comparator"].set_index("name")["slope_pp"].to_dict(),
    }
    return frame


def match_norm(v: jax.Array, like: jax.Array) -> jax.Array:
    """v with the norm of `like` at every layer; zero where either is zero."""
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return jnp.where(norm > 0, v / jnp.maximum(norm, 1e-12), 0.0) * jnp.linalg.norm(like, axis=-1, keepdims=True)


def match_total_norm(v: jax.Array, like: jax.Array) -> jax.Array:
    """v scaled as a whole to the norm of `like`: for sets that live at other layers."""
    return v * jnp.linalg.norm(like) / jnp.maximum(jnp.linalg.norm(v), 1e-12)


def norm_share(ctx: Context, vector: jax.Array, neutral: Steered) -> float:
    """The largest norm a layer gets at coefficient 1, as a share of the median residual norm there."""
    resid = run_decision(ctx.lm.config, ctx.lm.params, neutral.prompts, site=ctx.saes.config.site).resid
    return float((jnp.linalg.norm(vector, axis=-1) / jnp.median(jnp.linalg.norm(resid, axis=-1), axis=1)).max())


def specificity(ctx: Context, vector: jax.Array) -> dict:
    """Slope of the score, in percentage points, on the neutral prompts of each control that has some."""
    conditions = [f"{name}:neutral" for name in ctx.behavior.controls if len(ctx.rows(f"{name}:neutral"))]
    if not conditions:
        return {}
    prompts = Steered(ctx, *conditions)
    g = prompts.expected(
        prompts.sweep(np.stack([-np.asarray(vector), np.asarray(vector)]), what="specificity", chunk=2)
    )
    slopes, condition = (g[1] - g[0]) / 2, ctx.encoded[0].loc[prompts.rows, "condition"].to_numpy()
    out = {}
    for name in conditions:
        effect = mean_effect(slopes[condition == name])
        out[name.partition(":")[0]] = {
            "slope_pp": 100 * effect.value, "ci": [100 * effect.low, 100 * effect.high],
            "families": int((condition == name).sum()),
        }  # fmt: skip
    return out
