"""The exact distribution over allowed answers, from one pass over a token trie.

`B` denotes the batch, `T` prompt tokens, `M` trie nodes, `N` choices, `W` strings of a choice, `V` the vocabulary.

An answer's strings become paths in a trie of tokens. All nodes run behind the prompt in one pass, each attending to the
prompt and to its own ancestors only. With w_k the tokens of string w,

    s(a) = sum_w  prod_k p(w_k | prompt, w_<k) * p(end | prompt, w),

where `end` is the event that the next token does not continue the answer, so that "1" does not stand for "10". The
distribution over choices is s / M with M = sum_a s(a), the mass on valid answers. All of it is differentiable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.edits import Edits, on_prefix, with_answers
from jaxmech.models.chat import encode as encode_prompts
from jaxmech.models.chat import token_ids
from jaxmech.models.decoder import KV, Output, Params, check_groups, forward, next_positions, unembed
from jaxmech.models.load import LanguageModel

_CONTINUES = {"number": re.compile(r"[.,]?\d"), "word": re.compile(r"\w|['’-]\w")}


class Trie(NamedTuple):
    """Token tries, one a row.

    tokens [B,M] int32; depth [B,M], 1 for first tokens; parent [B,M], the slot of the node's parent, where slot 0 is
    the prompt's last token and slot m + 1 is node m; ancestors [B,M,M], True where the second is the first or above it;
    ends [B,N,W], the slot at which a string of a choice ends, -1 for none; continues [V], True on tokens that continue
    an answer.
    """

    tokens: jax.Array
    depth: jax.Array
    parent: jax.Array
    ancestors: jax.Array
    ends: jax.Array
    continues: jax.Array

    def of(self, rows: np.ndarray | jax.Array) -> Trie:
        """The tries of some rows."""
        return Trie(*(a[rows] for a in self[:-1]), self.continues)


class Prefix(NamedTuple):
    """What several prompts begin with, such as a family's worked examples: computed once for all of them.

    tokens [G,P]; mask [G,P]; rows [B], which of the G prefixes each prompt follows.
    """

    tokens: jax.Array
    mask: jax.Array
    rows: jax.Array

    def apart(self) -> Prefix:
        """The same with a prefix of its own for every prompt."""
        return Prefix(self.tokens[self.rows], self.mask[self.rows], jnp.arange(len(self.rows)))


class Prompts(NamedTuple):
    """What is scored: left-padded prompts, so that the last slot is the decision token, with their tries.

    tokens [B,T]; mask [B,T]; cache: segments of earlier tokens, which no edit reaches any more; prefix: worked examples
    in front, not computed yet (then there is no cache).
    """

    tokens: jax.Array
    mask: jax.Array
    trie: Trie
    cache: tuple[KV, ...] = ()
    prefix: Prefix | None = None


class Choices(NamedTuple):
    """logprobs [B,N]: log s(a), unnormalised."""

    logprobs: jax.Array

    @property
    def probs(self) -> jax.Array:
        """[B,N], summing to one over the choices."""
        return jax.nn.softmax(self.logprobs, axis=-1)

    @property
    def mass(self) -> jax.Array:
        """[B], the probability that the answer is one of the choices."""
        return jnp.exp(jax.nn.logsumexp(self.logprobs, axis=-1))

    def expected(self, values: jax.Array) -> jax.Array:
        """The mean [B] of `values` [N] or [B,N] under `probs`."""
        return (self.probs * values).sum(-1)


def score(
    config,
    params: Params,
    prompts: Prompts,
    *,
    edits: Edits | None = None,
    taps: Sequence[str] | Mapping[str, Any] = (),
    remat: bool = False,
) -> tuple[Choices, Output]:
    """Scores every choice of every prompt in one forward pass (and one over the prefixes, where there are any).

    Args:
      prompts: B prompts with tries.
      edits: their `where` speaks of `prompts.tokens`, their `after` of the answers' tokens, their `before` of the
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
    """Tokens, mask and positions [B,T+M] of prompts with all answers behind them, and who looks at whom
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


def read_out(config, params: Params, final: jax.Array, trie: Trie) -> jax.Array:
    """log s(a) [...,B,N] from the residuals [...,B,M+1,D] after the last layer, of the decision token and all nodes."""
    *lead, B, slots, D = final.shape
    wanted = jnp.broadcast_to(trie.tokens[:, None], (*lead, B, slots, slots - 1)).reshape(-1, slots - 1)
    rows = len(wanted)
    chunks = -(-rows * config.vocab_size // _LOGITS_AT_ONCE)
    size = -(-rows // chunks)

    def by_chunk(a):
        # Neighbours go to different chunks, so that devices that hold different rows all have work in each.
        a = jnp.pad(a, ((0, size * chunks - rows), (0, 0)))
        return jnp.swapaxes(a.reshape(size, chunks, -1), 0, 1)

    def chunk(inputs):
        x, tokens = inputs
        logits = unembed(config, params, x)  # [size,V]
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - top)
        sums = jnp.stack([weights.sum(-1), jnp.where(trie.continues, 0.0, weights).sum(-1)], axis=-1)
        return jnp.log(sums) + top, jnp.take_along_axis(logits, tokens, axis=-1)

    if chunks > 1:  # a gradient keeps the weights of one chunk, not those of all
        chunk = jax.checkpoint(chunk)
    sums, logits = jax.lax.map(chunk, (by_chunk(final.reshape(rows, D)), by_chunk(wanted)))
    back = lambda a: jnp.swapaxes(a, 0, 1).reshape(size * chunks, -1)[:rows].reshape(*lead, B, slots, -1)  # noqa: E731
    return _choice_logprobs(trie, back(sums)[..., 0], back(sums)[..., 1], back(logits))


def _choice_logprobs(trie: Trie, whole: jax.Array, ends: jax.Array, logits: jax.Array) -> jax.Array:
    """log s(a) [...,B,N] from each slot's log normaliser over all tokens [...,B,M+1], over those that end the answer,
    and its logits of the nodes' tokens [...,B,M+1,M]."""
    slots = jnp.broadcast_to(trie.parent[:, None], (*logits.shape[:-2], 1, logits.shape[-1]))
    step = jnp.take_along_axis(logits - whole[..., None], slots, axis=-2)[..., 0, :]  # [...,B,M]
    precision = jax.lax.Precision.HIGHEST
    path = jnp.einsum("bmn,...bn->...bm", trie.ancestors.astype(step.dtype), step, precision=precision)
    arrive = jnp.pad(path, [(0, 0)] * (path.ndim - 1) + [(1, 0)]) + ends - whole  # [...,B,M+1]
    B, N, W = trie.ends.shape
    at = jnp.broadcast_to(jnp.maximum(trie.ends, 0).reshape(B, N * W), (*arrive.shape[:-1], N * W))
    strings = jnp.take_along_axis(arrive, at, axis=-1).reshape(*arrive.shape[:-1], N, W)
    return jax.nn.logsumexp(jnp.where(trie.ends >= 0, strings, -jnp.inf), axis=-1)


