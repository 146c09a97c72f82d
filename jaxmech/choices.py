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
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.edits import Edits, with_answers
from jaxmech.models.chat import encode as encode_prompts
from jaxmech.models.chat import token_ids
from jaxmech.models.decoder import KV, Output, Params, check_groups, forward
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


class Prompts(NamedTuple):
    """What is scored: left-padded prompts, so that the last slot is the decision token, with their tries.

    tokens [B,T]; mask [B,T]; cache: segments of earlier tokens, such as a family's worked examples.
    """

    tokens: jax.Array
    mask: jax.Array
    trie: Trie
    cache: tuple[KV, ...] = ()


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
) -> tuple[Choices, Output]:
    """Scores every choice of every prompt in one forward pass.

    Args:
      prompts: B prompts with tries.
      edits: their `where` speaks of `prompts.tokens`, their `after` of the answers' tokens. A donor with a token axis
        longer than 1 spans both: T + M tokens.
      taps: as for `forward`; they see T + M tokens, the prompt's first.

    Returns:
      The choices, and the pass's output (its logits are those of the prompt's last token and of all nodes).
    """
    check_groups(edits)
    tokens, mask, trie, cache = prompts
    (B, T), M = tokens.shape, trie.tokens.shape[1]
    seen = sum((segment.mask.sum(1, keepdims=True) for segment in cache), jnp.zeros((B, 1), jnp.int32))
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + seen
    positions = jnp.concatenate([positions, positions[:, -1:] + trie.depth], axis=1)
    within = jnp.zeros((B, T + M, T + M), bool)
    within = within.at[:, :T, :T].set(jnp.tril(jnp.ones((T, T), bool)))
    within = within.at[:, T:, :T].set(True).at[:, T:, T:].set(trie.ancestors)
    out = forward(
        config,
        params,
        jnp.concatenate([tokens, trie.tokens], axis=1),
        mask=jnp.concatenate([mask, jnp.ones((B, M), bool)], axis=1),
        edits=with_answers(edits, T, M),
        taps=taps,
        logits=M + 1,
        cache=cache,
        positions=positions,
        within=within,
    )
    return Choices(_choice_logprobs(trie, out.logits)), out


def _choice_logprobs(trie: Trie, logits: jax.Array) -> jax.Array:
    """log s(a) [B,N] from the logits [B,M+1,V] of the slots."""
    whole = jax.nn.logsumexp(logits, axis=-1)
    end = jax.nn.logsumexp(jnp.where(trie.continues, -jnp.inf, logits), axis=-1) - whole
    rows = jnp.arange(logits.shape[0])[:, None]
    step = logits[rows, trie.parent, trie.tokens] - whole[rows, trie.parent]  # [B,M]
    path = jnp.einsum("bmn,bn->bm", trie.ancestors.astype(step.dtype), step, precision=jax.lax.Precision.HIGHEST)
    arrive = jnp.pad(path, ((0, 0), (1, 0))) + end  # [B,M+1]
    strings = jnp.where(trie.ends >= 0, arrive[rows[..., None], jnp.maximum(trie.ends, 0)], -jnp.inf)
    return jax.nn.logsumexp(strings, axis=-1)


def before_last(config, params: Params, prompts: Prompts) -> Prompts:
    """The same prompts with all but the decision token moved into the cache: the share that edits there leave alone."""
    if prompts.tokens.shape[1] == 1:
        return prompts
    early = forward(
        config, params, prompts.tokens[:, :-1], mask=prompts.mask[:, :-1], cache=prompts.cache, logits="none",
        return_cache=True,
    )  # fmt: skip
    return prompts._replace(
        tokens=prompts.tokens[:, -1:], mask=prompts.mask[:, -1:], cache=(*prompts.cache, early.cache)
    )


def sweep(score_point: Callable[[Any], Any], points: Any) -> Any:
    """`score_point` at every sweep point, one after another inside one program.

    Args:
      score_point: point -> any pytree; traced once.
      points: a pytree whose leaves lead with the sweep axis S, such as coefficients, directions or feature sets.

    Returns:
      What `score_point` returns, with S in front.
    """
    return jax.lax.map(score_point, points)


def in_chunks(
    run: Callable[[Any], Any], points: Any, *, size: int, advance: Callable[[int], None] | None = None
) -> Any:
    """Runs a compiled sweep in chunks of `size` points, the last one padded, so that one program serves any length.

    Args:
      run: chunk of points -> a pytree whose leaves lead with the points.
      advance: told how many points are done, for a progress bar.

    Returns:
      NumPy arrays over all points.
    """
    total = len(jax.tree.leaves(points)[0])
    pieces = []
    for start in range(0, total, size):
        rows, keep = np.minimum(np.arange(start, start + size), total - 1), min(size, total - start)
        piece = run(jax.tree.map(itemgetter(rows), points))
        pieces.append(jax.tree.map(lambda a, keep=keep: np.asarray(a)[:keep], piece))
        if advance is not None:
            advance(keep)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


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
    tokens, mask = encode_prompts(lm, prompts)
    trie = build_tries(lm, prompts, [choices] * len(prompts))
    return _score_jit(lm.config, lm.params, Prompts(tokens, mask, trie), edits)


@partial(jax.jit, static_argnums=0)
def _score_jit(config, params, prompts, edits):
    return score(config, params, prompts, edits=edits)[0]


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
