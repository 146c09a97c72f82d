"""Where there is nothing to find, the study finds nothing: each of its tests on many draws without an effect.

    python scripts/checks/check_nulls.py seed=1                # the organism; some minutes
    python scripts/checks/check_nulls.py --config quickstart   # any study

Labels swapped in a random half of the families: the rule selects something in at most 5 % of the draws, and so do word
pairs that mean nothing, dealt by family, pass the behaviour's gate. Random vectors in place of the selection's
direction: p is uniform, in steering and in each game. Intervals of simulated families cover 95 %. An organism whose
features are all hidden in the dictionary's error: patching the error alone brings back at least 95 % of the gap.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import stats

from jaxmech.behavior.behavior import poles
from jaxmech.contrast.flips import sign_flips
from jaxmech.contrast.statistics import mean_effect, p_from_normal_null, p_from_null, ratio_of_sums
from jaxmech.interventions import controls
from jaxmech.io.progress import progress
from jaxmech.study import claims, effects
from jaxmech.study.config import StudyConfig, load_config
from jaxmech.study.context import Context
from jaxmech.study.run import run_study
from jaxmech.study.stages import behavior, contrast, steering, transfer

LEVEL, COVERED, SLACK = 0.05, 0.95, 0.015
"""The share of draws that may find something; of intervals that hold the truth, and how far off that may be."""

LEAST_ERROR = 0.95
"""Of the gap, which the error alone has to bring back where every feature is hidden in it."""

GROUP = 40
"""Random vectors of which each is compared with the others."""


class Row(NamedTuple):
    """One null: what must hold, what was found, and whether it does."""

    null: str
    must: str
    found: str
    holds: bool


def at_most(null: str, found: list[bool], what: str) -> Row:
    share = sum(found) / len(found)
    return Row(null, f"{what} in at most {LEVEL:.0%}", f"{sum(found)} of {len(found)}", share <= LEVEL)


def swapped(table: pd.DataFrame, families: np.ndarray, names: list[str | None]) -> pd.DataFrame:
    """The table with the poles' labels swapped in some families, those of the behaviour (None) or of controls."""
    other = {a: b for name in names for a, b in (poles(name), poles(name)[::-1])}
    turned = table["family"].isin(families) & table["condition"].isin(list(other))
    return table.assign(condition=table["condition"].map(other).where(turned, table["condition"]))


