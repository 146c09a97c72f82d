"""Set, add and multiply, and the tokens that are steered, against the edits that do each of it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.answers import score
from jaxmech.answers.prompts import make_prompts
from jaxmech.interventions import edits, steering
from jaxmech.interventions.patching import donor_values
from jaxmech.interventions.sweep import run_chunk, sweep
from jaxmech.sae.collect import run_decision

AMOUNTS = ["0", "1", "5", "10"]
TEXTS = ["a stingy one $", "the kind man $"]
FEATURES = [(1, 12), (1, 16), (3, 17)]


@pytest.fixture(scope="module")
def prompts(lm):
    return score.before_last(lm.config, lm.params, make_prompts(lm, TEXTS, AMOUNTS))


@pytest.fixture(scope="module")
def steered(lm, saes, prompts):
    """What is swept, [L,B,K] values and [L,K] gaps."""
    selection = edits.select(FEATURES, lm.config.n_layers)
    base = run_decision(lm.config, lm.params, prompts)
    values = donor_values(edits.gather(saes, selection)[0], base.resid)
    gap = np.where(np.asarray(selection.valid), [[0.9, -0.4]] * lm.config.n_layers, 0.0).astype(np.float32)
    spans = edits.at_last(lm.config.n_layers, prompts.tokens.shape[1])
    return steering.ScaleAndShift(saes, selection, spans), base, values, gap


def test_every_way_is_what_its_own_edit_does_and_all_share_one_program(lm, saes, prompts, steered):
    build, base, values, gap = steered
    changes = [
        steering.gain_and_shift(way, alpha, values=values, gap=jnp.asarray(gap))
        for way in steering.WAYS
        for alpha in (1.0, -1.0)
    ]
    before = run_chunk._cache_size()
    points = jax.tree.map(lambda *each: np.stack(each), *changes)
    got = sweep(lm.config, lm.params, prompts, build, points, chunk=6).logprobs
    assert run_chunk._cache_size() == before + 1
    same = dict(saes=saes, selection=build.selection, gap=gap, base=base.resid)
    np.testing.assert_allclose(
        got[:2], steering.set_to_dose(lm.config, lm.params, prompts, [1.0, -1.0], **same).logprobs, atol=1e-4
    )
    direction = steering.feature_direction(saes, build.selection, jnp.asarray(gap))
    added = steering.steer(lm.config, lm.params, prompts, jnp.stack([direction, -direction])).logprobs
    np.testing.assert_allclose(got[2:4], added, atol=1e-4)
    for row, gain in zip(got[4:], ([[2.0, 0.0]], [[0.0, 2.0]]), strict=True):
        edit = edits.features(saes, build.selection, gain=jnp.asarray([gain]), shift=0.0, spans=build.spans)
        want = score.score(lm.config, lm.params, prompts, edits={"resid_post": (edit,)})[0].logprobs
        np.testing.assert_allclose(row, want, atol=1e-4)
    assert np.abs(got - np.asarray(base.choices.logprobs)).max((1, 2)).min() > 1e-3  # each moves something


def test_where_gain_is_one_and_shift_zero_nothing_changes(lm, prompts, steered):
    build, base, values, _ = steered
    points = np.ones_like(values)[None], np.zeros_like(values)[None]
    got = sweep(lm.config, lm.params, prompts, build, points).logprobs[0]
    np.testing.assert_allclose(got, base.choices.logprobs, atol=1e-5)


def test_other_ways_are_refused(steered):
    _, _, values, gap = steered
    with pytest.raises(ValueError, match="way: expected one of set, add, multiply, got 'double'"):
        steering.gain_and_shift("double", 1.0, values=values, gap=jnp.asarray(gap))


@pytest.mark.slow
def test_tokens_that_differ_among_points(lm):
    """Each point is scored as if it were alone, the worked examples edited where its spans say so."""
    L, rng = lm.config.n_layers, np.random.default_rng(0)
    prompts = make_prompts(lm, TEXTS, AMOUNTS, prefixes=["one man gave $5\n", "a kind one gave $10\n"])
    vector = 0.3 * rng.normal(size=(L, lm.config.d_model)).astype(np.float32)
    T = prompts.tokens.shape[1]
    last, everywhere = edits.at_last(L, T), edits.everywhere(L)
    none, on, every = jnp.zeros((L, 1), bool), jnp.ones((L, 1), bool), jnp.ones((L, 1, T), bool)
    spans = [
        last.replace(prefix=none), last.replace(prefix=none, answer=on), edits.Spans(none, every, none),
        edits.Spans(on, every, none), edits.Spans(on, every, on),
    ]  # fmt: skip
    points = jax.tree.map(lambda *each: np.stack(each), *((vector, span) for span in spans))
    got = sweep(lm.config, lm.params, prompts, steering.AddOn(), points).logprobs
    alone = [last, last.replace(answer=on), edits.Spans(None, every, none), spans[3], everywhere]
    for row, span in zip(got, alone, strict=True):
        edit = {"resid_post": (edits.add_vector(vector, span),)}
        want = score.score(lm.config, lm.params, prompts, edits=edit)[0].logprobs
        np.testing.assert_allclose(row, want, atol=1e-4)
    assert min(np.abs(a - b).max() for i, a in enumerate(got) for b in got[:i]) > 1e-3
