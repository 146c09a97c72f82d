"""A word-level stand-in for a model's tokenizer: words carry their space, digits stand alone."""

from __future__ import annotations

import re
from types import SimpleNamespace

_PIECE = re.compile(r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]")


class FakeTokenizer:
    """One token a word, digit or sign; words in `splits` fall into as many tokens as it says."""

    def __init__(self, splits: dict[str, int] | None = None):
        self.splits, self.vocab = splits or {}, {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        assert not add_special_tokens
        pieces = []
        for piece in _PIECE.findall(text):
            pieces += [f"{piece}#{i}" for i in range(self.splits.get(piece.strip(), 1))]
        return SimpleNamespace(input_ids=[self.vocab.setdefault(p, len(self.vocab)) for p in pieces])