def cache_prefix(
    config, params: Params, prompts: Prompts, *, edits: Edits | None = None, remat: bool = False
) -> Prompts:
    """The same prompts with the prefix, edited where the edits' `before` says so, in the cache: once for all prompts
    that share it, unless edits tell these apart."""
    if prompts.prefix is None:
        return prompts
    here, prefix = on_prefix(edits), prompts.prefix
    if any(edit.rows() > 1 for group in here.values() for edit in group):
        prefix = prefix.apart()
    cache = forward(
        config, params, prefix.tokens, mask=prefix.mask, edits=here, logits="none", return_cache=True, remat=remat
    ).cache
    return prompts._replace(prefix=None, cache=(cache._replace(rows=prefix.rows),))


def cache_before(config, params: Params, prompts: Prompts, position: int) -> Prompts:
    """The same prompts with the prefix and all tokens before slot `position` moved into the cache, unedited: the share
    that edits from there on leave alone."""
    prompts = cache_prefix(config, params, prompts)
    if position == 0:
        return prompts
    early = forward(
        config, params, prompts.tokens[:, :position], mask=prompts.mask[:, :position], cache=prompts.cache,
        logits="none", return_cache=True,
    )  # fmt: skip
    return prompts._replace(
        tokens=prompts.tokens[:, position:], mask=prompts.mask[:, position:], cache=(*prompts.cache, early.cache)
    )


def before_last(config, params: Params, prompts: Prompts) -> Prompts:
    """The same prompts with all but the decision token moved into the cache: the share that edits there leave alone."""
    return cache_before(config, params, prompts, prompts.tokens.shape[1] - 1)


def choice_distribution(
    lm: LanguageModel, prompts: Sequence[str], choices: Sequence[Any], edits: Edits | None = None
) -> Choices:
    """The exact distribution over `choices` after each prompt.

    Args:
      prompts: texts, each ending right before the answer.
      choices: answers; one string each, or several strings that mean the same.
      edits: as for `score`; all prompts are padded to the same length on the left.

    Raises:
      ValueError: a choice the tokenizer cannot put behind a prompt, or a prompt too long for the model.
    """
    return _score_jit(lm.config, lm.params, make_prompts(lm, prompts, choices), edits)


@partial(jax.jit, static_argnums=0)
def _score_jit(config, params, prompts, edits):
    return score(config, params, prompts, edits=edits)[0]


def make_prompts(
    lm: LanguageModel, texts: Sequence[str], choices: Sequence[Any], *, prefixes: Sequence[str] | None = None
) -> Prompts:
    """Prompts to be scored over the same `choices`, as for `choice_distribution`.

    Args:
      texts: what is asked, each ending right before the answer, padded to the same length on the left.
      prefixes: what stands before each text, such as its worked examples. Equal ones are computed once.

    Raises:
      ValueError: a prefix and a text that do not tokenise apart, a choice that does not tokenise behind its text, or
        prompts too long for the model.
    """
    trie = build_tries(lm, texts, [choices] * len(texts))
    if prefixes is None:
        return Prompts(*encode_prompts(lm, texts), trie)
    for before, text in zip(prefixes, texts, strict=True):
        check_apart(lm.tokenizer, before, text)
    own, rows = np.unique(np.asarray(prefixes, str), return_inverse=True)
    prefix = Prefix(*encode_prompts(lm, list(own)), jnp.asarray(rows))
    return Prompts(*encode_prompts(lm, texts, bos=False), trie, prefix=prefix)


