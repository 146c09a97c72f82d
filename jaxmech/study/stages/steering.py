"""Stage steering: do the features, set to a dose, move the outcome more than others, at what cost, and only that?"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.answers.score import Choices
from jaxmech.answers.trie import answer_ids
from jaxmech.behavior.arithmetic import one_digit_sums
from jaxmech.behavior.behavior import poles
from jaxmech.behavior.scoring import with_outcomes
from jaxmech.contrast.statistics import Effect, detectable, family_means, mean_effect, p_from_null
from jaxmech.interventions import controls, edits, steering
from jaxmech.interventions.sweep import in_chunks
from jaxmech.io.arguments import rng_of
from jaxmech.io.progress import progress
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import encode_prompts
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.doses import antisymmetric, dose, gap_of, mean_norms, written_at_one
from jaxmech.study.effects import Side, expected
from jaxmech.study.folder import Outcome
from jaxmech.study.ways import COLUMNS as WAYS_COLUMNS
from jaxmech.study.ways import chosen_window, compare_ways

EQUIVALENCE = 1 / 3
"""Of the effect at coefficient 1: what may not move has to stay within it, by its 90 % interval."""

KL_ROWS = 2
"""Rows of text on which directions are brought to the same KL divergence."""


def run(ctx: Context) -> Outcome:
    """Dose-response on neutral prompts, usable range, comparators of the same norm and KL, and what must not move."""
    alphas = np.asarray(ctx.config.steering.alphas)
    # Where a behaviour has no neutral prompts, those of both poles are steered.
    conditions = ("neutral",) if len(ctx.rows("neutral")) else poles()
    steered = effects.side(ctx, *conditions)
    doses = dose(ctx, steered, alphas, what="steering")
    table = dose_table(steered, alphas, doses)
    cost = costs(ctx, alphas)
    lost_mass = (1 - table["mass"] / table.loc[table["alpha"] == 0, "mass"].iloc[0]) / 0.05
    cost["cost"] = np.maximum(cost["cost"], lost_mass)
    low, high = steering.usable_range(alphas, cost["cost"].to_numpy())
    cost["usable"] = (alphas >= low) & (alphas <= high)
    inside = cost["usable"].to_numpy()
    slope = mean_effect(family_slopes(alphas, doses, steered, inside if inside.sum() >= 2 else np.abs(alphas) <= 1))
    g = dict(zip(alphas, expected(doses, steered.values), strict=True))
    halves = effects.by_family((g[1.0] - g[-1.0]) / 2, steered)
    at_one = mean_effect(halves)
    written = written_at_one(ctx, steered)
    compared, comparison = comparators(ctx, steered, at_one.value, written, float(cost.loc[alphas == 1, "kl"].iloc[0]))
    compared_ways = ctx.config.steering.ways and not effects.standing_in(ctx)
    ways = compare_ways(ctx, conditions) if compared_ways else pd.DataFrame(columns=WAYS_COLUMNS)
    results: dict[Any, Any] = {
        "steered": list(conditions),
        "at_one_pp": 100 * at_one.value,
        "at_one_ci": [100 * at_one.low, 100 * at_one.high],
        "at_one_p": at_one.p,
        "detectable_pp": 100 * detectable(halves),
        "slope_pp": 100 * slope.value,
        "slope_ci": [100 * slope.low, 100 * slope.high],
        "usable_range": [low, high],
        "effect_in_range_pp": 100 * float(table["g"][inside].iloc[-1] - table["g"][inside].iloc[0]),
        "dose_response": steering.dose_response(alphas[inside], table["g"][inside].to_numpy())
        if inside.sum() >= 5
        else None,
        **comparison,
        "specificity": specificity(ctx, at_one),
        "families": len(set(steered.families)),
        "norm_share": norm_share(steered, written[0]),
        "window": chosen_window(ways),
    }
    return Outcome(
        results, {"dose": table.merge(cost, on="alpha"), "comparators": compared, "ways": ways},
        {"direction": np.asarray(written[0].mean(1))},
    )  # fmt: skip


def dose_table(side: Side, alphas: np.ndarray, doses: Choices) -> pd.DataFrame:
    """A row per coefficient: mean score with its interval over families, mass, P(0), P(half), P(all)."""
    rows = []
    for alpha, logprobs in zip(alphas, doses.logprobs, strict=True):
        out = with_outcomes(pd.DataFrame(index=side.rows), logprobs, np.asarray(side.values))
        effect = mean_effect(effects.by_family(out["g"].to_numpy(), side))
        rows.append(
            dict(alpha=alpha, g=effect.value, g_low=effect.low, g_high=effect.high)
            | out[["mass", "p_zero", "p_half", "p_all"]].mean().to_dict()
        )
    return pd.DataFrame(rows)


def family_slopes(alphas: np.ndarray, doses: Choices, side: Side, inside: np.ndarray) -> np.ndarray:
    """Least-squares slope of the score per unit of alpha, by family, [K]."""
    return effects.by_family(np.polyfit(alphas[inside], expected(doses, side.values)[inside], 1)[0], side)


def costs(ctx: Context, alphas: np.ndarray) -> pd.DataFrame:
    """Perplexity and KL on text and accuracy on sums, the features set to the same doses at every token.

    Column cost: the largest in units of its limit: perplexity + 10 %, KL 0.1 nat per token, accuracy 2 points either
    way, since a direction that improves arithmetic is not specific either.
    """
    c, lm = ctx.config, ctx.lm
    arrays = ctx.folder.arrays("text")
    tokens, mask = arrays["heldout_tokens"][: c.fidelity.rows], arrays["heldout_mask"][: c.fidelity.rows].astype(bool)
    points, size = alphas.astype(np.float32), 3
    with progress("cost on text", len(alphas), unit="points") as advance:
        build = dose_everywhere(ctx, tokens, mask)
        cost = partial(steering.language_cost, lm.config, lm.params, tokens, build, mask=mask)
        nll, kl = in_chunks(cost, points, size=size, advance=advance)
    questions, answers = arithmetic(lm, c.steering.sums, key=ctx.key("steering.sums"))
    with progress("cost on arithmetic", len(alphas), unit="points") as advance:
        build = dose_everywhere(ctx, *questions)
        likeliest = partial(steering.next_token, lm.config, lm.params, questions[0], build, mask=questions[1])
        predicted = in_chunks(likeliest, points, size=size, advance=advance)
    accuracy = (predicted == answers).mean(1)
    zero = int(np.flatnonzero(alphas == 0)[0])
    perplexity = np.exp(nll)
    off = np.abs(accuracy - accuracy[zero])
    cost = np.maximum.reduce([(perplexity / perplexity[zero] - 1) / 0.1, kl / 0.1, (off - 1e-9) / 0.02])
    return pd.DataFrame(dict(alpha=alphas, perplexity=perplexity, kl=kl, accuracy=accuracy, cost=cost))


def dose_everywhere(ctx: Context, tokens: Any, mask: Any) -> steering.SetToDose:
    """The doses at every token of a text."""
    selection, gap = gap_of(ctx, ctx.selected)
    values = steering.values_in_text(
        ctx.lm.config, ctx.lm.params, tokens, mask=mask, saes=ctx.saes, selection=selection
    )
    return steering.SetToDose(ctx.saes, selection, jnp.asarray(gap), values, edits.everywhere(ctx.lm.config.n_layers))


def arithmetic(lm: LanguageModel, items: int, *, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], np.ndarray]:
    """Different one-digit sums after three worked ones, and the first token of each right answer, [items]."""
    sums = one_digit_sums(items)
    pairs = rng_of(key).permutation(sums)[:items]
    texts = [f"2+3=5\n4+1=5\n1+7=8\n{a}+{b}=" for a, b in pairs]
    answers = [answer_ids(lm.tokenizer, text, str(a + b))[0] for text, (a, b) in zip(texts, pairs, strict=True)]
    return encode_prompts(lm, texts), np.asarray(answers)


def comparators(
    ctx: Context, side: Side, observed: float, written: tuple[jax.Array, jax.Array], kl: float
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Other directions with the norm that coefficients 1 and -1 write at every layer, and the same random ones brought
    to the same KL divergence on text.

    Effects are antisymmetric, (g(+v) - g(-v)) / 2: what merely degrades the model cancels. P-values are two-sided.

    Returns:
      A row per direction, and the results.
    """
    norms, direction = mean_norms(written), np.asarray(written[0].mean(1))
    named = named_directions(ctx, direction)
    key, count = ctx.key("steering.directions"), effects.random_ones(ctx, ctx.config.steering.random_directions)
    noise = np.asarray(controls.random_directions(direction, key=key, count=count))
    null = {"matched random features": matched_directions(ctx), "random directions": noise}
    vectors = np.concatenate([np.stack([v for *_, v in named]), *null.values()])
    change = antisymmetric(ctx, side, vectors, norms, what="comparators").mean(1)
    names = [(n, k) for n, k, _ in named] + [(name, "null") for name, drawn in null.items() for _ in range(len(drawn))]
    rows = [dict(name="selected features", kind="effect", slope_pp=100 * observed)]
    rows += [dict(name=n, kind=k, slope_pp=100 * c) for (n, k), c in zip(names, change, strict=True)]
    scale = same_kl(ctx, noise, norms[0], kl)[:, None]
    at_kl = antisymmetric(ctx, side, noise, tuple(scale * norm for norm in norms), what="at the same KL").mean(1)
    rows += [dict(name="random directions, same KL", kind="null", slope_pp=100 * c) for c in at_kl]
    rows.append(dict(name="prompting", kind="comparator", slope_pp=100 * prompted(ctx)))
    frame = pd.DataFrame(rows)
    drawn = {name: np.abs(part["slope_pp"].to_numpy()) for name, part in frame[frame["kind"] == "null"].groupby("name")}
    size = 100 * abs(observed)
    reached = controls.with_norm(null["matched random features"], norms[0])  # less where a set does not differ at all
    ratio = float(np.median(jnp.linalg.norm(reached, axis=(1, 2)) / jnp.linalg.norm(norms[0])))
    enough = ratio >= effects.LEAST_RATIO
    return frame, {
        "slope_at_one_pp": 100 * observed,
        "random_ratio": ratio,
        "random_sets": len(null["matched random features"]),
        "random_directions": count,
        "p_random": p_from_null(size, drawn["matched random features"]) if enough else float("nan"),
        "p_random_directions": p_from_null(size, drawn["random directions"]),
        "p_random_kl": p_from_null(size, drawn["random directions, same KL"]),
        "comparators_pp": frame[frame["kind"] == "comparator"].set_index("name")["slope_pp"].to_dict(),
    }


