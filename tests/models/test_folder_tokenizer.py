"""Tokenizers of Hugging Face folders, against the library `tokenizers` reading `tokenizer.json` itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxmech.models.tokenizer import first_id, from_folder, load_saved, save

TEXTS = [
    "Hello world, it's 2024!",
    "\n\n12",
    "   3",
    "  two spaces,   three\n\n\n   4\t\t5\r\n",
    "1234567 $1,000.50",
    "naïve café Å ﬁ 日本語 🙂",
    "def f(x):\n    return x**2",
    "<s>a</s> <|im_start|>user\nhi<|im_end|>",
    "CamelCase DON'T I'll",
    " ",
    "",
]
END = "<|im_end|>"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*steps, normalizer=None, whole=False):
    """A trained byte-level tokenizer with `steps` before the bytes."""
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any("Split" in repr(s) for s in steps))]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 5, trainer)
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", END])
    return backend


def sentencepiece(prefix):
    """A trained one over characters, spaces made visible, with bytes to fall back on."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    visible = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), visible]) if prefix else visible
    special = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS * 5, trainer)
    fields = json.loads(backend.to_str())
    fields["added_tokens"] = [t for t in fields["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(fields))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def digits():
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def split(expression):
    return byte_level(pre_tokenizers.Split(Regex(expression), "isolated"))


FILES = {
    "digits": digits,
    "gpt2": byte_level,
    "qwen": lambda: byte_level(pre_tokenizers.Split(Regex(QWEN), "isolated"), normalizer=normalizers.NFC(), whole=True),
    "own split": lambda: split(r"\p{L}+|\p{N}{2}|[^\p{L}]"),
    "lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "sentencepiece": lambda: sentencepiece(prefix=False),
    "sentencepiece, prefix": lambda: sentencepiece(prefix=True),
}
PAIRINGS = [  # model_type, tokenizer_class, file
    ("llama", "GPT2Tokenizer", "digits"),
    ("llama", "LlamaTokenizer", "gpt2"),
    ("llama", "LlamaTokenizerFast", "digits"),
    ("llama", "LlamaTokenizer", "qwen"),
    ("llama", "LlamaTokenizer", "sentencepiece"),
    ("llama", "LlamaTokenizerFast", "sentencepiece, prefix"),
    ("llama", "PreTrainedTokenizerFast", "own split"),
    ("llama", "AClassOfTheirOwn", "own split"),
    ("llama", None, "digits"),
    ("qwen2", "Qwen2Tokenizer", "own split"),
    ("qwen2", "Qwen2TokenizerFast", "digits"),
    ("qwen3", "Qwen2Tokenizer", "gpt2"),
    ("mistral", "LlamaTokenizer", "gpt2"),
    ("gemma3_text", "GemmaTokenizer", "sentencepiece, prefix"),
    ("gemma2", "GemmaTokenizerFast", "own split"),
    ("gpt2", "GPT2Tokenizer", "own split"),
    ("gpt2", "GPT2Tokenizer", "lowercase"),
    ("gpt_neox", "GPTNeoXTokenizer", "digits"),
    ("phi3", "LlamaTokenizer", "sentencepiece"),
    ("olmo2", "GPT2Tokenizer", "qwen"),
]


def write(folder: Path, backend, settings=None, model_type="llama", **model) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **model}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def backends():
    return {name: make().to_str() for name, make in FILES.items()}


@pytest.mark.parametrize("again", [False, True], ids=["read", "saved and read"])
@pytest.mark.parametrize(("model_type", "kind", "file"), PAIRINGS)
def test_the_tokens_are_those_of_the_file(model_type, kind, file, again, backends, tmp_path):
    reference = Tokenizer.from_str(backends[file])
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": kind} if kind else {})
    # What transformers would split, clean up or add by.
    settings |= {"clean_up_tokenization_spaces": True, "add_prefix_space": True, "legacy": False}
    tokenizer = from_folder(write(tmp_path / "model", reference, settings, model_type))
    if again:
        save(tokenizer, tmp_path)
        tokenizer = load_saved(tmp_path)
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False), text


def test_truncation_and_padding_of_a_training_are_left_out(tmp_path):
    reference = byte_level()
    saved = Tokenizer.from_str(reference.to_str())
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    tokenizer = from_folder(write(tmp_path, saved, {}))
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference.encode(text).ids


# What the configuration adds -----------------------------------------------------------------------------------------


def test_special_tokens_and_template_come_from_the_configuration(tmp_path):
    settings = {"eos_token": {"__type": "AddedToken", "content": END}, "pad_token": "<pad>", "bos_token": None}
    settings |= {"additional_special_tokens": ["<|im_start|>"], "chat_template": "{{ messages[0].content }}"}
    backend = byte_level()
    tokenizer = from_folder(write(tmp_path, backend, settings))
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END, None, "<pad>")
    assert tokenizer.pad_token_id == backend.get_vocab_size() and len(tokenizer) == backend.get_vocab_size() + 1
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text("other")
    assert from_folder(tmp_path).chat_template == "other"  # a file wins, as in transformers


@pytest.mark.parametrize("role", ["pad_token", "unk_token", "eos_token"])
@pytest.mark.parametrize("again", [False, True], ids=["read", "saved and read"])
def test_a_role_given_to_an_ordinary_token_cuts_it_out_of_no_word(role, again, tmp_path):
    reference = byte_level()
    text = max(TEXTS, key=lambda text: sum(len(token) > 1 for token in reference.encode(text).tokens))
    longest = max(reference.encode(text).tokens, key=len)
    named = longest[1]  # a letter of its own in the vocabulary, and part of this token
    assert reference.token_to_id(named) is not None
    tokenizer = from_folder(write(tmp_path / "model", reference, {role: named}))
    if again:
        save(tokenizer, tmp_path)
        tokenizer = load_saved(tmp_path)
    assert getattr(tokenizer, role) == named and len(tokenizer) == reference.get_vocab_size()
    assert getattr(tokenizer, f"{role}_id") == reference.token_to_id(named)
    for asked in TEXTS:
        assert tokenizer(asked).input_ids == reference.encode(asked).ids


