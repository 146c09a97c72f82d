"""Patching, attribution, steering and proximity against plain loops, finite differences and identities."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech.answers import score
from jaxmech.answers.trie import build_tries
from jaxmech.interventions import controls, patching, steering
from jaxmech.interventions.edits import Replace, add_vector, at_last, everywhere, merge, select
from jaxmech.interventions.proximity import base_sublayers, direct_effects, mediated_effect, within_layer_difference
from jaxmech.interventions.sweep import run_chunk
from jaxmech.models.decoder import forward
from jaxmech.sae.collect import run_decision

AMOUNTS = ["0", "1", "5", "10"]
BASE, DONOR = ["a stingy one $", "the mean man $"], ["a generous one $", "the kind man $"]
VALUES = jnp.array([0.0, 0.1, 0.5, 1.0])
FIRST, SECOND, LATE = (1, 12), (1, 16), (3, 17)
"""Features whose values differ between base and donor, of both prompts: of others a patch does nothing."""


@pytest.fixture(scope="module")
def runs(lm):
    def prompts(texts):
        tokens, mask = jm.encode_prompts(lm, texts, length=20)
        full = jm.Prompts(tokens, mask, build_tries(lm, texts, [AMOUNTS] * len(texts)))
        return score.before_last(lm.config, lm.params, full)

    out = {}
    for name, texts in (("base", BASE), ("donor", DONOR)):
        p = prompts(texts)
        out[name] = (p, run_decision(lm.config, lm.params, p))
    return out


def sets(*pairs):
    return jax.tree.map(lambda *a: jnp.stack(a), *(select(p, 4, 2) for p in pairs))


def test_the_features_that_are_patched_here_differ(saes, runs):
    (_, base), (_, donor) = runs["base"], runs["donor"]
    for layer, feature in (FIRST, SECOND, LATE):
        codes = [saes.at(layer).encode(run.resid[layer])[:, feature] for run in (base, donor)]
        assert (np.abs(codes[0] - codes[1]) > 0.3).all()


@pytest.mark.slow
def test_patching_a_prompt_with_itself_changes_nothing(lm, saes, runs):
    p, base = runs["base"]
    got = patching.patch_features(
        lm.config, lm.params, p, sets([FIRST, LATE], [SECOND]), saes=saes, donor=base.resid
    ).logprobs
    for each in got:
        np.testing.assert_allclose(each, base.choices.logprobs, atol=2e-5)
    for got in patching.patch_parts(
        lm.config, lm.params, p, jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]), saes=saes, donor=base.resid
    ).logprobs:
        np.testing.assert_allclose(got, base.choices.logprobs, atol=2e-5)


def test_sets_are_set_to_the_donor_after_upstream_patches(lm, saes, runs):
    """By hand: patch at layer 1, run on, read z at layer 3 anew, and push there by what is still missing."""
    (p, _), (_, donor) = runs["base"], runs["donor"]
    first = {"resid_post": (one_layer(lm, saes, [FIRST, SECOND], donor.resid),)}
    both = then_set(lm, saes, p, first, LATE, donor.resid)
    want = score.score(lm.config, lm.params, p, edits=both)[0].logprobs
    got = patching.patch_features(
        lm.config, lm.params, p, sets([FIRST, SECOND, LATE]), saes=saes, donor=donor.resid
    ).logprobs[0]
    np.testing.assert_allclose(got, want, atol=1e-4)


def then_set(lm, saes, p, edits, pair, resid):
    """The edits, and what a feature, read from the run that holds them, still lacks of its value at `resid`."""
    (layer, feature), sae = pair, saes.at(pair[0])
    _, run = score.score(lm.config, lm.params, p, edits=edits, taps=("resid_post",))
    now, then = (sae.encode(x)[:, feature] for x in (run.taps["resid_post"][layer, :, 0], resid[layer]))
    push = jnp.zeros((4, 2, 32)).at[layer].set((then - now)[:, None] * sae.params["W_dec"][feature])
    return merge(edits, {"resid_post": (add_vector(push, at_last(4, 1, (layer,))),)})


def one_layer(lm, saes, pairs, resid):
    return patching.patch_edit(saes, select(pairs, 4, 2), donor=resid, spans=at_last(4, 1))["resid_post"][0]


def test_whole_residual_at_the_last_layer_is_the_donor(lm, saes, runs):
    """With layer 3, the last, replaced, the first token's distribution is the donor's own."""
    (p, _), (q, donor) = runs["base"], runs["donor"]
    spans = at_last(4, 1, (3,))
    edit = {"resid_post": (Replace(donor=donor.resid[:, :, None], spans=spans),)}
    _, got = score.score(lm.config, lm.params, p, edits=edit)
    _, want = score.score(lm.config, lm.params, q)
    np.testing.assert_allclose(got.final[:, 0], want.final[:, 0], rtol=1e-4, atol=1e-3)


def test_steering_sweep_equals_single_runs_and_traces_once(lm, runs):
    p, base = runs["base"]
    v = jax.random.normal(jax.random.key(0), (4, 32))
    alphas = np.array([-2.0, 0.0, 1.0])
    before = run_chunk._cache_size()
    swept = steering.steer(lm.config, lm.params, p, alphas[:, None, None] * v).logprobs
    steering.steer(lm.config, lm.params, p, alphas[:, None, None] * (3 * v))
    assert run_chunk._cache_size() == before + 1
    np.testing.assert_allclose(swept[1], base.choices.logprobs, atol=1e-5)
    for alpha, got in zip(alphas, swept, strict=True):
        edits = {"resid_post": (add_vector(alpha * v, at_last(4, 1)),)}
        np.testing.assert_allclose(got, score.score(lm.config, lm.params, p, edits=edits)[0].logprobs, atol=1e-4)


def test_a_dose_sets_features_once_however_many_layers_see_them(lm, saes, runs):
    """By hand: at layer 1 push by the dose, run on, and at layer 3 push by what is still missing there."""
    p, base = runs["base"]
    chosen = select([(1, 3), (3, 5)], 4, 2)
    gap = np.zeros((4, 2), np.float32)
    gap[1, 0], gap[3, 0] = 2.0, -1.5
    alphas = np.array([-1.0, 0.0, 0.5, 2.0])

    def run(doses):
        return steering.set_to_dose(
            lm.config, lm.params, p, doses, saes=saes, selection=chosen, gap=gap, base=base.resid, chunk=2
        ).logprobs

    got = run(alphas)
    np.testing.assert_allclose(got[1], base.choices.logprobs, atol=2e-5)
    before = run_chunk._cache_size()
    run(np.array([3.0, -3.0, 0.1]))
    assert run_chunk._cache_size() == before
    for alpha, want in zip(alphas, got, strict=True):
        pushes = None
        for layer, feature in ((1, 3), (3, 5)):
            resid = base.resid
            if pushes is not None:
                resid = score.score(lm.config, lm.params, p, edits=pushes, taps=("resid_post",))[1].taps["resid_post"][
                    :, :, 0
                ]
            sae = saes.at(layer)
            target = jnp.maximum(sae.encode(base.resid[layer])[:, feature] + alpha * gap[layer, 0], 0)
            missing = target - sae.encode(resid[layer])[:, feature]
            push = jnp.zeros((4, 2, 32)).at[layer].set(missing[:, None] * sae.params["W_dec"][feature])
            pushes = merge(pushes, {"resid_post": (add_vector(push, at_last(4, 1, (layer,))),)})
        np.testing.assert_allclose(want, score.score(lm.config, lm.params, p, edits=pushes)[0].logprobs, atol=1e-4)


def test_what_an_edit_adds_is_what_it_adds_after_those_below(lm, saes, runs):
    (p, _), (_, donor) = runs["base"], runs["donor"]
    chosen = [FIRST, SECOND, LATE]
    added = controls.added(lm.config, lm.params, p, one_layer(lm, saes, chosen, donor.resid))
    assert not np.asarray(added[jnp.array([0, 2])]).any()
    edits = {"resid_post": (add_vector(added, at_last(4, 1)),)}
    want = patching.patch_features(lm.config, lm.params, p, sets(chosen), saes=saes, donor=donor.resid).logprobs[0]
    np.testing.assert_allclose(score.score(lm.config, lm.params, p, edits=edits)[0].logprobs, want, atol=1e-4)


def test_matched_sets_and_directions_have_the_norm_asked_for(lm, saes, runs):
    (_, base), (_, donor) = runs["base"], runs["donor"]
    norm = jnp.zeros((4, 2)).at[jnp.array([1, 3])].set(jnp.array([[1.5, 0.5], [2.0, 0.25]]))
    differ = np.abs(np.stack([saes.at(i).encode(donor.resid[i]) - saes.at(i).encode(base.resid[i]) for i in (1, 3)]))
    features = differ.min(1).argmax(1)
    spans = at_last(4, 1)
    matched = controls.AddMatched(saes, donor.resid, base.resid, norm, spans)
    both, first = [(1, int(features[0])), (3, int(features[1]))], [(1, int(features[0]))]
    chosen = sets(both, first, [])
    for point, layers in ((0, (1, 3)), (1, (1,)), (2, ())):
        vector = matched(jax.tree.map(itemgetter(point), chosen))["resid_post"][0].vector
        held = jnp.zeros(4, bool).at[jnp.array(layers, int)].set(True)
        np.testing.assert_allclose(jnp.linalg.norm(vector, axis=-1), jnp.where(held[:, None], norm, 0), rtol=1e-5)
    share = np.linalg.norm(norm[1]) / np.linalg.norm(norm)
    np.testing.assert_allclose(matched.achieved(chosen), [1.0, share, 0.0], rtol=1e-5)
    # One feature alone, rescaled, points along its own decoder row.
    vector = matched(jax.tree.map(itemgetter(1), chosen))["resid_post"][0].vector[1]
    row = saes.at(1).params["W_dec"][features[0]]
    np.testing.assert_allclose(jnp.abs(vector @ row) / jnp.linalg.norm(row), norm[1], rtol=1e-4)
    direction = controls.AddDirection(norm, spans)(jax.random.normal(jax.random.key(0), (4, 32)))
    np.testing.assert_allclose(jnp.linalg.norm(direction["resid_post"][0].vector, axis=-1), norm, rtol=1e-5)


def test_usable_range_is_interpolated_between_coefficients():
    alphas = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert steering.usable_range(alphas, np.array([9.0, 0.5, 0.3, 0.5, 0.9])) == pytest.approx((-1 - 0.5 / 8.5, 2.0))
    assert steering.usable_range(alphas, np.array([9.0, 2.0, 5.0, np.inf, 0.1])) == (-0.5, 0.0)


def test_language_cost_against_a_loop(lm, tokens):
    v = 2 * jax.random.normal(jax.random.key(1), (2, 4, 32)).at[0].set(0.0)
    mask = jnp.ones_like(tokens, bool).at[0, 8:].set(False)
    nll, kl = steering.language_cost(
        lm.config, lm.params, tokens, steering.AddVector(everywhere(lm.config.n_layers)), v, mask=mask
    )
    assert abs(float(kl[0])) < 1e-6 and float(kl[1]) > 0
    logp = jax.nn.log_softmax(forward(lm.config, lm.params, tokens, mask=mask, logits="all").logits)
    want = [-logp[b, t, tokens[b, t + 1]] for b in range(3) for t in range(11) if mask[b, t + 1]]
    assert float(nll[0]) == pytest.approx(float(np.mean(want)), rel=1e-4)


def test_direct_effect_with_nothing_downstream_is_the_total(lm, saes, runs):
    """At the last layer nothing is left to mediate, save what the answers' own tokens read of the decision token."""
    (p, base), (_, donor) = runs["base"], runs["donor"]
    sae = saes.at(1)
    early = int(np.abs(sae.encode(donor.resid[1]) - sae.encode(base.resid[1])).min(0).argmax())  # one that moves
    chosen = sets([LATE], [(1, early)])
    sublayers = base_sublayers(lm.config, lm.params, p)
    total = patching.patch_features(lm.config, lm.params, p, chosen, saes=saes, donor=donor.resid).logprobs
    direct = direct_effects(lm.config, lm.params, p, chosen, saes=saes, donor=donor.resid, base=sublayers).logprobs
    np.testing.assert_allclose(direct[0], total[0], atol=1e-4)
    assert np.abs(total[1] - base.choices.logprobs).max() > 1e-3
    assert np.abs(direct[1] - total[1]).max() > 1e-3


