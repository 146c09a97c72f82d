"""Compares jaxmech with transformers on the same checkpoint, in float32: exit code 1 if anything differs.

    python scripts/checks/check_parity.py SOURCE...               # Hugging Face folders, hub ids, .gguf files
    python scripts/checks/check_parity.py --random all --seed 7   # fresh random checkpoints of every family

Needs torch besides jaxmech. Compared with what transformers computes for each text by itself, without padding or cache:
logits and every layer's residual stream (largest error over the spread of what is compared, at most 2e-4), as they are
and padded on either side; greedy continuations, which jaxmech decodes with its cache from a left-padded batch. Where
there is a real tokenizer: its tokens, the five likeliest next tokens, and the absolute error of logits, below 1e-3. For
.gguf files the residual stream's limit is 1e-3 as well. Tokens are compared with those of the library `tokenizers`
reading `tokenizer.json` itself, or with transformers' where there is no such file, as for .gguf.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from random_models import FAMILIES, LONGEST, write_random
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from jaxmech.models.decoder import forward
from jaxmech.models.generate import generate
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from scripts.goldens.hf_reference import TEXTS, continuation, run

RELATIVE, ABSOLUTE, NEW = 2e-4, 1e-3, 8
LENGTHS = (LONGEST, LONGEST - 5, LONGEST // 3, 3)
"""Of random texts. A window or an original context lies between some of them."""
REAL_VOCABULARY = 1000
TOKENISED = (
    *TEXTS,
    "\n\n12\n   3,  1,000.50",
    "def f(x):\n    return x**2",
    "naïve Å DON'T I'LL camelCase 🙂",
    "  ",
    "",
)
"""Where ways to split, to normalise and to add a space differ."""


@dataclass
class Row:
    """What came out for one source: measures by column, and what is wrong in words."""

    source: str
    facts: str = ""
    measures: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def error(self, column: str, value: float, limit: float) -> None:
        """NaN is an error too."""
        good = value <= limit
        self.measures[column] = f"{value:.1e}" if good else f"[red]{value:.1e}[/red]"
        if not good:
            self.problems.append(f"{column}: {value:.2e}, at most {limit:.0e} is allowed")

    def equal(self, column: str, same: bool, what: str) -> None:
        self.measures[column] = "same" if same else "[red]differ[/red]"
        if not same:
            self.problems.append(what)


@dataclass(frozen=True)
class Reference:
    """transformers' answers for each text by itself: logits [T,V], residuals [L,T,D], continuation [NEW]."""

    texts: list[np.ndarray]
    logits: list[np.ndarray]
    residuals: list[np.ndarray]
    continuations: list[np.ndarray]


def load_reference(source: str):
    """transformers' model and tokenizer of a folder, a hub id or a .gguf file."""
    path = Path(source)
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.resolve().parent), "gguf_file": path.name}
        kind = AutoModelForCausalLM
    else:
        where = {"pretrained_model_name_or_path": source}
        config = AutoConfig.from_pretrained(source)
        nested = config.get_text_config() is not config
        kind = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model = kind.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(**where)


def refer(model, texts: list[np.ndarray]) -> Reference:
    logits, residuals, continuations = [], [], []
    for text in texts:
        tokens = torch.tensor(text[None].astype(np.int64))
        out = run(model, tokens)
        logits.append(out[0][0].numpy())
        residuals.append(out[1][:, 0].numpy())
        continuations.append(continuation(model, tokens, NEW)[0].numpy())
    return Reference(texts, logits, residuals, continuations)


def batch(texts: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B,T] and mask [B,T], the texts at one side."""
    length = max(map(len, texts))
    tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        real = slice(length - len(text), None) if side == "left" else slice(0, len(text))
        tokens[row, real], mask[row, real] = text, True
    return tokens, mask


def spread_error(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest error of arrays [T,N], one per text, relative to the spread of all that is expected.

    Where a position has a larger spread of its own, that one counts: real models have first tokens whose residual
    stream is hundreds of times larger, and so is what float32 rounds away there.
    """
    spread = np.concatenate([x.ravel() for x in expected]).std()
    return max(
        float((np.abs(g - e).max(-1) / np.maximum(spread, e.std(-1))).max()) for g, e in zip(got, expected, strict=True)
    )


def compare(row: Row, lm: LanguageModel, reference: Reference, real: bool) -> None:
    """Fills a row: the longest texts as they are, all texts padded on either side, continuations."""
    texts = reference.texts
    # A released model's first position may reach a thousand times the others' norm, by sums that nearly cancel: two
    # float32 matrix products differ by more than the limit there, though every sublayer by itself agrees.
    limit = ABSOLUTE if row.source.endswith(".gguf") else RELATIVE
    longest = [i for i, text in enumerate(texts) if len(text) == max(map(len, texts))]
    for column, side, kept in (
        ("unpadded", "left", longest),
        ("left", "left", range(len(texts))),
        ("right", "right", range(len(texts))),
    ):
        logits, residuals = ours(lm, [texts[i] for i in kept], side)
        error = spread_error(logits, [reference.logits[i] for i in kept])
        by_layer = zip(*residuals, strict=True), zip(*(reference.residuals[i] for i in kept), strict=True)
        layers = max(map(spread_error, *by_layer))
        if column == "unpadded":
            row.error("logits", error, RELATIVE)
            row.error("layers", layers, limit)
        else:
            row.error(f"{column} padded", max(error, layers), limit)
    if real:
        pairs = list(zip(ours(lm, texts, "left")[0], reference.logits, strict=True))
        row.equal("top five", all(map(same_top_five, *zip(*pairs, strict=True))), "other next tokens in the top five")
        row.error("|logits|", max(float(np.abs(g - e).max()) for g, e in pairs), ABSOLUTE)
    tokens, mask = batch(texts, "left")
    new = generate(lm.config, lm.params, jnp.asarray(tokens), mask=jnp.asarray(mask), max_new_tokens=NEW, eos_ids=())
    wrong = [len(t) for t, g, e in zip(texts, np.asarray(new), reference.continuations, strict=True) if (g != e).any()]
    row.equal("greedy", not wrong, f"continuations differ for texts of lengths {wrong}")


