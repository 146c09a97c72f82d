"""Tokenizers: of a Hugging Face folder, and rebuilt from GGUF metadata, both without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# transformers tells at import that it found no PyTorch, which nobody here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_META = "\u2581"  # sentencepiece's visible space

# How llama.cpp splits text before merging, per `tokenizer.ggml.pre`: None for GPT-2's own expression.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"gpt-2": None, "smollm": None} | dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3_SPLIT)


def from_gguf(metadata: Mapping[str, Any]):
    """The tokenizer that a GGUF file describes, as a transformers `PreTrainedTokenizerFast`.

    Raises:
      ValueError: a kind of tokenizer or of splitting that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    kind, architecture = metadata.get("tokenizer.ggml.model"), metadata.get("general.architecture", "")
    if kind == "gpt2":
        backend, tokens = _byte_level(metadata)
    elif kind == "llama":
        backend, tokens = _sentencepiece(metadata, gemma=architecture.startswith("gemma"))
    else:
        raise ValueError(f"tokenizer.ggml.model: expected 'gpt2' or 'llama', got {kind!r}")
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    named = _special_names(metadata, tokens)
    default = kind == "llama"  # llama.cpp's own default where an old file has no flag
    if metadata.get("tokenizer.ggml.add_bos_token", default):
        backend.post_processor = _bos_first(named["bos_token"], backend.token_to_id(named["bos_token"]))
    if template := metadata.get("tokenizer.chat_template"):
        named["chat_template"] = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def from_folder(folder: str | Path):
    """The tokenizer of a Hugging Face folder, or of one written by `save`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def save(tokenizer, folder: str | Path) -> None:
    """Writes a folder for `load_saved` and for `AutoTokenizer`, on one line of JSON: that loads twice as fast."""
    folder = Path(folder)
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def load_saved(folder: str | Path):
    """Reads what `save` wrote."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if settings.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return from_folder(folder)
    # Twice as fast as from_pretrained, which reads and copies the whole vocabulary in Python.
    if (template := folder / "chat_template.jinja").exists():
        settings["chat_template"] = template.read_text()
    dropped = {"tokenizer_class", "backend", "added_tokens_decoder", "auto_map"}
    settings = {k: v for k, v in settings.items() if k not in dropped}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)


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


def _sentencepiece(metadata: Mapping[str, Any], gemma: bool):
    """BPE over characters with bytes to fall back on, as sentencepiece's `bpe` models."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    tokens = list(metadata["tokenizer.ggml.tokens"])
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    if gemma:
        # Runs of spaces are stored as spaces; the normalizer below turns the text's into the visible ones.
        tokens = [_META * len(t) if t and not t.strip(" ") else t for t in tokens]
        ordered: Sequence[str] = tokens
    else:
        scores = metadata["tokenizer.ggml.scores"]
        ordered = [tokens[i] for i in sorted(range(len(tokens)), key=lambda i: -scores[i])]
    model = BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=implied_merges(ordered),
        fuse_unk=True,
        unk_token=unknown,
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
    return backend, tokens


def _byte_level(metadata: Mapping[str, Any]):
    """BPE over bytes, as GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind = metadata.get("tokenizer.ggml.pre")
    if kind not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre: expected one of {', '.join(_SPLITS)}, got {kind!r}")
    tokens, split = list(metadata["tokenizer.ggml.tokens"]), _SPLITS[kind]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a whole word that is a token as it is, even where the merges would not build it.
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split is not None))
    if split is not None:
        first = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, tokens


def _add_special(backend, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens and user-defined ones are matched whole in the text, before anything else."""
    from tokenizers import AddedToken

    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        special = kind == _CONTROL
        # Runs of visible spaces come from merges, which rank first; matched whole, they would break " ▁▁" apart.
        chosen = [t for t, k in zip(tokens, kinds, strict=False) if k == kind and t.strip(_META)]
        add([AddedToken(token, normalized=False, special=special) for token in chosen])


def _special_names(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None}


def _bos_first(token: str, token_id: int):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, token_id)]
    )
