"""From a table of prompts to exact allocations; what the prompts of a family share is computed once.

`N` denotes prompts, `G` distinct prefixes (a family's worked examples), `P` prefix tokens, `T` query tokens, `C`
choices.
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
from jaxmech.answers.score import Choices, score
from jaxmech.answers.trie import build_tries
from jaxmech.io.reprs import short_repr
from jaxmech.models.decoder import KV, forward
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import encode_prompts, token_ids


class Encoded(NamedTuple):
    """A prompt table as arrays.

    prompts: N queries without caches; values [N,C], the share given by each choice; prefix [N], index of the prefix;
    caches: keys and values of the G prefixes, [L,G,P,...].
    """

    prompts: Prompts
    values: jax.Array
    prefix: np.ndarray
    caches: KV

    __repr__ = short_repr


def share_given(row) -> np.ndarray:
    """The share of the stake that each allowed number leaves to the other side, [C].

    `score` of the row where its game declares one; else amount / stake, turned round where the number is what the
    player keeps or takes.
    """
    if isinstance(row.get("score"), list | np.ndarray):
        return np.asarray(row["score"], np.float32)
    share = np.asarray(row["amounts"], np.float32) / row["stake"]
    return 1.0 - share if row["reverse"] else share


def encode_table(lm: LanguageModel, table: pd.DataFrame, *, batch: int = 4, answers: str = "amounts") -> Encoded:
    """Tokenises queries and their tries, and runs every distinct prefix once.

    Args:
      table: columns prefix, query, stake, amounts, reverse (see `behavior.altruism.dictator`).
      batch: prefixes in one pass; answers: the column with the allowed answers.

    Raises:
      ValueError: prefix and query do not tokenise apart, or an amount cannot be written behind a query.
    """
    for row in table.itertuples():
        check_apart(lm.tokenizer, row.prefix, row.query)
    prefixes, index = np.unique(table["prefix"].to_numpy(str), return_inverse=True)
    longest = max(len(token_ids(lm.tokenizer, q)) for q in table["query"])
    tokens, mask = encode_prompts(lm, list(table["query"]), length=-(-longest // 8) * 8, bos=False)
    trie = build_tries(lm, list(table["query"]), [[str(a) for a in row] for row in table[answers]])
    shares = [share_given(row) for _, row in table.iterrows()]
    values = np.zeros((len(shares), max(map(len, shares))), np.float32)
    for i, share in enumerate(shares):
        values[i, : len(share)] = share
    prefix = Prefix(*encode_prompts(lm, list(prefixes)), index)
    check_length(lm.config, Prompts(tokens, mask, trie, prefix=prefix))
    return Encoded(Prompts(tokens, mask, trie), jnp.asarray(values), index, prefix_caches(lm, prefix, batch=batch))


def prefix_caches(lm: LanguageModel, prefix: Prefix, *, batch: int) -> KV:
    """Keys and values of each prefix, `batch` of them a pass."""
    tokens, mask, _ = prefix
    parts = []
    for start in range(0, len(tokens), batch):
        rows = np.minimum(np.arange(start, start + batch), len(tokens) - 1)
        part = forward(lm.config, lm.params, tokens[rows], mask=mask[rows], logits="none", return_cache=True).cache
        keep = min(batch, len(tokens) - start)
        parts.append(KV(part.k[:, :keep], part.v[:, :keep], part.positions[:keep], part.mask[:keep]))
    return KV(
        *(jnp.concatenate(leaves, axis=1) for leaves in zip(*((p.k, p.v) for p in parts), strict=True)),
        *(jnp.concatenate(leaves) for leaves in zip(*((p.positions, p.mask) for p in parts), strict=True)),
    )


def take(encoded: Encoded, rows: Sequence[int] | np.ndarray) -> tuple[Prompts, jax.Array]:
    """The prompts of some rows, which share the caches of all prefixes, and their values [B,C]."""
    rows = np.asarray(rows)
    whole = encoded.prompts
    cache = encoded.caches._replace(rows=jnp.asarray(encoded.prefix[rows]))
    return Prompts(whole.tokens[rows], whole.mask[rows], whole.trie.of(rows), (cache,)), encoded.values[rows]


@partial(jax.jit, static_argnums=0)
def _score(config, params, prompts: Prompts) -> jax.Array:
    return score(config, params, prompts)[0].logprobs


def allocate(
    lm: LanguageModel,
    table: pd.DataFrame,
    encoded: Encoded,
    *,
    batch: int = 16,
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """The table with what each prompt makes the model do.

    Adds g (expected share given), mass (on valid answers), p_zero, p_half and p_all (of giving nothing, half,
    everything) and logprobs (a list [C]).
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
    """The table with outcome columns from log s(a) [N,C] and the share given [N,C]; see `allocate`.

    Raises:
      ValueError: a prompt's answers are not finite; names it.
    """
    bad = np.flatnonzero(np.isnan(logprobs).any(1))
    if len(bad):
        raise ValueError(f"prompt {table.index[bad[0]]} gave NaN; check the model's weights and dtype")
    dist = Choices(jnp.asarray(logprobs))
    probs = np.asarray(dist.probs)
    at = lambda share: (probs * np.isclose(values, share)).sum(1)  # noqa: E731
    return table.assign(
        g=(probs * values).sum(1), mass=np.asarray(dist.mass), p_zero=at(0.0), p_half=at(0.5), p_all=at(1.0),
        logprobs=list(logprobs),
    )  # fmt: skip
