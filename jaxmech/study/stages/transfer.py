"""Stage transfer: the frozen direction in other tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from jaxmech.answers.score import before_last
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.statistics import holm, mean_effect, p_from_normal_null
from jaxmech.interventions import steering
from jaxmech.interventions.controls import random_directions
from jaxmech.io.progress import progress
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome


def run(ctx: Context) -> Outcome:
    """Slope of each task's score over the coefficient, its interval over families, and a random-direction null."""
    c, tasks = ctx.config, ctx.tasks
    if not tasks:
        return Outcome({})
    alphas = np.asarray(c.transfer.alphas)
    vector = np.asarray(ctx.folder.arrays("steering")["direction"])
    noise = np.asarray(
        random_directions(vector, key=ctx.key("transfer.directions"), count=c.transfer.random_directions)
    )
    vectors = np.concatenate([alphas[:, None, None] * vector, noise]).astype(np.float32)
    table, scores, mass = played(ctx, vectors)
    S = len(alphas)
    rows, curves = [], []
    for name, task in tasks.items():
        own = (table["task"] == name).to_numpy()
        g, m = scores[:, own], mass[:S, own]
        effect = mean_effect(np.polyfit(alphas, g[:S], 1)[0])
        # Against random directions: the change from no steering to coefficient 1, the same for all.
        change = float((g[:S][alphas == 1] - g[:S][alphas == 0]).mean())
        null = (g[S:] - g[:S][alphas == 0]).mean(1)
        rows.append(
            dict(
                task=name, label=task.label, expected_sign=task.expected_sign, home=task.home, families=int(own.sum()),
                baseline=float(g[:S][alphas == 0].mean()), slope_pp=100 * effect.value, low_pp=100 * effect.low,
                high_pp=100 * effect.high, p=effect.p, p_random=p_from_normal_null(change, null),
                null_sd_pp=100 * float(null.std()), mass=float(m[alphas == 0].mean()), human=task.human,
            )
        )  # fmt: skip
        curves.append(pd.DataFrame(dict(task=name, alpha=alphas, score=g[:S].mean(1), mass=m.mean(1))))
    summary = pd.DataFrame(rows)
    summary["p_holm"] = holm(summary["p_random"].to_numpy())
    results = {
        row["task"]: {
            "slope": row["slope_pp"], "ci": [row["low_pp"], row["high_pp"]],
            **{
                name: row[name]
                for name in ("label", "p_random", "p_holm", "baseline", "mass", "expected_sign", "home", "families")
            },
        }
        for row in summary.to_dict("records")
    }  # fmt: skip
    prompts = table[["task", "family", "prefix", "query"]]
    return Outcome(results, {"tasks": summary, "curves": pd.concat(curves, ignore_index=True), "prompts": prompts})


def played(ctx: Context, vectors: np.ndarray) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """All tasks' prompts, one per family, with expected score and mass [S,B] for vectors [S,L,D]."""
    tasks = [task.prompts.assign(task=name) for name, task in ctx.tasks.items()]
    table = pd.concat(tasks, ignore_index=True)
    prompts, values = take(encode_table(ctx.lm, table), np.arange(len(table)))
    prompts = before_last(ctx.lm.config, ctx.lm.params, prompts)
    with progress("transfer", len(vectors), unit="points") as advance:
        choices = steering.steer(
            ctx.lm.config,
            ctx.lm.params,
            prompts,
            vectors,
            site=ctx.saes.config.site_out,
            chunk=effects.CHUNK,
            advance=advance,
        )
    return table, effects.expected(choices, values), np.asarray(choices.mass)
