"""Attribution and integrated gradients against finite differences, plain loops and exact identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech.answers import score
from jaxmech.answers.prompts import Prefix
from jaxmech.interventions import attribution
from jaxmech.interventions.edits import Replace, add_vector, at_last, at_positions
from jaxmech.sae.collect import run_decision

pytestmark = pytest.mark.slow

AMOUNTS = ["0", "1", "5", "10"]
BASE, DONOR = ["a stingy one $", "the mean man $"], ["a generous one $", "the kind man $"]
VALUES = jnp.array([0.0, 0.1, 0.5, 1.0])
LAYERS = jnp.array([1, 3])


@pytest.fixture(scope="module")
def runs(lm):
    out = {}
    for name, texts in (("base", BASE), ("donor", DONOR)):
        p = score.before_last(lm.config, lm.params, jm.make_prompts(lm, texts, AMOUNTS))
        out[name] = (p, run_decision(lm.config, lm.params, p))
    return out


def expected(lm, prompts, edits=None):
    return score.score(lm.config, lm.params, prompts, edits=edits)[0].expected(VALUES)


def test_attribution_is_the_derivative_of_true_patching(lm, saes, runs):
    (p, base), (_, donor) = runs["base"], runs["donor"]
    gradient = attribution.residual_gradient(lm.config, lm.params, p, VALUES)[LAYERS]
    scores = attribution.attribute(saes, gradient, base=base.resid[LAYERS], donor=donor.resid[LAYERS], by_prompt=True)
    h, checked = 1e-2, 0
    for slot, layer in enumerate((1, 3)):
        sae = saes.at(layer)
        dz = sae.encode(donor.resid[layer]) - sae.encode(base.resid[layer])
        for feature in np.flatnonzero(np.abs(np.asarray(dz)).min(0) > 0.1)[:4]:
            vector = jnp.zeros((4, 2, 32)).at[layer].set(dz[:, feature, None] * sae.params["W_dec"][feature])

            def mean(scale, vector=vector):
                return expected(lm, p, {"resid_post": (add_vector(scale * vector, at_last(4, 1)),)})

            slope = (mean(h) - mean(-h)) / (2 * h)
            np.testing.assert_allclose(scores[slot, :, feature], slope, rtol=0.05, atol=2e-4)
            checked += 1
    assert checked >= 3
    means = attribution.attribute(saes, gradient, base=base.resid[LAYERS], donor=donor.resid[LAYERS])
    np.testing.assert_allclose(means, scores.mean(1), rtol=1e-5, atol=1e-7)


def test_one_point_at_the_base_is_plain_attribution(lm, saes, runs):
    (p, base), (_, donor) = runs["base"], runs["donor"]
    resid = {"base": base.resid[LAYERS], "donor": donor.resid[LAYERS]}
    got = attribution.path_gradient(lm.config, lm.params, p, VALUES, saes=saes, **resid, points=jnp.zeros(1))
    want = attribution.residual_gradient(lm.config, lm.params, p, VALUES)[LAYERS]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer, from_zero", [(1, False), (3, False), (1, True)])
def test_integrated_gradients_of_a_layer_add_up_to_the_change(lm, saes, runs, layer, from_zero):
    (p, base), (_, donor) = runs["base"], runs["donor"]
    sae = saes.at(layer).as_stack()
    end = None if from_zero else donor.resid[layer : layer + 1]
    resid = {"base": base.resid[layer : layer + 1], "donor": end}
    gradient = attribution.path_gradient(
        lm.config, lm.params, p, VALUES, saes=sae, **resid, points=attribution.midpoints(100)
    )
    total = attribution.attribute(sae, gradient, **resid, by_prompt=True).sum((0, 2))
    z = sae.encode(resid["base"])
    way = (z if from_zero else sae.encode(resid["donor"]) - z) @ sae.params["W_dec"]
    push = jnp.zeros((4, 2, 32)).at[layer].set((-1 if from_zero else 1) * way[0])
    moved = expected(lm, p, {"resid_post": (add_vector(push, at_last(4, 1)),)})
    want = (expected(lm, p) - moved) if from_zero else (moved - expected(lm, p))
    assert np.abs(want).max() > 5e-3
    np.testing.assert_allclose(total, want, rtol=1e-2, atol=1e-4)


def test_the_decision_token_of_all_positions_and_finite_differences(lm):
    prompts = jm.make_prompts(lm, BASE, AMOUNTS)
    everywhere = attribution.residual_gradient(lm.config, lm.params, prompts, VALUES, everywhere=True)
    last = attribution.residual_gradient(lm.config, lm.params, prompts, VALUES)
    assert everywhere.shape == (4, 2, *prompts.tokens.shape[1:], 32)
    np.testing.assert_allclose(everywhere[:, :, -1], last, rtol=1e-3, atol=1e-6)
    again = attribution.residual_gradient(lm.config, lm.params, prompts, VALUES, everywhere=True, remat=True)
    np.testing.assert_allclose(again, everywhere, rtol=1e-3, atol=1e-6)
    _, out = score.score(lm.config, lm.params, prompts, taps=("resid_post",))
    T = prompts.tokens.shape[1]
    resid, direction = out.taps["resid_post"][:, :, :T], jax.random.normal(jax.random.key(2), (32,))
    for layer, slot in ((0, 5), (2, 9)):

        def moved(scale, layer=layer, slot=slot):
            donor = resid.at[layer, :, slot].add(scale * direction)
            edit = Replace(donor=donor, spans=at_positions(4, jnp.arange(T) == slot, (layer,)))
            return expected(lm, prompts, {"resid_post": (edit,)})

        slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
        np.testing.assert_allclose(everywhere[layer, :, slot] @ direction, slope, rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("site", ["resid_post", "attn_z"])
def test_shared_worked_examples_change_nothing(lm, site):
    """Three prompts, two of which share their examples, against each written out as one text."""
    prefixes, texts = ["he gave 1.\n", "she kept 5.\n", "he gave 1.\n"], ["a stingy one $", "my mean man $", "who? $"]
    shared = jm.make_prompts(lm, texts, AMOUNTS, prefixes=prefixes)
    got = attribution.residual_gradient(lm.config, lm.params, shared, VALUES, site=site, everywhere=True)
    prefix = shared.prefix
    for b in range(3):
        alone = jm.make_prompts(lm, [prefixes[b] + texts[b]], AMOUNTS)
        want = attribution.residual_gradient(lm.config, lm.params, alone, VALUES, site=site, everywhere=True)
        want = want[:, 0, alone.mask[0]]
        real = np.concatenate([prefix.mask[prefix.rows[b]], shared.mask[b]])
        np.testing.assert_allclose(got[:, b, real], want, rtol=2e-3, atol=2e-6)
        assert not np.any(got[:, b, ~real])
    by_one = attribution.residual_gradient(lm.config, lm.params, shared, VALUES, site=site, everywhere=True, chunk=1)
    np.testing.assert_allclose(by_one, got, rtol=2e-3, atol=2e-6)
    decision = attribution.residual_gradient(lm.config, lm.params, shared, VALUES, site=site)
    np.testing.assert_allclose(decision, got[:, :, -1], rtol=1e-3, atol=2e-6)


def test_chunks_of_prefixes_change_nothing(lm):
    """Prefixes of unlike length, which are cut; one that nobody follows; values of their own for each prompt."""
    prefixes = ["he gave 1.\n" * 8, "she kept 5.\n", "he gave 1.\n" * 8, "the man gave 10.\n" * 4]
    prompts = jm.make_prompts(lm, ["a stingy one $", "my man $", "who? $", "she $"], AMOUNTS, prefixes=prefixes)
    tokens, mask, rows = (np.asarray(a) for a in prompts.prefix)
    unread = Prefix(tokens[[0, 0, 1, 2, 0]], mask[[0, 0, 1, 2, 0]], jnp.asarray(rows + 1))
    prompts = prompts._replace(prefix=jax.tree.map(jnp.asarray, unread))
    values = VALUES * jnp.arange(1.0, 5.0)[:, None]
    gradient = lambda chunk: attribution.residual_gradient(  # noqa: E731
        lm.config, lm.params, prompts, values, everywhere=True, chunk=chunk
    )
    together = gradient(8)
    real = np.concatenate([mask[rows], prompts.mask], axis=1)
    assert together.shape[2] > 64 and not np.any(together[:, ~real]) and np.all(np.any(together[0, real], axis=1))
    before = attribution._shared_gradients._cache_size()
    for chunk in (1, 2):
        np.testing.assert_allclose(gradient(chunk), together, rtol=2e-3, atol=2e-6)
    assert attribution._shared_gradients._cache_size() - before <= 4  # two lengths for each number of prefixes
    with pytest.raises(ValueError, match="chunk"):
        gradient(0)


def test_a_dictionary_that_normalises_tokens_counts_their_scale(lm, saes, runs):
    """Its decoder speaks in units of each token: the attribution of all features together is that of the whole move."""
    (p, base), (_, donor) = runs["base"], runs["donor"]
    sae = saes.at(1).as_stack()
    sae = sae.replace(config=sae.config.__class__(**{**vars(sae.config), "normalize": "norm"}))
    resid = {"base": base.resid[1:2], "donor": donor.resid[1:2]}
    gradient = attribution.residual_gradient(lm.config, lm.params, p, VALUES)[1:2]
    got = attribution.attribute(sae, gradient, **resid, by_prompt=True).sum((0, 2))
    scale = np.sqrt((np.asarray(resid["base"]) ** 2).mean(-1, keepdims=True))
    way = ((sae.encode(resid["donor"]) - sae.encode(resid["base"])) @ sae.params["W_dec"]) * scale
    np.testing.assert_allclose(got, (way * gradient).sum((0, 2)), rtol=1e-4)


def test_no_array_over_layers_prompts_and_features(lm, saes, runs):
    base, donor = runs["base"][1], runs["donor"][1]
    traced = jax.make_jaxpr(attribution.attribute)(
        saes, base.resid[LAYERS], base=base.resid[LAYERS], donor=donor.resid[LAYERS]
    )
    assert "f32[2,2,24]" not in str(traced) and "f32[2,24]" in str(traced)


def test_double_precision_switched_on_changes_nothing(lm, saes, runs):
    """JAX_ENABLE_X64 makes new arrays float64, which a loop that began in float32 cannot carry."""
    (p, base), (_, donor) = runs["base"], runs["donor"]
    resid = {"base": base.resid[LAYERS], "donor": donor.resid[LAYERS]}
    shared = jm.make_prompts(lm, BASE, AMOUNTS, prefixes=["a b\n"] * 2)

    def results(points):
        along = attribution.path_gradient(lm.config, lm.params, p, VALUES, saes=saes, **resid, points=points())
        everywhere = attribution.residual_gradient(lm.config, lm.params, shared, VALUES, everywhere=True)
        return along, everywhere, attribution.attribute(saes, along, **resid)

    want = results(lambda: attribution.midpoints(2))
    with jax.enable_x64(True):
        for points in (lambda: attribution.midpoints(2), lambda: np.array([0.25, 0.75])):
            for got, once in zip(results(points), want, strict=True):
                assert got.dtype == jnp.float32
                np.testing.assert_allclose(got, once, rtol=1e-4, atol=1e-6)


def test_arrays_of_other_layers_or_prompts_are_named(saes):
    right = jnp.zeros((2, 3, 32))
    for wrong in (jnp.zeros((4, 3, 32)), jnp.zeros((2, 3, 16)), jnp.zeros((2, 5, 32)), jnp.zeros((2, 32))):
        with pytest.raises(ValueError, match=r"gradient, base: expected \[L',B,D\] .* layers 1, 3, got"):
            attribution.attribute(saes, right, base=wrong)


@pytest.mark.parametrize("everywhere", [False, True])
def test_values_of_another_number_of_prompts_are_named(lm, everywhere):
    prompts = jm.make_prompts(lm, ["one $", "a man $"], ["1", "5"], prefixes=["kind $1\n", "kind $1\n"])
    with pytest.raises(ValueError, match=r"values: expected \[N\] or \[B,N\] for 2 prompts, got \[7, 2\]"):
        attribution.residual_gradient(lm.config, lm.params, prompts, jnp.ones((7, 2)), everywhere=everywhere)
