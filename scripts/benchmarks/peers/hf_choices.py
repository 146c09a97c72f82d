"""The exact distribution over answers with Hugging Face's model and hooks: the three loops that users write.

`T` denotes prompt tokens, `N` answers, `R` texts that are run, `A` tokens of the longest one, `V` the vocabulary.

As in `jaxmech.answers.score`, an answer counts as given if what follows does not continue it, be it at once or after a
separator: each answer is run, and each answer with each separator after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from jaxmech.answers.trie import answer_ids, going_on

Hook = Callable[[torch.Tensor], torch.Tensor]
"""The steered layer's output [n,slots,D] -> what takes its place."""


class Answers(NamedTuple):
    """count N; ids [R,A], padded behind: the N answers, then these with a first separator, with a second; lengths [R];
    goes_on [R,V] bool, tokens that continue what the row holds."""

    count: int
    ids: torch.Tensor
    lengths: torch.Tensor
    goes_on: torch.Tensor


def encode_answers(lm, prompt: str, names: Sequence[str]) -> Answers:
    """The answers after `prompt`, numbers all."""
    tails = [answer_ids(lm.tokenizer, prompt, name) for name in names]
    at_once, after = going_on(lm.tokenizer, lm.config.vocab_size, "0")
    rows = tails + [[*tail, separator] for separator in after for tail in tails]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tail in zip(ids, rows, strict=True):
        row[: len(tail)] = torch.tensor(tail)
    goes_on = np.repeat([at_once, *after.values()], len(tails), axis=0)
    return Answers(len(tails), ids, torch.tensor(list(map(len, rows))), torch.from_numpy(goes_on))


def read(logits: torch.Tensor, answers: Answers) -> torch.Tensor:
    """log s(a) [N] from logits [R,1+A,V]: of the prompt's last token, and of each text's tokens."""
    whole = logits.logsumexp(-1)
    at = answers.ids[..., None]
    steps = logits[:, :-1].gather(-1, at)[..., 0] - whole[:, :-1]  # [R,A]
    real = torch.arange(steps.shape[1]) < answers.lengths[:, None]
    path = (steps * real).sum(1).exp()
    rows = torch.arange(len(logits)), answers.lengths
    goes_on = (logits[rows].masked_fill(~answers.goes_on, -torch.inf).logsumexp(-1) - whole[rows]).exp()
    N = answers.count
    return (path[:N] * (1 - goes_on[:N]) - (path * goes_on)[N:].reshape(-1, N).sum(0)).log()


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
    """(a) One forward pass of the prompt [T] with each text after it."""
    R, A = answers.ids.shape
    tokens = torch.cat([prompt.expand(R, -1), answers.ids], 1)
    with hooked(model, layer, add(vector, len(prompt) - 1 if last else None)):
        logits = model(tokens, use_cache=False, logits_to_keep=A + 1).logits
    return read(logits, answers)


def cached_prompt(model, layer: int, prompt: torch.Tensor, answers: Answers, vector, last: bool) -> torch.Tensor:
    """(b) The prompt with the hook on, once; then the answers on its cache."""
    R = len(answers.ids)
    cache = DynamicCache(config=model.config)
    with hooked(model, layer, add(vector, -1 if last else None)):
        first = model(prompt[None], past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(R)
    with hooked(model, layer, add(vector, None)) if not last else contextlib.nullcontext():
        rest = model(answers.ids, past_key_values=cache).logits
    return read(torch.cat([first.expand(R, -1, -1), rest], 1), answers)


def kept_cache(model, layer: int, prompt: torch.Tensor, answers: Answers, vectors) -> list[torch.Tensor]:
    """(c) All but the prompt's last token once, for all vectors; then that token and the answers, steered."""
    R, A = answers.ids.shape
    cache = DynamicCache(config=model.config)
    model.model(prompt[None, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(R)
    tokens = torch.cat([prompt[-1:].expand(R, 1), answers.ids], 1)
    results = []
    for vector in vectors:
        with hooked(model, layer, add(vector, 0)):
            logits = model(tokens, past_key_values=cache, logits_to_keep=A + 1).logits
        cache.crop(-tokens.shape[1])
        results.append(read(logits, answers))
    return results
