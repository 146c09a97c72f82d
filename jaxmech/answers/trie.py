"""Token tries of allowed answers, and which ways of leaving a trie count as which answer.

`B` denotes prompts, `M` trie nodes, `N` choices, `V` the vocabulary. Slot 0 is the prompt's last token and slot m + 1
is node m.

Whatever a model writes follows the trie down to some slot and leaves it there, with a token that is not a child of that
slot. So (slot, kind of the token that leaves) is a partition of all that can be written, and an answer is a set of its
cells: the answer's own tokens, then a token that does not continue it. Every cell belongs to one answer at most:

- "1" is not given where a digit follows ("10"), nor a separator and a digit ("1.5", "1,000"), whether one token or
  two: a separator that is a token is a node below the answer's end, and leaving it with a digit gives no answer.
- Of two answers that share a beginning (" yes", " yes please") the longer one takes what it can, the shorter one the
  rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.reprs import short_repr
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.text import check_rows, require_tokenizer, token_ids

_DIGIT, _LETTER, _JOINED_DIGIT, _JOINED_LETTER = 1, 2, 4, 8
"""Bits of what a token begins with: a digit, another letter, or one of them after a separator."""

_JOINS = {_DIGIT: ".,", _LETTER: "'’-"}
"""Separators after which a number or a word may continue."""


_DIGITS = r"[\d¼½¾]"


class Trie(NamedTuple):
    """Token tries, one per row.

    tokens [B,M] int32; depth [B,M], 1 for first tokens; parent [B,M], the slot of the node's parent (its own for
    padding); ancestors [B,M,M], True where the second is the first or above it; continues [B,M+1] uint8, bits of what
    continues an answer that ends at the slot; cells [B,N,2,M+1], whether it is choice n to leave the trie at the slot
    with a token that does not (0) or does (1) continue it; kinds [V] uint8, bits of what each token begins with.
    """

    tokens: jax.Array
    depth: jax.Array
    parent: jax.Array
    ancestors: jax.Array
    continues: jax.Array
    cells: jax.Array
    kinds: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


def build_tries(
    lm: LanguageModel, prompts: Sequence[str], choices: Sequence[Sequence[Any]], *, nodes: int | None = None
) -> Trie:
    """One trie per prompt, padded to the largest (or to `nodes`).

    Args:
      prompts: texts, each ending right before the answer.
      choices: each prompt's choices; a choice is a string or several that mean the same. Whole numbers of four
        digits and more are also read with commas between the thousands. N is the largest number of choices: where a
        prompt has fewer, the rest have a probability of 0.

    Raises:
      ValueError: choices that are not strings, a choice that re-tokenises the prompt it follows, is empty, is given
        twice, or has a token without a row in the model's embedding.
    """
    require_tokenizer(lm.tokenizer)
    groups = [_spellings(lm.tokenizer, row) for row in choices]
    kinds, joins = _token_kinds(lm.tokenizer, lm.config.vocab_size)
    tries = [
        _Builder(lm.tokenizer, kinds, joins).build(prompt, row) for prompt, row in zip(prompts, groups, strict=True)
    ]
    for trie, row in zip(tries, groups, strict=True):
        check_rows(lm, trie.tokens, ", ".join(string for strings in row for string in strings))
    most = max(len(t.tokens) for t in tries)
    nodes = most if nodes is None else nodes
    if most > nodes:
        raise ValueError(f"nodes: the choices need {most} trie nodes, got room for {nodes}")
    B, N = len(tries), max(map(len, groups))
    tokens, parent = np.zeros((B, nodes), np.int32), np.tile(np.arange(1, nodes + 1, dtype=np.int32), (B, 1))
    depth, ancestors = np.ones((B, nodes), np.int32), np.zeros((B, nodes, nodes), bool)
    ancestors[:, np.arange(nodes), np.arange(nodes)] = True
    continues, cells = np.zeros((B, nodes + 1), np.uint8), np.zeros((B, N, 2, nodes + 1), bool)
    for b, trie in enumerate(tries):
        size = len(trie.tokens)
        tokens[b, :size], parent[b, :size] = trie.tokens, trie.parents
        for m, above in enumerate(trie.parents):
            if above:
                depth[b, m] = depth[b, above - 1] + 1
                ancestors[b, m] |= ancestors[b, above - 1]
        for slot, bits in trie.continues.items():
            continues[b, slot] = bits
        for (slot, side), n in trie.owners.items():
            cells[b, n, side, slot] = True
    return Trie(*map(jnp.asarray, (tokens, depth, parent, ancestors, continues, cells, kinds)))


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The tokens that `answer` adds after `prompt`."""
    head, both = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + answer)
    if both[: len(head)] != head or len(both) == len(head):
        raise ValueError(
            f"choice {answer!r} does not tokenise after the prompt's end {prompt[-20:]!r}: the prompt's own tokens "
            "change. Move the boundary, for example by putting a space or a currency sign into the prompt"
        )
    return both[len(head) :]