def ours(lm: LanguageModel, texts: list[np.ndarray], side: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """jaxmech's logits [T,V] and residuals [L,T,D] of each text, from one batch padded at `side`."""
    tokens, mask = batch(texts, side)
    given = None if mask.all() else jnp.asarray(mask)
    out = forward(lm.config, lm.params, jnp.asarray(tokens), mask=given, taps=("resid_post",), logits="all")
    logits, residuals = np.asarray(out.logits), np.asarray(out.taps["resid_post"])
    return [x[m] for x, m in zip(logits, mask, strict=True)], [residuals[:, i, m] for i, m in enumerate(mask)]


def same_top_five(got: np.ndarray, expected: np.ndarray) -> bool:
    """After the last token, in order."""
    return np.argsort(-got[-1])[:5].tolist() == np.argsort(-expected[-1])[:5].tolist()


def random_texts(vocabulary: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocabulary, n).astype(np.int32) for n in LENGTHS]


def reference_tokens(source: str, theirs, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens added."""
    path = Path(source) / "tokenizer.json"
    if not path.is_file() and not Path(source).exists():
        path = Path(cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) or path)
    if not path.is_file():
        return [theirs(text, add_special_tokens=False).input_ids for text in texts]
    backend = Tokenizer.from_file(str(path))  # and not transformers' class, which may have a splitting of its own
    backend.no_truncation()
    backend.no_padding()
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def check(source: str, seed: int, row: Row, tokenizer: str | None) -> None:
    lm = load_model(source)
    model, theirs = load_reference(source)
    theirs = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else theirs
    real = len(theirs) > REAL_VOCABULARY
    if real:
        start = [] if lm.config.bos_id is None else [lm.config.bos_id]
        ids = reference_tokens(tokenizer or source, theirs, TOKENISED)
        mine = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in TOKENISED]
        other = [text for text, a, b in zip(TOKENISED, ids, mine, strict=True) if a != b]
        row.equal("tokens", not other, f"tokens differ for {other}")
        texts = [np.array(start + text, np.int32) for text in ids[: len(TEXTS)]]
    else:
        texts = random_texts(lm.config.vocab_size, seed)
    compare(row, lm, refer(model, texts), real)


def rows(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """One for each source, compared as it is asked for."""
    sources = [(Path(s).name if Path(s).exists() else s, s, "", args.seed) for s in args.sources]
    families = [] if args.random is None else list(FAMILIES) if args.random == "all" else [args.random]
    for seed in range(args.seed, args.seed + args.count):
        for family in families:
            made = folder / f"{family}-{seed}"
            sources.append((f"{family} {seed}", str(made), write_random(family, seed, made), seed))
    for name, source, facts, seed in sources:
        row = Row(name, facts)
        try:
            check(source, seed, row, args.tokenizer)
        except ValueError as error:  # what jaxmech says of a checkpoint that it does not take
            row.problems.append(f"not loaded: {error}")
        yield row


def table_of(found: list[Row]) -> Table:
    columns = list(dict.fromkeys(column for row in found for column in row.measures))
    table = Table("source", box=box.SIMPLE)
    if any(row.facts for row in found):
        table.add_column("facts")
    for column in (*columns, ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        verdict = "[red]fails[/red]" if row.problems else "[green]equal[/green]"
        facts = [row.facts] if len(table.columns) > len(columns) + 2 else []
        table.add_row(row.source, *facts, *(row.measures.get(column, "") for column in columns), verdict)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a folder, a hub id, or a .gguf file")
    parser.add_argument("--random", choices=[*FAMILIES, "all"], help="also check random checkpoints of this family")
    parser.add_argument("--seed", type=int, default=0, help="of the random checkpoints and texts")
    parser.add_argument("--count", type=int, default=1, help="random checkpoints a family, with seeds from --seed on")
    parser.add_argument("--tokenizer", help="folder or hub id to compare tokens with, instead of the source's own")
    args = parser.parse_args()
    if not args.sources and args.random is None:
        parser.error("give a SOURCE or --random FAMILY")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    console.width = max(console.width, 120)
    with tempfile.TemporaryDirectory() as folder:
        found = list(rows(args, Path(folder)))
    console.print(table_of(found))
    for row in found:
        for problem in row.problems:
            console.print(f"{row.source}: {problem}", markup=False, highlight=False)
    return int(any(row.problems for row in found))


if __name__ == "__main__":
    sys.exit(main())
