"""Configurations from GGUF metadata: real models' published ones, and golden models through files of their own.

The metadata are written here as llama.cpp's converter (conversion/base.py, llama.py, gemma.py) writes them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmech.models.config import Rope
from jaxmech.models.convert import convert, flatten
from jaxmech.models.decoder import forward, param_shapes
from jaxmech.models.families import config_from_hf, table_for
from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_config import hf_config

GOLDENS = Path(__file__).parents[1] / "goldens"
PUBLISHED = json.loads((GOLDENS / "published.json").read_text())

LLAMA = {"context_length": 512, "embedding_length": 32, "block_count": 3, "feed_forward_length": 48}
LLAMA |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
LLAMA |= {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 500.0}
GEMMA3 = {"context_length": 512, "embedding_length": 32, "block_count": 7, "feed_forward_length": 48}
GEMMA3 |= {"attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 16}
GEMMA3 |= {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, "attention.sliding_window": 64}
EMBEDDING = {"token_embd.weight": np.zeros((7, 32), np.float32)}


@pytest.fixture
def config_of(tmp_path, write_gguf):
    """Metadata (and tensors) -> the Hugging Face configuration of a file that holds them."""
    return lambda facts, architecture="llama", tensors=EMBEDDING, **more: hf_config(
        GGUFFile(write_gguf(tmp_path / "x.gguf", tensors, architecture, facts, **more))
    )


# As llama.cpp converts -----------------------------------------------------------------------------------------------


def converted_metadata(config):
    """What llama.cpp's converter writes for a model: its architecture and the metadata under it."""
    architecture = {"mistral": "llama"}.get(config.family, config.family)
    scaling = dict(config.rope.scaling)
    facts = {
        "block_count": config.n_layers,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_mlp,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }
    if architecture not in ("llama", "qwen2") or config.head_dim * config.n_heads != config.d_model:
        facts |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
    if architecture == "llama":
        facts |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if architecture not in ("gemma", "gemma2"):
        facts["rope.freq_base"] = config.rope.theta
    if architecture in ("gemma2", "gemma3"):
        facts["attention.sliding_window"] = config.window
    if architecture == "gemma2":
        facts["attn_logit_softcapping"] = config.attn_softcap
        facts["final_logit_softcapping"] = config.final_softcap
    if scaling.get("rope_type") in ("linear", "yarn"):
        facts |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
    if scaling.get("rope_type") == "yarn":
        facts["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    return architecture, facts


def rope_freqs(head_dim, theta, factor, low=1.0, high=4.0, original=8192):
    """Llama 3's divisors one by one, as llama.cpp's converter computes them."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


MODELS = ["gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b"]
MODELS += ["gemma-3-27b", "llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"]


@pytest.mark.parametrize("name", MODELS)
def test_published_models(name, config_of):
    published = config_from_hf(PUBLISHED[name]["config"])
    tensors = {"token_embd.weight": np.zeros((3, published.d_model), np.float32)}
    if not published.tied:
        tensors["output.weight"] = tensors["token_embd.weight"]
    architecture, facts = converted_metadata(published)
    if published.rope.scaling and dict(published.rope.scaling)["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_freqs(published.head_dim, published.rope.theta, 8.0)
    expected = dataclasses.replace(published, family=architecture, vocab_size=3, bos_id=2, eos_ids=(1,))
    if name == "mistral-7b":  # of whose window the file knows nothing
        expected = dataclasses.replace(expected, window=None, is_local=(False,) * 32)
    assert config_from_hf(config_of(facts, architecture, tensors)) == expected


# Golden models, with what their files cannot say: a query scale that is not llama.cpp's, Qwen2's window, and a scaling
# of Llama 3's kind with another original context.
UNSAID = {
    "tiny-gemma": set(),
    "tiny-gemma2": {"query_scale"},
    "tiny-gemma3": {"query_scale"},
    "tiny-llama": {"rope"},
    "tiny-llama-bias": set(),
    "tiny-mistral": {"window", "is_local"},
    "tiny-qwen2": {"window", "is_local"},
    "tiny-qwen3": set(),
}


def as_gguf(path, name, write_gguf):
    """A golden model as llama.cpp's converter would write it. Tensors are named by the `gguf` package's own map."""
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    config = config_from_hf(hf)
    architecture, facts = converted_metadata(config)
    if architecture.startswith("gemma"):
        facts |= {"rope.freq_base": config.rope.theta}  # for the first two, llama.cpp's 10,000 goes without saying
    if architecture == "gemma3":
        facts |= {"rope.freq_base_swa": config.rope_local.theta, "attention.sliding_window_pattern": 3}
    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    named = gguf.get_tensor_name_map(arch, config.n_layers)
    tensors = {}
    for key, array in load_file(GOLDENS / name / "model.safetensors").items():
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
            if part in key and architecture == "llama":
                array = np.ascontiguousarray(array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2))
                array = array.reshape(-1, *array.shape[3:])
        if key.endswith("norm.weight") and architecture.startswith("gemma"):
            array = array + np.float32(1)
        tensors[named.get_name(key, try_suffixes=(".weight", ".bias"))] = array
    return write_gguf(path, tensors, architecture, facts), dataclasses.replace(config, family=architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSAID)
def test_a_golden_model_through_gguf(name, tmp_path, write_gguf):
    path, expected = as_gguf(tmp_path / "model.gguf", name, write_gguf)
    file = GGUFFile(path)
    unsaid = {field: getattr(expected, field) for field in UNSAID[name]}
    config = dataclasses.replace(config_from_hf(hf_config(file)), **unsaid)
    assert config == expected
    params = convert(file, table_for(config, gguf=True), param_shapes(config))
    golden = np.load(GOLDENS / name / "golden.npz")
    logits = forward(config, params, jnp.asarray(golden["tokens"]), logits="all").logits
    assert np.abs(logits - golden["logits"]).max() <= 2e-4 * golden["logits"].std()


def test_stored_values_equal_hugging_faces(tmp_path, write_gguf):
    file = GGUFFile(as_gguf(tmp_path / "model.gguf", "tiny-gemma3", write_gguf)[0])
    config = config_from_hf(hf_config(file))
    got = flatten(convert(file, table_for(config, gguf=True), param_shapes(config)))
    stored = load_file(GOLDENS / "tiny-gemma3" / "model.safetensors")
    np.testing.assert_array_equal(got["embed/embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_allclose(got["final_norm/scale"], stored["model.norm.weight"], atol=1e-7)


# What files leave to llama.cpp ---------------------------------------------------------------------------------------


def test_gemma3(config_of):
    config = config_from_hf(config_of(GEMMA3, "gemma3"))
    assert config.is_local == (True,) * 5 + (False, True) and config.window == 64
    assert (config.rope, config.rope_local, config.query_scale) == (Rope(1e6), Rope(1e4), 0.25)
    assert config.tied and config.vocab_size == 7 and (config.bos_id, config.eos_ids) == (2, (1,))
    flags = {"attention.sliding_window_pattern": [True, False] * 3 + [True]}
    assert config_from_hf(config_of(GEMMA3 | flags, "gemma3")).is_local == (True, False) * 3 + (True,)
    with pytest.raises(ValueError, match=r"sliding_window_pattern=\[True\]: expected one flag for each of 7 layers"):
        config_of(GEMMA3 | {"attention.sliding_window_pattern": [True]}, "gemma3")
    no_window = {key: value for key, value in GEMMA3.items() if "window" not in key}
    assert not any(config_from_hf(config_of(no_window, "gemma3")).is_local)


def test_gemma2_of_the_first_days_has_neither_caps_nor_window(config_of):
    facts = {key: value for key, value in GEMMA3.items() if "window" not in key and "rope" not in key}
    config = config_from_hf(config_of(facts, "gemma2"))
    assert (config.attn_softcap, config.final_softcap, config.window) == (50.0, 30.0, 4096)
    assert config.rope == Rope(1e4) and config.is_local == (True, False) * 3 + (True,)
    with pytest.raises(ValueError, match="freq_base_swa=20000.0: Gemma 2 has one"):
        config_of(facts | {"rope.freq_base_swa": 2e4}, "gemma2")


def test_llama2_leaves_out_its_base_and_says_none_for_the_pad(config_of):
    facts = {key: value for key, value in LLAMA.items() if not key.startswith("rope.freq")}
    facts |= {"rope.scaling.finetuned": False, "tensor_data_layout": "Meta AI original pth"}
    got = config_of(facts, tokenizer__ggml__eot_token_id=2**32 - 1)
    assert got["rope_parameters"] == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert (got["bos_token_id"], got["eos_token_id"]) == (2, [1])


def test_turns_end_where_llama_cpp_ends_them(config_of):
    tokens = ["<unk>", "</s>", "<s>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>", "a"]
    vocabulary = {"tokens": tokens, "tokenizer__ggml__token_type": [2, 3, 3, 3, 3, 1, 1]}
    assert config_of(LLAMA, **vocabulary)["eos_token_id"] == [1, 3, 4]  # "<|im_end|>" is an ordinary word here
    assert config_of(LLAMA, tokenizer__ggml__eot_token_id=0)["eos_token_id"] == [0, 1]


def test_bos_is_given_only_where_the_file_wants_it(config_of):
    assert config_of(LLAMA)["bos_token_id"] == 2
    assert config_of(LLAMA, tokenizer__ggml__add_bos_token=False)["bos_token_id"] is None


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 0.0}, {"rope_type": "default"}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
    ],
)  # fmt: skip
def test_rope_scaling(scaling, expected, config_of):
    facts = LLAMA | {f"rope.scaling.{key}": value for key, value in scaling.items()}
    assert config_of(facts)["rope_parameters"] == {"rope_theta": 500.0, **expected}


def test_oldest_name_of_the_linear_factor(config_of):
    assert config_of(LLAMA | {"rope.scale_linear": 8.0})["rope_parameters"]["factor"] == 8.0


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.2
def test_llama3_scaling_is_recovered(factor, config_of):
    facts = LLAMA | {"attention.key_length": 64, "rope.dimension_count": 64, "rope.freq_base": 500_000.0}
    tensors = EMBEDDING | {"rope_freqs.weight": rope_freqs(64, 500_000.0, factor)}
    got = config_of(facts, tensors=tensors)["rope_parameters"]
    assert got == {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    for wrong in (rope_freqs(64, 500_000.0, factor, original=4096), rope_freqs(32, 500_000.0, factor)):
        with pytest.raises(ValueError, match=r"rope_freqs.weight \(\d+,\): not Llama 3's scaling with factor"):
            config_of(facts, tensors=EMBEDDING | {"rope_freqs.weight": wrong})
    with pytest.raises(ValueError, match="rope_freqs.weight: not understood for llama with RoPE scaling 'linear'"):
        config_of(facts | {"rope.scaling.factor": 2.0}, tensors=tensors)
    with pytest.raises(ValueError, match="rope_freqs.weight: not understood for gemma3 with RoPE scaling 'default'"):
        config_of(GEMMA3, "gemma3", tensors)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": "x"}, "llama.surprise='x': not understood"),
        ({"expert_count": 8}, "llama.expert_count=8: mixtures of experts"),
        ({"attention.value_length": 16}, "value_length=16: values other than the head width, 8"),
        ({"attention.head_count_kv": [2, 2, 1]}, r"head_count_kv=\[2, 2, 1\]: layers that differ"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope': expected 'none', 'linear' or 'yarn'"),
        ({"rope.scaling.type": "yarn"}, "'llama.rope.scaling.factor' is missing"),
        ({"tensor_data_layout": "row-major"}, "expected 'Meta AI original pth'"),
    ],
)
def test_refusals_name_the_key(changes, message, config_of):
    with pytest.raises(ValueError, match=message):
        config_of(LLAMA | changes)


def test_all_that_is_wrong_is_named_at_once(config_of):
    wrong = {"surprise": "x", "another": 3, "expert_count": 8, "rope.scaling.type": "su", "attention.value_length": 4}
    with pytest.raises(ValueError) as found:
        config_of(LLAMA | wrong)
    assert all(f"llama.{key}={value!r}: " in str(found.value) for key, value in wrong.items())


def test_layers_that_agree_may_be_listed(config_of):
    assert config_of(LLAMA | {"attention.head_count_kv": [2, 2, 2]})["num_key_value_heads"] == 2


def test_missing_and_unknown_as_a_whole(config_of):
    with pytest.raises(
        ValueError, match="architecture 'mamba' is not supported; expected one of gemma, gemma2, gemma3"
    ):
        config_of(LLAMA, "mamba")
    few = {key: value for key, value in LLAMA.items() if key not in ("block_count", "context_length")}
    with pytest.raises(ValueError) as found:
        config_of(few, tensors={"w": np.zeros((7, 32), np.float32)})
    lines = ["'llama.context_length' is missing", "'llama.block_count' is missing", "token_embd.weight is missing"]
    assert [line in text for line, text in zip(lines, str(found.value).split("\n")[1:], strict=True)] == [True] * 3
    with pytest.raises(ValueError, match="'gemma3.attention.key_length' is missing"):
        config_of({key: value for key, value in GEMMA3.items() if "key_length" not in key}, "gemma3")
    with pytest.raises(ValueError, match="one of 3 shards; join them with `llama-gguf-split --merge`"):
        config_of(LLAMA, split__count=3)
