"""The sweep engine against each point alone from scratch, whatever varies among points; and what it computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.tree_util import Partial

from jaxmech.answers import score
from jaxmech.interventions import sweep as engine
from jaxmech.interventions.edits import (
    Edit,
    Replace,
    Spans,
    add_vector,
    at_last,
    at_positions,
    everywhere,
    features,
    select,
    select_sets,
)
from jaxmech.interventions.patching import patch_edit
from jaxmech.interventions.steering import AddVector
from jaxmech.models.generate import generate
from jaxmech.models.sharding import make_mesh

AMOUNTS = ["0", "1", "5", "10"]
TEXTS = ["a stingy one $", "the mean man gives $", "so $"]
BEFORE = ["x gives 5\ny gives 1\n", "z gives 10\n", "x gives 5\ny gives 1\n"]
L, D = 4, 32


@pytest.fixture(scope="module")
def prompts(lm):
    return score.make_prompts(lm, TEXTS, AMOUNTS, prefixes=BEFORE)


def vector(i, *shape):
    return 3 * jax.random.normal(jax.random.key(i), (*shape, L, D))


def stack(*points):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)


def one_by_one(lm, prompts, points):
    return np.stack([score.score(lm.config, lm.params, prompts, edits=edits)[0].logprobs for edits in points])


def spans(where, before=False, after=False, layers=range(L)):
    """Full-sized spans, so that points of any reach have arrays of one shape."""
    active = jnp.zeros(L, bool).at[jnp.asarray(layers)].set(True)
    where = active[:, None, None] & jnp.asarray(where)
    return Spans(active[:, None] & before, where, active[:, None] & after)


@pytest.mark.slow
def test_directions_layers_and_positions_in_one_sweep_equal_each_alone(lm, prompts):
    T = prompts.tokens.shape[1]
    slot = np.arange(T)
    last, late, never = slot == T - 1, slot >= T - 3, np.zeros(T, bool)
    where = [
        spans(last), spans(last, layers=[2]), spans(late, layers=[3]), spans(last, after=True, layers=[1, 3]),
        spans(never, after=True), spans(never),
    ]  # fmt: skip
    points = [{"resid_post": (add_vector(vector(i), span),)} for i, span in enumerate(where)]
    want = one_by_one(lm, prompts, points)
    for chunk in (None, 1, 4):
        got = engine.sweep(lm.config, lm.params, prompts, stack(*points), chunk=chunk)
        np.testing.assert_allclose(got.logprobs, want, atol=2e-4)
    # With one that acts on the worked examples too, all are computed from there on.
    points.append({"resid_post": (add_vector(vector(9), spans(~never, before=True, after=True)),)})
    got = engine.sweep(lm.config, lm.params, prompts, stack(*points), chunk=3)
    np.testing.assert_allclose(got.logprobs, one_by_one(lm, prompts, points), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "resid_post"])
def test_at_every_token_of_a_shared_prefix(lm, prompts, site):
    points = [{site: (add_vector(a * vector(0), everywhere(L, [layer])),)} for a, layer in ((1, 3), (-2, 1), (0, 2))]
    want = one_by_one(lm, prompts, points)
    got = engine.sweep(lm.config, lm.params, prompts, stack(*points)).logprobs
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(want[0] - want[2]).max() > 1e-2


@pytest.mark.slow
def test_values_of_each_prompt_part_the_prefix(lm, prompts):
    own = [{"resid_post": (add_vector(jnp.swapaxes(vector(3, 3), 0, 1), everywhere(L)),)}]
    got = engine.sweep(lm.config, lm.params, prompts, stack(*own)).logprobs
    np.testing.assert_allclose(got, one_by_one(lm, prompts, own), atol=2e-4)


def test_feature_sets_and_donors(lm, saes, prompts):
    """A function of the point, with the dictionaries and donors shared by all points."""
    resid, spans = jnp.swapaxes(vector(5, 3), 0, 1), at_last(L, prompts.tokens.shape[1])
    sets = [select(pairs, L, 2) for pairs in ([(1, 3), (3, 5)], [(3, 0), (3, 1)], [(1, 2)], [])]
    build = Partial(patch_edit, saes, donor=resid, spans=spans)
    got = engine.sweep(lm.config, lm.params, prompts, build, stack(*sets)).logprobs
    want = one_by_one(lm, prompts, [patch_edit(saes, s, donor=resid, spans=spans) for s in sets])
    np.testing.assert_allclose(got, want, atol=2e-4)
    np.testing.assert_allclose(got[-1], score.score(lm.config, lm.params, prompts)[0].logprobs, atol=2e-5)


@pytest.mark.slow
def test_donors_that_speak_of_every_token_lose_those_that_are_cached(lm, prompts):
    T, M = prompts.tokens.shape[1], prompts.trie.tokens.shape[1]
    for length in (T, T + M):
        donors = jnp.moveaxis(vector(6, 2, 3, length), 3, 1)  # [S,L,B,T,D]
        where = at_positions(L, np.arange(T) >= T - 5, (2,))
        points = [{"attn_out": (Replace(donor=donor, spans=where),)} for donor in donors]
        got = engine.sweep(lm.config, lm.params, prompts, stack(*points)).logprobs
        np.testing.assert_allclose(got, one_by_one(lm, prompts, points), atol=2e-4)


def steered(point, spans):
    alpha, v = point
    return {"resid_post": (add_vector(alpha * v, spans),)}


def test_one_trace_whatever_changes(lm, prompts):
    T, start = prompts.tokens.shape[1], engine.run_chunk._cache_size()
    for i, layer in enumerate(range(L)):  # another layer, direction, coefficient, number of points
        points = (jnp.full(5 + i, 1.0 + i), vector(i, 5 + i))
        build = Partial(steered, spans=at_last(L, T, [layer]))
        engine.sweep(lm.config, lm.params, prompts, build, points, chunk=4)
    build = Partial(steered, spans=at_last(L, T))
    engine.sweep(lm.config, lm.params, prompts, build, (jnp.zeros(1), vector(0, 1)), chunk=4)
    assert engine.run_chunk._cache_size() == start + 1


def test_a_builder_made_anew_is_the_same_program(lm, prompts):
    start = engine.run_chunk._cache_size()
    for layer in range(L):
        build = AddVector(at_last(L, prompts.tokens.shape[1], [layer]), site="resid_mid")
        got = engine.sweep(lm.config, lm.params, prompts, build, vector(layer, 3), chunk=4).logprobs
        want = one_by_one(lm, prompts, [build(v) for v in vector(layer, 3)])
        np.testing.assert_allclose(got, want, atol=2e-4)
    assert engine.run_chunk._cache_size() == start + 1


@struct.dataclass
class Damp(Edit):
    """A kind of one's own, of arrays for each prompt and for each of its tokens: x less a share of itself."""

    share: jax.Array
    by_token: jax.Array
    BY_ROW = ("share", "by_token")
    BY_TOKEN = ("by_token",)

    def change(self, x):
        return -self.share[:, None, None] * self.by_token[..., None] * x


