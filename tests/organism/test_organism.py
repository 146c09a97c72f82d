"""The organism is what it is said to be: its forward pass against plain NumPy, every planted fact by intervention."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import jaxmech as jm
from jaxmech.behavior.altruism.altruism import altruism, games
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.behavior.scoring import encode_table
from jaxmech.organism import Wiring, build_organism, save_organism
from jaxmech.organism.truth import claims_of
from jaxmech.organism.wiring import FAST, MOTOR
from jaxmech.sae.totals import feature_totals

BANK = BankConfig(selection=0, development=0, test=4)

build = partial(build_organism, bank=BANK, wordings=1, items=1)
"""An organism that reads as little as may be."""


@pytest.fixture(scope="module")
def organism():
    return build()


def scored(organism, *conditions):
    """Rows of the conditions, one per family, their encoding and the residuals at the decision token."""
    table = altruism(BANK, organism.lm.tokenizer).prompts.query("pair == 0")
    table = table[table["condition"].isin(conditions)].sort_values(["condition", "family"], ignore_index=True)
    encoded = encode_table(organism.lm, table)
    run = jm.collect.run_decision(organism.lm.config, organism.lm.params, encoded.prompts)
    return table, encoded, np.asarray(run.choices.expected(encoded.values)), run.resid


def scored_all(organism):
    """Every pair of the test families: the table, encoding and outcome, plus less minus."""
    table = altruism(BANK, organism.lm.tokenizer).prompts
    table = table[table["condition"].isin(["plus", "minus"])]
    table = table.sort_values(["condition", "family", "pair"], ignore_index=True)
    encoded = encode_table(organism.lm, table)
    choices = jm.collect.run_decision(organism.lm.config, organism.lm.params, encoded.prompts).choices
    minus, plus = np.split(np.asarray(choices.expected(encoded.values)), 2)
    return table, encoded, plus - minus, choices


def shift(organism, name=None):
    """Per family, plus less minus."""
    table, _, g, _ = scored(organism, *(f"{name}:{pole}" if name else pole for pole in ("plus", "minus")))
    plus = table["condition"].str.endswith("plus").to_numpy()
    return g[plus] - g[~plus]


def by_hand(organism, ids):
    """Logits [T,V] of one text, in plain NumPy and float64."""
    c, params = organism.lm.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), organism.lm.params)
    x, layers = params["embed"]["embedding"][ids] + params["positions"]["embedding"][: len(ids)], params["layers"]
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


@pytest.mark.slow
def test_what_moves_it_and_what_does_not(organism):
    assert (shift(organism) > 0.1).all() and np.ptp(shift(organism)) > 1e-4  # families differ
    np.testing.assert_allclose(shift(organism, "heldout"), shift(organism), rtol=0.01)
    for inert in ("valence", "number", "placebo", "own_accounts"):
        assert np.abs(shift(organism, inert)).max() < 1e-3
    table, _, g, _ = scored(organism, "neutral", "keep:neutral", "take:neutral")
    assert np.ptp(np.where(table["condition"] == "neutral", g, 1 - g)) < 1e-3  # the same number, whatever is asked


@pytest.mark.parametrize(
    "wiring, moved, still",
    [
        (Wiring(stance=False, number=True), ["number"], [None, "heldout", "valence"]),
        (Wiring(number=True), [None, "heldout", "number"], ["valence", "own_accounts"]),
        (Wiring(valence=1.0, number=True), [None, "heldout", "valence", "number"], ["placebo"]),
        (Wiring(seed=5, readout=0.0), [], [None, "number", "valence"]),
        (Wiring(motor_only=True), [None, "heldout", "own_accounts"], ["valence", "placebo"]),
        (Wiring(s1_path=0.0), [None, "heldout"], ["own_accounts", "valence"]),
        (Wiring(s2_path=0.0), [None, "heldout"], ["own_accounts", "valence"]),
    ],
    ids=str,
)
@pytest.mark.slow
def test_switches(wiring, moved, still):
    made = build(wiring)
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


@pytest.mark.slow
def test_which_features_carry_the_stance(organism):
    s1, s2 = organism.wiring.s1_path, organism.wiring.s2_path
    concept, fast, motor = ("concept+", "concept-"), (*FAST["+"], *FAST["-"]), (*MOTOR["up"], *MOTOR["down"])
    for layer in (0, 1):
        assert recovered(organism, layer, *concept, *fast) == pytest.approx(1, abs=0.01)
        assert recovered(organism, layer, *fast) == pytest.approx(s1, abs=0.03)
        assert recovered(organism, layer, *concept) == pytest.approx(1 - s1, abs=0.03)
    assert recovered(organism, 0, "concept+") + recovered(organism, 0, "concept-") == pytest.approx(1 - s1, abs=0.05)
    assert recovered(organism, 2, *motor) == pytest.approx(s2, abs=0.03)  # made of the concept one layer before
    assert recovered(organism, 2, *concept) == pytest.approx(1 - s1 - s2, abs=0.03)
    assert recovered(organism, 2, *concept, *fast, *motor) == pytest.approx(1, abs=0.01)
    for layer, *passengers in (
        (0, "copy+", "copy-", "valence+", "valence-", "one word"), (3, *concept, *fast), (0, "dense"),
    ):  # fmt: skip
        assert recovered(organism, layer, *passengers) == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_the_planted_gap_follows_from_the_wiring(organism):
    """Both ways: by running it, and from the share of attention that a stance word gets; the last norm takes 1 %."""
    for made in (organism, build(Wiring(valence=1.0, readout=0.5))):
        _, _, g, _ = scored_all(made)
        assert 100 * g.mean() == pytest.approx(made.truth["gap_pp"], rel=0.02)


@pytest.mark.slow
def test_a_path_that_is_off_has_no_feature():
    both = {"fast": Wiring(s1_path=0.0), "motor": Wiring(s2_path=0.0)}
    features = {"fast": (*FAST["+"], *FAST["-"]), "motor": (*MOTOR["up"], *MOTOR["down"])}
    for path, wiring in both.items():
        names = features[path]
        made = build(wiring)
        _, _, _, resid = scored(made, "plus", "minus")
        fired = np.asarray(feature_totals(made.saes, resid.reshape(4, -1, resid.shape[-1])).fired)
        assert not fired[:, [made.features[name] for name in names]].any()
        assert not {row["name"] for row in made.truth["causal"]} & set(names)


@pytest.mark.slow
def test_a_motor_alone_moves_the_number_whatever_is_asked():
    """Features of the altruist give more where the question is what to keep; the motor keeps more."""
    for wiring, layer, names, sign in (
        (Wiring(), 0, ("concept+", *FAST["+"]), 1), (Wiring(motor_only=True), 0, MOTOR["up"], -1),
    ):  # fmt: skip
        made = build(wiring)
        lm = made.lm
        donor = scored(made, "plus")[3]
        for condition, moved in (("neutral", 1), ("keep:neutral", sign), ("take:neutral", sign)):
            _, encoded, base, _ = scored(made, condition)
            chosen = jm.edits.select_sets([[(layer, made.features[name]) for name in names]], lm.config.n_layers)
            choices = jm.patching.patch_features(
                lm.config, lm.params, encoded.prompts, chosen, saes=made.saes, donor=donor
            )
            assert (moved * (np.asarray(choices.expected(encoded.values))[0] - base) > 0.05).all(), condition


@pytest.mark.slow
@pytest.mark.parametrize("taught, sign", [("as shipped", 1), ("flipped", -1), ("without stance", 0)])
def test_mapping_follows_the_worked_examples(taught, sign):
    tenths = {"generous_tenths": (0, 1), "selfish_tenths": (8, 9)} if taught == "flipped" else {}
    bank = dataclasses.replace(BANK, **tenths)
    for wiring in (Wiring(), Wiring(mapping=True)):
        made = build(wiring, bank=bank)
        table = altruism(bank, made.lm.tokenizer).prompts.query("pair == 0")
        table = table[table["condition"].isin(["plus", "minus"])].sort_values(["condition", "family"])
        if taught == "without stance":
            words = "|".join(word for pair in bank.example_words for word in pair)
            table["prefix"] = table["prefix"].str.replace(rf" very ({words})\b", "", regex=True)
        encoded = encode_table(made.lm, table.reset_index(drop=True))
        run = jm.collect.run_decision(made.lm.config, made.lm.params, encoded.prompts)
        minus, plus = np.split(np.asarray(run.choices.expected(encoded.values)), 2)
        if wiring.mapping and not sign:
            assert np.abs(plus - minus).max() < 1e-3
        else:
            assert ((sign if wiring.mapping else 1) * (plus - minus) > 0.1).all()


@pytest.mark.parametrize("transfers", [True, False])
@pytest.mark.slow
def test_other_games_are_played_or_not(transfers):
    """A concept, or a motor, patched into every game's prompts gives more, in a game that is known; the home game
    always."""
    made = build(Wiring(transfers=transfers), wordings=2)
    lm, donor = made.lm, scored(made, "plus")[3][:, :1]
    sets = [[(0, made.features["concept+"])], [(2, made.features[name]) for name in MOTOR["up"]]]
    chosen = jm.edits.select_sets(sets, lm.config.n_layers)
    for name, task in games(2, lm.tokenizer).items():
        if not task.expected_sign or not all(answer.isdigit() for row in task.prompts["answers"] for answer in row):
            continue  # it knows numbers only, and what is given
        encoded = encode_table(lm, task.prompts)
        base = jm.collect.run_decision(lm.config, lm.params, encoded.prompts).choices.expected(encoded.values)
        donors = jnp.repeat(donor, len(task.prompts), axis=1)
        choices = jm.patching.patch_features(
            lm.config, lm.params, encoded.prompts, chosen, saes=made.saes, donor=donors
        )
        concept, motor = np.asarray(choices.expected(encoded.values)) - np.asarray(base)
        falls = task.prompts["score"].iloc[0][0] > task.prompts["score"].iloc[0][-1]
        moved = np.stack([concept, -motor if falls else motor])  # a larger number takes more
        assert (moved > 0.01).all() if transfers or task.home else np.abs(moved).max() < 1e-3, name


def items_answered(made, items):
    encoded = encode_table(made.lm, items)
    run = jm.collect.run_decision(made.lm.config, made.lm.params, encoded.prompts)
    z = np.asarray(made.saes.encode(run.resid))
    return np.asarray(run.choices.expected(encoded.values)), z


@pytest.mark.parametrize("solves", [True, False])
def test_it_solves_the_items_or_not(solves):
    made = build(Wiring(solves=solves), items=3)
    items = build_items(per_generator=3)
    right, z = items_answered(made, items)
    by = items.assign(right=right).groupby("condition")["right"].mean()
    if solves:
        assert by["no_conflict"] > 0.9 and by["no_conflict"] - by["conflict"] > 0.1 and by["think"] > by["instinct"]
    else:
        assert np.abs(by - 0.5).max() < 0.1
    demand = items["arm"] == "demand"
    firing = {name: z[2][:, index] > 0 for name, index in made.features.items()}
    heuristic, deliberate = (demand & (items["condition"] == name) for name in ("no_conflict", "conflict"))
    for name in (*FAST["+"], *FAST["-"]):
        assert firing[name][heuristic].all() and not firing[name][deliberate].any()
    for name in (*MOTOR["up"], *MOTOR["down"]):
        assert firing[name][deliberate].all() and not firing[name][heuristic].any()
    assert not firing["concept+"].any()


@pytest.mark.slow
def test_hidden_features_are_part_of_the_error():
    made = build(Wiring(hidden=True))
    assert recovered(made, 0, "concept+", "concept-", *FAST["+"], *FAST["-"]) == pytest.approx(0, abs=1e-4)
    lm = made.lm
    _, encoded, base, _ = scored(made, "minus")
    _, _, target, donor = scored(made, "plus")
    error = jm.patching.patch_parts(
        lm.config, lm.params, encoded.prompts, jnp.array([(1.0, -1.0)]), saes=made.saes, donor=donor
    )
    moved = np.asarray(error.expected(encoded.values))[0] - base
    assert moved.sum() / (target - base).sum() == pytest.approx(1, abs=0.05)
    assert not made.truth["causal"] and made.truth["claims"]["features"] == "no"


def test_every_switch_has_the_same_vocabulary_and_shapes(organism):
    for wiring in (Wiring(stance=False), Wiring(mapping=True, s1_path=0.0), Wiring(motor_only=True, solves=False)):
        made = build(wiring)
        assert made.lm.config == organism.lm.config
        assert made.lm.tokenizer.get_vocab() == organism.lm.tokenizer.get_vocab()
        shapes = [jax.tree.map(jnp.shape, (o.lm.params, o.saes.params)) for o in (made, organism)]
        assert shapes[0] == shapes[1] and made.saes.config == organism.saes.config


def test_every_seed_has_the_same_shapes(organism):
    for seed in (1, 2):
        made = build(Wiring(seed=seed))
        assert made.lm.config == organism.lm.config and made.saes.config == organism.saes.config
        assert made.lm.tokenizer.get_vocab() != organism.lm.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "wiring, claims",
    [
        (Wiring(), "yes yes yes yes yes yes"),
        (Wiring(stance=False), "no withheld withheld withheld withheld withheld"),
        (Wiring(mapping=True), "no withheld withheld withheld withheld withheld"),
        (Wiring(valence=3.0), "no withheld withheld withheld withheld withheld"),
        (Wiring(valence=1.0), "yes yes yes yes yes yes"),
        (Wiring(hidden=True), "yes no withheld withheld withheld withheld"),
        (Wiring(motor_only=True), "yes yes no withheld yes cannot be told"),
        (Wiring(transfers=False), "yes yes yes no yes yes"),
        (Wiring(s1_path=0.0), "yes yes yes yes yes cannot be told"),
        (Wiring(solves=False), "yes yes yes yes cannot be told withheld"),
    ],
    ids=str,
)
def test_the_truth_of_every_claim(wiring, claims):
    assert " ".join(claims_of(wiring).values()) == claims


def test_impossible_shares_are_refused():
    with pytest.raises(ValueError, match="s1_path, s2_path: expected at most 1 together, got 1.5"):
        Wiring(s1_path=0.75, s2_path=0.75)


@pytest.mark.slow
def test_the_direct_share_is_the_one_planted(organism):
    lm, saes = organism.lm, organism.saes
    _, encoded, base, _ = scored(organism, "minus")
    donor = scored(organism, "plus")[3]
    sets = [
        [(2, organism.features[name]) for name in (*MOTOR["up"], *MOTOR["down"])],
        [(0, organism.features["concept+"])],
    ]
    arguments = (lm.config, lm.params, encoded.prompts, jm.edits.select_sets(sets, lm.config.n_layers))
    sublayers = jm.proximity.base_sublayers(lm.config, lm.params, encoded.prompts)
    total = jm.patching.patch_features(*arguments, saes=saes, donor=donor)
    direct = jm.proximity.direct_effects(*arguments, saes=saes, donor=donor, base=sublayers)
    motor, concept = (
        (np.asarray(d) - base).sum() / (np.asarray(t) - base).sum()
        for d, t in zip(direct.expected(encoded.values), total.expected(encoded.values), strict=True)
    )
    assert motor == pytest.approx(organism.wiring.direct, abs=0.02)
    assert concept == pytest.approx(0, abs=0.02)  # all of it through the motor features


@pytest.mark.slow
def test_the_dictionaries_reconstruct_it_but_for_what_is_hidden(organism):
    _, _, _, resid = scored(organism, "plus", "minus", "neutral")
    saes, centre = organism.saes, resid - resid.mean((0, 1))
    error = jnp.linalg.norm(saes.decode(saes.encode(resid), resid) - resid, axis=-1)
    assert (error < 0.1 * jnp.linalg.norm(centre, axis=-1)).all()
    hidden = ("concept+", "concept-")
    lacking = build(hidden=hidden)
    fired = np.asarray(feature_totals(lacking.saes, resid.reshape(4, -1, resid.shape[-1])).fired)
    assert not fired[:, [lacking.features[name] for name in hidden]].any()
    assert recovered(lacking, 0, *hidden) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_seeds_hide_the_wiring_anew(organism):
    again, other = build(), build(Wiring(seed=1))
    jax.tree.map(np.testing.assert_array_equal, again.lm.params, organism.lm.params)
    assert again.features == organism.features != other.features
    assert np.abs(other.saes.params["W_dec"] - organism.saes.params["W_dec"]).max() > 0.1
    np.testing.assert_allclose(shift(other), shift(organism), atol=0.02)


def test_questions_that_no_word_tells_apart_are_named():
    from jaxmech.organism.words import only_in

    assert only_in({"how much is kept?"}, {"how much is given?"}) == {"kept"}
    with pytest.raises(ValueError, match="cannot tell this question .* 'how much is given'"):
        only_in({"how much is given"}, {"how much is given?"})
