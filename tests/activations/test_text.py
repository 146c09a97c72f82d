"""Token rows: BOS, packing, padding, and samples that end where the model ends them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxmech.activations import text
from jaxmech.io import help_topics
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import init_params

CONFIG = ModelConfig(
    family="llama", vocab_size=6, n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, head_dim=8, d_mlp=8,
    activation="silu", norm_eps=1e-6, rope=Rope(10_000.0), query_scale=0.5, max_positions=64,
    is_local=(False,), bos_id=1, eos_ids=(2,),
)  # fmt: skip


def tokenizer(string, add_special_tokens):
    assert not add_special_tokens
    return SimpleNamespace(input_ids=[3 + "abc".index(c) for c in string])


LM = SimpleNamespace(config=CONFIG, params=init_params(CONFIG, jax.random.key(0)), tokenizer=tokenizer)


def test_pack_texts():
    tokens, mask = text.pack_texts(LM, ["abc", "a", "bb"], length=4)
    np.testing.assert_array_equal(tokens, [[1, 3, 4, 5], [1, 2, 3, 2], [1, 4, 4, 2]])
    assert mask.all()
    assert len(text.pack_texts(LM, iter(["abcabc"] * 100), length=4, limit=3).tokens) == 3
    with pytest.raises(ValueError, match="do not fill one row"):
        text.pack_texts(LM, ["a"], length=8)


def test_prompts_and_mix():
    prompts = text.from_prompts(LM, ["ab", "c"])
    np.testing.assert_array_equal(prompts.tokens, [[1, 3, 4], [1, 5, 0]])
    np.testing.assert_array_equal(prompts.mask, [[1, 1, 1], [1, 1, 0]])
    both = text.mix(prompts, text.pack_texts(LM, ["abcabc"], length=5))
    assert both.tokens.shape == both.mask.shape == (3, 5)
    np.testing.assert_array_equal(both.mask.sum(1), [3, 2, 5])
    with pytest.raises(ValueError, match="longest prompt has 3"):
        text.from_prompts(LM, ["ab"], length=2)


def test_files(tmp_path):
    (tmp_path / "b.txt").write_text("abc")
    (tmp_path / "a.md").write_text("c")
    (tmp_path / "c.bin").write_text("zzz")
    np.testing.assert_array_equal(text.from_file(LM, tmp_path, length=5).tokens, [[1, 5, 2, 3, 4]])
    np.testing.assert_array_equal(text.from_file(LM, tmp_path / "b.txt", length=4).tokens, [[1, 3, 4, 5]])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b.txt could not be read as UTF-8"):
        text.from_file(LM, tmp_path / "b.txt", length=4)
    with pytest.raises(ValueError, match="no text file"):
        text.from_file(LM, tmp_path / "missing.txt", length=4)


@pytest.mark.slow
def test_samples():
    tokens, mask = text.sample_text(LM, 10, 12, key=jax.random.key(0), batch=4)
    assert tokens.shape == mask.shape == (10, 12)
    assert (tokens[:, 0] == 1).all() and mask[:, 0].all()
    assert (tokens == 2).any()
    for row, real in zip(tokens, mask, strict=True):
        ends = np.flatnonzero(row == 2)
        assert real.sum() == (ends[0] + 1 if len(ends) else 12)  # up to the end-of-text token, itself included
    again = text.sample_text(LM, 10, 12, key=jax.random.key(0), batch=4)
    np.testing.assert_array_equal(again.tokens, tokens)
    assert not np.array_equal(text.sample_text(LM, 10, 12, key=jax.random.key(1), batch=4).tokens, tokens)
    started = text.sample_text(LM, 3, 8, key=jax.random.key(0), starts=["abc", "b"])
    np.testing.assert_array_equal(started.tokens[:, :2], [[1, 3], [1, 4], [1, 3]])
    with pytest.raises(ValueError, match="already has 4 tokens"):
        text.sample_text(LM, 3, 4, key=jax.random.key(0), starts=["abc"])


@pytest.mark.slow
def test_draw(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    rows, origin = text.draw(LM, 5, 4, jax.random.key(0), file=tmp_path / "a.txt")
    assert rows.tokens.tolist() == [[1, 3, 4, 5]] and origin == str(tmp_path / "a.txt")
    rows, origin = text.draw(LM, 5, 4, jax.random.key(0))
    assert rows.tokens.shape == (5, 4) and origin == "sampled from the model"
    with pytest.raises(ValueError, match="not both"):
        text.draw(LM, 5, 4, jax.random.key(0), file="a.txt", dataset="b")


def test_help_topics_come_with_python(monkeypatch):
    texts = help_topics.texts()
    assert len(texts) > 50 and all("\n" in t for t in texts) and texts == help_topics.texts() != sorted(texts)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    text.require_source(None, help_topics.NAME)
    monkeypatch.setattr(help_topics, "texts", lambda: ["abcabc"])
    assert text.from_dataset(LM, help_topics.NAME, length=4, limit=1).tokens.tolist() == [[1, 3, 4, 5]]


def test_data_sets_need_their_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxmech\[text\]'"):
        text.from_dataset(LM, "some/set", length=8, limit=1)

    def missing(*_, **__):
        raise FileNotFoundError("no such set on the hub")

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=missing))
    with pytest.raises(ValueError, match="dataset: some/set could not be opened: no such set"):
        text.from_dataset(LM, "some/set", length=8, limit=1)


def test_one_string_is_no_list_of_texts():
    for name, call in {
        "texts": lambda: text.pack_texts(LM, "abcabc", length=4),
        "prompts": lambda: text.from_prompts(LM, "abc"),
        "starts": lambda: text.sample_text(LM, 2, 8, key=jax.random.key(0), starts="abc"),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected strings in a list, got one str"):
            call()
    with pytest.raises(ValueError, match="prompts: expected strings, got 3 among them"):
        text.from_prompts(LM, ["abc", 3])
    with pytest.raises(ValueError, match="length: expected a whole number, got 4.0"):
        text.pack_texts(LM, ["abcabc"], length=4.0)


def test_texts_of_linked_folders_are_read(tmp_path):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "a.txt").write_text("abc")
    (tmp_path / "elsewhere" / "b.txt").write_text("c")
    (tmp_path / "here" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "up").symlink_to(tmp_path / "here")  # entered once would be entered for ever
    np.testing.assert_array_equal(text.from_file(LM, tmp_path / "here", length=6).tokens, [[1, 3, 4, 5, 2, 5]])
    (tmp_path / "here" / "c.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="c.txt could not be read"):
        text.from_file(LM, tmp_path / "here", length=6)