@pytest.mark.slow
def test_a_kind_of_ones_own_is_its_change_alone(lm, prompts):
    """With no prefix, so that it can be told from one forward pass over the same tokens, choice by choice."""
    B, T = prompts.tokens.shape
    by_token = jax.random.uniform(jax.random.key(0), (L, B, T))
    share = jnp.linspace(0.1, 0.5, B)[None].repeat(L, 0)
    spans = at_last(L, T).replace(answer=jnp.ones((L, 1), bool))
    each = [Damp(spans=spans, share=share, by_token=given) for given in (by_token, by_token[:, :, -1:])]
    edits, last = ({"resid_mid": (edit,)} for edit in each)
    got, want = (one_by_one(lm, prompts, [e])[0] for e in (edits, last))
    np.testing.assert_allclose(got, want, atol=1e-5)  # the last prompt token's value serves the answers
    swept = engine.sweep(lm.config, lm.params, prompts, jax.tree.map(lambda a: a[None], edits)).logprobs[0]
    np.testing.assert_allclose(swept, want, atol=2e-4)
    assert np.abs(want - score.score(lm.config, lm.params, prompts)[0].logprobs).max() > 1e-3
    write = partial(generate, lm.config, lm.params, prompts.tokens, mask=prompts.mask, max_new_tokens=6)
    ids = [write(edits=e) for e in (edits, last)]
    np.testing.assert_array_equal(*ids)


def alone(v, spans):
    return {"resid_post": (add_vector(v, spans),)}