def test_tokens_that_only_the_configuration_declares(tmp_path):
    backend = byte_level()
    size = backend.get_vocab_size()
    told = {str(size + i): {"content": name, "special": False} for i, name in enumerate(("<a>", "<b>"))}
    tokenizer = from_folder(write(tmp_path, backend, {"added_tokens_decoder": told, "pad_token": "<b>"}))
    assert tokenizer("<b><a>").input_ids == [size + 1, size]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "<a>"}}}))
    with pytest.raises(ValueError, match=f"does not fit tokenizer.json: '<a>' is declared as 7, loaded as {size}"):
        from_folder(tmp_path)


def test_names_that_only_an_old_map_or_the_model_gives(tmp_path):
    backend = byte_level()
    folder = write(tmp_path, backend, {"model_max_length": 64}, bos_token_id=backend.token_to_id("<s>"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": END, "lstrip": False}}))
    tokenizer = from_folder(folder)
    assert (tokenizer.eos_token, tokenizer.bos_token, first_id(tokenizer)) == (END, "<s>", None)


TEMPLATES = {"default": "{{ messages[0].content }}", "rag": "rag {{ messages[0].content }}"}


@pytest.mark.parametrize("names", [("default", "rag"), ("rag",), ("default",)])
def test_named_templates_survive_saving(names, tmp_path):
    told = [{"name": name, "template": TEMPLATES[name]} for name in names]
    tokenizer = from_folder(write(tmp_path / "model", byte_level(), {"chat_template": told}))
    save(tokenizer, tmp_path)
    expected = {name: TEMPLATES[name] for name in names}
    for one in (tokenizer, load_saved(tmp_path)):
        assert one.chat_template == (expected["default"] if names == ("default",) else expected)


# The token that is put first -----------------------------------------------------------------------------------------


def first(*tokens, eos=False):
    ends = ["</s>"] if eos else []
    backend = byte_level()
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((*tokens, *ends))]
    backend.post_processor = processors.TemplateProcessing(single=[*tokens, "$A", *ends], special_tokens=ids)
    return backend


@pytest.mark.parametrize("settings", [None, {}, {"bos_token": END}, {"bos_token": None}, {"add_bos_token": False}])
@pytest.mark.parametrize("eos", [False, True])
def test_the_first_token_is_what_the_file_puts_first(settings, eos, tmp_path):
    backend = first("<s>", eos=eos)
    tokenizer = from_folder(write(tmp_path, backend, settings))
    assert first_id(tokenizer) == backend.token_to_id("<s>")
    assert tokenizer("ab").input_ids == backend.encode("ab").ids
    if "bos_token" not in (settings or {}):
        assert tokenizer.bos_token == "<s>"


def test_none_or_several_first_tokens(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "jaxmech"):
        tokenizer = from_folder(write(tmp_path, byte_level(), {"bos_token": "<s>", "add_bos_token": True}))
    assert first_id(tokenizer) is None and "puts no token before a text" in caplog.text
    with pytest.raises(ValueError, match="puts 2 tokens before a text .<s>, </s>."):
        from_folder(write(tmp_path, first("<s>", "</s>"), {}))


# What cannot be read -------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer is missing; .*tokenizer.json.*load_model.…, tokenizer=…"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("jaxmech.models.tokenizer._installed", lambda module: False)
    with pytest.raises(ValueError, match="tokenizer.model is read with sentencepiece protobuf, .*pip install sentence"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match="read with tiktoken, which is not installed"):
        from_folder(tmp_path)


def test_code_of_its_own_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "tokenizer_class": "XTokenizer"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "x.XConfig"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="is code of its own .auto_map.*add a tokenizer.json"):
        from_folder(tmp_path)
    reference = byte_level()
    tokenizer = from_folder(write(tmp_path, reference, settings, "x"))
    assert tokenizer("  a1").input_ids == reference.encode("  a1").ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "its tokenizer is damaged .tokenizer.json, .*download or copy it again"),
        ("{", "its tokenizer is damaged"),
        ("version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    folder = write(tmp_path, byte_level(), {})
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_folder(folder)
    write(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is damaged"):
        from_folder(folder)


def test_a_null_in_the_models_configuration_is_not_the_tokenizers_fault(tmp_path):
    reference = byte_level()
    folder = write(tmp_path, reference, {"tokenizer_class": "LlamaTokenizer"}, rope_scaling=None, eos_token_id=None)
    (folder / "config.json").write_text(json.dumps({"model_type": None, "vocab_size": None, "text_config": None}))
    assert from_folder(folder)("a 12").input_ids == reference.encode("a 12").ids


def test_a_vocabulary_without_tokenizer_json_is_read_by_its_class(tmp_path):
    backend = byte_level()
    fields = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(fields["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in fields["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = from_folder(tmp_path)
    for text in TEXTS[:5]:
        assert tokenizer(text).input_ids == backend.encode(text).ids


def test_an_added_token_keeps_how_the_file_matches_it(tmp_path):
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    i = backend.token_to_id("<x>")
    told = {"added_tokens_decoder": {str(i): {"content": "<x>", "lstrip": False, "rstrip": False, "special": True}}}
    tokenizer = from_folder(write(tmp_path, backend, told | {"pad_token": "<x>"}))
    assert tokenizer("a  <x>  b").input_ids == backend.encode("a  <x>  b").ids
