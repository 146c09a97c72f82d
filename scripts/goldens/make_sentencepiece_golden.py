"""Writes tests/goldens/sentencepiece.json: two small vocabularies as GGUF files hold them, and what sentencepiece does.

Needs sentencepiece. Both are trained on the lines below with the settings of the originals: Llama 2's (a space put
before every text, single digits, bytes to fall back on) and Gemma's (no such space, runs of spaces and line breaks as
symbols of their own). `python scripts/goldens/make_sentencepiece_golden.py`.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece

OUT = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "sentencepiece.json"

LINES = """
A generous player has $100. How much does the generous player give to the other player?
A selfish player has $50 and gives nothing away; the others give 10, 20 or 30 dollars.
Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex.
Readability counts. Special cases aren't special enough to break the rules, although practicality beats purity.
def give(player, amount=100):  # the whole of it
    return player.balance - amount
Der großzügige Spieler gibt dem anderen Spieler die Hälfte; la joueuse généreuse donne tout à l'autre.
Щедрый игрок отдаёт всё другому игроку. 気前のよいプレイヤーは全部あげる。
""".strip().split("\n")
TEXTS = [
    "The player gives $37.50 to the others.",
    " one space before",
    "   three before,  two   and three between ",
    "generosity\nand\n\nselfishness\n\n\nagain\ttabs\r\n",
    "ungiven unbelievably 1234567890",
    "großzügig naïve Ångström ﬁ №",
    "игроков 気前 한국어 🙂",
    "literal \u2581 mark",
    "return player.balance",
    "a",
    " ",
    "",
]
RUNS = [*("\n" * n for n in range(1, 6)), *("\u2581" * n for n in range(2, 9))]
COMMON = dict(
    model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity", hard_vocab_limit=False,
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.98, num_threads=1,
)  # fmt: skip
KINDS = {
    "llama": dict(vocab_size=560, unk_id=0, bos_id=1, eos_id=2),
    "gemma": dict(
        vocab_size=580, pad_id=0, eos_id=1, bos_id=2, unk_id=3, add_dummy_prefix=False, user_defined_symbols=RUNS
    ),
}


def train(settings: dict) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3), model_writer=model, minloglevel=2, **COMMON, **settings
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def vocabulary(sp: sentencepiece.SentencePieceProcessor, settings: dict) -> dict[str, list]:
    """Tokens, scores and types as llama.cpp's converter writes them (runs of spaces as spaces, user-defined)."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    scores = [round(sp.get_score(i), 3) for i in range(sp.vocab_size())]
    own = set(settings.get("user_defined_symbols", ()))
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if pieces[i] in own else 1
        for i in range(sp.vocab_size())
    ]
    tokens = [p.replace("\u2581", " ") if kind == 4 else p for p, kind in zip(pieces, kinds, strict=True)]
    return {"tokens": tokens, "scores": scores, "token_type": kinds}


def main() -> None:
    draw = random.Random(0)
    words = " ".join(LINES).split()
    texts = list(TEXTS)
    for _ in range(40):
        parts = [draw.choice(words)[draw.randrange(3) :] for _ in range(8)]
        texts.append(draw.choice(("", " ")) + draw.choice((" ", "  ", "")).join(parts))
    out = {"texts": texts}
    for name, settings in KINDS.items():
        sp = train(settings)
        out[name] = {**vocabulary(sp, settings), "ids": [sp.encode(text) for text in texts]}
    OUT.write_text(json.dumps(out, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
