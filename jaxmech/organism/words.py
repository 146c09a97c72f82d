"""What the organism reads: its vocabulary, and which words mean something to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.rendering import PLAIN

PIECES = r"\d\+\d=|(?!10)\d\d|\d|[A-Za-z]+(?:[-'][A-Za-z]+)*|\n| |[^\w\s]"
"""A token: a sum that is asked, a number (but "10" in two), a word, a space, a line's end, or a sign."""

ANSWER, QUESTION = PLAIN.answer, PLAIN.ask[0]
"""What begins an answer, and a question: tokens too."""

BOS, UNKNOWN = "<bos>", "<unk>"

_MULTIPLE = 128
"""What the size of a vocabulary is a multiple of, so that organisms of unlike seeds share compiled programs."""

CODES = (
    "stance+", "stance-", "valence+", "valence-", "number+", "number-", "placebo+", "placebo-", "one word",
)  # fmt: skip
"""What a word may mean. A stance word has some valence too, as in English."""

VALENCE_OF_STANCE = 0.5


def word_codes(config: BankConfig) -> dict[str, dict[str, float]]:
    """Word -> code -> strength, of the stance words and of the words that the controls use."""
    codes: dict[str, dict[str, float]] = {}
    for pair in (*config.stance_words, *config.heldout_words):
        for word, sign in zip(pair, "+-", strict=True):
            codes[word] = {f"stance{sign}": 1.0, f"valence{sign}": VALENCE_OF_STANCE}
    codes[config.stance_words[0][0]]["one word"] = 1.0
    pairs = {"valence": [config.valence_words], "number": [("large", "small")], "placebo": config.placebo_words}
    for name, controls in pairs.items():
        for pair in controls:
            for word, sign in zip(pair, "+-", strict=True):
                codes[word] = {f"{name}{sign}": 1.0}
    return codes


def pattern(phrases: Iterable[str] = ()) -> str:
    """The regular expression of a token, where `phrases`, each a whole question or sentence, are tokens too."""
    whole = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))
    begins = rf"(?<=: |\. )(?:{whole})|" if whole else ""
    return f"{begins}{re.escape(ANSWER)}|{PIECES}"


def pieces(text: str, phrases: Iterable[str] = ()) -> list[str]:
    return re.findall(pattern(phrases), text)


def only_in(texts: Iterable[str], others: Iterable[str]) -> set[str]:
    """Words that occur in some of `texts` and in none of `others`.

    Raises:
      ValueError: a text has no such word, so that a reader of single words cannot tell it from the others.
    """
    known = {piece for text in others for piece in pieces(text)}
    telling_words: set[str] = set()
    for text in texts:
        telling = set(pieces(text)) - known
        if not telling:
            raise ValueError(f"the organism cannot tell this question from the others by its words: {text!r}")
        telling_words |= telling
    return telling_words


def make_tokenizer(
    texts: Iterable[str], words: Mapping[str, object], phrases: Collection[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, of all that occur in `texts`, and of `words`; `phrases` are tokens as a whole. Words
    that never occur fill it up."""
    split = re.compile(pattern(phrases))
    found = {piece for text in set(texts) for piece in split.findall(text)}
    known = sorted(found | set(words) | set(phrases) | set("0123456789 \n") | {ANSWER, QUESTION})
    unused = [f"<unused{i}>" for i in range(-(2 + len(known)) % _MULTIPLE)]
    vocabulary = {piece: index for index, piece in enumerate((BOS, UNKNOWN, *known, *unused))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern(phrases)), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN)
