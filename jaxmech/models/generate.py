"""Sampling from the decoder with a KV cache; edits act in the prefill and in every decoding step.

`B` denotes the batch, `T` prompt tokens, `V` the vocabulary.

Prompts and the cache of new tokens are padded to bucket sizes, and how tokens are picked is data, so that one program
serves many prompt lengths, numbers of new tokens and sampling settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.arguments import is_key, number, whole_number, whole_numbers
from jaxmech.models.checks import check_edits, check_tokens, longest_text
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import KV, Params, forward


class _Rules(NamedTuple):
    """How tokens are picked. None switches a step off; values are traced."""

    temperature: jax.Array | None
    top_k: jax.Array | None
    top_p: jax.Array | None
    key: jax.Array | None


class _State(NamedTuple):
    """step: tokens picked so far; ids [B,room] int32; done [B]; buffer: keys and values of the tokens fed, if kept."""

    step: jax.Array
    ids: jax.Array
    done: jax.Array
    buffer: KV | None


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
    top_k: int | None = None,
) -> jax.Array:
    """Continues every row after its last real token, whichever side the padding is on.

    A row's sample depends on `key` and the row's index, not on its neighbours. Decoding ends when every row has ended.
    Temperature acts first, then `top_k`, then `top_p` on what is left, as in transformers.

    Args:
      tokens: [B,T] int prompts; mask: [B,T] bool, True on real tokens.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: keeps the smallest set of tokens with at least this probability (Holtzman et al. 2020, arXiv 1904.09751).
      key: needed unless temperature is 0.
      edits: as for `forward`; `spans.prompt` refers to the prompt, `spans.answer` to generated tokens.
      eos_ids: tokens that end a row, `config.eos_ids` by default. What follows one repeats it; see `until_end`.
      cache: segments of tokens before the prompt, as for `forward`.
      top_k: keeps this many of the likeliest tokens, and ties with the last of them; None keeps all.

    Returns:
      [B, max_new_tokens] int32.

    Raises:
      ValueError: a temperature without a key, a setting outside its range, misshapen tokens or mask, or a text longer
        than the positions that a model has learned (rotary ones are unbounded).
    """
    tokens, mask = check_tokens(config, tokens, mask)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 0)
    temperature, top_p = number("temperature", temperature), number("top_p", top_p)
    top_k = None if top_k is None else whole_number("top_k", top_k)
    ends = config.eos_ids if eos_ids is None else whole_numbers("eos_ids", eos_ids)
    _check(temperature, top_k, top_p, key)
    _check_length(config, mask, cache, max_new_tokens)
    T = tokens.shape[1]
    # Never past the model's own limit: a model with learned positions refuses rows that are longer.
    front = max(T, min(bucket(T), config.max_positions)) - T
    rules = _Rules(None, None, None, None)
    if temperature > 0:
        rules = _Rules(
            jnp.float32(temperature),
            None if top_k is None else jnp.int32(top_k),
            None if top_p == 1 else jnp.float32(top_p),
            key,
        )
    if _crosses_original(config, mask, cache, max_new_tokens):
        if cache:
            raise ValueError("cache: with it the text would cross the model's original context while decoding, where "
                             "longrope changes what was cached; pass the whole text as tokens")  # fmt: skip
        run: Callable[..., jax.Array] = _generate_recomputing
    else:
        run = partial(_generate, cache=tuple(cache))
    check_edits(config, edits, tokens.shape)
    ids = run(
        config,
        params,
        jnp.pad(tokens, ((0, 0), (front, 0))),
        jnp.pad(mask, ((0, 0), (front, 0))),
        {site: tuple(edit.pad_prompt(front) for edit in group) for site, group in (edits or {}).items()},
        rules,
        jnp.asarray(ends, jnp.int32),
        jnp.int32(max_new_tokens),
        bucket(max_new_tokens),
    )
    ids = ids[:, :max_new_tokens]
    if not isinstance(ids, jax.core.Tracer) and ids.is_fully_addressable and (broken := np.argwhere(ids == _NONE)).size:
        row, step = broken[0]
        raise ValueError(
            f"row {row}: the logits of new token {step} are not finite, so that there is no next token; the edits, the "
            "weights or the dtype (float16 overflows) make the activations infinite"
        )
    return ids


_NONE = -1
"""In place of a token that cannot be picked; what follows repeats it, as after an end."""


def bucket(n: int) -> int:
    """The least of 8, 12, 16, 24, 32, 48, ... that holds n: powers of two and their midpoints."""
    size = 8
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _check(temperature, top_k, top_p, key) -> None:
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None to keep all tokens, got {top_k}")
    if temperature > 0 and not is_key(key):
        raise ValueError(f"key: sampling at temperature > 0 needs one key, such as jax.random.key(0), got {key!r:.80}; "
                         "or pass temperature=0")  # fmt: skip


def _check_length(config: ModelConfig, mask, cache, max_new_tokens: int) -> None:
    """Refuses texts that run past learned positions; rotary ones are unbounded."""
    most = config.max_positions + 1  # the last new token is not fed back
    longest = longest_text(config, mask, cache)
    if longest and longest + max_new_tokens > most:
        raise ValueError(
            f"max_new_tokens: the longest prompt has {longest} tokens and the model {config.max_positions} positions, "
            f"so that at most {max(most - longest, 0)} new tokens fit, got {max_new_tokens}; shorten either"
        )


@partial(jax.jit, static_argnames=("config", "room"))
def _generate(config, params, tokens, mask, edits, rules, ends, steps, room, cache):
    prompt = forward(config, params, tokens, mask=mask, edits=edits, cache=cache, return_cache=True)
    own = prompt.cache
    assert own is not None
    later = {site: tuple(edit.for_answers() for edit in group) for site, group in edits.items()}

    def follow(ids, step, buffer):
        last = jax.lax.dynamic_slice_in_dim(ids, step - 1, 1, 1)
        out = forward(config, params, last, edits=later, cache=(*cache, own, buffer), return_cache=True)
        return out.logits, jax.tree.map(
            lambda kept, new, axis: jax.lax.dynamic_update_slice_in_dim(kept, new, step - 1, axis),
            buffer, out.cache, KV._make((2, 2, 1, 1, None)),
        )  # fmt: skip

    return _decode(prompt.logits, follow, _empty_like(own, room), rules, ends, steps, room)


@partial(jax.jit, static_argnames=("config", "room"))
def _generate_recomputing(config, params, tokens, mask, edits, rules, ends, steps, room):
    """As `_generate`, but recomputes the whole text for every token."""
    edits = {site: tuple(e.with_answers(tokens.shape[1], room) for e in group) for site, group in edits.items()}

    def follow(ids, step, _):
        seen = jnp.broadcast_to(jnp.arange(room) < step, ids.shape)
        text, real = jnp.concatenate([tokens, ids], 1), jnp.concatenate([mask, seen], 1)
        return forward(config, params, text, mask=real, edits=edits).logits, None

    logits, _ = follow(jnp.zeros((tokens.shape[0], room), jnp.int32), 0, None)
    return _decode(logits, follow, None, rules, ends, steps, room)


def _decode(logits, follow, buffer, rules, ends, steps, room):
    """Picks tokens from logits [B,V], then from `follow(ids, step, buffer) -> logits, buffer`: [B,room] int32."""

    def going(state):
        return (state.step < steps) & ~state.done.all()

    def advance(state):
        logits, buffer = follow(state.ids, state.step, state.buffer)
        last = jax.lax.dynamic_index_in_dim(state.ids, state.step - 1, 1, keepdims=False)
        token = jnp.where(state.done, last, _pick(logits, rules, state.step))
        ids = jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.step, 1)
        return _State(state.step + 1, ids, state.done | ended(token), buffer)

    def ended(token):
        return jnp.isin(token, ends) | (token == _NONE)

    first = _pick(logits, rules, 0)
    ids = jnp.zeros((logits.shape[0], room), jnp.int32).at[:, 0].set(first)
    end = jax.lax.while_loop(going, advance, _State(jnp.int32(1), ids, ended(first), buffer))
    last = jax.lax.dynamic_index_in_dim(end.ids, end.step - 1, 1)
    return jnp.where(jnp.arange(room) < end.step, end.ids, last)


def _crosses_original(config: ModelConfig, mask, cache, max_new_tokens: int) -> bool:
    """Whether longrope would switch from short to long factors while decoding: then nothing cached is valid, not even
    the values, which depend on earlier layers' attention. HF drops its cache there too."""
    scaling = dict(config.rope.scaling) if config.rope is not None else {}
    if scaling.get("rope_type") != "longrope":
        return False
    original, fed = scaling["original_max_position_embeddings"], max(max_new_tokens - 1, 0)
    masks = [mask, *(segment.of(segment.mask) for segment in cache)]
    if any(isinstance(m, jax.core.Tracer) for m in masks):
        return sum(m.shape[1] for m in masks) + fed > original
    counts = sum(m.sum(1) for m in masks)
    before = sum(m.sum(1) for m in masks[1:]) if cache else counts  # what holds keys already, or will after the prompt
    return bool(((before <= original) & (counts + fed > original)).any())


