"""Sampling from the decoder with a KV cache; edits act in the prefill and in every decoding step alike.

`B` denotes the batch, `T` prompt tokens, `V` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import KV, Params, forward


def generate(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    mask: jax.Array | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    edits: Mapping[str, Sequence[Any]] | None = None,
    eos_ids: tuple[int, ...] | None = None,
    cache: Sequence[KV] = (),
) -> jax.Array:
    """Continues every row after its last real token, whichever side the padding is on.

    A row's sample depends on `key` and the row's index, not on its neighbours.

    Args:
      tokens: [B,T] int prompts; mask: [B,T] bool, True on real tokens.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: keeps the smallest set of tokens with at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
      key: needed unless temperature is 0.
      edits: as for `forward`; their `where` speaks of the prompt, their `after` of generated tokens.
      eos_ids: tokens that end a row, `config.eos_ids` by default. What follows one repeats it.
      cache: segments of tokens before the prompt, as for `forward`.

    Returns:
      [B, max_new_tokens] int32.

    Raises:
      ValueError: a temperature without a key, or a top_p outside (0, 1].
    """
    if temperature > 0 and key is None:
        raise ValueError("key: sampling at temperature > 0 needs a jax.random.key; or pass temperature=0")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    key = jax.random.key(0) if key is None else key
    eos_ids = config.eos_ids if eos_ids is None else tuple(eos_ids)
    return _generate(
        config, params, tokens, mask, key, dict(edits or {}), tuple(cache), max_new_tokens,
        temperature > 0, jnp.float32(temperature or 1.0), jnp.float32(top_p), top_p < 1, eos_ids,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("config", "steps", "sample", "nucleus", "eos_ids"))
def _generate(config, params, tokens, mask, key, edits, cache, steps, sample, temperature, top_p, nucleus, eos_ids):
    B = tokens.shape[0]
    prompt = forward(config, params, tokens, mask=mask, edits=edits, cache=cache, return_cache=True)
    later = {site: tuple(edit.for_answers() for edit in group) for site, group in edits.items()}
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
    shape = (config.n_layers, B, steps, config.n_kv_heads, config.head_dim)
    empty = jnp.zeros(shape, prompt.cache.k.dtype)
    buffer = KV(empty, empty, jnp.zeros((B, steps), jnp.int32), jnp.zeros((B, steps), bool))
    ends = jnp.asarray(eos_ids, jnp.int32)

    def pick(logits, step):
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        logits = nucleus_logits(logits, top_p) if nucleus else logits
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(row_keys)
        return draw(logits, uniform)

    def advance(carry, step):
        logits, buffer, last, done = carry
        token = jnp.where(done, last, pick(logits, step).astype(jnp.int32))
        done = done | jnp.isin(token, ends)
        segments = (*cache, prompt.cache, buffer)
        out = forward(config, params, token[:, None], edits=later, cache=segments, return_cache=True)
        buffer = jax.tree.map(
            lambda whole, new, axis: jax.lax.dynamic_update_slice_in_dim(whole, new, step, axis),
            buffer, out.cache, KV(2, 2, 1, 1),
        )  # fmt: skip
        return (out.logits, buffer, token, done), token

    start = (prompt.logits, buffer, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    return jax.lax.scan(advance, start, jnp.arange(steps))[1].T


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token a row by inversion: logits [B,V], uniform [B] in [0, 1) -> [B] int32.

    One random number a row instead of the Gumbel trick's V of them, which cost more than the model itself on a CPU. The
    cumulative sum runs over blocks first, then inside one block.
    """
    B, V = logits.shape
    size = max(1, round(V**0.5))
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    blocks = jnp.pad(p, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    above = jnp.cumsum(blocks.sum(-1), axis=-1)  # [B, V / size]
    target = uniform * above[:, -1]
    block = jnp.minimum((above <= target[:, None]).sum(-1), above.shape[1] - 1)
    rest = target - jnp.where(block > 0, jnp.take_along_axis(above, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    rest = jnp.minimum(rest, inside[:, -1] * (1 - 1e-6))  # rounding may put the target behind the block's last token
    return (block * size + (inside <= rest[:, None]).sum(-1)).astype(jnp.int32)


def nucleus_logits(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits [B,V] with all tokens outside the smallest set of probability `top_p` set to -inf."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    keep_ranked = jnp.cumsum(ranked, axis=-1) - ranked < top_p  # the token that crosses top_p is kept
    keep = jnp.zeros(logits.shape, bool).at[jnp.arange(logits.shape[0])[:, None], order].set(keep_ranked)
    return jnp.where(keep, logits, -jnp.inf)
