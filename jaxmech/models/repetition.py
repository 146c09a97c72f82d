"""How much generated text repeats itself: what shows first when steering breaks a model.

`B` denotes rows, `T` generated tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmech.io.reprs import short_repr

LENGTHS = (1, 2, 3, 4)
"""The n of the n-grams."""


class Repetition(NamedTuple):
    """repeated [B,4]: the share of n-grams that occur earlier in the row, for n of `LENGTHS`; loop_length [B]: tokens
    of the longest loop at the row's end, 0 without one; loop_period [B]: its period, or 0.
    """

    repeated: jax.Array
    loop_length: jax.Array
    loop_period: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


@partial(jax.jit, static_argnames="max_period")
def repetition(ids: jax.Array, mask: jax.Array | None = None, *, max_period: int = 32) -> Repetition:
    """Repetition statistics of each row.

    `repeated` is 1 - distinct n-grams / n-grams: the seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), and
    1 - distinct-n of Li et al. 2016 (arXiv 1510.03055), except that they divide by the number of tokens. A row with
    fewer than n tokens has no n-grams, and gets NaN.

    A loop is a block of 1 to `max_period` tokens that occurs at least twice in succession and continues to the end,
    where the last copy may be cut off; the longest one counts and, of equally long ones, that of the shortest period.

    Args:
      ids: [B,T] int, for example what `generate` returns.
      mask: [B,T] bool, True on tokens that count, which are contiguous; for example `until_end(ids, eos_ids)`, since
        what `generate` repeats after a row's end is not the model's. All by default.
    """
    mask = jnp.ones(ids.shape, bool) if mask is None else mask
    repeated = jnp.stack([1.0 - _distinct(ids, mask, n) for n in LENGTHS], axis=-1)
    periods = jnp.arange(1, max_period + 1)
    lengths = jax.vmap(partial(_loop, ids, mask))(periods)  # [P,B]
    longest, best = lengths.max(0), jnp.argmax(lengths, axis=0)
    return Repetition(repeated, longest, jnp.where(longest > 0, periods[best], 0))


def _distinct(ids, mask, n: int) -> jax.Array:
    """Distinct n-grams over n-grams [B], by sorting, which puts equal ones side by side."""
    B, T = ids.shape
    if n > T:
        return jnp.full(B, jnp.nan)
    columns = [ids[:, i : T - n + 1 + i] for i in range(n)]
    real = jnp.stack([mask[:, i : T - n + 1 + i] for i in range(n)]).all(0)
    unreal, *columns = jax.lax.sort((~real, *columns), dimension=1, num_keys=n + 1)
    differs = jnp.stack([column[:, 1:] != column[:, :-1] for column in columns]).any(0)
    new = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True) & ~unreal
    return new.sum(1) / real.sum(1)  # 0 / 0 is NaN


def _loop(ids, mask, period) -> jax.Array:
    """Tokens [B] of the loop of `period` at the row's end, 0 if less than two whole periods."""
    slots = jnp.arange(ids.shape[1])
    before = jnp.maximum(slots - period, 0)
    same = (ids == ids[:, before]) & mask[:, before] & (slots >= period)
    breaks = mask & ~same
    unbroken = jnp.cumsum(breaks[:, ::-1], axis=1)[:, ::-1] == 0
    run = (unbroken & mask).sum(1)
    return jnp.where(run >= period, run + period, 0)