def test_holding_a_set_at_base_takes_its_part_out(lm, saes, runs):
    """By hand: patch at layer 1, run on, and at layer 3 push the held feature back to where it was."""
    (p, base), (_, donor) = runs["base"], runs["donor"]
    patched, held, nothing = (select(pairs, 4, 1) for pairs in ([FIRST], [LATE], []))
    effect = partial(
        mediated_effect, lm.config, lm.params, p, saes=saes, patched=patched, donor=donor.resid, base_donor=base.resid
    )
    free, without = effect(held=nothing).logprobs, effect(held=held).logprobs
    want = patching.patch_features(lm.config, lm.params, p, sets([FIRST]), saes=saes, donor=donor.resid).logprobs[0]
    np.testing.assert_allclose(free, want, atol=1e-5)
    by_hand = then_set(lm, saes, p, {"resid_post": (one_layer(lm, saes, [FIRST], donor.resid),)}, LATE, base.resid)
    np.testing.assert_allclose(without, score.score(lm.config, lm.params, p, edits=by_hand)[0].logprobs, atol=1e-4)
    assert np.abs(free - without).max() > 1e-3
    with pytest.raises(ValueError, match=r"held: \(1, 12\) cannot be patched and held at once"):
        effect(held=patched)


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_there_is_no_next_token_after_what_is_no_number(lm, tokens, wrong):
    vectors = np.zeros((2, 4, 32), np.float32)
    run = partial(steering.next_token, lm.config, lm.params, tokens, steering.AddVector(everywhere(4)), mask=None)
    assert (np.asarray(run(vectors)) >= 0).all()
    vectors[1, 3] = wrong
    with pytest.raises(ValueError, match="point 1, row 0: the logits are NaN or infinite"):
        run(vectors)


