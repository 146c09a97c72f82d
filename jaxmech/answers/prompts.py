"""Prompts with their answers: texts as left-padded tokens, tries, and worked examples that several share.

`B` denotes prompts, `T` their tokens, `G` prefixes, `P` their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.answers.trie import Trie, build_tries
from jaxmech.io.arguments import as_indices
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import KV
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import encode_prompts, require_texts, token_ids


class Prefix(NamedTuple):
    """What several prompts begin with, such as a family's worked examples: computed once for all of them.

    tokens [G,P]; mask [G,P]; rows [B], which of the G prefixes each prompt follows.
    """

    tokens: jax.Array
    mask: jax.Array
    rows: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)

    def apart(self) -> Prefix:
        """The same with a separate prefix for every prompt."""
        return Prefix(self.tokens[self.rows], self.mask[self.rows], jnp.arange(len(self.rows)))


class Prompts(NamedTuple):
    """What is scored: left-padded prompts, so that the last slot is the decision token, with their tries.

    tokens [B,T]; mask [B,T]; cache: segments of earlier tokens, which no edit reaches any more; prefix: worked examples
    before them, not computed yet (then there is no cache).
    """

    tokens: jax.Array
    mask: jax.Array
    trie: Trie
    cache: tuple[KV, ...] = ()
    prefix: Prefix | None = None

    def __repr__(self) -> str:
        return short_repr(self)

    def of(self, rows: np.ndarray | jax.Array) -> Prompts:
        """Some of the prompts, by index or by a mask; what they share with others is kept.

        Raises:
          ValueError: rows that do not exist.
        """
        *tries, kinds = self.trie
        if not isinstance(rows, jax.core.Tracer):
            rows = as_indices("rows", rows, len(self.tokens))
        rows, of = jnp.asarray(rows), [segment.rows for segment in self.cache]
        taken = rows_of((self.tokens, self.mask, tries, of, self.prefix and self.prefix.rows), rows)
        tokens, mask, tries, of, follows = taken
        cache = (s._replace(rows=rows if r is None else r) for s, r in zip(self.cache, of, strict=True))
        return Prompts(
            tokens, mask, Trie._make([*tries, kinds]), tuple(cache), self.prefix and self.prefix._replace(rows=follows)
        )


@jax.jit  # one program for all arrays
def rows_of(arrays: Any, rows: jax.Array | np.ndarray) -> Any:
    """Some rows of every array, strongly typed: one made from Python numbers is weakly typed, and would be another
    program for whatever takes it."""
    return jax.tree.map(lambda a: jax.lax.convert_element_type(a[rows], a.dtype), arrays)


def make_prompts(
    lm: LanguageModel, texts: Sequence[str], choices: Sequence[Any], *, prefixes: Sequence[str] | None = None
) -> Prompts:
    """Prompts to be scored over the same `choices`, as for `choice_distribution`.

    Args:
      texts: what is asked, each ending right before the answer, padded to the same length on the left.
      prefixes: the text before each one, such as its worked examples. Equal ones are computed once.

    Raises:
      ValueError: a prefix and a text that do not tokenise separately, a choice that does not tokenise after its text,
        or prompts that are, with their prefix and the longest answer, too long for the model.
    """
    require_texts("texts", texts)
    if prefixes is None:
        prompts = Prompts(*encode_prompts(lm, texts), build_tries(lm, texts, [choices] * len(texts)))
        check_length(lm.config, prompts)
        return prompts
    require_texts("prefixes", prefixes)
    if len(prefixes) != len(texts):
        raise ValueError(f"prefixes: expected one for each of {len(texts)} texts, got {len(prefixes)}")
    for before, text in zip(prefixes, texts, strict=True):
        check_apart(lm.tokenizer, before, text)
    distinct, rows = np.unique(np.asarray(prefixes, str), return_inverse=True)
    prefix = Prefix(*encode_prompts(lm, list(distinct)), jnp.asarray(rows))
    trie = build_tries(lm, texts, [choices] * len(texts))
    prompts = Prompts(*encode_prompts(lm, texts, bos=False), trie, prefix=prefix)
    check_length(lm.config, prompts)
    return prompts


def check_length(config: ModelConfig, prompts: Prompts) -> None:
    """Refuses prompts that, with what precedes them and the longest answer, have more tokens than the model takes.

    An answer extends to its last token, or to the separator that is scored after it.
    """
    counts = np.asarray(prompts.mask.sum(1))
    if prompts.prefix is not None:
        counts = counts + np.asarray(prompts.prefix.mask.sum(1))[np.asarray(prompts.prefix.rows)]
    for segment in prompts.cache:
        counts = counts + np.asarray(segment.of(segment.mask).sum(1))
    answer = np.asarray(prompts.trie.depth).max(1)
    longest = int((counts + answer).argmax())
    if counts[longest] + answer[longest] > config.max_positions:
        raise ValueError(
            f"prompt {longest}: {counts[longest]} tokens, worked examples included, and {answer[longest]} of its "
            "longest answer (with the separator that is scored after it) are more than the model's "
            f"{config.max_positions} positions; shorten it"
        )


def check_apart(tokenizer: Any, prefix: str, text: str) -> None:
    """Refuses a text whose tokens change when `prefix` stands before it."""
    if token_ids(tokenizer, prefix + text) != token_ids(tokenizer, prefix) + token_ids(tokenizer, text):
        raise ValueError(
            f"prompt {text[:40]!r} and its prefix, ending in {prefix[-20:]!r}, do not tokenise separately; end the "
            "prefix with a line break"
        )
