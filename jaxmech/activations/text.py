"""Where the tokens come from: a file, a data set, given prompts, or the model's own samples; each row starts with BOS.

`N` denotes rows, `T` tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io import help_topics
from jaxmech.io.arguments import strings, whole_number
from jaxmech.io.folders import walk
from jaxmech.io.progress import progress
from jaxmech.io.reprs import short_repr
from jaxmech.models.generate import generate
from jaxmech.models.text import checked_ids, text_ids

if TYPE_CHECKING:
    from jaxmech.models.language_model import LanguageModel


class Tokens(NamedTuple):
    """tokens [N,T] int32, and mask [N,T] bool, True on real tokens."""

    tokens: np.ndarray
    mask: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def pack_texts(lm: LanguageModel, texts: Iterable[str], *, length: int, limit: int | None = None) -> Tokens:
    """Texts one after another, cut into full rows of `length` tokens (BOS included); the rest is dropped.

    Texts are joined by the end-of-text token when the model has one, else by a blank line.

    Args:
      texts: a list, or any iterable of strings.
      limit: rows at most; texts are read only as far as needed.

    Raises:
      ValueError: one string instead of several, or too little text for a row.
    """
    texts, bos = strings("texts", texts), text_ids(lm, "")
    length = whole_number("length", length, len(bos) + 1)
    limit = None if limit is None else whole_number("limit", limit, 1)
    body = length - len(bos)
    between = [lm.config.eos_ids[0]] if lm.config.eos_ids else checked_ids(lm, "\n\n")
    rows: list[list[int]] = []
    pending: list[int] = []
    for text in texts:
        pending += checked_ids(lm, text) + between
        while len(pending) >= body and (limit is None or len(rows) < limit):
            rows.append(bos + pending[:body])
            pending = pending[body:]
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"texts: {len(pending)} tokens do not fill one row of length {length}; give more text")
    tokens = np.array(rows, np.int32)
    return Tokens(tokens, np.ones(tokens.shape, bool))


def from_prompts(lm: LanguageModel, prompts: Sequence[str], *, length: int | None = None) -> Tokens:
    """Each prompt a row of its own, padded on the right to `length` (by default to the longest).

    Raises:
      ValueError: one string instead of several, or prompts longer than `length`: cutting them would cut off what they
        end in.
    """
    rows = [text_ids(lm, prompt) for prompt in strings("prompts", prompts)]
    if not rows:
        raise ValueError("prompts: expected at least one")
    longest = max(map(len, rows))
    length = longest if length is None else whole_number("length", length)
    if longest > length:
        raise ValueError(f"length: the longest prompt has {longest} tokens with its BOS, more than {length}")
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Tokens(tokens, mask)


def from_file(lm: LanguageModel, path: str | Path, *, length: int, limit: int | None = None) -> Tokens:
    """A UTF-8 text file, or the .txt and .md files of a folder, packed into rows."""
    paths = text_files(path)
    return pack_texts(lm, map(_read, paths), length=length, limit=limit)


def text_files(path: str | Path) -> list[Path]:
    """A file, or the .txt and .md files of a folder.

    Raises:
      ValueError: there is none.
    """
    path = Path(path)
    below = walk(path) if path.is_dir() else None  # a link that leads nowhere is refused when it is read
    paths = (
        sorted(path / name for name in (*below.files, *below.lost) if name.endswith((".txt", ".md")))
        if below
        else [path]
    )
    if not paths or below is None and not path.is_file():
        raise ValueError(f"path: no text file at {path}; expected a file, or a folder with .txt or .md files")
    return paths


def require_source(file: str | Path | None, dataset: str | None) -> None:
    """Refuses at once what `draw` would refuse only once a model is loaded.

    Raises:
      ValueError: both are given, there is no such file, or the `datasets` package is missing.
    """
    if file and dataset:
        raise ValueError(f"text: expected a file or a data set, not both, got {file} and {dataset}")
    if file:
        for path in text_files(file):
            _read(path)
    if dataset and dataset != help_topics.NAME:
        _datasets()


def _datasets():
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "text: data sets of the hub need the `datasets` package: pip install 'jaxmech[text]';"
            " or use a text file, or text sampled from the model"
        ) from None
    return datasets


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {path} could not be read as UTF-8 text ({error})") from error


def from_dataset(
    lm: LanguageModel,
    name: str,
    *,
    length: int,
    limit: int,
    split: str = "train",
    column: str = "text",
    subset: str | None = None,
) -> Tokens:
    """A data set of the hub, streamed and packed into rows. Needs the `datasets` package and a connection.

    "pydoc-topics" stands for the help topics that come with Python, and needs neither.
    """
    if name == help_topics.NAME:
        return pack_texts(lm, help_topics.texts(), length=length, limit=limit)
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
    except OSError as error:  # neither found nor reached
        raise ValueError(f"dataset: {name} could not be opened: {error}") from error
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(f"column: {name} has {', '.join(rows.column_names)}, got {column!r}")
    return pack_texts(lm, (row[column] for row in rows), length=length, limit=limit)


def sample_text(
    lm: LanguageModel,
    n: int,
    length: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    batch: int = 64,
    starts: Sequence[str] = (),
) -> Tokens:
    """n texts of `length` tokens (BOS included), sampled from the model itself.

    The offline default. A model's own text is what it finds likely, so dictionaries fit it well, and rare subjects are
    missing. What follows an end-of-text token is masked out.

    Args:
      batch: rows sampled together; it does not change the samples' distribution, only their draw.
      starts: openings, used in turn, for text about given subjects; from BOS alone if none are given.
    """
    n, length = whole_number("n", n, 1), whole_number("length", length)
    batch = whole_number("batch", batch, 1)
    openings = [text_ids(lm, start) for start in strings("starts", starts)]
    if lm.config.bos_id is None and not openings:
        raise ValueError("starts: this model has no BOS token to sample from; give openings")
    openings = openings or [text_ids(lm, "")]
    if (longest := max(map(len, openings))) >= length:
        raise ValueError(f"length: the longest opening already has {longest} tokens, more than fits in {length}")
    out = Tokens(np.zeros((n, length), np.int32), np.zeros((n, length), bool))
    with progress("sampling text", n, unit="texts") as advance:
        for first in range(0, n, batch):
            # Every batch has the same shape, so that one program samples them all.
            rows = [openings[i % len(openings)] for i in range(first, first + batch)]
            prompt, mask = np.zeros((batch, longest), np.int32), np.zeros((batch, longest), bool)
            for i, row in enumerate(rows):
                prompt[i, : len(row)], mask[i, : len(row)] = row, True
            new = generate(
                lm.config,
                lm.params,
                jnp.asarray(prompt),
                mask=jnp.asarray(mask),
                max_new_tokens=length - min(map(len, openings)),
                temperature=temperature,
                key=jax.random.fold_in(key, first),
            )
            for i, (row, continued) in enumerate(zip(rows[: n - first], np.asarray(new), strict=False)):
                text = np.concatenate([row, continued])[:length]
                ended = np.isin(text, lm.config.eos_ids)
                ended[: len(row)] = False
                out.tokens[first + i] = text
                out.mask[first + i] = np.cumsum(ended) - ended == 0
            advance(len(rows[: n - first]))
    return out


def draw(
    lm: LanguageModel,
    n: int,
    length: int,
    key: jax.Array,
    *,
    file: str | Path | None = None,
    dataset: str | None = None,
) -> tuple[Tokens, str]:
    """Up to n rows from a file or a data set, or, if neither is given, sampled from the model; and their origin.

    Raises:
      ValueError: both are given.
    """
    require_source(file, dataset)
    if file:
        return from_file(lm, file, length=length, limit=n), str(file)
    if dataset:
        return from_dataset(lm, dataset, length=length, limit=n), dataset
    return sample_text(lm, n, length, key=key, batch=min(64, n)), "sampled from the model"


def mix(*parts: Tokens) -> Tokens:
    """All rows of several sources, padded to one length. The stream shuffles them."""
    if not parts:
        raise ValueError("parts: expected at least one source of tokens")
    length = max(part.tokens.shape[1] for part in parts)

    def widen(a):
        return np.pad(a, ((0, 0), (0, length - a.shape[1])))

    return Tokens(
        np.concatenate([widen(part.tokens) for part in parts]), np.concatenate([widen(part.mask) for part in parts])
    )
