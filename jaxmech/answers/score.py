"""The exact distribution over allowed answers, from one pass over a token trie.

`B` denotes the batch, `T` prompt tokens, `M` trie nodes, `N` choices, `V` the vocabulary.

An answer's strings become paths in a trie of tokens. All nodes run after the prompt in one pass, each attending to the
prompt and to its own ancestors only. With w_k the tokens of string w,

    s(a) = sum_w  prod_k p(w_k | prompt, w_<k) * p(end | prompt, w),

where `end` is the event that what follows neither continues the answer, so that "1" stands neither for "10" nor for
"1.5", nor turns it into another answer (`jaxmech.answers.trie`). No text counts as two answers. The distribution over
choices is s / M with M = sum_a s(a), the mass on valid answers. All of it is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.answers.prompts import Prompts, make_prompts
from jaxmech.answers.trie import Trie
from jaxmech.io.arguments import Array
from jaxmech.io.reprs import concrete, described, extent
from jaxmech.models.checks import check_groups
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import KV, Output, Params, forward, next_positions, unembed
from jaxmech.models.edits import Edits, on_prefix, with_answers
from jaxmech.models.language_model import LanguageModel


class Choices(NamedTuple):
    """logprobs [B,N]: log s(a), unnormalised."""

    logprobs: Array

    def __repr__(self) -> str:
        mass = f", mass {extent(self.mass)}" if concrete(self.logprobs) else ""
        return f"Choices(logprobs={described(self.logprobs)}{mass})"

    @property
    def probs(self) -> jax.Array:
        """[B,N], summing to one over the choices."""
        return _probs(self.logprobs)

    @property
    def mass(self) -> jax.Array:
        """[B], the probability that the answer is one of the choices."""
        return _mass(self.logprobs)

    def expected(self, values: jax.Array) -> jax.Array:
        """The mean [B] of `values` [N] or [B,N] under `probs`.

        Raises:
          ValueError: values of another number of choices or prompts.
        """
        values = jnp.asarray(values)
        shape, given = self.logprobs.shape, values.shape
        if given[-1:] != shape[-1:] or given[:-1] not in ((), shape[:-1], shape[-2:-1]):
            raise ValueError(f"values: expected [N] or [B,N] for choices {list(shape)}, got shape {list(given)}")
        return _expected(self.logprobs, values)


@jax.jit
def _probs(logprobs: Array) -> jax.Array:
    return jax.nn.softmax(logprobs, axis=-1)


@jax.jit
def _mass(logprobs: Array) -> jax.Array:
    return jnp.exp(jax.nn.logsumexp(logprobs, axis=-1))


@jax.jit  # one program, where a dozen small ones would be compiled for every shape
def _expected(logprobs: Array, values: Array) -> jax.Array:
    return (jax.nn.softmax(logprobs, axis=-1) * values).sum(-1)


def score(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    *,
    edits: Edits | None = None,
    taps: Sequence[str] | Mapping[str, Any] = (),
    remat: bool = False,
) -> tuple[Choices, Output]:
    """Scores every choice of every prompt in one forward pass (and one over the prefixes, if there are any).

    Args:
      prompts: B prompts with tries.
      edits: `spans.prompt` refers to `prompts.tokens`, `spans.answer` to the answers' tokens, `spans.prefix` to the
        prefix. A donor with a token axis longer than 1 spans prompt and answers: T + M tokens.
      taps: as for `forward`; they see T + M tokens, the prompt's first.
      remat: as for `forward`.

    Returns:
      The choices, and the pass's output, without logits: there are `M + 1` slots to read out, which is done a few rows
      at a time.
    """
    check_groups(edits)
    prompts = cache_prefix(config, params, prompts, edits=edits, remat=remat)
    tokens, mask, positions, within = lay_out(prompts)
    (_, T), M = prompts.tokens.shape, prompts.trie.tokens.shape[1]
    out = forward(
        config,
        params,
        tokens,
        mask=mask,
        edits=with_answers(edits, T, M),
        taps=taps,
        logits="none",
        cache=prompts.cache,
        positions=positions,
        within=within,
        remat=remat,
    )
    return Choices(read_out(config, params, out.final[:, T - 1 :], prompts.trie)), out


def lay_out(prompts: Prompts) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tokens, mask and positions [B,T+M] of prompts with all answers after them, and which tokens look at which
    [B,T+M,T+M]."""
    tokens, mask, trie = prompts.tokens, prompts.mask, prompts.trie
    (B, T), M = tokens.shape, trie.tokens.shape[1]
    positions = next_positions(mask, prompts.cache)
    if prompts.prefix is not None:
        positions = positions + prompts.prefix.mask.sum(1)[prompts.prefix.rows][:, None]
    within = jnp.zeros((B, T + M, T + M), bool)
    within = within.at[:, :T, :T].set(jnp.tril(jnp.ones((T, T), bool)))
    within = within.at[:, T:, :T].set(True).at[:, T:, T:].set(trie.ancestors)
    return (
        jnp.concatenate([tokens, trie.tokens], axis=1),
        jnp.concatenate([mask, jnp.ones((B, M), bool)], axis=1),
        jnp.concatenate([positions, positions[:, -1:] + trie.depth], axis=1),
        within,
    )


