"""Parts of stages on an organism: pairs, families, controls, donors and norms are those said, by plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxmech as jm
from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.behavior import poles
from jaxmech.contrast.flips import sign_flips
from jaxmech.contrast.selection import Rule
from jaxmech.organism import build_organism
from jaxmech.study import effects
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import Context
from jaxmech.study.stages import contrast, patching, steering

CONTROLS = ("flipped", "placebo", "valence", "number")
BANK = BankConfig(
    selection=6, development=0, test=4, examples=2, decoys=(), selection_controls=CONTROLS, controls=("neutral",),
    placebo_words=(("tall", "short"), ("morning", "evening")),
)  # fmt: skip
RULE = Rule(q=0.05)  # six families have 64 flips


@pytest.fixture(scope="module")
def organism():
    return build_organism(bank=BANK, wordings=1, items=1)


@pytest.fixture(scope="module")
def ctx(organism, tmp_path_factory):
    """A study of the organism that has its model, dictionaries and prompts already, and one selected feature."""
    made = Context(StudyConfig("made", str(tmp_path_factory.mktemp("planted")), batch=32))
    made._made = {
        "lm": organism.lm, "saes": organism.saes, "behavior": altruism(BANK, organism.lm.tokenizer),
        "selected": pd.DataFrame({"layer": [0], "feature": [organism.features["concept+"]]}),
    }  # fmt: skip
    return made


@pytest.fixture(scope="module")
def read(ctx):
    """The selection families' prompts, and what the stage reads of them at the decision token.

    Which word of a placebo's pair comes first means nothing: the second pair is turned round.
    """
    table = ctx.prompts("selection", *(pole for name in (None, *CONTROLS) for pole in poles(name)))
    plus, minus = poles("placebo")
    turned = table["condition"].isin([plus, minus]) & (table["pair"] == 1)
    table.loc[turned, "condition"] = table.loc[turned, "condition"].map({plus: minus, minus: plus})
    density = np.zeros((len(ctx.saes.config.layers), ctx.saes.config.d_sae))
    positions, *_ = contrast.read_positions(ctx, contrast.find_compared(ctx, table), ctx.saes, density)
    return table, positions[0]


def differences(ctx, table, name=None):
    """Plus less minus of every feature, [families][pairs, m], each prompt run as a whole text, by a plain loop."""
    lm, by_family = ctx.lm, {}
    rows = table[table["condition"].isin(poles(name))]
    tokens, mask = jm.encode_prompts(lm, list(rows["prefix"] + rows["query"]))
    resid = jm.forward(lm.config, lm.params, tokens, mask=mask, taps=("resid_post",)).taps["resid_post"]
    z = np.moveaxis(np.asarray(ctx.saes.encode(resid[:, :, -1])), 0, 1).reshape(len(rows), -1)
    at = {(row.family, row.condition, row.pair): code for row, code in zip(rows.itertuples(), z, strict=True)}
    plus, minus = poles(name)
    for family, condition, pair in sorted(at):
        if condition == plus:
            by_family.setdefault(family, []).append(at[family, plus, pair] - at[family, minus, pair])
    return [np.array(pairs) for pairs in by_family.values()]


def test_features_are_compared_within_pairs_and_averaged_within_families(ctx, read):
    table, s = read
    want = differences(ctx, table)
    assert len(want) == 6 and {len(pairs) for pairs in want} == {2} and s.pairs == 12
    np.testing.assert_allclose(s.difference, [pairs.mean(0) for pairs in want], atol=1e-4)
    np.testing.assert_allclose(s.flipped.difference, [p.mean(0) for p in differences(ctx, table, "flipped")], atol=1e-4)


def test_features_are_compared_with_what_every_control_moves(ctx, read):
    """The mean of a control whose poles have an order, the size of one whose poles have none."""
    table, s = read
    assert set(s.controls) == {"placebo", "valence", "number"}
    for name in ("valence", "number"):
        want = np.mean([pairs.mean(0) for pairs in differences(ctx, table, name)], 0)
        np.testing.assert_allclose(s.controls[name], np.abs(want), atol=1e-4)
    placebo = np.mean([(pairs**2).mean(0) for pairs in differences(ctx, table, "placebo")], 0)
    np.testing.assert_allclose(s.controls["placebo"], np.sqrt(placebo), atol=1e-4)


def judged(s):
    signs = sign_flips(len(s.difference), key=jax.random.key(0), R=64)
    return contrast.judge(s, RULE, signs, splits=2, key=jax.random.key(0))


def test_valence_is_what_the_stance_words_have_too(organism, read):
    """A feature of valence goes with the stance, and is rejected for what cheerful words do."""
    s, at = read[1], organism.features
    of_stance, of_valence = [at["concept+"], at["concept-"]], [at["valence+"], at["valence-"]]
    chosen = judged(s)[2].chosen
    assert chosen[of_stance].all() and not chosen[of_valence].any()
    others = {name: size for name, size in s.controls.items() if name != "valence"}
    assert judged(s._replace(controls=others))[2].chosen[of_valence].all()


def test_the_data_themselves_are_one_relabeling_of_their_null(read):
    """Two of 19 relabelings select as many as the data: p is 3 / 20."""
    s = read[1]
    tests, flips, chosen = judged(s)
    found = int(chosen.chosen.sum())
    false = np.array([found, found + 1, *[0] * 17])
    picked = pd.DataFrame({"layer": [0] * found})
    results = contrast.selection_results(s, chosen, false, chosen.chosen, "rule", picked)
    assert results["null_p"] == pytest.approx(3 / 20) and results["null_share"] == pytest.approx(2 / 19)


@pytest.fixture(scope="module")
def sides(ctx):
    return {name: effects.side(ctx, name) for name in poles()}


def alone(ctx, pole):
    """The first prompt of every family as whole texts, families from the last to the first, and their residuals."""
    rows = ctx.prompts("test", pole).query("pair == 0").sort_values("family", ascending=False)
    prompts = jm.make_prompts(ctx.lm, list(rows["prefix"] + rows["query"]), rows["answers"].iloc[0])
    return prompts, jm.collect.run_decision(ctx.lm.config, ctx.lm.params, prompts).resid


@pytest.mark.slow
def test_a_prompt_takes_the_values_of_its_own_familys_donor(ctx, organism, sides):
    base, donor = sides["minus"], sides["plus"]
    patch = patching.Patch("to_plus", base, donor, effects.by_family(donor.g - base.g, base), jnp.zeros(()))
    chosen = [[(layer, organism.features[name]) for layer in (0, 1) for name in ("concept+", "concept-")]]
    got = patching.patched(ctx, patch, chosen, what="donors")[0]
    lm, (prompts, _), (_, resid) = ctx.lm, alone(ctx, "minus"), alone(ctx, "plus")
    sets = jm.edits.select_sets(chosen, lm.config.n_layers)

    def reversed_families(donor):
        choices = jm.patching.patch_features(lm.config, lm.params, prompts, sets, saes=ctx.saes, donor=donor)
        return np.asarray(choices.expected(np.arange(11) / 10))[0, ::-1]

    np.testing.assert_allclose(got, reversed_families(resid), atol=2e-5)
    assert np.abs(got - reversed_families(jnp.roll(resid, 1, axis=1))).max() > 2e-4  # of the next family's: another


def test_a_family_with_two_prompts_is_one(ctx):
    both = effects.side(ctx, *poles())
    values = np.arange(8.0) ** 2
    want = [values[both.families == family].mean() for family in sorted(set(both.families))]
    np.testing.assert_array_equal(effects.by_family(values, both), want)
    assert len(want) == 4


@pytest.mark.slow
def test_directions_are_added_with_the_norm_that_either_sign_has(ctx, sides):
    """(g(+v) - g(-v)) / 2, each run with a vector rescaled by hand."""
    lm, side, L = ctx.lm, sides["plus"], ctx.lm.config.n_layers
    vectors = np.asarray(jax.random.normal(jax.random.key(0), (2, L, lm.config.d_model)))
    norms = np.array([3.0, 0.0, 2.0, 1.0]), np.array([1.0, 2.0, 0.0, 4.0])
    got = steering.antisymmetric(ctx, side, vectors, norms, what="directions")
    spans = jm.edits.at_last(L, side.prompts.tokens.shape[1])
    for vector, found in zip(vectors, got, strict=True):
        unit, g = vector / np.linalg.norm(vector, axis=1, keepdims=True), []
        for sign, norm in zip((1, -1), norms, strict=True):
            edits = {"resid_post": (jm.edits.add_vector(sign * norm[:, None] * unit, spans),)}
            g.append(np.asarray(jm.score(lm.config, lm.params, side.prompts, edits=edits)[0].expected(side.values)))
        np.testing.assert_allclose(found, (g[0] - g[1]) / 2, atol=2e-5)
        assert np.abs(found).max() > 1e-3
