"""Stage games: the frozen direction in other social-preference games."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd

from jaxmech.answers.score import before_last
from jaxmech.behavior.altruism.games import GAMES, game_prompts
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.statistics import holm, mean_effect, p_from_normal_null
from jaxmech.interventions import steering as st
from jaxmech.interventions.controls import random_directions
from jaxmech.io.progress import progress
from jaxmech.study import effects as ef
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Slope of each game's score over the coefficient, its interval over families, and a random-direction null."""
    c, alphas = ctx.config, np.asarray(ctx.config.game_alphas)
    vector = np.asarray(ctx.folder.arrays("steering")["direction"])
    noise = np.asarray(random_directions(jax.random.key(c.seed + 3), vector, c.game_directions))
    vectors = np.concatenate([alphas[:, None, None] * vector, noise]).astype(np.float32)
    table, scores, mass = play(ctx, vectors)
    S = len(alphas)
    rows, curves = [], []
    for name, game in GAMES.items():
        here = (table["game"] == name).to_numpy()
        g, m = scores[:, here], mass[:S, here]
        effect = mean_effect(np.polyfit(alphas, g[:S], 1)[0], seed=c.seed)
        # Against random directions: the change from no steering to coefficient 1, the same for all.
        change = float((g[:S][alphas == 1] - g[:S][alphas == 0]).mean())
        null = (g[S:] - g[:S][alphas == 0]).mean(1)
        rows.append(
            dict(
                game=name, expected_sign=game.expected_sign, families=int(here.sum()),
                baseline=float(g[:S][alphas == 0].mean()), slope_pp=100 * effect.value, low_pp=100 * effect.low,
                high_pp=100 * effect.high, p=effect.p, p_random=p_from_normal_null(change, null),
                null_sd_pp=100 * float(null.std()), mass=float(m[alphas == 0].mean()), people=game.people,
            )
        )  # fmt: skip
        curves.append(pd.DataFrame(dict(game=name, alpha=alphas, score=g[:S].mean(1), mass=m.mean(1))))
    summary = pd.DataFrame(rows)
    summary["p_holm"] = holm(summary["p_random"].to_numpy())
    results = {
        row["game"]: {
            "slope": row["slope_pp"], "ci": [row["low_pp"], row["high_pp"]],
            **{k: row[k] for k in ("p_random", "p_holm", "baseline", "mass", "expected_sign", "families")},
        }
        for row in summary.to_dict("records")
    }  # fmt: skip
    prompts = table[["game", "family", "prefix", "query"]]
    return Outcome(results, {"games": summary, "curves": pd.concat(curves, ignore_index=True), "prompts": prompts})


def play(ctx: Context, vectors: np.ndarray) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """All games' neutral prompts, one a family, with expected score and mass [S,B] for vectors [S,L,D]."""
    c = ctx.config
    parts = [
        game_prompts(game, families=c.game_families, seed=c.seed, tokenizer=ctx.lm.tokenizer).assign(game=name)
        for name, game in GAMES.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    prompts, values = take(encode_table(ctx.lm, table), np.arange(len(table)))
    prompts = before_last(ctx.lm.config, ctx.lm.params, prompts)
    with progress("games", len(vectors), unit="points") as advance:
        logprobs = st.steer(
            ctx.lm.config,
            ctx.lm.params,
            prompts,
            vectors,
            site=ctx.saes.config.site_out,
            chunk=ef.CHUNK,
            advance=advance,
        )
    return table, ef.expected(logprobs, values), np.exp(np.logaddexp.reduce(logprobs, axis=-1))