def going_on(tokenizer: Any, vocab_size: int, string: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """[V] bool, the tokens that continue `string`; and for each separator after which it may continue, those that then
    do."""
    kinds, joins = _token_kinds(tokenizer, vocab_size)
    bits = _continuations(string)
    after = {token: kinds & _after_separator(kind) > 0 for kind in _JOINS if bits & kind << 2 for token in joins[kind]}
    return kinds & bits > 0, after


class _Builder:
    """The trie of one prompt, grown string by string. A slot's parent always has the smaller number."""

    def __init__(self, tokenizer, kinds: np.ndarray, joins: dict[int, tuple[int, ...]]):
        self.tokenizer, self.kinds, self.joins = tokenizer, kinds, joins
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.children: list[dict[int, int]] = [{}]  # of each slot: token -> slot
        self.continues: dict[int, int] = {}
        self.owners: dict[tuple[int, int], int] = {}

    def build(self, prompt: str, choices: Sequence[tuple[str, ...]]) -> _Builder:
        ends: dict[int, tuple[int, str]] = {}
        for n, strings in enumerate(choices):
            for string in strings:
                slot = 0
                for token in answer_ids(self.tokenizer, prompt, string):
                    slot = self._child(slot, token)
                if slot in ends:
                    raise ValueError(
                        f"choices {ends[slot][1]!r} and {string!r} are the same tokens; state each answer once"
                    )
                ends[slot] = n, string
        joined = {}
        for slot, (_, string) in ends.items():
            self.continues[slot] = _continuations(string)
            joined[slot] = self._join(slot, string)
        for slot in sorted(ends):  # longer answers after shorter ones, from which they take
            self._claim(slot, ends[slot][0], joined[slot])
        return self

    def _child(self, slot: int, token: int) -> int:
        if token not in self.children[slot]:
            self.tokens.append(token)
            self.parents.append(slot)
            self.children.append({})
            self.children[slot][token] = len(self.tokens)
        return self.children[slot][token]

    def _join(self, slot: int, string: str) -> set[int]:
        """Nodes for the separators after which `string` may continue."""
        joined = set()
        for kind in (_DIGIT, _LETTER):
            if self.continues[slot] & kind << 2:  # it may continue after a separator
                for token in self.joins[kind]:
                    joined.add(child := self._child(slot, token))
                    self.continues[child] = self.continues.get(child, 0) | _after_separator(kind)
        return joined

    def _claim(self, slot: int, n: int, joined: set[int]) -> None:
        """Everything written after `slot` that does not continue what ends there is answer n."""
        self.owners[slot, 0] = n
        for token, child in self.children[slot].items():
            if child in joined:
                self._claim(child, n, set())
            elif not self.kinds[token] & self.continues[slot]:
                self._claim_all(child, n)

    def _claim_all(self, slot: int, n: int) -> None:
        self.owners[slot, 0] = self.owners[slot, 1] = n
        for child in self.children[slot].values():
            self._claim_all(child, n)


def _spellings(tokenizer, choices: Sequence[Any]) -> list[tuple[str, ...]]:
    """Each choice's strings; whole numbers without and with commas, unless another choice is written like that."""
    if isinstance(choices, str) or len(choices) == 0:
        raise ValueError(f"choices: expected a list of at least one answer, got {choices!r}")
    groups = []
    for choice in choices:
        strings = (choice,) if isinstance(choice, str) else tuple(choice) if isinstance(choice, list | tuple) else ()
        if not strings or not all(isinstance(s, str) for s in strings):
            raise ValueError(
                f"choices: expected strings, or tuples of strings that mean the same, got {choice!r} "
                f"({type(choice).__name__}); write numbers as str(number)"
            )
        groups.append(strings)
    stated = {s for strings in groups for s in strings}
    out = []
    for strings in groups:
        added = {spelling for s in strings if (spelling := _respelled(s)) is not None} - stated
        out.append((*strings, *(s for s in sorted(added) if tokenizer.unk_token_id not in token_ids(tokenizer, s))))
    return out


def _respelled(string: str) -> str | None:
    """A whole number of at least four digits with commas where it has none, and without where it has them."""
    if match := re.fullmatch(r"(\W*)([1-9]\d{3,})", string):
        return f"{match[1]}{int(match[2]):,}"
    if match := re.fullmatch(r"(\W*)([1-9]\d{0,2}(?:,\d{3})+)", string):
        return match[1] + match[2].replace(",", "")
    return None


def _continuations(string: str) -> int:
    """The bits of tokens that continue `string`: digits a number, letters and digits a word."""
    bits, last = 0, string[-1]
    number = re.search(_DIGITS + r"[.,]?$", string) is not None
    if number:
        bits |= _DIGIT | (0 if last in _JOINS[_DIGIT] else _JOINED_DIGIT)
    if not number or any(c.isalpha() for c in string):
        bits |= _after_separator(_LETTER) | (0 if last in _JOINS[_LETTER] else _JOINED_LETTER)
    return bits


def _after_separator(kind: int) -> int:
    return _DIGIT if kind == _DIGIT else _DIGIT | _LETTER


@lru_cache(maxsize=8)
def _token_kinds(tokenizer, vocab_size: int) -> tuple[np.ndarray, dict[int, tuple[int, ...]]]:
    """[V] uint8, what each token begins with, and by kind the tokens that are a separator and nothing else."""
    kinds = np.zeros(vocab_size, np.uint8)
    joins: dict[int, list[int]] = {kind: [] for kind in _JOINS}
    for token, text in enumerate(_token_texts(tokenizer, vocab_size)):
        kinds[token] = _begins(text[:1])
        for kind, separators in _JOINS.items():
            if text and text[0] in separators:
                if len(text) == 1:
                    joins[kind].append(token)
                elif _begins(text[1]) & _after_separator(kind):
                    kinds[token] |= kind << 2
    return kinds, {kind: tuple(tokens) for kind, tokens in joins.items()}


def _begins(character: str) -> int:
    if re.match(_DIGITS, character):
        return _DIGIT
    return _LETTER if re.match(r"\w", character) else 0


def _token_texts(tokenizer, vocab_size: int) -> list[str]:
    """What each token writes, "" for special ones. A leading space is kept, which decoding token by token would lose;
    the first token of a character that is spread over several stands for all."""
    written = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    special = set(tokenizer.all_special_ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    as_bytes = _byte_alphabet() if decoder is not None and b"ByteLevel" in decoder.__getstate__() else None

    def text(token: int, form: str | None) -> str:
        if form is None or token in special:
            return ""
        if as_bytes is not None:
            return _decode(bytes(as_bytes[c] for c in form)) if all(c in as_bytes for c in form) else form
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", form):  # only where no token writes the character
            byte = int(match[1], 16)
            return _decode(bytes([byte])) if byte >= 0x80 else ""
        return form.replace("▁", " ")

    return [text(token, form) for token, form in enumerate(written)]


def _decode(raw: bytes) -> str:
    """UTF-8. A character that is cut off counts as a letter if most that begin with its first byte are letters."""
    text = raw.decode(errors="replace")
    letter = text[:1] == "\ufffd" and 0xC3 <= raw[0] < 0xF0 and raw[0] != 0xE2  # E2: dashes, quotes and the like
    return "é" + text[1:] if letter else text


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes (Radford et al. 2019): printable Latin-1 as it is, the
    rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(shifted)}
