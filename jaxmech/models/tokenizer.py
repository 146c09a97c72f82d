"""Tokenizers of a Hugging Face folder, of a GGUF file and of a saved model, all without torch.

A folder's `tokenizer.json` is what tokenises: splitting, normaliser, merges, decoder and what is put before a text are
the file's. The class named beside it is not used, as it may replace them with its own. `tokenizer_config.json` names
the special tokens and holds the chat template.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmech.io.files import is_lfs_pointer, read_json, reason
from jaxmech.models.gguf_tokenizer import from_gguf as from_gguf

# transformers warns at import that PyTorch is missing, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

FILES = ("*.json", "*.model", "*.jinja", "*.txt")
"""What a tokenizer may be made of, as patterns of file names."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ANOTHER = "give one: load_model(…, tokenizer=…)"
_log = logging.getLogger("jaxmech")


def from_folder(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder, or of one written by `save`.

    Raises:
      ValueError: there is none, it is damaged, or it needs a package that is not installed or code of its own.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise ValueError(
            f"{folder}: its tokenizer is missing; expected one of {', '.join(_VOCABULARIES)}, or {_ANOTHER}"
        )
    settings = _settings(folder)
    tokenizer = (_from_json if (folder / "tokenizer.json").is_file() else _by_class)(folder, settings)
    _name_ends(tokenizer, settings, folder)
    return tokenizer


def first_id(tokenizer: Any) -> int | None:
    """The one token that the tokenizer puts before every text, None if it puts none.

    Raises:
      ValueError: it puts several.
    """
    # A toy vocabulary may lack "a", and then encodes it as nothing or raises an error of its own.
    known = tokenizer.convert_tokens_to_ids("a") not in (None, tokenizer.unk_token_id)
    letter = "a" if known else tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    full, bare = tokenizer(letter).input_ids, tokenizer(letter, add_special_tokens=False).input_ids
    before = next((full[:i] for i in range(len(full)) if bare and full[i : i + len(bare)] == bare), full)
    if len(before) > 1:
        names = ", ".join(tokenizer.convert_ids_to_tokens(before))
        raise ValueError(f"the tokenizer puts {len(before)} tokens before a text ({names}); expected at most one")
    return before[0] if before else None


def save(tokenizer: Any, folder: str | Path) -> None:
    """Writes a folder for `load_saved` and for `AutoTokenizer`, as JSON on one line, which loads twice as fast."""
    folder = Path(folder)
    tokenizer.save_pretrained(str(folder))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def load_saved(folder: str | Path) -> Any:
    """Reads what `save` wrote."""
    return from_folder(folder)


# tokenizer.json ------------------------------------------------------------------------------------------------------


def _from_json(folder: Path, settings: Mapping[str, Any]):
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    if is_lfs_pointer(path):
        raise ValueError(f"{path} is a Git LFS pointer; run: git lfs pull")
    try:
        more, named = _declared(folder, settings), _special_tokens(settings)
        ordinary = _ordinary(path, named, settings)
        # Twice as fast as from_pretrained, which reads and copies the whole vocabulary in Python.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            added_tokens_decoder=more,
            clean_up_tokenization_spaces=False,  # it would take spaces out of decoded texts
            **{name: token for name, token in named.items() if name not in ordinary},
            **{name: settings[name] for name in ("model_max_length", "padding_side") if settings.get(name)},
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(
            f"{folder}: its tokenizer is damaged (tokenizer.json, {reason(error)}); download or copy it again, or "
            "update the package tokenizers if a newer one wrote it"
        ) from error
    wrong = {str(t): (i, got) for i, t in more.items() if (got := tokenizer.convert_tokens_to_ids(str(t))) != i}
    if wrong:
        listed = ", ".join(f"{token!r} is declared as {i}, loaded as {got}" for token, (i, got) in wrong.items())
        raise ValueError(f"{folder}: tokenizer_config.json does not fit tokenizer.json: {listed}; download both again")
    for role, token in ordinary.items():
        setattr(tokenizer, role, token)
    tokenizer.chat_template = _chat_template(folder, settings)
    return tokenizer


def _ordinary(path: Path, named: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    """The roles that are given to ordinary entries of tokenizer.json's vocabulary, such as padding to "!". Declared to
    transformers with the others, such an entry would be cut out of every word that it is part of."""
    from tokenizers import Tokenizer

    declared = {entry["content"] for entry in settings.get("added_tokens_decoder", {}).values()}
    roles = {role: named[role] for role in _ROLES if named.get(role, "") not in {"", *declared}}
    if not roles:
        return {}
    backend = Tokenizer.from_file(str(path))
    added = {str(token) for token in backend.get_added_tokens_decoder().values()}
    return {
        role: token for role, token in roles.items() if token not in added and backend.token_to_id(token) is not None
    }


def _declared(folder: Path, settings: Mapping[str, Any]) -> dict[int, Any]:
    """Tokens that tokenizer_config.json, or an old added_tokens.json, adds to those of tokenizer.json."""
    from tokenizers import AddedToken

    added = {int(i): dict(entry) for i, entry in settings.get("added_tokens_decoder", {}).items()}
    if not added and (old := folder / "added_tokens.json").is_file():
        added = {i: {"content": token, "normalized": True} for token, i in read_json(old).items()}
    if not added:
        return {}
    known = {entry["content"] for entry in read_json(folder / "tokenizer.json").get("added_tokens") or ()}
    for entry in added.values():
        entry.pop("__type", None)
    return {i: AddedToken(**entry) for i, entry in added.items() if entry["content"] not in known}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a transformers tokenizer: tokens with a role, model-specific ones, and further ones."""
    named = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
    named = {key: value for key, value in named.items() if isinstance(value, str)}  # others are switches
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if isinstance(extra, Mapping):
        named |= {key: _text(value) for key, value in extra.items()}
    elif extra:
        named["extra_special_tokens"] = [_text(value) for value in extra]
    return named


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json adds; in folders of old transformers the map wins."""
    config, tokens = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    return {**tokens, **config} if "added_tokens_decoder" in config else {**config, **tokens}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by name; those in separate files win, as in transformers."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    stated = settings.get("chat_template")
    if not templates and isinstance(stated, list):
        templates = {entry["name"]: entry["template"] for entry in stated}
    if not templates and stated is None and (old := folder / "chat_template.json").is_file():
        stated = read_json(old).get("chat_template")
    return templates["default"] if list(templates) == ["default"] else templates or stated


# Vocabularies of other kinds -----------------------------------------------------------------------------------------


def _by_class(folder: Path, settings: Mapping[str, Any]):
    """Through transformers' class for it, which knows what a bare vocabulary leaves out."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if settings.get("auto_map"):
        raise ValueError(
            f"{folder}: its tokenizer is code of its own (auto_map in tokenizer_config.json), which is not run; add a "
            f"tokenizer.json, or {_ANOTHER}"
        )
    _require_packages(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # the tokenizers library warns the first releases of transformers 5
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            if not hasattr(tokenizer, "backend_tokenizer"):  # mistral-common's own class, where that is installed
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # damaged files end in KeyErrors and transformers' own errors
        raise ValueError(
            f"{folder}: transformers cannot read its tokenizer ({reason(error)}); download or copy it again, add a "
            f"tokenizer.json, or {_ANOTHER}"
        ) from error
    return tokenizer


def _require_packages(folder: Path) -> None:
    for path in (folder / "tokenizer.model", folder / "spiece.model"):
        if not path.is_file() or (folder / "vocab.json").is_file():
            continue
        with path.open("rb") as file:
            needed = ("sentencepiece", "google.protobuf") if file.read(1) == b"\n" else ("tiktoken",)
        if absent := [name for name in needed if not _installed(name)]:
            names = " ".join(name.split(".")[-1] for name in absent)
            raise ValueError(
                f"{path} is read with {names}, which {'are' if len(absent) > 1 else 'is'} not installed: pip install "
                f"{names}, or add the model's tokenizer.json"
            )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False


# Names of the first and the last token -------------------------------------------------------------------------------


def _name_ends(tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Names the tokens for beginning, end and padding that tokenizer_config.json does not name."""
    first = first_id(tokenizer)
    if settings.get("add_bos_token") and first is None and (folder / "tokenizer.json").is_file():
        _log.warning("%s: tokenizer_config.json says add_bos_token, but tokenizer.json puts no token before a text; "
                     "none is added", folder)  # fmt: skip
    model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    ids = {role: (model.get("text_config") or {}).get(f"{role}_id", model.get(f"{role}_id")) for role in _ROLES}
    if first is not None:
        ids["bos_token"] = first
    for role, i in ids.items():
        if role not in settings and getattr(tokenizer, role) is None and isinstance(i, int) and 0 <= i < len(tokenizer):
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(i))