def _empty_like(cache: KV, room: int) -> KV:
    """A segment of `room` unused slots."""
    L, B, _, G, h = cache.k.shape
    empty = jnp.zeros((L, B, room, G, h), cache.k.dtype)
    return KV(empty, empty, jnp.zeros((B, room), cache.positions.dtype), jnp.zeros((B, room), bool))


def _pick(logits: jax.Array, rules: _Rules, step: jax.Array | int) -> jax.Array:
    """The next token of each row, from logits [B,V]: [B] int32, `_NONE` where the largest is not finite."""

    def uniform(row):
        assert rules.key is not None
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(rules.key, row), step))

    if rules.temperature is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        filtered = filter_logits(logits / rules.temperature, rules.top_k, rules.top_p)
        token = draw(filtered, jax.vmap(uniform)(jnp.arange(logits.shape[0])))
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), token, _NONE)


def filter_logits(logits: jax.Array, top_k: jax.Array | None = None, top_p: jax.Array | None = None) -> jax.Array:
    """Logits [B,V] with -inf outside the `top_k` likeliest tokens, and then outside the smallest set of the likeliest
    whose probability among those is at least `top_p`. Ties with the last one kept are kept too."""
    if top_k is not None:
        logits = jnp.where(_likeliest(logits, jnp.ones(logits.shape, jnp.int32), top_k), logits, -jnp.inf)
    if top_p is not None:
        logits = jnp.where(_likeliest(logits, jax.nn.softmax(logits, axis=-1), top_p), logits, -jnp.inf)
    return logits