def test_matched_sets_match_layers_and_avoid_the_selection(saes):
    rng = np.random.default_rng(0)
    fires, strength = rng.uniform(0.1, 1, (2, 24)), rng.uniform(size=(2, 24))
    chosen = [(1, 3), (1, 4), (3, 9)]
    for s in controls.matched_sets(
        chosen, fires=fires, strength=strength, layers=(1, 3), sets=20, key=jax.random.key(0), neighbours=5
    ):
        assert [layer for layer, _ in s] == [1, 1, 3] and not set(s) & set(chosen) and len(set(s)) == 3
    with pytest.raises(ValueError, match="too few"):
        controls.matched_sets(
            [(1, 3)], fires=np.zeros((2, 24)), strength=strength, layers=(1, 3), sets=1, key=jax.random.key(0)
        )


def test_layer_matched_difference():
    layer = np.repeat([2, 5, 9], 6)
    s2 = np.tile([True, False], 9)
    proximity = layer / 10 + 0.2 * s2
    difference, p, layers = within_layer_difference(proximity, layer, s2, permutations=500, key=jax.random.key(0))
    assert difference == pytest.approx(0.2) and p < 0.05 and layers == 3
    assert within_layer_difference(proximity, layer, layer > 4, permutations=10, key=jax.random.key(0))[2] == 0


def test_dose_response_and_usable_range():
    alphas = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    d = steering.dose_response(alphas, 0.3 + 0.1 * alphas)
    assert d["slope"] == pytest.approx(0.1) and d["spearman"] == pytest.approx(1.0)
    assert d["isotonic_r2"] == pytest.approx(1.0) and d["asymmetry"] == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(list(steering.dose_response(alphas, np.array([0.1, 0.2, np.nan, 0.4, 0.5])).values())).all()
    assert steering.usable_range(alphas, np.array([0.0, np.inf, 0.0, 0.0, 0.0])) == (0.0, 2.0)