_LOGITS_AT_ONCE = 2**27
"""Entries of the logits that are held at a time, 512 MiB in float32. A vocabulary is long, slots are many, and a few
hundred rows are enough for the unembedding to run at full speed."""


def read_out(config: ModelConfig, params: Params, final: jax.Array, trie: Trie) -> jax.Array:
    """log s(a) [...,B,N] from the residuals [...,B,M+1,D] after the last layer, of the decision token and all nodes."""
    *lead, B, slots, D = final.shape

    def by_row(a):  # [B,M+1,.] -> [rows,.]
        return jnp.broadcast_to(a, (*lead, *a.shape)).reshape(-1, a.shape[-1])

    children = trie.parent[:, None] == jnp.arange(slots)[:, None]  # [B,M+1,M]
    inputs = (
        final.reshape(-1, D),
        by_row(jnp.broadcast_to(trie.tokens[:, None], children.shape)),
        by_row(children),
        by_row(trie.continues[..., None]),
    )
    rows = len(inputs[0])
    chunks = math.ceil(rows * config.vocab_size / _LOGITS_AT_ONCE)
    size = math.ceil(rows / chunks)

    def by_chunk(a):
        # Neighbours go to different chunks, so that devices that hold different rows all have work in each.
        a = jnp.pad(a, ((0, size * chunks - rows), (0, 0)))
        return jnp.swapaxes(a.reshape(size, chunks, -1), 0, 1)

    def chunk(inputs):
        x, tokens, child, bits = inputs
        logits = unembed(config, params, x)  # [size,V]
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        step = jnp.take_along_axis(logits, tokens, axis=-1)
        # Any token but the slot's children leaves the trie. Summing those, rather than subtracting the children from
        # the total, keeps the digits of what is improbable.
        leaving = logits.at[jnp.arange(size)[:, None], tokens].add(jnp.where(child, -jnp.inf, 0.0))
        weights = jnp.exp(leaving - top)
        continues = (trie.kinds & bits) != 0
        sides = [jnp.where(continues, 0.0, weights).sum(-1), jnp.where(continues, weights, 0.0).sum(-1)]
        sums = jnp.stack(sides, axis=-1)
        return jnp.log(jnp.maximum(sums, jnp.finfo(sums.dtype).tiny)) + top, step

    if chunks > 1:  # a gradient keeps the weights of one chunk, not those of all
        chunk = jax.checkpoint(chunk)
    leave, step = (
        jnp.swapaxes(a, 0, 1).reshape(size * chunks, -1)[:rows].reshape(*lead, B, slots, -1)
        for a in jax.lax.map(chunk, tuple(map(by_chunk, inputs)))
    )
    return _choice_logprobs(trie, children, leave, step)


def _choice_logprobs(trie: Trie, children: jax.Array, leave: jax.Array, step: jax.Array) -> jax.Array:
    """log s(a) [...,B,N].

    Args:
      children: [B,M+1,M], which nodes are children of which slot.
      leave: [...,B,M+1,2], log-odds of leaving the trie at each slot with a token that does not, and that does,
        continue the answer.
      step: [...,B,M+1,M], those of each node's token.
    """
    ways = jnp.concatenate([leave, jnp.where(children, step, -jnp.inf)], axis=-1)
    total = jax.nn.logsumexp(ways, axis=-1, keepdims=True)  # [...,B,M+1,1]
    slots = jnp.broadcast_to(trie.parent[:, None], (*step.shape[:-2], 1, step.shape[-1]))
    taken = jnp.take_along_axis(step - total, slots, axis=-2)[..., 0, :]  # [...,B,M], log p of each node's token
    precision = jax.lax.Precision.HIGHEST
    path = jnp.einsum("bmn,...bn->...bm", trie.ancestors.astype(taken.dtype), taken, precision=precision)
    path = jnp.pad(path, [(0, 0)] * (path.ndim - 1) + [(1, 0)])  # [...,B,M+1]
    cells = jnp.swapaxes(path[..., None] + leave - total, -1, -2)[..., None, :, :]  # [...,B,1,2,M+1]
    return jax.nn.logsumexp(jnp.where(trie.cells, cells, -jnp.inf), axis=(-2, -1))


