"""Texts and conversations as left-padded tokens, BOS never missing and never doubled.

`B` denotes the batch, `T` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

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
    rows = [text_ids(lm, text, bos=bos) for text in texts]
    return _left_padded(lm, "prompt", rows, texts, length)


def encode_chat(
    lm: LanguageModel,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    add_generation_prompt: bool = True,
    *,
    length: int | None = None,
    **variables: Any,
) -> tuple[jax.Array, jax.Array]:
    """Conversations, through the tokenizer's own chat template, as tokens [B,T] and mask [B,T], padded on the left.

    Whether there is a BOS is the template's decision, as in transformers; the tokenizer adds none to it.

    Args:
      conversations: B lists of messages {"role": ..., "content": ...}.
      add_generation_prompt: end with the header of the assistant's next message.
      length: T; by default the longest conversation's number of tokens, rounded up to a multiple of 16.
      variables: what else the template asks for, such as enable_thinking=False for Qwen 3.

    Raises:
      ValueError: the tokenizer has no template, the template refuses a conversation or does not ask for a variable, a
        conversation that is not a list of such messages, or one longer than `length` or than the model takes.
    """
    _check_conversations(conversations)
    require_tokenizer(lm.tokenizer)
    if not lm.tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {lm.name!r} has no chat template, as those of models that were not tuned to chat; use "
            "encode_prompts(lm, texts), or set lm.tokenizer.chat_template"
        )
    template = _template(lm)
    if unknown := [name for name in variables if not re.search(rf"\b{name}\b", template)]:
        raise ValueError(f"{unknown[0]}: the chat template of {lm.name!r} does not ask for it")
    variables["add_generation_prompt"] = add_generation_prompt
    texts = [_render(lm, i, conversation, variables) for i, conversation in enumerate(conversations)]
    rows = [checked_ids(lm, text) for text in texts]
    start = lm.tokenizer.bos_token_id  # the template's BOS; `config.bos_id` is None where plain texts have none
    rows = [[start, *_without_bos(row, start)] if start is not None and row[:1] == [start] else row for row in rows]
    return _left_padded(lm, "conversation", rows, texts, length)


def token_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text, no special tokens added.

    Raises:
      ValueError: there is no tokenizer.
    """
    require_tokenizer(tokenizer)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def checked_ids(lm: LanguageModel, text: str) -> list[int]:
    """Token ids of a text, no special tokens added, each of which has a row in the model's embedding.

    Raises:
      ValueError: one has none, as when a token was added to a tokenizer and the model was not resized.
    """
    return check_rows(lm, token_ids(lm.tokenizer, text), text)


def text_ids(lm: LanguageModel, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a text, behind exactly one BOS if the model has one and it is wanted.

    Raises:
      ValueError: as `checked_ids`.
    """
    row, first = token_ids(lm.tokenizer, text), lm.config.bos_id if bos else None
    return check_rows(lm, row if first is None else [first, *_without_bos(row, first)], text)


def check_rows(lm: LanguageModel, row: list[int], text: str) -> list[int]:
    """The ids of `text`, or a ValueError where one has no row in the model's embedding."""
    rows = lm.config.vocab_size
    if (most := max(row, default=0)) >= rows:
        token = lm.tokenizer.convert_ids_to_tokens(most)
        raise ValueError(
            f"{text[:60]!r} holds the token {token!r} with the id {most}, yet the embedding of {lm.name!r} has {rows} "
            f"rows, 0 to {rows - 1}: the token was added to the tokenizer and not to the model. Write the text without "
            "it, or resize the model"
        )
    return row


def require_tokenizer(tokenizer) -> None:
    """Refuses None, which models that take tokens only have."""
    if tokenizer is None:
        raise ValueError(
            "the model was loaded without a tokenizer, so it takes tokens and no text; give it one: "
            "load_model(…, tokenizer=FOLDER or hub id)"
        )


def _without_bos(row: list[int], bos_id: int) -> list[int]:
    """The row behind its leading BOS tokens, however many there are."""
    return row[next((i for i, token in enumerate(row) if token != bos_id), len(row)) :]


def _template(lm: LanguageModel) -> str:
    """The chat template's text: the one called default, where there are several."""
    template = lm.tokenizer.chat_template
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(
            f"the tokenizer of {lm.name!r} has the chat templates {', '.join(template)} and none called default; "
            "choose one: lm.tokenizer.chat_template = lm.tokenizer.chat_template[NAME]"
        )
    return template["default"]


def _render(lm: LanguageModel, index: int, conversation, variables: Mapping[str, Any]) -> str:
    messages = [dict(message) for message in conversation]
    try:
        return lm.tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    except Exception as error:  # a template is a program that came with the model: it fails in whatever way it likes
        roles = ", ".join(message["role"] for message in messages)
        if isinstance(error, TemplateSyntaxError):
            way_out = f"the template is damaged in line {error.lineno}; mend it, and set lm.tokenizer.chat_template"
        elif type(error) is TemplateError:  # what a template raises itself speaks of the conversation
            way_out = "give roles in the order that the model was tuned on, such as user, assistant, user"
        else:
            way_out = "give what variables it asks for, as encode_chat(lm, …, NAME=value), or mend it and set "
            way_out += "lm.tokenizer.chat_template"
        raise ValueError(
            f"conversation {index} (roles {roles}): the chat template of {lm.name!r} refuses it: {error}; {way_out}"
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
