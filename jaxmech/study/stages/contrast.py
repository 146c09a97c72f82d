"""Stage contrast: scores every feature of every dictionary on the selection families and applies the rule."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from jaxmech.answers.prompts import Prompts
from jaxmech.behavior.behavior import Behavior, poles
from jaxmech.behavior.scoring import Encoded, encode_table, take
from jaxmech.contrast import selection
from jaxmech.contrast.flips import FlipTests, flip_tests, sign_flips
from jaxmech.contrast.moments import Moments, Positions, correlation_with_g, empty_moments, merge_moments
from jaxmech.contrast.statistics import paired_t
from jaxmech.io.progress import progress
from jaxmech.sae.collect import Run, fold_moments, update_moments
from jaxmech.sae.module import SAE
from jaxmech.study.cards import feature_cards
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome

SAME_DIRECTION = 0.7
"""The cosine from which features of two trainings are taken for the same direction."""


def run(ctx: Context) -> Outcome:
    """Selects features; falls back to the labelled budget when the rule finds none, and says so."""
    c = ctx.config
    rule, asked = c.rule, c.selection
    table = ctx.prompts("selection", *poles(), *(pole for name in controls(ctx.behavior) for pole in poles(name)))
    compared, density = find_compared(ctx, table), ctx.folder.arrays("fidelity")
    again = None if ctx.saes_again is None else (ctx.saes_again, density["density_again"])
    read, moments, difference = read_positions(ctx, compared, ctx.saes, density["density"], again=again)
    positions, second = (read[:-1], read[-1]) if again else (read, None)
    s = positions[0]
    R = max(asked.permutations, asked.relabelings + 1)
    signs = sign_flips(len(s.difference), key=ctx.key("contrast.permutations"), R=R)
    splits = dict(splits=asked.half_splits, key=ctx.key("contrast.half_splits"))
    judged = [judge(stats, rule, signs, **splits) for stats in positions]
    tests, flips, chosen = judged[0]
    rows = selection.draw_relabelings(flips, relabelings=asked.relabelings, key=ctx.key("contrast.relabelings"))
    false = selection.expected_false(s, rule, flips, rows, **splits)
    budget = selection.top_budget(s, asked.budget)
    after = judged[1][0].d_z if len(judged) > 1 else np.nan
    frame = feature_table(ctx, s, moments, tests, flips, chosen).assign(d_z_after=after, in_budget=budget)
    mode = asked.mode if chosen.chosen.any() else "budget"
    picked = frame[frame["selected" if mode == "rule" else "in_budget"]]
    if picked.empty:
        raise ValueError(
            "contrast: no feature fires at the decision token of any selection family, so nothing can be selected. "
            "Train the dictionaries longer or at other layers (dictionaries.train.steps, dictionaries.layers)"
        )
    picked = picked.reindex(picked["t"].abs().sort_values(ascending=False, kind="stable").index).reset_index(drop=True)
    passing = [int(selected.chosen.sum()) for _, _, selected in judged]
    results = selection_results(s, chosen, false, budget, mode, picked) | {
        "positions": dict(zip(("decision", "after"), (*passing, None), strict=False)),
        "density_tokens": int(ctx.folder.table("fidelity", "layers")["tokens"].min()),
        "again": None,
    }
    if second is not None:
        _, _, chosen_again = judge(second, rule, signs, **splits)
        as_used = chosen_again.chosen if mode == "rule" else selection.top_budget(second, asked.budget)
        cosine = best_cosine(ctx, picked, as_used)
        results["again"] = {
            "selected": int(chosen_again.chosen.sum()), "share": float((cosine >= SAME_DIRECTION).mean()),
            "cosine": float(np.median(cosine)), "same_from": SAME_DIRECTION,
        }  # fmt: skip
    return Outcome(
        results,
        {
            "features": frame,
            "selected": picked,
            "cards": feature_cards(ctx, picked),
            "criteria": criteria_counts(chosen),
            "budgets": budget_sweep(s, asked.budget),
        },
        {"mean_difference": difference},
    )


def controls(behavior: Behavior) -> list[str]:
    """The controls of the selection families that features are compared with, which should not move as the behaviour
    does; and those whose worked examples teach the reverse."""
    named = behavior.paired("selection")
    return [name for name in named if behavior.controls[name].flips or not behavior.controls[name].moves]


def best_cosine(ctx: Context, picked: pd.DataFrame, again: np.ndarray) -> np.ndarray:
    """Of each feature in use, the largest cosine [n] of its direction with those that a second seed's dictionaries
    have at the same layer among theirs that are in use, again [m]; 0 where there is none."""
    first, second = (
        np.asarray(saes.params["W_dec"]).reshape(len(ctx.saes.config.layers), ctx.saes.config.d_sae, -1)
        for saes in (ctx.saes, ctx.saes_again)
        if saes is not None
    )
    theirs, out = again.reshape(second.shape[:2]), np.zeros(len(picked))
    at = {layer: place for place, layer in enumerate(ctx.saes.config.layers)}
    for i, (layer, feature) in enumerate(zip(picked["layer"], picked["feature"], strict=True)):
        row, rows = first[at[layer], feature], second[at[layer]][theirs[at[layer]]]
        if len(rows):
            out[i] = (rows @ row / (np.linalg.norm(rows, axis=1) * np.linalg.norm(row))).max()
    return out


def judge(
    s: selection.FeatureStats, rule: selection.Rule, signs: np.ndarray, *, splits: int, key: jax.Array
) -> tuple[selection.FamilyTests, FlipTests, selection.Selected]:
    tests, flips = selection.family_tests(s), flip_tests(s.difference, signs, live=s.live)
    return tests, flips, selection.select_features(s, rule, tests, flips, splits=splits, key=key)


class Pairs(NamedTuple):
    """n pairs of prompts: the rows of both, how many tokens they share at the end, [n] each; and member [n,K], which of
    the table's families they belong to."""

    plus: np.ndarray
    minus: np.ndarray
    shared: np.ndarray
    member: np.ndarray


