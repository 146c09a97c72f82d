"""Repetition statistics against plain Python loops."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmech.models.repetition import LENGTHS, repetition


def share_repeated(row, n):
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def longest_loop(row, max_period):
    """(length, period): every suffix of at least two periods is tried."""
    best = (0, 0)
    for period in range(1, max_period + 1):
        for start in range(len(row) - 2 * period + 1):
            tail = row[start:]
            if all(tail[i] == tail[i - period] for i in range(period, len(tail))) and len(tail) > best[0]:
                best = (len(tail), period)
    return best


@pytest.mark.parametrize("words", [1, 2, 5, 50])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_plain_loops(words, side):
    rng = np.random.default_rng(words)
    B, T = 40, 17
    ids = rng.integers(0, words, (B, T))
    counts = rng.integers(0, T + 1, B)
    ids[::3, 8:] = ids[::3, 2:11]  # loops of period 6 where both ends are real
    at = np.arange(T)
    mask = at < counts[:, None] if side == "right" else at >= T - counts[:, None]
    got = repetition(jnp.asarray(ids), jnp.asarray(mask), max_period=7)
    rows = [ids[b][mask[b]].tolist() for b in range(B)]
    np.testing.assert_allclose(got.repeated, [[share_repeated(r, n) for n in LENGTHS] for r in rows], atol=1e-6)
    loops = [longest_loop(r, 7) for r in rows]
    np.testing.assert_array_equal(np.stack([got.loop_length, got.loop_period], 1), loops)


def test_by_hand():
    rows = ["12345678", "95123123", "44444444", "12121219"]
    got = repetition(jnp.array([list(map(int, row)) for row in rows]))
    np.testing.assert_array_equal(got.loop_length, [0, 6, 8, 0])
    np.testing.assert_array_equal(got.loop_period, [0, 3, 1, 0])
    np.testing.assert_allclose(got.repeated[:, 1], [0, 2 / 7, 6 / 7, 4 / 7], atol=1e-6)
    cut = repetition(jnp.array([[3, 1, 2, 3, 1, 2, 3, 1]]))  # the last copy is cut off
    assert (int(cut.loop_length[0]), int(cut.loop_period[0])) == (8, 3)
    beyond = repetition(jnp.array([[3, 1, 2, 3, 1, 2]]), max_period=2)
    assert int(beyond.loop_length[0]) == 0


def test_rows_shorter_than_the_n_gram_have_no_share():
    got = repetition(jnp.array([[7, 7]])).repeated[0]
    np.testing.assert_array_equal(got, [0.5, 0.0, np.nan, np.nan])