def selected_by_chance(ctx: Context, runs: int, rng: np.random.Generator) -> list[bool]:
    """Whether the rule selects anything, with labels swapped in half of the families, [runs]."""
    asked, names = ctx.config.selection, contrast.controls(ctx.behavior)
    table = ctx.prompts("selection", *poles(), *(pole for name in names for pole in poles(name)))
    turning: list[str | None] = [None, *(name for name in names if ctx.behavior.controls[name].flips)]
    families = table["family"].unique()
    signs = sign_flips(len(families), key=ctx.key("signs"), R=asked.permutations)
    splits = dict(splits=asked.half_splits, key=ctx.key("splits"))
    out, density = [], ctx.folder.arrays("fidelity")["density"]
    with progress("labels swapped", runs, unit="draws") as advance:
        for _ in range(runs):
            half = rng.choice(families, len(families) // 2, replace=False)
            compared = contrast.find_compared(ctx, swapped(table, half, turning))
            read, _, _ = contrast.read_positions(ctx, compared, ctx.saes, density)
            out.append(bool(contrast.judge(read[0], ctx.config.rule, signs, **splits)[2].chosen.any()))
            advance(1)
    return out


def gates_passed(ctx: Context, runs: int, rng: np.random.Generator) -> list[bool]:
    """Whether the gate takes pairs of words without a stance for the behaviour, their poles dealt by family, [runs]."""
    scored, config = ctx.folder.table("behavior", "prompts"), dataclasses.asdict(ctx.config)
    neutral, out = poles("placebo"), []
    families = scored.loc[scored["condition"].isin(neutral), "family"].unique()
    renamed = dict(zip(neutral, poles(), strict=True))
    for _ in range(runs):
        half = rng.choice(families, len(families) // 2, replace=False)
        dealt = swapped(scored, half, ["placebo"])
        placebo = dealt[dealt["condition"].isin(neutral)]
        as_poles = placebo.assign(condition=placebo["condition"].map(renamed))
        again = pd.concat([dealt[~dealt["condition"].isin(poles())], as_poles], ignore_index=True)
        r = behavior.effect_pp(behavior.by_family(behavior.pair_differences(again)))
        found = claims.at_least("shift", r | {"value": r["pp"]}, config["gate"]["shift_pp"])
        out.append(found.met is True)
    return out


def uniform(null: str, changes: np.ndarray, p_of: Any, rng: np.random.Generator) -> Row:
    """Each of the changes [S] beside the others of its group. A p that counts is spread within its step, so that its
    law is the uniform one."""
    groups = changes[: len(changes) // GROUP * GROUP].reshape(-1, GROUP)
    step = 1 / GROUP if p_of is p_from_null else 0.0
    p = np.array([p_of(group[0], group[1:]) for group in groups]) - step * rng.random(len(groups))
    kept = stats.kstest(p, "uniform").pvalue
    low, below = (p < LEVEL).sum(), stats.binomtest(int((p < LEVEL).sum()), len(p), LEVEL).pvalue
    found = f"{low} of {len(p)} below {LEVEL}, Kolmogorov-Smirnov p {kept:.2f}"
    return Row(null, "p uniform", found, bool(min(kept, below) > 0.01))


def random_directions(ctx: Context, count: int, rng: np.random.Generator) -> list[Row]:
    """Random vectors of the norm that coefficients 1 and -1 write, on neutral prompts and in every game."""
    side = effects.side(ctx, *(("neutral",) if len(ctx.rows("neutral")) else poles()))
    norms = steering.mean_norms(steering.written_at_one(ctx, side))
    vectors = np.asarray(
        controls.random_directions(jnp.ones((ctx.lm.config.n_layers, ctx.lm.config.d_model)),
                                   key=ctx.key("directions"), count=count * GROUP)
    )  # fmt: skip
    change = steering.antisymmetric(ctx, side, vectors, norms, what="random directions").mean(1)
    rows = [uniform("steering", np.abs(change), p_from_null, rng)]
    played, table = transfer.played(ctx, *transfer.ask(ctx), stance=False)
    change = steering.antisymmetric(ctx, played, vectors, norms, what="random directions in games")
    for name in ctx.tasks:
        rows.append(uniform(name, change[:, (table["task"] == name).to_numpy()].mean(1), p_from_normal_null, rng))
    return rows


def coverage(families: int, runs: int, rng: np.random.Generator) -> list[Row]:
    """How often intervals hold the truth, of means and of shares of a gap, over families of normal effects."""
    moved, gap = 0.3, 1.0
    d = rng.normal(gap, 0.5, (runs, families))
    n = moved * d + rng.normal(0, 0.3, (runs, families))
    means = [mean_effect(row) for row in n]
    shares = [ratio_of_sums(*rows) for rows in zip(n, d, strict=True)]
    rows = []
    for name, found, truth in (("mean", means, moved * gap), ("share of a gap", shares, moved)):
        held = float(np.mean([effect.low <= truth <= effect.high for effect in found]))
        rows.append(Row(f"interval of a {name}, {families} families", f"{COVERED:.0%} ± {100 * SLACK} points",
                        f"{held:.1%} of {runs}", abs(held - COVERED) <= SLACK))  # fmt: skip
    return rows


def error_only(config: StudyConfig) -> Row:
    """The share of the gap that the dictionaries' error brings back alone, with every feature hidden in it."""
    hidden = dataclasses.replace(config, model="organism:hidden=true", run_dir=f"{config.run_dir}/hidden")
    run_study(hidden, until="patching")
    bars = Context(hidden).folder.table("patching", "bars")
    least = bars.loc[bars["name"] == "reconstruction error only", "recovered"].min()
    must = f"error alone brings back {LEAST_ERROR:.0%}"
    return Row("features hidden in the error", must, f"{least:.1%}", bool(least >= LEAST_ERROR))


def nulls(config: StudyConfig, *, runs: int, directions: int, simulations: int) -> list[Row]:
    rng = np.random.default_rng(config.seed)
    for stage in ("behavior", "dual_process"):
        run_study(config, until=stage)
    ctx = Context(config)
    rows = [
        at_most("labels swapped in half of the families", selected_by_chance(ctx, runs, rng), "something selected"),
        at_most("words without a stance, dealt by family", gates_passed(ctx, runs, rng), "a shift"),
        *random_directions(ctx, directions, rng),
    ]
    for families in (6, 8, 16):
        rows += coverage(families, simulations, rng)
    return [*rows, error_only(config)] if config.model.startswith("organism") else rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="organism", help="a study's YAML file, or the name of one")
    parser.add_argument("overrides", nargs="*", help="key=value pairs that replace values of the file")
    parser.add_argument("--runs", type=int, default=40, help="draws of labels")
    parser.add_argument("--directions", type=int, default=100, help=f"groups of {GROUP} random vectors")
    parser.add_argument("--simulations", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [f"run_dir={folder}", *options.overrides])
        rows = nulls(config, runs=options.runs, directions=options.directions, simulations=options.simulations)
    for row in rows:
        print(f"{'✓' if row.holds else '✗'} {row.null:42} {row.must:36} {row.found}")
    if not all(row.holds for row in rows):
        sys.exit("a test finds what is not there")


if __name__ == "__main__":
    main()
