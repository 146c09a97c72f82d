"""Screens against single runs, in both directions at once, and the grid of layers and positions against a loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.answers import score
from jaxmech.interventions import screens
from jaxmech.interventions.controls import matched_sets
from jaxmech.interventions.edits import Replace, at_last, at_positions, select
from jaxmech.interventions.patching import patch_edit
from jaxmech.interventions.sweep import run_chunk, sweep
from jaxmech.sae.collect import run_decision

AMOUNTS = ["0", "1", "5", "10"]
TEXTS = ["a stingy one $", "the mean man $", "a generous one $", "the kind man $"]
CHOSEN = [(1, 3), (3, 5), (1, 7)]
L, D = 4, 32


@pytest.fixture(scope="module")
def prompts(lm):
    return score.make_prompts(lm, TEXTS, AMOUNTS)


def test_sets():
    assert screens.each_feature(CHOSEN) == [[(1, 3)], [(3, 5)], [(1, 7)]]
    assert screens.each_layer(CHOSEN) == [[(1, 3), (1, 7)], [(3, 5)]]
    assert screens.each_pair(CHOSEN) == [[(1, 3), (3, 5)], [(1, 3), (1, 7)], [(3, 5), (1, 7)]]


@pytest.mark.slow
def test_one_sweep_in_both_directions_equals_single_runs(lm, saes, prompts):
    resid = run_decision(lm.config, lm.params, prompts).resid
    donors = screens.twins(resid)
    np.testing.assert_array_equal(donors[:, 0], resid[:, 2])
    sets = screens.each_feature(CHOSEN) + screens.each_layer(CHOSEN) + screens.each_pair(CHOSEN)
    rng = np.random.default_rng(0)
    sets += matched_sets(
        CHOSEN,
        fires=rng.uniform(0.1, 1, (2, 24)),
        strength=rng.uniform(size=(2, 24)),
        layers=(1, 3),
        sets=4,
        key=jax.random.key(0),
    )
    traces = run_chunk._cache_size()
    got = screens.screen(lm.config, lm.params, prompts, sets, saes=saes, donor=donors, chunk=5).logprobs
    assert run_chunk._cache_size() == traces + 1
    spans = at_last(L, prompts.tokens.shape[1])
    for chosen, logprobs in zip(sets, got, strict=True):
        edits = patch_edit(saes, select(chosen, L, 2), donor=donors, spans=spans)
        want = score.score(lm.config, lm.params, prompts, edits=edits)[0].logprobs
        np.testing.assert_allclose(logprobs, want, atol=2e-4)
    with pytest.raises(ValueError, match=r"feature \(1, 24\) does not exist"):
        screens.screen(lm.config, lm.params, prompts, [[(1, 24)]], saes=saes, donor=donors)
    with pytest.raises(ValueError, match="even number"):
        screens.twins(resid[:, :3])


@pytest.mark.slow
def test_the_grid_equals_a_loop(lm, prompts):
    T = prompts.tokens.shape[1]
    donor = jax.random.normal(jax.random.key(0), (L, 4, T, D)) * 5
    positions = (T - 6, T - 1)
    traces = run_chunk._cache_size()
    got = screens.patch_positions(
        lm.config, lm.params, prompts, donor=donor, site="mlp_out", positions=positions
    ).logprobs
    assert got.shape[:3] == (L, 2, 4) and run_chunk._cache_size() == traces + 1
    for layer in range(L):
        for slot, position in enumerate(positions):
            where = at_positions(L, np.arange(T) == position, (layer,))
            edits = {"mlp_out": (Replace(donor=donor, spans=where),)}
            want = score.score(lm.config, lm.params, prompts, edits=edits)[0].logprobs
            np.testing.assert_allclose(got[layer, slot], want, atol=2e-4)
    with pytest.raises(ValueError, match="positions: expected 0"):
        screens.patch_positions(lm.config, lm.params, prompts, donor=donor, positions=[T])
    with pytest.raises(ValueError, match="donor: expected"):
        screens.patch_positions(lm.config, lm.params, prompts, donor=donor[:, :, :2])


def test_a_vector_one_layer_at_a_time():
    vector = jnp.arange(12.0).reshape(4, 3)
    points = screens.each_layer_alone(vector)
    np.testing.assert_array_equal(points.sum(0), vector)
    np.testing.assert_array_equal(points[2, 2], vector[2])


@pytest.mark.parametrize("place", [(99, 0), (0, 99), (-1, 0)])
def test_a_place_that_does_not_exist_gives_nan(lm, prompts, place):
    donor = jnp.zeros((L, 4, prompts.tokens.shape[1], D))
    points = np.array([(0, 1), place], np.int32)
    got = sweep(lm.config, lm.params, prompts, screens.ReplaceAt(donor), points).logprobs
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()


def test_nothing_to_screen_is_said(lm, saes, prompts):
    donor = screens.twins(run_decision(lm.config, lm.params, prompts).resid)
    for sets in ([], screens.each_pair([(1, 3)])):
        with pytest.raises(ValueError, match="^sets: expected at least one set of features, got none"):
            screens.screen(lm.config, lm.params, prompts, sets, saes=saes, donor=donor)
    for wrong, message in (([[(1, 3), (1, 3)]], "listed twice"), ([[(2, 3)]], "does not exist"), ([[3]], "pairs")):
        with pytest.raises(ValueError, match=message):
            screens.screen(lm.config, lm.params, prompts, wrong, saes=saes, donor=donor)
    with pytest.raises(ValueError, match=r"donor: expected the donors' \[L,B,D\] = \[4, 4, 32\].*got .*\[4, 2, 32\]"):
        screens.screen(lm.config, lm.params, prompts, [[(1, 3)]], saes=saes, donor=donor[:, :2])


@pytest.mark.slow
def test_a_grid_takes_masks(lm, prompts):
    T = prompts.tokens.shape[1]
    donor = jax.random.normal(jax.random.key(0), (L, 4, T, D))
    run = partial(screens.patch_positions, lm.config, lm.params, prompts, donor=donor)
    want = run(layers=[2], positions=[T - 1]).logprobs
    got = run(layers=np.arange(L) == 2, positions=[False] * (T - 1) + [True]).logprobs
    np.testing.assert_array_equal(got, want)
    for wrong in (dict(layers=[4]), dict(positions=np.ones(3, bool)), dict(layers=1)):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            run(**wrong)
