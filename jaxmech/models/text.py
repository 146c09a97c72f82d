"""Texts as left-padded tokens, BOS never missing and never doubled.

`B` denotes the batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxmech.models.language_model import LanguageModel


_BUCKET = 16


def encode_prompts(
    lm: LanguageModel, texts: Sequence[str], *, length: int | None = None, bos: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Plain texts as tokens [B,T] and mask [B,T], padded on the left.

    Args:
      texts: B texts. Special tokens written in them, such as "<bos>", become those tokens.
      length: T; by default the longest text's number of tokens, rounded up to a multiple of 16.
      bos: start every row with exactly one BOS, whether or not the text does, if the model has one (`config.bos_id`).

    Raises:
      ValueError: no texts, one without tokens, or one longer than `length` or than the model takes; names the text.
    """
    require_texts("texts", texts)
    rows = [text_ids(lm, text, bos=bos) for text in texts]
    return left_padded(lm, "prompt", rows, texts, length)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, no special tokens added.

    Raises:
      ValueError: there is no tokenizer.
    """
    require_tokenizer(tokenizer)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def checked_ids(lm: LanguageModel, text: str) -> list[int]:
    """Token ids of a text, no special tokens added; each has a row in the model's embedding.

    Raises:
      ValueError: an id has no row, as when a token was added to the tokenizer and the model was not resized.
    """
    return check_rows(lm, token_ids(lm.tokenizer, text), text)


def text_ids(lm: LanguageModel, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a text, after exactly one BOS if the model has one and it is wanted.

    Raises:
      ValueError: as `checked_ids`.
    """
    row, first = token_ids(lm.tokenizer, text), lm.config.bos_id if bos else None
    return check_rows(lm, row if first is None else [first, *without_bos(row, first)], text)


def check_rows(lm: LanguageModel, row: list[int], text: str) -> list[int]:
    """The ids of `text`, or a ValueError where one has no row in the model's embedding."""
    rows = lm.config.vocab_size
    if (most := max(row, default=0)) >= rows:
        token = lm.tokenizer.convert_ids_to_tokens(most)
        raise ValueError(
            f"{text[:60]!r} holds the token {token!r} with the id {most}, but the embedding of {lm.name!r} has {rows} "
            f"rows, 0 to {rows - 1}: the token was added to the tokenizer but not to the model. Write the text without "
            "it, or resize the model"
        )
    return row


def require_tokenizer(tokenizer: Any) -> None:
    """Refuses None, the tokenizer of models that take tokens only."""
    if tokenizer is None:
        raise ValueError(
            "the model was loaded without a tokenizer, so it takes tokens but no text; give it one: "
            "load_model(…, tokenizer=FOLDER or hub id)"
        )


def without_bos(row: list[int], bos_id: int) -> list[int]:
    """The row after its leading BOS tokens, however many there are."""
    return row[next((i for i, token in enumerate(row) if token != bos_id), len(row)) :]


def require_texts(name: str, texts: Any) -> None:
    """Refuses anything but a list of strings: a single string would be read letter by letter.

    Raises:
      ValueError: names the argument.
    """
    require_list(name, texts, str, "strings")


def require_list(name: str, values: Any, kind: Any, what: str) -> None:
    if isinstance(values, str) or len(values) == 0 or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name}: expected at least one, as a list of {what}; got {values!r:.80}")


def left_padded(
    lm: LanguageModel, what: str, rows: list[list[int]], texts: Sequence[str], length: int | None
) -> tuple[jax.Array, jax.Array]:
    """Rows of ids as tokens and mask; `what` and `texts` name the row that does not fit."""
    counts = [len(row) for row in rows]
    longest, most = int(np.argmax(counts)), lm.config.max_positions
    limit = most if length is None else min(length, most)
    if counts[longest] > limit:
        raise ValueError(
            f"{what} {longest} has {counts[longest]} tokens, at most {limit} fit: shorten it ({texts[longest][:60]!r}…)"
        )
    if 0 in counts:
        raise ValueError(f"{what} {counts.index(0)} has no tokens, so the model has nothing to start from; write some")
    if length is None:
        length = min(-(-counts[longest] // _BUCKET) * _BUCKET, most)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)
