"""The k largest of a whole batch, exactly and fast: what BatchTopK training keeps.

`B` denotes the batch, `F` dictionary features.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def largest(values: jax.Array, n: jax.Array | int, guess: jax.Array | float = 1.0) -> jax.Array:
    """A mask [B,F] of the n largest positive entries of `values`; all positive ones if there are fewer, and no NaN.

    Entries equal to the n-th largest are all kept. `guess`, a value near it, affects speed only.
    """
    values = jnp.asarray(values, jnp.float32)
    return (values >= cut(values, n, n, guess)[0]) & (values > 0)


def cut(
    values: jax.Array, least: jax.Array | int, most: jax.Array | int, guess: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """A value that at least `least` and at most `most` positive entries reach, and the next float, which fewer reach.

    values: [B,F] float32. Where no value has as few as `most`, because entries are equal, the first float of the pair
    is the largest that at least `least` reach; where fewer than `least` are positive, it is 0.

    Sorting a million entries takes several times as long as the matrix products around it. Counting those above a
    value is one pass over memory, and the count falls smoothly, so a search by the secant of its logarithm, bracketed
    and every third time a bisection of the floats' bits, needs about eight passes for an exact count. It ends once the
    count is right.
    """
    B, F = values.shape
    blocks = values.reshape(B, -1, math.gcd(F, 32))  # CPUs are fast at short sums of a known length

    def count(bits):
        inside = jnp.sum((blocks >= _float(bits)).astype(jnp.int32), axis=-1, dtype=jnp.int32)
        return jnp.sum(inside, dtype=jnp.int32)

    # Positive floats are ordered as their bits are. Always count(low) >= least > count(high), but for low = 0.
    start = {
        "low": jnp.int32(0),
        "high": _bits(jnp.max(jnp.where(values > 0, values, 0.0))) + 1,  # a NaN is no bound
        "at_low": jnp.int32(values.size),
        "at_high": jnp.int32(0),
        "turn": jnp.int32(0),
    }

    def search(s):
        low, high = s["low"], s["high"]
        above, below = jnp.log(s["at_low"] + 0.5), jnp.log(s["at_high"] + 0.5)
        part = (above - 0.5 * (jnp.log(jnp.float32(least)) + jnp.log(jnp.float32(most)))) / (above - below)
        secant = _bits(_float(low) + part * (_float(high) - _float(low)))
        middle = jnp.where(s["turn"] % 3 == 2, low + (high - low) // 2, secant)
        middle = jnp.where(s["turn"] == 0, _bits(jnp.float32(guess)), middle)
        middle = jnp.clip(middle, low + 1, high - 1)
        reached = count(middle)
        enough = reached >= least
        return {
            "low": jnp.where(enough, middle, low),
            "high": jnp.where(enough, high, middle),
            "at_low": jnp.where(enough, reached, s["at_low"]),
            "at_high": jnp.where(enough, s["at_high"], reached),
            "turn": s["turn"] + 1,
        }

    def going(s):
        return (s["at_low"] > most) & (s["high"] - s["low"] > 1)

    end = jax.lax.while_loop(going, search, start)
    return _float(end["low"]), _float(end["high"])


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