def check_apart(tokenizer, prefix: str, text: str) -> None:
    """Refuses a text whose tokens change when `prefix` stands before it."""
    if token_ids(tokenizer, prefix + text) != token_ids(tokenizer, prefix) + token_ids(tokenizer, text):
        raise ValueError(
            f"prompt {text[:40]!r} and what stands before it, ending in {prefix[-20:]!r}, do not tokenise apart; end "
            "the prefix with a line break"
        )


def build_tries(
    lm: LanguageModel, prompts: Sequence[str], choices: Sequence[Sequence[Any]], *, nodes: int | None = None
) -> Trie:
    """One trie a prompt, padded to the largest (or to `nodes`).

    Args:
      prompts: texts, each ending right before the answer.
      choices: for each prompt its choices; a choice is a string or several. N is the largest number of them: where a
        prompt has fewer, the rest get no string and a probability of 0.

    Raises:
      ValueError: a choice that re-tokenises the prompt it follows, is empty, or stands twice.
    """
    groups = [[(c,) if isinstance(c, str) else tuple(c) for c in row] for row in choices]
    tails = [
        [[answer_ids(lm.tokenizer, prompt, s) for s in c] for c in row]
        for prompt, row in zip(prompts, groups, strict=True)
    ]
    tries = [_one_trie(tail, group) for tail, group in zip(tails, groups, strict=True)]
    nodes = max(len(t[0]) for t in tries) if nodes is None else nodes
    width = max(len(c) for row in groups for c in row)
    B, N = len(tries), max(map(len, groups))
    tokens, parent = np.zeros((B, nodes), np.int32), np.zeros((B, nodes), np.int32)
    depth, ancestors = np.ones((B, nodes), np.int32), np.zeros((B, nodes, nodes), bool)
    ancestors[:, np.arange(nodes), np.arange(nodes)] = True
    ends = np.full((B, N, width), -1, np.int32)
    for b, (ids, parents, stops) in enumerate(tries):
        if len(ids) > nodes:
            raise ValueError(f"nodes: prompt {b} needs {len(ids)} trie nodes, got room for {nodes}")
        tokens[b, : len(ids)], parent[b, : len(ids)] = ids, parents
        for m, above in enumerate(parents):
            if above:
                depth[b, m] = depth[b, above - 1] + 1
                ancestors[b, m] |= ancestors[b, above - 1]
        for n, stop in enumerate(stops):
            ends[b, n, : len(stop)] = stop
    numeric = all(re.fullmatch(r"\s*\d+", s) for row in groups for c in row for s in c)
    continues = continuing_tokens(lm.tokenizer, lm.config.vocab_size, "number" if numeric else "word")
    return Trie(*map(jnp.asarray, (tokens, depth, parent, ancestors, ends, continues)))


def answer_ids(tokenizer, prompt: str, answer: str) -> list[int]:
    """The tokens that `answer` adds behind `prompt`."""
    head, both = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    if both[: len(head)] != head or len(both) == len(head):
        raise ValueError(
            f"choice {answer!r} does not tokenise behind the prompt's end {prompt[-20:]!r}: the prompt's own tokens "
            "change. Move the boundary, for example put a space or a currency sign into the prompt"
        )
    return both[len(head) :]


def _one_trie(tails: list[list[list[int]]], names) -> tuple[list[int], list[int], list[list[int]]]:
    """Node tokens, parents' slots, and the slot at which each string of each choice ends."""
    ids: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    taken: dict[int, Any] = {}
    stops = []
    for name, strings in zip(names, tails, strict=True):
        stops.append([])
        for string in strings:
            slot = 0
            for token in string:
                if (slot, token) not in children:
                    ids.append(token)
                    parents.append(slot)
                    children[slot, token] = len(ids)
                slot = children[slot, token]
            if slot in taken:
                raise ValueError(f"choices {taken[slot]!r} and {name[0]!r} are the same tokens; state each answer once")
            taken[slot] = name if len(name) > 1 else name[0]
            stops[-1].append(slot)
    return ids, parents, stops


@lru_cache(maxsize=8)
def continuing_tokens(tokenizer, vocab_size: int, kind: str) -> np.ndarray:
    """[V] bool: tokens that continue an answer. A number goes on with a digit, also behind a point or a comma; a word
    with a letter, a digit, an apostrophe or a hyphen."""
    pattern = _CONTINUES[kind]
    texts = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    out = np.zeros(vocab_size, bool)
    # Byte-level vocabularies write a leading space as a letter (Ġ), which would look like a word going on.
    out[: len(texts)] = [bool(t) and t[0] not in "ĠĊ▁" and bool(pattern.match(t)) for t in texts]
    return out
