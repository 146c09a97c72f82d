"""The exact distribution over answers with Hugging Face's model and hooks: the three loops that users write.

`T` denotes prompt tokens, `N` answers, `A` tokens of the longest one, `V` the vocabulary.

As in `jaxmech.choices`, an answer counts as given if the next token does not continue it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache

from jaxmech.choices import answer_ids, continuing_tokens

Hook = Callable[[torch.Tensor], torch.Tensor]
"""The steered layer's output [n,slots,D] -> what takes its place."""


class Answers(NamedTuple):
    """ids [N,A], padded behind; lengths [N]; continuing: tokens that continue an answer."""

    ids: torch.Tensor
    lengths: torch.Tensor
    continuing: torch.Tensor


def encode_answers(lm, prompt: str, names: Sequence[str]) -> Answers:
    """The answers behind `prompt`."""
    tails = [answer_ids(lm.tokenizer, prompt, name) for name in names]
    ids = torch.zeros(len(tails), max(map(len, tails)), dtype=torch.long)
    for row, tail in zip(ids, tails, strict=True):
        row[: len(tail)] = torch.tensor(tail)
    continuing = torch.from_numpy(continuing_tokens(lm.tokenizer, lm.config.vocab_size, "number")).nonzero()[:, 0]
    return Answers(ids, torch.tensor([len(tail) for tail in tails]), continuing)


def read(logits: torch.Tensor, answers: Answers) -> torch.Tensor:
    """log s(a) [N] from logits [N,1+A,V]: of the prompt's last token, and of the answer's tokens."""
    whole = logits.logsumexp(-1)
    at = answers.ids[..., None]
    steps = logits[:, :-1].gather(-1, at)[..., 0] - whole[:, :-1]  # [N,A]
    real = torch.arange(steps.shape[1]) < answers.lengths[:, None]
    rows = torch.arange(len(logits)), answers.lengths
    goes_on = logits[rows][:, answers.continuing].logsumexp(-1) - whole[rows]
    return (steps * real).sum(1) + torch.log1p(-goes_on.exp())


@contextlib.contextmanager
def hooked(model, layer: int, hook: Hook) -> Iterator[None]:
    handle = model.model.layers[layer].register_forward_hook(lambda _, __, out: hook(out))
    try:
        yield
    finally:
        handle.remove()


def add(vector: torch.Tensor, at: int | None) -> Hook:
    """Adds to one slot, or to all of them."""

    def hook(out):
        if at is None:
            return out + vector
        out[:, at] += vector
        return out

    return hook


def whole_texts(model, layer: int, prompt: torch.Tensor, answers: Answers, vector, last: bool) -> torch.Tensor:
    """(a) One forward pass of the prompt [T] with each answer behind it."""
    N, A = answers.ids.shape
    tokens = torch.cat([prompt.expand(N, -1), answers.ids], 1)
    with hooked(model, layer, add(vector, len(prompt) - 1 if last else None)):
        logits = model(tokens, use_cache=False, logits_to_keep=A + 1).logits
    return read(logits, answers)


def cached_prompt(model, layer: int, prompt: torch.Tensor, answers: Answers, vector, last: bool) -> torch.Tensor:
    """(b) The prompt with the hook on, once; then the answers on its cache."""
    N = len(answers.ids)
    cache = DynamicCache(config=model.config)
    with hooked(model, layer, add(vector, -1 if last else None)):
        first = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(N)
    with hooked(model, layer, add(vector, None)) if not last else contextlib.nullcontext():
        rest = model(answers.ids, past_key_values=cache).logits
    return read(torch.cat([first.expand(N, -1, -1), rest], 1), answers)


def kept_cache(model, layer: int, prompt: torch.Tensor, answers: Answers, vectors) -> list[torch.Tensor]:
    """(c) All but the prompt's last token once, for all vectors; then that token and the answers, steered."""
    N, A = answers.ids.shape
    cache = DynamicCache(config=model.config)
    model.model(prompt[None, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(N)
    tokens = torch.cat([prompt[-1:].expand(N, 1), answers.ids], 1)
    results = []
    for vector in vectors:
        with hooked(model, layer, add(vector, 0)):
            logits = model(tokens, past_key_values=cache, logits_to_keep=A + 1).logits
        cache.crop(-tokens.shape[1])
        results.append(read(logits, answers))
    return results
