"""What the causal stages share: base and donor runs on test families, patched outcomes, and their family means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from scipy.special import softmax

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices, before_last
from jaxmech.behavior.scoring import take
from jaxmech.contrast.statistics import family_means
from jaxmech.interventions import edits
from jaxmech.io.progress import progress
from jaxmech.sae.collect import run_decision
from jaxmech.study.context import Context

DIRECTIONS = {"to_plus": ("minus", "plus"), "to_minus": ("plus", "minus")}
"""Direction of a patch -> (condition that is patched, condition of the donor)."""


Pairs = list[tuple[int, int]]
"""(layer, feature) of a set."""

LEAST_RATIO = 0.8
"""Of the selection's norm: sets that reach less of it are no comparison, and give no p."""

FEW = 4
"""Random sets and directions where nothing hangs on them."""

_CHUNK = 8
"""Sweep points in one call of a compiled sweep, at most: enough to hide the call."""


class Side(NamedTuple):
    """Prompts of the test families, one per family and condition: all before the decision token is in the cache.

    rows [B] of the prompt table; families [B]; prompts; values [B,N]; g [B]; resid [L,B,D].
    """

    rows: np.ndarray
    families: np.ndarray
    prompts: Prompts
    values: jax.Array
    g: np.ndarray
    resid: jax.Array


def standing_in(ctx: Context) -> bool:
    """Whether the rule was asked for and selected nothing: the features in use were taken by budget, and no claim is
    made of them."""
    return ctx.config.selection.mode == "rule" and ctx.folder.results("contrast")["mode"] == "budget"


def random_ones(ctx: Context, asked: int) -> int:
    """How many random sets or directions to compare with: a few where nothing hangs on them."""
    return min(asked, FEW) if standing_in(ctx) else asked


def side(ctx: Context, *conditions: str) -> Side:
    """Runs one prompt per family and condition."""
    rows = np.concatenate([ctx.rows(name, per_family=1) for name in conditions])
    if not len(rows):
        raise ValueError(f"the test families have no prompt of {', '.join(conditions)}")
    prompts, values = take(ctx.encoded[1], rows)
    return run_side(ctx, rows, ctx.families(rows), prompts, values)


def run_side(ctx: Context, rows: np.ndarray, families: np.ndarray, prompts: Prompts, values: jax.Array) -> Side:
    prompts = before_last(ctx.lm.config, ctx.lm.params, prompts)
    base = run_decision(ctx.lm.config, ctx.lm.params, prompts, site=ctx.saes.config.site)
    return Side(rows, families, prompts, values, np.asarray(base.choices.expected(values)), base.resid)


def of_families(of: Side, families: np.ndarray) -> Side:
    """The side of some families only, one prompt each."""
    kept = np.flatnonzero(np.isin(of.families, families))
    if len(kept) == len(of.families):  # prompts that are taken from others are laid out otherwise: other programs
        return of
    prompts = of.prompts.of(kept)
    return Side(of.rows[kept], of.families[kept], prompts, of.values[kept], of.g[kept], of.resid[:, kept])


def expected(choices: Choices, values: Any) -> np.ndarray:
    """Expected score [..., B] of choices [..., B, N], on the host: `Choices.expected` is another program per shape.

    Raises:
      ValueError: answers that are no numbers.
    """
    g = (softmax(np.asarray(choices.logprobs, np.float64), axis=-1) * np.asarray(values)).sum(-1)
    if len(wrong := np.argwhere(np.isnan(g))):
        raise ValueError(
            f"an intervention (point {wrong[0][0]}) gave NaN; check the model's weights and dtype, or intervene less"
        )
    return g


def stack_selections(ctx: Context, sets: list[Pairs]) -> edits.Selection:
    """Feature sets as one `Selection` with the sweep axis in front, [S,L,K], K being what the whole selection needs."""
    return edits.select_sets(sets, ctx.lm.config.n_layers, ctx.room(pairs_of(ctx.selected), *sets))


def pairs_of(features: pd.DataFrame) -> Pairs:
    return [(int(a), int(b)) for a, b in zip(features["layer"], features["feature"], strict=True)]


def chunk_of(points: int) -> int:
    """Sweep points in one call, so that little of the last one is padding."""
    return -(-points // -(-points // _CHUNK))


def sweep_sets(run: Callable[..., Choices], sets: edits.Selection, values: Any, *, what: str) -> np.ndarray:
    """Expected scores [S,B] of a sweep over feature sets; `run` takes them and the options of `sweep`."""
    chunk = _CHUNK if len(sets.index) > _CHUNK // 2 else 1  # two programs for any number of sets
    with progress(what, len(sets.index), unit="sets") as advance:
        return expected(run(sets, chunk=chunk, advance=advance), values)


def by_family(values: np.ndarray, of: Side) -> np.ndarray:
    """Means within families of values [B]."""
    return family_means(values, of.families)