def test_only_what_an_edit_can_change_is_computed(lm, prompts, monkeypatch):
    """Points start behind their own first edited layer, and only tokens from the first edited one on are run anew."""
    seen, real = [], engine.run_chunk
    monkeypatch.setattr(engine, "run_chunk", lambda *a: seen.append((int(a[3]), a[2].parts)) or real(*a))
    T, M = prompts.tokens.shape[1], prompts.trie.tokens.shape[1]
    each = jnp.eye(L)[:, :, None] * vector(0)  # a point a layer: zero elsewhere
    engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=at_last(L, T)), each[::-1], chunk=1)
    assert [layer for layer, _ in seen] == [1, 2, 3, 4]
    assert all(len(parts) == 1 and parts[0].x.shape[:2] == (3, 1 + M) for _, parts in seen)
    seen.clear()
    engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=everywhere(L)), each[2:], chunk=1)
    assert [layer for layer, _ in seen] == [3, 4]
    assert [part.x.shape[:2] for part in seen[0][1]] == [(2, prompts.prefix.tokens.shape[1]), (3, T + M)]


@pytest.mark.devices
def test_points_spread_over_devices(lm, prompts):
    build, points = Partial(alone, spans=at_last(L, prompts.tokens.shape[1])), vector(1, 6)
    want = engine.sweep(lm.config, lm.params, prompts, build, points).logprobs
    got = engine.sweep(lm.config, lm.params, prompts, build, points, mesh=make_mesh(data=4)).logprobs
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_progress_and_order(lm, prompts):
    done, points = [], jnp.linspace(-1, 1, 7)[:, None, None] * vector(2)
    build = Partial(alone, spans=at_last(L, prompts.tokens.shape[1]))
    got = engine.sweep(lm.config, lm.params, prompts, build, points, chunk=3, advance=done.append).logprobs
    assert done == [3, 3, 1]
    np.testing.assert_allclose(got[3], score.score(lm.config, lm.params, prompts)[0].logprobs, atol=2e-5)


def test_a_chunk_takes_what_memory_allows(lm, prompts, monkeypatch):
    shapes = {"resid_post": (add_vector(vector(0), at_last(L, prompts.tokens.shape[1])),)}
    parts = engine.prepare(lm.config, lm.params, prompts, 0).parts
    monkeypatch.setattr(engine, "_free_bytes", lambda: 10**9)
    assert engine.points_at_once(lm.config, parts, shapes) > 10
    monkeypatch.setattr(engine, "_free_bytes", lambda: 10)
    assert engine.points_at_once(lm.config, parts, shapes) == 1


def test_chunks_cover_every_point():
    points = {"a": np.arange(10.0)}
    out = engine.in_chunks(lambda p: p["a"] * 2, points, size=4)
    np.testing.assert_array_equal(out, 2 * points["a"])


def test_bad_points_are_named(lm, prompts):
    v, spans = vector(0, 2), at_last(L, prompts.tokens.shape[1])
    with pytest.raises(ValueError, match="the same for all and at least one"):
        engine.sweep(lm.config, lm.params, prompts, {"resid_post": (add_vector(v, spans),)})
    with pytest.raises(ValueError, match="leads with the model's 4 layers"):
        engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=spans), v[:, :2])
    with pytest.raises(ValueError, match="spans: made for .* prompt tokens, but the prompts have"):
        longer = at_last(L, prompts.tokens.shape[1] + 1)
        engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=longer), v)
    with pytest.raises(ValueError, match="chunk: expected at least one sweep point"):
        engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=spans), v, chunk=0)
    with pytest.raises(ValueError, match=r"Add does not fit the activations here, \[B,T,D\] = .*vector \[4, 1, 31\]"):
        engine.sweep(lm.config, lm.params, prompts, Partial(alone, spans=spans), v[..., :31])
    with pytest.raises(ValueError, match="unknown site"):
        engine.sweep(lm.config, lm.params, prompts, lambda v: {"resid": (add_vector(v, spans),)}, v)


def test_features_that_do_not_exist_are_named_before_anything_runs(lm, saes, prompts):
    build = Partial(chosen_alone, saes=saes, spans=at_last(L, prompts.tokens.shape[1]))
    for pair in ((1, 9999), (2, 0)):
        with pytest.raises(ValueError, match=rf"feature \({pair[0]}, {pair[1]}\) does not exist"):
            engine.sweep(lm.config, lm.params, prompts, build, select_sets([[(1, 2)], [pair]], L))


def chosen_alone(selection, saes, spans):
    return {"resid_post": (features(saes, selection, gain=0.0, shift=1.0, spans=spans),)}
