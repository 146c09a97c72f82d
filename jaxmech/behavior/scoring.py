"""From a table of prompts to exact outcomes; what the prompts of a family share is computed once.

`N` denotes prompts, `C` choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.answers.prompts import Prefix, Prompts, check_apart, check_length
from jaxmech.answers.score import Choices, cache_prefix, score
from jaxmech.answers.trie import build_tries
from jaxmech.io.arguments import Array
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import encode_prompts, token_ids


class Encoded(NamedTuple):
    """A prompt table as arrays: N prompts, their prefixes computed; values [N,C], what each choice is worth."""

    prompts: Prompts
    values: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


def encode_table(lm: LanguageModel, table: pd.DataFrame, *, batch: int | None = 4) -> Encoded:
    """Tokenises prompts and their tries, and runs every distinct prefix once, if all prompts have one.

    Args:
      table: columns prefix, query, answers, score (see `jaxmech.behavior.behavior`).
      batch: prefixes per pass; None leaves them to whoever scores the prompts, so that edits may act on them.

    Raises:
      ValueError: prefix and query do not tokenise separately, or an answer cannot be written after a query.
    """
    trie = build_tries(lm, list(table["query"]), [list(row) for row in table["answers"]])
    values = np.zeros((len(table), max(map(len, table["score"]))), np.float32)
    for i, score_of in enumerate(table["score"]):
        values[i, : len(score_of)] = score_of
    if (table["prefix"] == "").any():  # then nothing is shared, and every text begins as the model wants it
        prompts = Prompts(*encode_prompts(lm, list(table["prefix"] + table["query"])), trie)
        check_length(lm.config, prompts)
        return Encoded(prompts, jnp.asarray(values))
    for before, query in zip(table["prefix"], table["query"], strict=True):
        check_apart(lm.tokenizer, before, query)
    prefixes, index = np.unique(table["prefix"].to_numpy(str), return_inverse=True)
    longest = max(len(token_ids(lm.tokenizer, q)) for q in table["query"])
    tokens, mask = encode_prompts(lm, list(table["query"]), length=-(-longest // 8) * 8, bos=False)
    prompts = Prompts(tokens, mask, trie, prefix=Prefix(*encode_prompts(lm, list(prefixes)), jnp.asarray(index)))
    check_length(lm.config, prompts)
    if batch is not None:
        prompts = cache_prefix(lm.config, lm.params, prompts, batch=batch)
    return Encoded(prompts, jnp.asarray(values))


def take(encoded: Encoded, rows: Sequence[int] | np.ndarray) -> tuple[Prompts, jax.Array]:
    """The prompts of some rows, which share the caches of all prefixes, and their values [B,C]."""
    rows = np.asarray(rows)
    return encoded.prompts.of(rows), jnp.asarray(np.asarray(encoded.values)[rows])


@partial(jax.jit, static_argnums=0)
def _score(config: ModelConfig, params: Params, prompts: Prompts) -> Array:
    return score(config, params, prompts)[0].logprobs


def allocate(
    lm: LanguageModel,
    table: pd.DataFrame,
    encoded: Encoded,
    *,
    batch: int = 16,
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """The table with the model's outcome on each prompt.

    Adds g (the expected score), mass (on valid answers), p_zero, p_half and p_all (of a score of 0, one half, 1) and
    logprobs (a list [C]).
    """
    logprobs = []
    for start in range(0, len(table), batch):
        rows = np.minimum(np.arange(start, start + batch), len(table) - 1)
        keep = min(batch, len(table) - start)
        logprobs.append(np.asarray(_score(lm.config, lm.params, take(encoded, rows)[0]))[:keep])
        if advance is not None:
            advance(keep)
    return with_outcomes(table, np.concatenate(logprobs), np.asarray(encoded.values))


def with_outcomes(table: pd.DataFrame, logprobs: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """The table with outcome columns from log s(a) [N,C] and the scores [N,C]; see `allocate`.

    Raises:
      ValueError: a prompt's answers are not finite; names it.
    """
    bad = np.flatnonzero(np.isnan(logprobs).any(1))
    if len(bad):
        raise ValueError(f"prompt {table.index[bad[0]]} gave NaN; check the model's weights and dtype")
    dist = Choices(jnp.asarray(logprobs))
    probs = np.asarray(dist.probs)
    mass_at = lambda share: (probs * np.isclose(values, share)).sum(1)  # noqa: E731
    return table.assign(
        g=(probs * values).sum(1), mass=np.asarray(dist.mass), p_zero=mass_at(0.0), p_half=mass_at(0.5),
        p_all=mass_at(1.0), logprobs=list(logprobs),
    )  # fmt: skip
