"""Texts and conversations as left-padded tokens, BOS never missing and never doubled.

`B` denotes the batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxmech.models.load import LanguageModel

_BUCKET = 16


def encode(
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
    rows = [text_ids(lm, text) if bos else token_ids(lm.tokenizer, text) for text in texts]
    return _left_padded(lm, "prompt", rows, texts, length)


def encode_chat(
    lm: LanguageModel,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    add_generation_prompt: bool = True,
    *,
    length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Conversations, through the tokenizer's own chat template, as tokens [B,T] and mask [B,T], padded on the left.

    Whether there is a BOS is the template's decision, as in transformers; the tokenizer adds none to it.

    Args:
      conversations: B lists of messages {"role": ..., "content": ...}.
      add_generation_prompt: end with the header of the assistant's next message.
      length: T; by default the longest conversation's number of tokens, rounded up to a multiple of 16.

    Raises:
      ValueError: the tokenizer has no template, the template refuses a conversation, a conversation that is not a list
        of such messages, or one longer than `length` or than the model takes.
    """
    _check_conversations(conversations)
    if not lm.tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {lm.name!r} has no chat template, as those of models that were not tuned to chat; use "
            "encode_prompts(lm, texts), or set lm.tokenizer.chat_template"
        )
    texts = [_render(lm, i, conversation, add_generation_prompt) for i, conversation in enumerate(conversations)]
    rows = [token_ids(lm.tokenizer, text) for text in texts]
    start = lm.tokenizer.bos_token_id  # the template's BOS; `config.bos_id` is None where plain texts have none
    rows = [[start, *_without_bos(row, start)] if start is not None and row[:1] == [start] else row for row in rows]
    return _left_padded(lm, "conversation", rows, texts, length)


def token_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text, no special tokens added."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def text_ids(lm: LanguageModel, text: str) -> list[int]:
    """Token ids of a text, behind exactly one BOS if the model has one."""
    row, bos = token_ids(lm.tokenizer, text), lm.config.bos_id
    return row if bos is None else [bos, *_without_bos(row, bos)]


def _without_bos(row: list[int], bos_id: int) -> list[int]:
    """The row behind its leading BOS tokens, however many there are."""
    return row[next((i for i, token in enumerate(row) if token != bos_id), len(row)) :]


def _render(lm: LanguageModel, index: int, conversation, add_generation_prompt: bool) -> str:
    messages = [dict(message) for message in conversation]
    try:
        return lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program that came with the model: it fails in whatever way it likes
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"conversation {index} (roles {roles}): the chat template of {lm.name!r} refuses it: {error}; "
            "give roles in the order that the model was tuned on, such as user, assistant, user"
        ) from error


def _check_conversations(conversations) -> None:
    _require_list("conversations", conversations, (list, tuple), "lists of messages; put a single one into a list")
    for i, conversation in enumerate(conversations):
        if not conversation:
            raise ValueError(f"conversation {i} has no messages")
        for message in conversation:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise ValueError(
                    f"conversation {i}: expected messages {{'role': text, 'content': text}}, got {message!r:.80}"
                )


def require_texts(name: str, texts: Any) -> None:
    """Refuses what is no list of strings: a single string would be taken letter by letter.

    Raises:
      ValueError: names the argument.
    """
    _require_list(name, texts, str, "strings")


def _require_list(name: str, values: Any, kind, what: str) -> None:
    if isinstance(values, str) or len(values) == 0 or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name}: expected at least one, as a list of {what}; got {values!r:.80}")


def _left_padded(
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
        raise ValueError(f"{what} {counts.index(0)} has no tokens, and the model has nothing to start from; write some")
    if length is None:
        length = min(-(-counts[longest] // _BUCKET) * _BUCKET, most)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)
