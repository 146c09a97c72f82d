"""The k largest of a whole batch, exactly and fast: what BatchTopK training keeps.

`B` denotes the batch, `F` dictionary features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def largest(values: jax.Array, n: int, guess: jax.Array | float = 1.0) -> jax.Array:
    """A mask [B,F] of the n largest positive entries of `values`; all positive ones if there are fewer.

    Entries equal to the n-th largest are all kept. `guess` is a value near it and matters to speed alone.

    Sorting a million entries takes several times as long as the matrix products around it. Counting those above a
    value is one pass over memory, and the count falls smoothly, so a search by the secant of its logarithm, bracketed
    and every third time halved on the floats' bits, needs about eight passes. It ends as soon as the count is right.
    """
    values = jax.nn.relu(values)

    def count(bits):
        # A row's count is exact in float32, and several times faster there than in integers on a CPU.
        rows = jnp.sum(jnp.where(values >= _float(bits), 1.0, 0.0), axis=-1)
        return jnp.sum(rows.astype(jnp.int32))

    # Positive floats are ordered as their bits are. Always count(low) >= n > count(high).
    start = {
        "low": jnp.int32(0),
        "high": _bits(jnp.max(values)) + 1,
        "at_low": jnp.int32(values.size),
        "at_high": jnp.int32(0),
        "turn": jnp.int32(0),
    }

    def search(s):
        low, high = s["low"], s["high"]
        above, below = jnp.log(s["at_low"] + 0.5), jnp.log(s["at_high"] + 0.5)
        part = (above - jnp.log(jnp.float32(n))) / (above - below)
        secant = _bits(_float(low) + part * (_float(high) - _float(low)))
        middle = jnp.where(s["turn"] % 3 == 2, low + (high - low) // 2, secant)
        middle = jnp.where(s["turn"] == 0, _bits(jnp.float32(guess)), middle)
        middle = jnp.clip(middle, low + 1, high - 1)
        here = count(middle)
        enough = here >= n
        return {
            "low": jnp.where(enough, middle, low),
            "high": jnp.where(here == n, middle + 1, jnp.where(enough, high, middle)),
            "at_low": jnp.where(enough, here, s["at_low"]),
            "at_high": jnp.where(enough, s["at_high"], here),
            "turn": s["turn"] + 1,
        }

    end = jax.lax.while_loop(lambda s: s["high"] - s["low"] > 1, search, start)
    return (values >= _float(end["low"])) & (values > 0)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
