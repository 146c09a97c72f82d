"""Cached decoding against recomputation of the whole text, with and without edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech import edits as ed
from jaxmech.models.decoder import forward
from jaxmech.models.generate import generate, nucleus_logits


def recompute(lm, tokens, steps, edits=None):
    for _ in range(steps):
        logits = forward(lm.config, lm.params, tokens, edits=edits).logits
        tokens = jnp.concatenate([tokens, logits.argmax(-1)[:, None].astype(tokens.dtype)], axis=1)
    return tokens[:, -steps:]


def test_steered_cached_decoding_equals_steered_recomputation(lm, tokens, saes):
    spans = ed.everywhere(lm.config.n_layers, (1, 3))
    for edits in (
        None,
        {"resid_post": (ed.add_vector(2 * jax.random.normal(jax.random.key(1), (4, 32)), **spans),)},
        {"resid_post": (ed.features(saes, ed.select([(1, 3), (3, 7)], 4), gain=2.0, shift=3.0, **spans),)},
    ):
        got = generate(lm.config, lm.params, tokens, max_new_tokens=9, edits=edits)
        np.testing.assert_array_equal(got, recompute(lm, tokens, 9, edits))


def test_padding_side_and_neighbours_do_not_matter(lm, tokens):
    key = jax.random.key(5)
    whole = generate(lm.config, lm.params, tokens, max_new_tokens=6, temperature=1.0, key=key)
    for pad in [(4, 0), (0, 4)]:
        mask = jnp.pad(jnp.ones_like(tokens, bool), ((0, 0), pad))
        padded = jnp.pad(tokens, ((0, 0), pad))
        out = generate(lm.config, lm.params, padded, mask=mask, max_new_tokens=6, temperature=1.0, key=key)
        np.testing.assert_array_equal(out, whole)
    other = tokens.at[1:].set(1)
    out = generate(lm.config, lm.params, other, max_new_tokens=6, temperature=1.0, key=key)
    np.testing.assert_array_equal(out[0], whole[0])


def test_sampling_follows_the_distribution(lm, tokens):
    row = jnp.repeat(tokens[:1], 4000, axis=0)
    first = generate(lm.config, lm.params, row, max_new_tokens=1, temperature=1.5, key=jax.random.key(0))[:, 0]
    p = jax.nn.softmax(forward(lm.config, lm.params, tokens[:1]).logits[0] / 1.5)
    seen = np.bincount(np.asarray(first), minlength=len(p)) / len(first)
    assert np.abs(seen - p).max() < 4 * np.sqrt(0.25 / 4000)


def test_rows_stop_at_eos(lm, tokens):
    free = np.asarray(generate(lm.config, lm.params, tokens, max_new_tokens=8))
    stop = int(free[0, 2])
    out = np.asarray(generate(lm.config, lm.params, tokens, max_new_tokens=8, eos_ids=(stop,)))
    for a, b in zip(free, out, strict=True):
        end = np.flatnonzero(a == stop)[0] if stop in a else 8
        np.testing.assert_array_equal(b[: end + 1], a[: end + 1])
        assert (b[end:] == stop).all()


def test_nucleus_keeps_the_smallest_set():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.9, 0.04, 0.01]]))
    kept = np.isfinite(nucleus_logits(logits, 0.75))
    np.testing.assert_array_equal(kept, [[True, True, False, False], [False, True, False, False]])


def test_sampling_needs_a_key(lm, tokens):
    with pytest.raises(ValueError, match="key"):
        generate(lm.config, lm.params, tokens, max_new_tokens=1, temperature=1.0)
    with pytest.raises(ValueError, match="top_p"):
        generate(lm.config, lm.params, tokens, max_new_tokens=1, temperature=1.0, top_p=0.0, key=jax.random.key(0))