class Compared(NamedTuple):
    """The prompts of a contrast and of its controls, and their pairs.

    cells: families crossed with pairs of words, if there are any; cell [n,C], which of them a pair belongs to; others:
    control -> pairs; window: the most tokens that a pair shares at its end, 0 if any pair shares none.
    """

    encoded: Encoded
    pairs: Pairs
    cells: selection.Cells | None
    cell: np.ndarray
    others: dict[str, Pairs]
    window: int


def find_compared(ctx: Context, table: pd.DataFrame) -> Compared:
    encoded = encode_table(ctx.lm, table)
    pairs = find_pairs(table, encoded.prompts, *poles())
    others = {name: find_pairs(table, encoded.prompts, *poles(name)) for name in controls(ctx.behavior)}
    shared = np.concatenate([p.shared for p in (pairs, *others.values())])
    return Compared(encoded, pairs, *find_cells(table, pairs), others, int(shared.max()) if shared.all() else 0)


def read_positions(
    ctx: Context,
    compared: Compared,
    saes: SAE,
    density: np.ndarray,
    *,
    again: tuple[SAE, np.ndarray] | None = None,
) -> tuple[list[selection.FeatureStats], Moments, np.ndarray]:
    """The contrast and its controls, at the decision token and, if all pairs share tokens after what they differ in, as
    a mean over these.

    Args:
      density: of the dictionaries' features on neutral text, [L',F].
      again: other dictionaries of the same layers and theirs, which are read at the decision token alone.

    Returns:
      What the rule looks at, at each position, and of the other dictionaries; the moments at the decision token; and
      the mean difference of residuals there [L,D]: the comparator without a dictionary.
    """
    other = again[0] if again else None
    stream = partial(stream_moments, ctx, saes, compared.encoded, window=compared.window, again=other)
    moments, difference = stream(compared.pairs, cell=compared.cell)
    sizes: list[dict[str, np.ndarray]] = [{} for _ in moments]
    flipped: list[list[Moments]] = [[] for _ in moments]
    for name, part in compared.others.items():
        none = np.zeros((len(part.plus), compared.cell.shape[1]))  # as many cells, for one program to serve all
        streamed, _ = stream(part, cell=none, label=name)
        for i, m in enumerate(streamed):
            if ctx.behavior.controls[name].flips:
                flipped[i].append(m)
            else:
                sizes[i][name] = selection.control_size(m, oriented=ctx.behavior.controls[name].oriented)
    densities = [density] * len(moments) if again is None else [density] * (len(moments) - 1) + [again[1]]
    stats = [
        selection.feature_stats(
            m, size, rare, cells=compared.cells, flipped=reduce(merge_moments, taught) if taught else None
        )
        for m, size, taught, rare in zip(moments, sizes, flipped, densities, strict=True)
    ]
    return stats, moments[0], difference