def cache_prefix(
    config: ModelConfig, params: Params, prompts: Prompts, *, edits: Edits | None = None, remat: bool = False,
    batch: int | None = None,
) -> Prompts:  # fmt: skip
    """The same prompts with the prefix, edited where the edits' spans say so, in the cache: once for all prompts that
    share it, unless edits tell these apart.

    Args:
      batch: prefixes per pass, all by default; edits that tell prompts apart need all in one, and so does `jax.jit`.
    """
    if prompts.prefix is None:
        return prompts
    acting, prefix = on_prefix(edits), prompts.prefix
    if any(edit.rows() > 1 for group in acting.values() for edit in group):
        prefix = prefix.apart()
    run = partial(forward, config, params, logits="none", return_cache=True, remat=remat)
    if batch is None:
        cache = run(prefix.tokens, mask=prefix.mask, edits=acting).cache
    else:
        tokens, mask, parts = np.asarray(prefix.tokens), np.asarray(prefix.mask), []
        for start in range(0, len(tokens), batch):
            rows = np.minimum(np.arange(start, start + batch), len(tokens) - 1)  # filled up: one program for all
            parts.append(run(jnp.asarray(tokens[rows]), mask=jnp.asarray(mask[rows]), edits=acting).cache)
        cache = _joined(parts, len(tokens))
    assert cache is not None
    return prompts._replace(prefix=None, cache=(cache._replace(rows=prefix.rows),))


_ROWS = KV._make((1, 1, 0, 0, None))
"""The row axis of each of a cache's arrays."""


@partial(jax.jit, static_argnums=1)
def _joined(parts: list[KV], count: int) -> KV:
    """The first `count` rows of all parts."""
    join = lambda axis, *leaves: jax.lax.slice_in_dim(jnp.concatenate(leaves, axis), 0, count, axis=axis)  # noqa: E731
    return jax.tree.map(join, _ROWS, *parts)


def cache_before(config: ModelConfig, params: Params, prompts: Prompts, position: int) -> Prompts:
    """The same prompts with the prefix and all tokens before slot `position` moved into the cache, unedited: the share
    that edits from there on leave alone."""
    prompts = cache_prefix(config, params, prompts)
    if position == 0:
        return prompts
    early = forward(
        config, params, prompts.tokens[:, :position], mask=prompts.mask[:, :position], cache=prompts.cache,
        logits="none", return_cache=True,
    )  # fmt: skip
    assert early.cache is not None
    return prompts._replace(
        tokens=prompts.tokens[:, position:], mask=prompts.mask[:, position:], cache=(*prompts.cache, early.cache)
    )


def before_last(config: ModelConfig, params: Params, prompts: Prompts) -> Prompts:
    """The same prompts with all but the decision token moved into the cache: the share that edits there leave alone."""
    return cache_before(config, params, prompts, prompts.tokens.shape[1] - 1)


def choice_distribution(
    lm: LanguageModel, prompts: Sequence[str], choices: Sequence[Any], *, edits: Edits | None = None
) -> Choices:
    """The exact distribution over `choices` after each prompt.

    Args:
      prompts: texts, each ending right before the answer.
      choices: answers; one string each, or several strings that mean the same.
      edits: as for `score`; all prompts are padded to the same length on the left.

    Raises:
      ValueError: a choice the tokenizer cannot put after a prompt, or a prompt too long for the model.
    """
    return _score_jit(lm.config, lm.params, make_prompts(lm, prompts, choices), edits)


@partial(jax.jit, static_argnums=0)
def _score_jit(config, params, prompts, edits):
    return score(config, params, prompts, edits=edits)[0]
