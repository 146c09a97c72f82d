"""Tokenizers rebuilt from GGUF metadata, as the model's original tokenizer splits text.

llama.cpp stores the vocabulary and the name of a splitting rule, not the tokenizer's whole definition; what it and the
original know besides is here. Where the two differ (composed characters of Qwen), the original is followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # llama.cpp's token types
_META = "\u2581"  # sentencepiece's visible space


class _Split(NamedTuple):
    """How a byte-level vocabulary cuts text into the words that its merges build.

    Attributes:
      expression: each match is a word, and so is what lies between; None for GPT-2's own.
      digits: every digit is cut out first.
      ignore_merges: a word that is a token is taken as it is, even where the merges would not build it.
      composed: text is put into Unicode's composed form (NFC) first.
      bos: whether the beginning token is added where the file does not say.
    """

    expression: str | None
    digits: bool = False
    ignore_merges: bool = False
    composed: bool = False
    bos: bool = False


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _Split(_LLAMA3_WORDS, ignore_merges=True, bos=True)
_QWEN2 = _Split(_LLAMA3_WORDS.replace("{1,3}", ""), composed=True)
_TEKKEN = _Split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    bos=True,
)
_SPLITS = {
    "gpt-2": _Split(None),
    "smollm": _Split(None, digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
}


def from_gguf(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer that a GGUF file describes, as a transformers `PreTrainedTokenizerFast`.

    Raises:
      ValueError: an unknown kind of tokenizer or of splitting, or a missing or contradictory entry.
    """
    from transformers import PreTrainedTokenizerFast

    kind, architecture = metadata.get("tokenizer.ggml.model"), metadata.get("general.architecture", "")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model: expected 'gpt2' or 'llama', got {kind!r}")
    tokens, kinds = _tokens(metadata), metadata.get("tokenizer.ggml.token_type", ())
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    else:
        gemma = architecture.startswith("gemma")
        if gemma:
            # Runs of spaces are stored as spaces; the normalizer turns the text's into the visible ones.
            tokens = [_META * len(t) if not t.strip(" ") else t for t in tokens]
        backend = _sentencepiece(metadata, tokens, kinds, gemma)
    _add_special(backend, tokens, kinds)
    ids = special_ids(metadata)
    _add_ends(backend, metadata, tokens, ids)
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: tokens[ids[key]] for name, key in keys.items() if key in ids}
    if template := metadata.get("tokenizer.chat_template"):
        named["chat_template"] = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the tokens with a role ("bos", "eos", "eot", "eom", "unknown", "padding") that the file has."""
    roles = ("bos", "eos", "eot", "eom", "unknown", "padding")
    # llama.cpp's own ids for sentencepiece vocabularies of files that give none.
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    given = {role: metadata.get(f"tokenizer.ggml.{role}_token_id", defaults.get(role)) for role in roles}
    size = len(metadata.get("tokenizer.ggml.tokens", ()))  # converters write -1 for "none", as a huge number
    return {role: i for role, i in given.items() if i is not None and 0 <= i < size}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether the file wants the beginning token put before a text."""
    if (flag := metadata.get("tokenizer.ggml.add_bos_token")) is not None:
        return flag
    split = _SPLITS.get(metadata.get("tokenizer.ggml.pre", ""))
    return metadata.get("tokenizer.ggml.model") == "llama" or (split is not None and split.bos)


def implied_merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary whose tokens stand in the order in which they were learned.

    A token of n characters may come from any of its n - 1 splits into two tokens; sentencepiece merges the pair whose
    result ranks first, so the splits of one token stand together, longest left part first.
    """
    known = set(tokens)
    merges = []
    for token in tokens:
        for cut in range(len(token) - 1, 0, -1):
            left = token[:cut]
            if left in known:
                right = token[cut:]
                if right in known:
                    merges.append((left, right))
    return merges


def _need(metadata: Mapping[str, Any], key: str) -> Any:
    if metadata.get(key) is None:
        raise ValueError(f"{key} is missing: the file does not describe its tokenizer")
    return metadata[key]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_need(metadata, "tokenizer.ggml.tokens"))]
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"tokenizer.ggml.tokens: {twice} occur more than once, so their ids cannot be told apart")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if metadata.get(key) is not None and len(metadata[key]) < len(tokens):
            raise ValueError(f"{key} has {len(metadata[key])} entries for {len(tokens)} tokens; the file is damaged")
    return tokens


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], gemma: bool):
    """BPE over characters with bytes to fall back on, as sentencepiece's `bpe` models."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    order: Sequence[int] = range(len(tokens))
    if not gemma:  # whose scores do not rank its tokens; their order does
        scores = _need(metadata, "tokenizer.ggml.scores")
        order = sorted(order, key=lambda i: -scores[i])
    never = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)  # no text merges into these
    model = BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=implied_merges([tokens[i] for i in order if not kinds or kinds[i] not in never]),
        fuse_unk=True,
        unk_token=tokens[special_ids(metadata).get("unknown", 0)],
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    visible = normalizers.Replace(" ", _META)
    decoding = [decoders.Replace(_META, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", not gemma):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_META), visible])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = visible
    if gemma:
        backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]):
    """BPE over bytes, as GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    kind = metadata.get("tokenizer.ggml.pre")
    if kind not in _SPLITS:
        # "default" is what converters wrote before they knew how to name the splitting.
        unsaid = (
            ": the file does not say how text is split; convert the model again" if kind in (None, "default") else ""
        )
        raise ValueError(f"tokenizer.ggml.pre: expected one of {', '.join(_SPLITS)}, got {kind!r}{unsaid}")
    split = _SPLITS[kind]
    merges = [tuple(merge.split(" ")) for merge in _need(metadata, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    if split.composed:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.expression is not None:
        steps.append(pre_tokenizers.Split(Regex(split.expression), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_special(backend, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens and user-defined ones are matched whole in the text, before anything else."""
    from tokenizers import AddedToken

    for members, special, add in (
        ((_CONTROL, _UNKNOWN), True, backend.add_special_tokens),
        ((_USER_DEFINED,), False, backend.add_tokens),
    ):
        # Runs of visible spaces come from merges, which rank first; matched whole, they would break " ▁▁" apart.
        chosen = [t for t, kind in zip(tokens, kinds, strict=False) if kind in members and t.strip(_META)]
        add([AddedToken(token, normalized=False, special=special) for token in chosen])


def _add_ends(backend, metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int]) -> None:
    """Puts the beginning token before every text and the end token after it, where the file wants that."""
    from tokenizers.processors import TemplateProcessing

    wanted = {"bos": adds_bos(metadata), "eos": metadata.get("tokenizer.ggml.add_eos_token", False)}
    if absent := [role for role, add in wanted.items() if add and role not in ids]:
        raise ValueError(
            f"tokenizer.ggml.{absent[0]}_token_id is missing, and the file wants that token added to texts"
        )
    first, last = ([tokens[ids[role]]] if wanted[role] else [] for role in ("bos", "eos"))
    if first or last:
        backend.post_processor = TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *[f"{t}:1" for t in first], "$B:1", *[f"{t}:1" for t in last]],
            special_tokens=[(tokens[ids[role]], ids[role]) for role in ("bos", "eos") if wanted[role]],
        )