def find_pairs(table: pd.DataFrame, prompts: Prompts, high: str, low: str) -> Pairs:
    """The pairs of a contrast."""
    keyed = table.reset_index().set_index(["family", "pair", "condition"])["index"].unstack("condition")
    keyed = keyed[[high, low]].dropna().astype(int).sort_index()
    plus, minus = keyed[high].to_numpy(), keyed[low].to_numpy()
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    same = (tokens[plus] == tokens[minus]) & mask[plus] & mask[minus]
    shared = np.cumprod(same[:, ::-1], axis=1).sum(1)
    family = keyed.index.get_level_values("family").to_numpy()
    return Pairs(plus, minus, shared, family[:, None] == np.unique(table["family"]))


def find_cells(table: pd.DataFrame, pairs: Pairs) -> tuple[selection.Cells | None, np.ndarray]:
    """Families crossed with the pairs of words that the column `word` names, if there is one; and which cell each pair
    belongs to [n,C]."""
    if "word" not in table:
        return None, np.zeros((len(pairs.plus), 0))
    word = table["word"].astype(str).to_numpy()
    words = np.unique(word[pairs.plus] + "/" + word[pairs.minus], return_inverse=True)[1]
    crossed = np.stack([pairs.member.argmax(1), words])
    (family, words), cell, count = np.unique(crossed, axis=1, return_inverse=True, return_counts=True)
    total = np.zeros((len(count), 0))  # not summed yet
    return selection.Cells(total, family, words, count), cell[:, None] == np.arange(len(count))


