"""Ways of steering on an organism: each row against a plain run, and the window that development families choose."""

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.interventions import edits, steering
from jaxmech.organism import build_organism
from jaxmech.study import effects, ways
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import Context
from jaxmech.study.doses import dose, gap_of
from jaxmech.study.tables import TABLES

pytestmark = pytest.mark.slow

BANK = BankConfig(
    selection=6, development=2, test=4, pairs=1, examples=2, decoys=(), selection_controls=(), controls=("neutral",),
)  # fmt: skip


@pytest.fixture(scope="module")
def ctx(tmp_path_factory):
    """A study of an organism, with the stance's concept selected at layer 0 and its later number at layer 2."""
    organism = build_organism(bank=BANK)
    at = organism.features
    chosen = [
        (0, at["concept+"], 1.0),
        (0, at["concept-"], -1.0),
        (2, at["up later"], 0.5),
        (2, at["down later"], -0.5),
    ]
    made = Context(StudyConfig("made", str(tmp_path_factory.mktemp("ways")), batch=32))
    made._made = {
        "lm": organism.lm, "saes": organism.saes, "behavior": altruism(BANK, organism.lm.tokenizer),
        "selected": pd.DataFrame(chosen, columns=["layer", "feature", "dz"]),
    }  # fmt: skip
    return made


@pytest.fixture(scope="module")
def table(ctx):
    found = ways.compare_ways(ctx, ("neutral",))
    assert list(found) == list(TABLES["steering"]["ways"])
    return found.set_index("name")


def check(row, halves):
    """halves: by family, in score."""
    low, high = stats.ttest_1samp(100 * halves, 0).confidence_interval()
    np.testing.assert_allclose([row.change_pp, row.low_pp, row.high_pp], [100 * halves.mean(), low, high], atol=2e-3)


def test_windows():
    assert list(ways.windows([3])) == []
    assert list(ways.windows([3, 7])) == [(3,), (7,)]
    assert list(ways.windows([0, 1, 2])) == [(0,), (1,), (2,), (0, 1), (1, 2)]
    many = list(ways.windows(list(range(16))))
    assert [w for w in many if len(w) == 8] == [tuple(range(a, a + 8)) for a in (0, 4, 8)]
    assert {len(w) for w in many} == {1, 2, 4, 8} and len(many) == len(set(many))


def test_every_way_and_window_is_a_dose_of_its_own(ctx, table):
    side = effects.side(ctx, "neutral")
    assert len(set(side.families)) == 4
    parts = {"set": ctx.selected, "layer 0": ctx.selected[:2], "layer 2": ctx.selected[2:]}
    for name, features in parts.items():
        g = effects.expected(dose(ctx, side, np.array([1.0, -1.0]), what=name, features=features), side.values)
        check(table.loc[name], (g[0] - g[1]) / 2)
    assert set(table[table.kind == "layers"].index) == {"layer 0", "layer 2"}
    assert table.loc["set", "change_pp"] > 10 > 1 > abs(table.loc["multiply", "change_pp"])  # silent without a stance


def test_the_window_is_chosen_on_development_families(ctx, table):
    asked = ctx.prompts("development", "neutral")
    side = effects.run_side(
        ctx, np.arange(2), asked["family"].to_numpy(), *take(encode_table(ctx.lm, asked), np.arange(2))
    )
    moved = {}
    for name, features in (("layer 0", ctx.selected[:2]), ("layer 2", ctx.selected[2:])):
        g = effects.expected(dose(ctx, side, np.array([1.0, -1.0]), what=name, features=features), side.values)
        moved[name] = 100 * float((g[0] - g[1]).mean() / 2)
        assert table.loc[name, "development_pp"] == pytest.approx(moved[name], abs=2e-3)
    best = max(moved, key=lambda name: abs(moved[name]))
    assert list(table.index[table.chosen]) == [best]
    window = ways.chosen_window(table)
    assert window["layers"] == [int(best[-1])] and window["at_one_pp"] == table.loc[best, "change_pp"]
    assert ways.chosen_window(table.assign(chosen=False)) is None


def test_tokens_that_are_steered(ctx, table):
    asked = ctx.prompts("test", "neutral").sort_values("family").reset_index(drop=True)
    prompts, values = encode_table(ctx.lm, asked)
    selection, gap = gap_of(ctx, ctx.selected)
    direction = steering.feature_direction(ctx.saes, selection, jnp.asarray(gap))
    L, T = ctx.lm.config.n_layers, prompts.tokens.shape[1]
    for name, spans in (
        ("decision token", edits.at_last(L, T)),
        ("question", edits.at_positions(L, jnp.ones(T, bool))),
    ):
        vectors = jnp.stack([direction, -direction])
        g = effects.expected(steering.steer(ctx.lm.config, ctx.lm.params, prompts, vectors, spans=spans), values)
        check(table.loc[name], (g[0] - g[1]) / 2)
    assert list(table.index[table.kind == "tokens"]) == list(ways.spans_of(L, T))
    assert (table["mass"] > 0.5).all()