def _likeliest(logits: jax.Array, weights: jax.Array, least: jax.Array) -> jax.Array:
    """[B,V] bool: the smallest set of the likeliest tokens that weighs at least `least`; all tokens if none does.

    Its lowest logit is found bit by bit, since sorting a large vocabulary takes longer than running a small model.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits).astype(jnp.float32), jnp.uint32)
    ranks = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # unsigned integers, ordered as the floats

    def narrow(i, lowest):
        higher = lowest | (jnp.uint32(1 << 31) >> i)
        enough = jnp.where(ranks >= higher[:, None], weights, 0).sum(-1) >= least
        return jnp.where(enough, higher, lowest)

    lowest = jax.lax.fori_loop(0, 32, lambda i, low: narrow(i.astype(jnp.uint32), low), jnp.zeros_like(ranks[:, 0]))
    return ranks >= lowest[:, None]


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token per row by inversion: logits [B,V], uniform [B] in [0, 1) -> [B] int32.

    One random number per row instead of the Gumbel trick's V of them, which cost more than the model itself on a CPU.
    The cumulative sum runs over blocks first, then inside one block.
    """
    B, V = logits.shape
    size = max(1, round(V**0.5))
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    blocks = jnp.pad(p, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    mass = blocks.sum(-1)  # [B, V / size]
    above = jnp.cumsum(mass, axis=-1)
    target = uniform * above[:, -1]
    block = _first_past(mass, above, target)[:, None]
    remaining = target - jnp.where(block > 0, jnp.take_along_axis(above, jnp.maximum(block - 1, 0), 1), 0.0)[:, 0]
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    return (block[:, 0] * size + _first_past(inside, jnp.cumsum(inside, axis=-1), remaining)).astype(jnp.int32)


def _first_past(mass: jax.Array, above: jax.Array, target: jax.Array) -> jax.Array:
    """The first index [B] at which the running sum `above` [B,n] of `mass` passes `target`.

    A sum computed in parallel is not quite monotone and may change where nothing is added; so an index without mass is
    never taken, and the last one with mass is where rounding leaves the target beyond the total.
    """
    some = mass > 0
    past = (above > target[:, None]) & some
    last = mass.shape[1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    return jnp.where(past.any(-1), jnp.argmax(past, axis=-1), last)


def until_end(ids: jax.Array, eos_ids: Sequence[int]) -> jax.Array:
    """[B,T] bool: generated tokens [B,T] up to the first of `eos_ids`, that one included; a mask for what follows."""
    ended = jnp.isin(ids, jnp.asarray(tuple(eos_ids), ids.dtype))
    return jnp.cumsum(ended, axis=1) - ended == 0