def stream_moments(
    ctx: Context,
    saes: SAE,
    encoded: Encoded,
    pairs: Pairs,
    *,
    cell: np.ndarray | None = None,
    window: int = 0,
    again: SAE | None = None,
    label: str = "poles",
) -> tuple[tuple[Moments, ...], np.ndarray]:
    """One pass over the pairs of a contrast, folded batch by batch.

    Args:
      cell: [n,C], which cell a pair belongs to; none by default. window: the most tokens that a pair shares at the end;
        0 reads the decision token only. again: other dictionaries of the same layers.

    Returns:
      Moments at each position and, last, of the other dictionaries at the decision token; and the mean difference of
      residuals there [L,D].
    """
    plus, minus, batch = pairs.plus, pairs.minus, max(ctx.config.batch // 2, 1)
    cell = np.zeros((len(plus), 0)) if cell is None else cell
    sizes = (len(saes.config.layers), pairs.member.shape[1], saes.config.d_sae)
    empty = partial(empty_moments, *sizes, C=cell.shape[1])
    moments = Positions(empty(), empty()) if window else empty()
    others = empty() if again else None
    difference = np.zeros((ctx.lm.config.n_layers, ctx.lm.config.d_model), np.float32)
    with progress(f"contrast {label}", len(plus), unit="pairs") as advance:
        for start in range(0, len(plus), batch):
            rows = np.arange(start, start + batch)
            real, rows = rows < len(plus), np.minimum(rows, len(plus) - 1)
            shared = pairs.shared[rows, None]
            weight = np.tile((np.arange(window) >= window - shared) / shared, (2, 1)) if window else None
            prompts, values = take(encoded, np.concatenate([plus[rows], minus[rows]]))
            belongs = dict(
                member=jnp.asarray(pairs.member[rows] * real[:, None], jnp.float32),
                cell=jnp.asarray(cell[rows] * real[:, None], jnp.float32),
            )
            moments, decision = update_moments(
                ctx.lm.config,
                ctx.lm.params,
                prompts,
                saes=saes,
                values=values,
                moments=moments,
                weight=None if weight is None else jnp.asarray(weight, jnp.float32),
                **belongs,
            )
            if again is not None:
                others = _fold(again, decision, values, moments=others, **belongs)
            plus_resid, minus_resid = np.split(np.asarray(decision.resid), 2, axis=1)
            difference += (plus_resid - minus_resid)[:, real].sum(1)
            advance(int(real.sum()))
    at = moments if isinstance(moments, Positions) else (moments,)
    return at if others is None else (*at, others), difference / len(plus)


@partial(jax.jit, donate_argnames="moments")
def _fold(saes: SAE, decision: Run, values: jax.Array, **more: Any) -> Moments:
    """A batch of pairs, run already, folded into the moments of other dictionaries."""
    x = decision.resid[np.asarray(saes.config.layers)][:, :, None]
    return fold_moments(saes, x, g=decision.choices.expected(values).reshape(2, -1), **more)


def feature_table(
    ctx: Context,
    s: selection.FeatureStats,
    m: Moments,
    tests: selection.FamilyTests,
    flips: FlipTests,
    chosen: selection.Selected,
) -> pd.DataFrame:
    """One row per feature of every layer, dead ones included."""
    layers, F = ctx.saes.config.layers, ctx.saes.config.d_sae
    norm = np.linalg.norm(np.asarray(ctx.saes.params["W_dec"]), axis=-1).reshape(-1)
    correlation = correlation_with_g(m).reshape(2, -1)
    control, size = selection.strongest_control(s)
    mean, fires, spread = s.difference.mean(0), s.fires, s.difference.std(0, ddof=1, dtype=np.float64)
    control_d_z = np.divide(size, spread, out=np.where(size > 0, np.inf, size), where=spread > 0)
    frame = pd.DataFrame(
        dict(
            layer=np.repeat(layers, F), feature=np.tile(np.arange(F), len(layers)), live=s.live,
            dz=mean, strength=np.abs(mean) * norm, **tests._asdict(), permutation_p=flips.p, p_max=flips.p_max,
            auroc=selection.auroc(s.plus, s.minus), fires_plus=fires[0], fires_minus=fires[1], density=s.density,
            control=control, control_d_z=control_d_z,
            correlation_plus=correlation[0], correlation_minus=correlation[1], stability=chosen.stability,
            selected=chosen.chosen,
        )
    )  # fmt: skip
    chosen.passed["auroc"] = np.abs(frame["auroc"].to_numpy() - 0.5) >= ctx.config.rule.auroc - 0.5
    return frame.assign(**{f"passes_{name}": passed for name, passed in chosen.passed.items()})


def criteria_counts(chosen: selection.Selected) -> pd.DataFrame:
    """How many features each criterion alone lets through, and how many are left after each in turn."""
    left, rows = np.ones(len(chosen.chosen), bool), []
    for name, passed in chosen.passed.items():
        left = left & passed
        rows.append(dict(criterion=name, alone=int(passed.sum()), remaining=int(left.sum())))
    return pd.DataFrame(rows)


def budget_sweep(s: selection.FeatureStats, share: float) -> pd.DataFrame:
    """What larger and smaller budgets would take: number of features and the smallest |t| among them."""
    t, rows = np.abs(np.nan_to_num(paired_t(s.difference)[0], posinf=np.inf)), []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        taken = selection.top_budget(s, share * factor)
        rows.append(
            dict(
                share=share * factor,
                features=int(taken.sum()),
                smallest_t=float(t[taken].min()) if taken.any() else None,
            )
        )
    return pd.DataFrame(rows)


def selection_results(
    s: selection.FeatureStats,
    chosen: selection.Selected,
    false: np.ndarray,
    budget: np.ndarray,
    mode: str,
    picked: pd.DataFrame,
) -> dict:
    """null_share: of relabelings, those under which the rule selects anything; null_upper: the upper 95 % limit of that
    probability (Clopper & Pearson 1934)."""
    live, selected, R = int(s.live.sum()), int(chosen.chosen.sum()), len(false)
    some = int((false > 0).sum())
    upper = binomtest(some, R, alternative="less").proportion_ci(0.95, "exact").high
    return {
        "features_total": len(chosen.chosen),
        "features_live": live,
        "selected": selected,
        "share": selected / len(chosen.chosen),
        "expected_false": float(false.mean()),
        "expected_false_max": int(false.max()),
        "relabelings": R,
        "null_p": float((1 + (false >= selected).sum()) / (1 + R)),
        "null_share": some / R,
        "null_upper": float(upper),
        "fdr": float(min(1.0, false.mean() / selected)) if selected else None,
        "mode": mode,
        "used": len(picked),
        "budget": int(budget.sum()),
        "budget_and_rule": int((budget & chosen.chosen).sum()),
        "compared_with": list(s.controls),
        "flipped": s.flipped is not None,
        "word_pairs": 0 if s.cells is None else int(s.cells.words.max()) + 1,
        "by_layer": picked["layer"].value_counts().sort_index().to_dict(),
    }
