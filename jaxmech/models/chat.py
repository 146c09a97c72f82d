"""Conversations as left-padded tokens, through the tokenizer's own chat template.

`B` denotes the batch, `T` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jinja2 import TemplateError, TemplateSyntaxError

if TYPE_CHECKING:
    from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import checked_ids, left_padded, require_list, require_tokenizer, without_bos


def encode_chat(
    lm: LanguageModel,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    add_generation_prompt: bool = True,
    length: int | None = None,
    **variables: Any,
) -> tuple[jax.Array, jax.Array]:
    """Conversations as tokens [B,T] and mask [B,T], padded on the left, through the tokenizer's own chat template.

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
            f"the tokenizer of {lm.name!r} has no chat template, as is usual for models not tuned to chat; use "
            "encode_prompts(lm, texts), or set lm.tokenizer.chat_template"
        )
    template = _template(lm)
    if unknown := [name for name in variables if not re.search(rf"\b{name}\b", template)]:
        raise ValueError(f"{unknown[0]}: the chat template of {lm.name!r} does not ask for it")
    variables["add_generation_prompt"] = add_generation_prompt
    texts = [_render(lm, i, conversation, variables) for i, conversation in enumerate(conversations)]
    rows = [checked_ids(lm, text) for text in texts]
    start = lm.tokenizer.bos_token_id  # the template's BOS; `config.bos_id` is None where plain texts have none
    rows = [[start, *without_bos(row, start)] if start is not None and row[:1] == [start] else row for row in rows]
    return left_padded(lm, "conversation", rows, texts, length)


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
    except Exception as error:  # a template is a program that came with the model: it can fail in any way
        roles = ", ".join(message["role"] for message in messages)
        if isinstance(error, TemplateSyntaxError):
            way_out = f"the template is damaged in line {error.lineno}; fix it, and set lm.tokenizer.chat_template"
        elif type(error) is TemplateError:  # what a template itself raises is about the conversation
            way_out = "give roles in the order that the model was tuned on, such as user, assistant, user"
        else:
            way_out = "give the variables it asks for, as encode_chat(lm, …, NAME=value), or fix it and set "
            way_out += "lm.tokenizer.chat_template"
        raise ValueError(
            f"conversation {index} (roles {roles}): the chat template of {lm.name!r} refuses it: {error}; {way_out}"
        ) from error


def _check_conversations(conversations) -> None:
    require_list("conversations", conversations, (list, tuple), "lists of messages; put a single one into a list")
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