def named_directions(ctx: Context, direction: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """(name, kind, [L,D]) of the directions that the selection is set beside. direction: what coefficient 1 writes."""
    mean_difference = ctx.folder.arrays("contrast")["mean_difference"]
    named = [("what it writes, added as a vector", direction), ("mean difference", mean_difference)]
    alone = ctx.folder.table("patching", "singles").set_index(["layer", "feature"])["change_pp"]
    weighted = ctx.selected.join(alone, on=["layer", "feature"], how="inner")
    named.append(("weighted by effect alone", summed(ctx, weighted.assign(dz=weighted["dz"] * weighted["change_pp"]))))
    classes = ctx.folder.table("dual_process", "classes")
    for name in ("s1", "s2"):
        part = classes[classes["class"] == name]
        if len(part):
            chosen = ctx.selected.merge(part[["layer", "feature"]], on=["layer", "feature"])
            named.append((f"{name.upper()} features only", summed(ctx, chosen)))
    for name in ctx.behavior.gating("test"):
        plus, minus = (effects.side(ctx, condition).resid for condition in poles(name))
        other = np.asarray((plus - minus).mean(1))
        named.append((f"{name} direction", other))
        along = np.asarray(controls.with_norm(other, 1.0))
        named.append((f"without its {name} part", direction - (direction * along).sum(-1, keepdims=True) * along))
    return [(name, "comparator", vector) for name, vector in named]


def summed(ctx: Context, features: pd.DataFrame) -> np.ndarray:
    """sum_j mean(dz_j) D_j of features, [L,D]."""
    selection, gap = gap_of(ctx, features)
    return np.asarray(steering.feature_direction(ctx.saes, selection, jnp.asarray(gap)))


def matched_directions(ctx: Context) -> np.ndarray:
    """The directions [S,L,D] of random feature sets matched to the selection."""
    features, saes = ctx.folder.table("contrast", "features"), ctx.saes
    layers, F = saes.config.layers, saes.config.d_sae
    sets = controls.matched_sets(
        effects.pairs_of(ctx.selected),
        fires=features[["fires_plus", "fires_minus"]].max(axis=1).to_numpy().reshape(len(layers), F),
        strength=features["strength"].to_numpy().reshape(len(layers), F),
        layers=layers,
        sets=effects.random_ones(ctx, ctx.config.patching.random_sets),
        key=ctx.key("steering.sets"),
    )
    lookup = features.set_index(["layer", "feature"])
    return np.stack([summed(ctx, lookup.loc[chosen].reset_index()) for chosen in sets])


def same_kl(ctx: Context, directions: np.ndarray, norm: jax.Array, kl: float) -> np.ndarray:
    """What brings each direction [S,L,D] of a norm [L] to a KL divergence on text, [S]: KL grows with the square."""
    lm, arrays = ctx.lm, ctx.folder.arrays("text")
    tokens, mask = arrays["heldout_tokens"][:KL_ROWS], arrays["heldout_mask"][:KL_ROWS].astype(bool)
    build = steering.AddVector(edits.everywhere(lm.config.n_layers), ctx.saes.config.site_out)
    with progress("KL of random directions", len(directions), unit="points") as advance:
        cost = partial(steering.language_cost, lm.config, lm.params, tokens, build, mask=mask)
        _, drawn = in_chunks(cost, np.asarray(controls.with_norm(directions, norm)), size=3, advance=advance)
    return np.clip(np.sqrt(max(kl, 0.0) / np.maximum(drawn, 1e-12)), 0.0, 10.0)


def prompted(ctx: Context) -> float:
    """Half the behaviour's own shift: what the words do, from the middle to either pole."""
    plus, minus = (effects.side(ctx, condition) for condition in poles())
    return float((effects.by_family(plus.g, plus).mean() - effects.by_family(minus.g, minus).mean()) / 2)


def norm_share(side: Side, written: jax.Array) -> float:
    """The largest mean norm that coefficient 1 writes at a layer, as a share of the median residual norm there."""
    norm = jnp.linalg.norm(written, axis=-1).mean(1)
    return float((norm / jnp.median(jnp.linalg.norm(side.resid, axis=-1), axis=1)).max())


def specificity(ctx: Context, at_one: Effect) -> dict:
    """Effect of coefficient 1, in percentage points, on the neutral prompts of each control that has some.

    equivalent: whether the 90 % interval lies within a third of the effect on neutral prompts either way.
    """
    margin, out = EQUIVALENCE * abs(at_one.value), dict[str, Any]()
    asked = [name for name in ctx.behavior.controls if len(ctx.rows(f"{name}:neutral"))]
    if not asked:
        return out
    side = effects.side(ctx, *(f"{name}:neutral" for name in asked))
    g = expected(dose(ctx, side, np.array([-1.0, 1.0]), what="specificity"), side.values)
    conditions = ctx.encoded[0].loc[side.rows, "condition"].to_numpy()
    for name in asked:
        own = conditions == f"{name}:neutral"
        halves = family_means((g[1] - g[0])[own] / 2, side.families[own])
        effect, K = mean_effect(halves), len(halves)
        reach = stats.t.ppf(0.95, K - 1) * halves.std(ddof=1) / np.sqrt(K) if K > 1 else float("nan")
        out[name] = {
            "slope_pp": 100 * effect.value, "ci": [100 * effect.low, 100 * effect.high], "families": K,
            "margin_pp": 100 * margin, "ci90": [100 * (effect.value - reach), 100 * (effect.value + reach)],
            "equivalent": bool(abs(effect.value) + reach <= margin), "detectable_pp": 100 * detectable(halves),
        }  # fmt: skip
    return out
