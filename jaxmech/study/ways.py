"""Other ways of steering by the same features: set, add or multiply them; at some layers only; on more tokens.

`S` denotes sweep points, `L` layers, `B` prompts, `D` the residual width, `K` selected features per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.answers.score import Choices
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.statistics import family_means, mean_effect
from jaxmech.interventions import edits, steering
from jaxmech.interventions.patching import donor_values
from jaxmech.interventions.sweep import sweep
from jaxmech.io.progress import progress
from jaxmech.study import effects
from jaxmech.study.context import Context
from jaxmech.study.doses import gap_of
from jaxmech.study.effects import Side, chunk_of
from jaxmech.study.tables import TABLES

SIGNS = (1.0, -1.0)
"""The coefficients; effects are half the difference between them."""

COLUMNS = TABLES["steering"]["ways"]


class Point(NamedTuple):
    """One way. kind: "how" or "layers"; layers: at which the features are changed, by `way`, see `steering.WAYS`."""

    kind: str
    name: str
    way: str
    layers: tuple[int, ...]


def compare_ways(ctx: Context, conditions: tuple[str, ...]) -> pd.DataFrame:
    """What coefficient 1 moves by each way, on test families' prompts of some conditions.

    Returns:
      A row per way: kind ("how", "layers" or "tokens"), name, layers, change_pp with its interval, mass on valid
      answers, the less of both signs, development_pp (on development families; by layers only) and chosen, which of
      the windows of layers moves most on those.
    """
    return pd.DataFrame([*by_features(ctx, conditions), *by_tokens(ctx, conditions)], columns=COLUMNS)


def chosen_window(ways: pd.DataFrame) -> dict[str, Any] | None:
    """The layers that were chosen on development families, and what coefficient 1 moves there on test families."""
    for row in ways[ways["chosen"].astype(bool)].to_dict("records"):
        return {
            "layers": [int(layer) for layer in row["layers"]], "at_one_pp": row["change_pp"],
            "at_one_ci": [row["low_pp"], row["high_pp"]],
        }  # fmt: skip
    return None


def windows(layers: list[int]) -> Iterator[tuple[int, ...]]:
    """Runs of 1, 2, 4, ... of the layers, each overlapping the last by half, short of all of them."""
    width = 1
    while width < len(layers):
        starts = {*range(0, len(layers) - width, max(1, width // 2)), len(layers) - width}
        yield from (tuple(layers[start : start + width]) for start in sorted(starts))
        width *= 2


def by_features(ctx: Context, conditions: tuple[str, ...]) -> list[dict]:
    """The features set, added and multiplied at all layers, and set within windows of layers."""
    layers = sorted({int(layer) for layer in ctx.selected["layer"]})
    points = [Point("how", way, way, tuple(layers)) for way in steering.WAYS]
    points += [Point("layers", layers_name(window), "set", window) for window in windows(layers)]
    table = asked(ctx, ("development", "test"), conditions)
    side = side_of(ctx, table)
    g, mass = swept(ctx, side, points)
    test = table["split"].to_numpy() == "test"
    rows = []
    for point, halves, least in zip(points, (g[:, 0] - g[:, 1]) / 2, mass.min(1), strict=True):
        developed = 100 * float(halves[~test].mean()) if (~test).any() and point.kind == "layers" else None
        rows.append(row_of(point, halves[test], side.families[test], least[test]) | {"development_pp": developed})
    tried = [row for row in rows if row["development_pp"] is not None]
    if tried:
        max(tried, key=lambda row: abs(row["development_pp"]))["chosen"] = True
    return rows


def asked(ctx: Context, splits: tuple[str, ...], conditions: tuple[str, ...]) -> pd.DataFrame:
    """One prompt per family and condition."""
    table = pd.concat([ctx.prompts(split, *conditions) for split in splits], ignore_index=True)
    table = table.sort_values(["family", "pair"], kind="stable").groupby(["family", "condition"], sort=True).head(1)
    return table.reset_index(drop=True)


def side_of(ctx: Context, table: pd.DataFrame) -> Side:
    """The prompts of a table of any split, all before the decision token cached."""
    rows = np.arange(len(table))
    return effects.run_side(ctx, rows, table["family"].to_numpy(), *take(encode_table(ctx.lm, table), rows))


def layers_name(layers: tuple[int, ...]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def row_of(point: Point, halves: np.ndarray, families: np.ndarray, mass: np.ndarray) -> dict:
    effect = mean_effect(family_means(halves, families))
    return dict(
        kind=point.kind, name=point.name, layers=list(point.layers), change_pp=100 * effect.value,
        low_pp=100 * effect.low, high_pp=100 * effect.high, mass=float(mass.mean()), development_pp=None, chosen=False,
    )  # fmt: skip


def swept(ctx: Context, side: Side, points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Expected scores and mass of each point at coefficients 1 and -1, [S,2,B] each: one sweep, one program."""
    selection, gap = gap_of(ctx, ctx.selected)
    encoder, _ = edits.gather(ctx.saes, selection)
    values, L = np.asarray(donor_values(encoder, side.resid)), ctx.lm.config.n_layers

    def change(point: Point, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        gain, shift = steering.gain_and_shift(point.way, alpha, values=values, gap=gap)
        inside = np.isin(np.arange(L), point.layers)[:, None, None]
        return np.where(inside, gain, 1.0).astype(np.float32), np.where(inside, shift, 0.0).astype(np.float32)

    changes = [change(point, alpha) for point in points for alpha in SIGNS]
    spans = edits.at_last(L, side.prompts.tokens.shape[1])
    build = steering.ScaleAndShift(ctx.saes, selection, spans)
    stacked = jax.tree.map(lambda *each: np.stack(each), *changes)
    with progress("ways of steering", len(changes), unit="points") as advance:
        choices = sweep(
            ctx.lm.config, ctx.lm.params, side.prompts, build, stacked, chunk=chunk_of(len(changes)), advance=advance,
        )  # fmt: skip
    return by_sign(choices, side.values)


def by_sign(choices: Choices, values: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Expected scores and mass [S,2,B] of points that come in pairs of signs."""
    g, mass = effects.expected(choices, values), np.asarray(choices.mass)
    return g.reshape(-1, len(SIGNS), g.shape[-1]), mass.reshape(-1, len(SIGNS), mass.shape[-1])


def spans_of(n_layers: int, length: int) -> Mapping[str, edits.Spans]:
    """Which tokens: name -> spans of prompts of `length` tokens after their worked examples."""
    last, every = edits.at_last(n_layers, length), edits.everywhere(n_layers)
    none, on = jnp.zeros((n_layers, 1), bool), jnp.ones((n_layers, 1), bool)
    all_tokens = jnp.ones((n_layers, 1, length), bool)
    assert every.prefix is not None
    return {
        "decision token": last.replace(prefix=none),
        "decision token and answer": last.replace(prefix=none, answer=on),
        "question": edits.Spans(none, all_tokens, none),
        "question and worked examples": edits.Spans(on, all_tokens, none),
        "everywhere": edits.Spans(on, all_tokens, on),
    }


def by_tokens(ctx: Context, conditions: tuple[str, ...]) -> list[dict]:
    """The direction that the features write, one gap of each, added on more and more tokens of test prompts."""
    table = asked(ctx, ("test",), conditions)
    prompts, values = encode_table(ctx.lm, table, batch=None)
    selection, gap = gap_of(ctx, ctx.selected)
    direction = steering.feature_direction(ctx.saes, selection, jnp.asarray(gap))
    spans = spans_of(ctx.lm.config.n_layers, prompts.tokens.shape[1])
    points = [(sign * direction, span) for span in spans.values() for sign in SIGNS]
    stacked = jax.tree.map(lambda *each: np.stack(each), *points)
    with progress("tokens to steer", len(points), unit="points") as advance:
        choices = sweep(
            ctx.lm.config, ctx.lm.params, prompts, steering.AddOn(ctx.saes.config.site_out), stacked, advance=advance
        )
    g, mass = by_sign(choices, values)
    layers = tuple(sorted({int(layer) for layer in ctx.selected["layer"]}))
    families = table["family"].to_numpy()
    return [
        row_of(Point("tokens", name, "add", layers), (pair[0] - pair[1]) / 2, families, least)
        for name, pair, least in zip(spans, g, mass.min(1), strict=True)
    ]
