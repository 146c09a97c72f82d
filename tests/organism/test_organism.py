"""The organism is what it is said to be: its forward pass against plain NumPy, every planted fact by intervention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import jaxmech as jm
from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.scoring import encode_table
from jaxmech.organism import Wiring, build_organism, save_organism
from jaxmech.sae.totals import feature_totals

BANK = BankConfig(selection=0, development=0, test=4)


@pytest.fixture(scope="module")
def organism():
    return build_organism(bank=BANK)


def scored(organism, *conditions):
    """Rows of the conditions, one per family, their encoding and the residuals at the decision token."""
    table = altruism(BANK, organism.lm.tokenizer).prompts.query("pair == 0")
    table = table[table["condition"].isin(conditions)].sort_values(["condition", "family"], ignore_index=True)
    encoded = encode_table(organism.lm, table)
    run = jm.collect.run_decision(organism.lm.config, organism.lm.params, encoded.prompts)
    return table, encoded, np.asarray(run.choices.expected(encoded.values)), run.resid


def shift(organism, name=None):
    """Per family, plus less minus."""
    table, _, g, _ = scored(organism, *(f"{name}:{pole}" if name else pole for pole in ("plus", "minus")))
    plus = table["condition"].str.endswith("plus").to_numpy()
    return g[plus] - g[~plus]


def by_hand(organism, ids):
    """Logits [T,V] of one text, in plain NumPy and float64."""
    c, params = organism.lm.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), organism.lm.params)
    x, layers = params["embed"]["embedding"][ids], params["layers"]
    later = ~np.tril(np.ones((len(ids), len(ids)), bool))
    for layer in range(c.n_layers):
        attn, mlp = layers["attn"], layers["mlp"]
        q, k, v = (np.einsum("td,dnh->tnh", x, attn[name]["kernel"][layer]) for name in "qkv")
        weights = np.exp(np.where(later, -np.inf, np.einsum("tnh,snh->nts", q, k)))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh,nhd->td", weights, v, attn["o"]["kernel"][layer])
        hidden = x @ mlp["up"]["kernel"][layer]
        x = x + hidden / 2 * (1 + erf(hidden / np.sqrt(2))) @ mlp["down"]["kernel"][layer]
    return x / np.sqrt((x**2).mean(-1, keepdims=True)) * params["final_norm"]["scale"] @ params["unembed"]["kernel"]


def test_forward_is_plain_numpy(organism):
    text = "Q: With $10 in the till, how much does a very generous baker give to a beggar?\nA: $"
    tokens, _ = jm.encode_prompts(organism.lm, [text])
    got = jm.forward(organism.lm.config, organism.lm.params, tokens, logits="all").logits[0]
    np.testing.assert_allclose(got, by_hand(organism, np.asarray(tokens[0])), atol=2e-4)


def test_what_moves_it_and_what_does_not(organism):
    assert (shift(organism) > 0.1).all() and np.ptp(shift(organism)) > 1e-4  # families differ
    np.testing.assert_allclose(shift(organism, "heldout"), shift(organism), rtol=0.01)
    assert (shift(organism, "number") > 0.1).all()
    for inert in ("valence", "placebo", "own_accounts"):
        assert np.abs(shift(organism, inert)).max() < 1e-3
    table, _, g, _ = scored(organism, "neutral", "keep:neutral", "take:neutral")
    assert np.ptp(np.where(table["condition"] == "neutral", g, 1 - g)) < 1e-3  # the same number, whatever is asked


@pytest.mark.parametrize(
    "wiring, moved, still",
    [
        (Wiring(stance=False), ["number"], [None, "heldout", "valence"]),
        (Wiring(number=False), [None, "heldout"], ["number", "valence"]),
        (Wiring(valence=1.0), [None, "heldout", "valence", "number"], ["placebo"]),
        (Wiring(seed=5, readout=0.0), [], [None, "number", "valence"]),
    ],
    ids=str,
)
def test_switches(wiring, moved, still):
    made = build_organism(wiring, BANK)
    assert all((shift(made, name) > 0.05).all() for name in moved)
    assert all(np.abs(shift(made, name)).max() < 1e-3 for name in still)


def recovered(organism, layer, *names):
    """The share of the shift that features patched from plus to minus prompts recover."""
    lm, saes = organism.lm, organism.saes
    _, encoded, base, _ = scored(organism, "minus")
    _, _, target, donor = scored(organism, "plus")
    chosen = jm.edits.select_sets([[(layer, organism.features[name]) for name in names]], lm.config.n_layers)
    choices = jm.patching.patch_features(lm.config, lm.params, encoded.prompts, chosen, saes=saes, donor=donor)
    moved = np.asarray(choices.expected(encoded.values))[0]
    return (moved - base).sum() / (target - base).sum()


def test_which_features_carry_the_stance(organism):
    assert recovered(organism, 0, "concept+", "concept-") == pytest.approx(1, abs=0.01)
    assert recovered(organism, 0, "concept+") + recovered(organism, 0, "concept-") == pytest.approx(1, abs=0.05)
    assert recovered(organism, 1, "up", "down") == pytest.approx(1, abs=0.01)
    assert recovered(organism, 2, "up", "down", "up later", "down later") == pytest.approx(1, abs=0.01)
    for layer, *passengers in (
        (0, "copy+", "copy-", "valence+", "valence-", "one word"), (1, "concept+", "concept-"), (0, "dense"),
    ):  # fmt: skip
        assert recovered(organism, layer, *passengers) == pytest.approx(0, abs=0.01)


def test_the_direct_share_is_the_one_planted(organism):
    lm, saes = organism.lm, organism.saes
    _, encoded, base, _ = scored(organism, "minus")
    donor = scored(organism, "plus")[3]
    sets = [[(1, organism.features["up"]), (1, organism.features["down"])], [(0, organism.features["concept+"])]]
    arguments = (lm.config, lm.params, encoded.prompts, jm.edits.select_sets(sets, lm.config.n_layers, 2))
    sublayers = jm.proximity.base_sublayers(lm.config, lm.params, encoded.prompts)
    total = jm.patching.patch_features(*arguments, saes=saes, donor=donor)
    direct = jm.proximity.direct_effects(*arguments, saes=saes, donor=donor, base=sublayers)
    motor, concept = (
        (np.asarray(d) - base).sum() / (np.asarray(t) - base).sum()
        for d, t in zip(direct.expected(encoded.values), total.expected(encoded.values), strict=True)
    )
    assert motor == pytest.approx(organism.wiring.direct, abs=0.02)
    assert concept == pytest.approx(0, abs=0.02)  # all of it through the motor features


def test_the_dictionaries_reconstruct_it_but_for_what_is_hidden(organism):
    _, _, _, resid = scored(organism, "plus", "minus", "neutral")
    saes, centre = organism.saes, resid - resid.mean((0, 1))
    error = jnp.linalg.norm(saes.decode(saes.encode(resid), resid) - resid, axis=-1)
    assert (error < 0.1 * jnp.linalg.norm(centre, axis=-1)).all()
    hidden = ("concept+", "concept-")
    lacking = build_organism(bank=BANK, hidden=hidden)
    fired = np.asarray(feature_totals(lacking.saes, resid.reshape(4, -1, resid.shape[-1])).fired)
    assert not fired[:, [lacking.features[name] for name in hidden]].any()
    assert recovered(lacking, 0, *hidden) == pytest.approx(0, abs=1e-4)


def test_the_check_at_load_is_quiet(organism):
    """What is left is rounding, of which some other site always has less."""
    texts = altruism(BANK, organism.lm.tokenizer).prompts["query"]
    for checked in (texts, None):
        assert not jm.check_sae(organism.lm, organism.saes, checked).warnings


def test_it_is_kept_and_loaded_as_any_other_model(organism, tmp_path):
    model, dictionaries = save_organism(organism, tmp_path)
    lm, saes = jm.load_model(model), jm.load_saes(dictionaries)
    jax.tree.map(np.testing.assert_array_equal, dict(lm.params), dict(organism.lm.params))
    assert lm.config == organism.lm.config and saes.config.layers == organism.saes.config.layers
    text = altruism(BANK, lm.tokenizer).prompts["query"].iloc[0]
    assert lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_seeds_hide_the_wiring_anew(organism):
    again, other = build_organism(bank=BANK), build_organism(Wiring(seed=1), BANK)
    jax.tree.map(np.testing.assert_array_equal, again.lm.params, organism.lm.params)
    assert again.features == organism.features != other.features
    assert np.abs(other.lm.params["embed"]["embedding"] - organism.lm.params["embed"]["embedding"]).max() > 1
    np.testing.assert_allclose(shift(other), shift(organism), atol=0.02)


def test_questions_that_no_word_tells_apart_are_named():
    from jaxmech.organism.words import only_in

    assert only_in({"how much is kept?"}, {"how much is given?"}) == {"kept"}
    with pytest.raises(ValueError, match="cannot tell this question .* 'how much is given'"):
        only_in({"how much is given"}, {"how much is given?"})
