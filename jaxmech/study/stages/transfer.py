"""Stage transfer: the features, set to the same doses, in other tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from jaxmech.behavior.scoring import Encoded, encode_table, take
from jaxmech.contrast.statistics import detectable, holm, mean_effect, p_from_normal_null
from jaxmech.interventions import controls
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.doses import antisymmetric, dose, mean_norms, written_at_one
from jaxmech.study.folder import Outcome

STANCED = ("stance_pp", "stance_low_pp", "stance_high_pp")


def run(ctx: Context) -> Outcome:
    """Effect of coefficient 1 in each task, its interval over families, and random directions of the same norm."""
    tasks = ctx.tasks
    if not tasks:
        return Outcome({})
    alphas = np.asarray(ctx.config.transfer.alphas)
    asked = ask(ctx)
    side, table = played(ctx, *asked, stance=False)
    choices = dose(ctx, side, alphas, what="transfer")
    scores, mass = effects.expected(choices, side.values), np.asarray(choices.mass)
    halves = (scores[alphas == 1][0] - scores[alphas == -1][0]) / 2
    drawn, stanced = random_changes(ctx, side), with_stance(ctx, *asked)
    rows, curves = [], []
    for name, task in tasks.items():
        own = (table["task"] == name).to_numpy()
        effect = mean_effect(halves[own])
        null = drawn[:, own].mean(1)
        rows.append(
            dict(
                task=name, label=task.label, kind=task.kind, expected_sign=task.expected_sign, home=task.home,
                families=int(own.sum()),
                baseline=float(scores[alphas == 0][0, own].mean()), slope_pp=100 * effect.value,
                low_pp=100 * effect.low, high_pp=100 * effect.high, p=effect.p,
                p_random=p_from_normal_null(effect.value, null), null_sd_pp=100 * float(null.std()),
                detectable_pp=100 * detectable(halves[own]), mass=float(mass[alphas == 0][0, own].mean()),
                human=task.human, **stanced.get(name, dict.fromkeys(STANCED)),
            )
        )  # fmt: skip
        curves.append(
            pd.DataFrame(dict(task=name, alpha=alphas, score=scores[:, own].mean(1), mass=mass[:, own].mean(1)))
        )
    summary = pd.DataFrame(rows)
    # Tasks in which giving may serve oneself, or whose sign is open, are no tests of it: they are reported apart.
    tested = (summary["kind"] == "") & (summary["expected_sign"] != 0) & ~summary["home"]
    summary["p_holm"] = holm(summary["p_random"].where(tested).to_numpy(float))
    results: dict[Any, Any] = {
        row["task"]: {
            "slope": row["slope_pp"], "ci": [row["low_pp"], row["high_pp"]],
            **{
                name: row[name]
                for name in (
                    "label", "kind", "p_random", "p_holm", "baseline", "mass", "expected_sign", "home", "families",
                    "detectable_pp", "stance_pp",
                )
            },
            "random_directions": len(drawn),
        }
        for row in summary.to_dict("records")
    }  # fmt: skip
    prompts = table[["task", "family", "prefix", "query"]]
    return Outcome(results, {"tasks": summary, "curves": pd.concat(curves, ignore_index=True), "prompts": prompts})


def ask(ctx: Context) -> tuple[pd.DataFrame, Encoded]:
    """All tasks' prompts, without and with a stance in their worked examples: encoded at once, they share programs."""
    tables = [
        prompts.assign(task=name, stance=stance)
        for stance in (False, True)
        for name, task in ctx.tasks.items()
        if (prompts := task.stance_prompts if stance else task.prompts) is not None
    ]
    table = pd.concat(tables, ignore_index=True)
    return table, encode_table(ctx.lm, table)


def played(ctx: Context, table: pd.DataFrame, encoded: Encoded, *, stance: bool) -> tuple[effects.Side, pd.DataFrame]:
    """The prompts of either kind, one per family, and their table."""
    rows = np.flatnonzero(table["stance"] == stance)
    prompts, values = take(encoded, rows)
    families = np.arange(len(rows))
    return effects.run_side(ctx, families, families, prompts, values), table.iloc[rows]


def with_stance(ctx: Context, table: pd.DataFrame, encoded: Encoded) -> dict[str, dict[str, float]]:
    """The same effect after worked examples that show both poles, for the tasks that have such prompts."""
    if not table["stance"].any():
        return {}
    side, table = played(ctx, table, encoded, stance=True)
    low, high = effects.expected(dose(ctx, side, np.array([-1.0, 1.0]), what="after stance examples"), side.values)
    out = {}
    for name in table["task"].unique():
        effect = mean_effect(((high - low) / 2)[(table["task"] == name).to_numpy()])
        out[name] = dict(zip(STANCED, (100 * effect.value, 100 * effect.low, 100 * effect.high), strict=True))
    return out


def random_changes(ctx: Context, side: effects.Side) -> np.ndarray:
    """(g(+v) - g(-v)) / 2 along random directions, [S,B], with the norm that coefficients 1 and -1 write."""
    written, count = written_at_one(ctx, side), effects.random_ones(ctx, ctx.config.transfer.random_directions)
    like = written[0].mean(1)
    noise = np.asarray(controls.random_directions(like, key=ctx.key("transfer.directions"), count=count))
    return antisymmetric(ctx, side, noise, mean_norms(written), what="random directions")
