"""Configurations: what Hugging Face's classes mean, old and new spellings, and that nothing is ignored silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from jaxmech.models.config import Rope
from jaxmech.models.convert import flatten
from jaxmech.models.decoder import param_shapes
from jaxmech.models.families import FAMILIES, config_from_hf, table_for

GOLDENS = Path(__file__).parents[1] / "goldens"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama(**changes):
    return (
        LlamaConfig(num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).to_dict()
        | changes
    )


def gemma3(**changes):
    return Gemma3TextConfig(num_hidden_layers=8).to_dict() | changes


def without(hf, *keys):
    return {k: v for k, v in hf.items() if k not in keys}


def test_llama_from_the_class():
    config = config_from_hf(llama(num_attention_heads=32, num_key_value_heads=8))
    assert (config.family, config.n_heads, config.n_kv_heads, config.head_dim) == ("llama", 32, 8, 128)
    assert config.rope == Rope(5e5) and config.query_scale == 128**-0.5
    assert not config.tied and not any(config.is_local) and config.eos_ids == (2,) and config.bos_id == 1


def test_gemma3_from_the_class():
    config = config_from_hf(gemma3(query_pre_attn_scalar=168))
    assert config.is_local == (True,) * 5 + (False,) + (True,) * 2 and config.window == 4096
    assert (config.rope, config.rope_local) == (Rope(1e6), Rope(1e4))
    assert config.query_scale == 168**-0.5 and config.embed_scale == 2304**0.5
    assert config.norm_offset == 1 and config.qk_norm and config.post_norms and config.tied


def test_what_tuning_tools_and_mirrors_write_is_inert():
    told = {"unsloth_fixed": True, "unsloth_version": "2026.1", "model_name": "org/base"}
    told |= {"_attn_implementation_internal": "sdpa", "_experts_implementation_internal": None}
    for hf in (llama(), gemma3(), GPT2Config().to_dict(), Qwen2Config().to_dict()):
        assert config_from_hf(hf | told) == config_from_hf(hf)


@pytest.mark.parametrize("ignored", [None, ["partial_rotary_factor"]])
def test_phi3_as_the_first_releases_of_transformers_5_save_it(ignored):
    hf = Phi3Config(
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}
    ).to_dict()
    assert config_from_hf(hf | {"ignore_keys_at_rope_validation": ignored}) == config_from_hf(hf)


def test_old_and_new_rope_mean_the_same():
    new = {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}
    old = without(llama(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3}), "rope_parameters")
    assert config_from_hf(llama(rope_parameters=new)) == config_from_hf(old)
    assert dict(config_from_hf(old).rope.scaling) == {"rope_type": "llama3", **LLAMA3}

    linear = {"rope_type": "linear", "factor": 8.0}
    new = {"full_attention": {"rope_theta": 1e6, **linear}, "sliding_attention": {"rope_theta": 1e4}}
    old = without(
        gemma3(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear), "rope_parameters", "layer_types"
    )
    assert config_from_hf(gemma3(rope_parameters=new)) == config_from_hf(old | {"sliding_window_pattern": 6})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (without(Qwen2Config().to_dict(), "rope_parameters"), "neither rope_parameters nor rope_theta"),
        (llama(rope_parameters={"rope_type": "default"}), "rope_theta is missing"),
        (
            llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}),
            r"'yarn' takes \['factor', 'original_max_position_embeddings'\]",
        ),
        (llama(rope_parameters={"rope_type": "linear", "rope_theta": 1.0}), r"takes \['factor'\], got \[\]"),
        (llama(rope_theta=1.0), "contradicts"),
        (llama(rope_scaling={"type": "linear", "factor": 4.0}), "factor=4.0 contradicts"),
        (
            without(
                llama(rope_theta=1.0, rope_scaling={"type": "linear", "factor": 4.0, "rope_theta": 2.0}),
                "rope_parameters",
            ),
            "contradicts rope_scaling",
        ),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 .expected 1.0"),
        (llama(rope_parameters={"rope_theta": 1.0, "partial_rotary_factor": 0.5}), "llama rotates whole heads"),
        (llama(hidden_size="4096"), "hidden_size='4096' .expected a number"),
        (gemma3(rope_scaling={"rope_type": "linear", "factor": 8.0}), "beside rope_parameters: expected one of them"),
        (GPT2Config().to_dict() | {"hidden_size": 7}, "contradicts .* of its other name"),
        ({"model_type": "gemma3", "text_config": gemma3(), "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gemma3", "text_config": gemma3(final_logit_softcapping=30.0)}, "final_logit_softcapping"),
        (gemma3(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0 .expected None"),
        (llama(brand_new=3), r"brand_new=3 \(not understood\)"),
        (llama(quantization_config={"bits": 4}), "quantization_config"),
        (llama(hidden_act="relu"), "hidden_act: expected one of"),
        (without(llama(), "vocab_size"), "vocab_size is missing"),
        (without(llama(), "vocab_size", "rms_norm_eps"), "vocab_size, rms_norm_eps are missing"),
        (without(GPT2Config().to_dict(), "n_embd"), "n_embd is missing"),
        ({"model_type": "dino"}, "model_type: expected one of gemma, .*qwen3, gemma3, got 'dino'$"),
        ({"model_type": "mamba"}, "got 'mamba' .*not made of attention layers alone"),
        ({"model_type": "mixtral"}, "mixtral is a mixture of experts"),
        ({"model_type": "gemma4_text"}, "shares keys and values between layers"),
        ({"model_type": "mllama", "text_config": {}}, "mllama reads images"),
        (Qwen2Config(use_sliding_window=False).to_dict() | {"layer_types": ["sliding_attention"] * 32}, "is off"),
        (without(Qwen3Config().to_dict(), "head_dim"), "head_dim is missing"),
        (without(Gemma2Config().to_dict(), "attn_logit_softcapping"), "attn_logit_softcapping is missing"),
        (MistralConfig().to_dict() | {"layer_types": ["full_attention"] * 32}, "layer_types=.*not understood"),
        (gemma3(use_bidirectional_attention=True), r"use_bidirectional_attention=True \(expected False\)"),
        (gemma3(layer_types=["chunked_attention"] * 8), "chunked_attention"),
        (gemma3(rope_parameters={"full_attention": {"rope_theta": 1.0}}), r"\['sliding_attention'\] missing"),
        (without(gemma3(), "rope_parameters"), "neither rope_parameters nor rope_theta"),
        (without(gemma3(), "layer_types", "_sliding_window_pattern"), "layer_types: missing"),
    ],
)
def test_refusals_name_the_attribute(hf, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)


def test_multimodal_gemma3_nests_the_decoder():
    hf = Gemma3Config(text_config=Gemma3TextConfig(num_hidden_layers=7)).to_dict()
    assert config_from_hf(hf) == config_from_hf(Gemma3TextConfig(num_hidden_layers=7).to_dict())


def test_old_nested_gemma3_omits_what_the_class_knows():
    # The published 4B, written before transformers 5.
    old = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    config = config_from_hf(old)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.rope == Rope(1e6, (("factor", 8.0), ("rope_type", "linear"))) and config.rope_local == Rope(1e4)
    assert config.is_local.index(False) == 5 and config.eos_ids == (1, 106)


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.glob("tiny-*")))
def test_every_configuration_hashes(name):
    config = config_from_hf(json.loads((GOLDENS / name / "config.json").read_text()))
    assert hash(config) == hash(config_from_hf(json.loads((GOLDENS / name / "config.json").read_text())))


def test_llama_rows_are_unpermuted():
    config = config_from_hf(llama(hidden_size=24, num_attention_heads=2, num_key_value_heads=1))
    weight = np.random.default_rng(0).normal(size=(24, 24))
    # llama.cpp's own permutation, from its converter.
    stored = weight.reshape(2, 2, 6, 24).swapaxes(1, 2).reshape(24, 24)
    rule = next(r for r in table_for(config, gguf=True).rules if r.path == "layers/attn/q/kernel")
    np.testing.assert_array_equal(rule.transform(stored), weight.reshape(2, 12, 24).transpose(2, 0, 1))


def test_gemma_norms_lose_the_one():
    rules = {r.path: r for r in table_for(config_from_hf(gemma3()), gguf=True).rules}
    stored = np.array([1.0, 1.5, 0.25], np.float32)
    for path in (
        "final_norm/scale",
        "layers/attn_norm/scale",
        "layers/attn/q_norm/scale",
        "layers/mlp_post_norm/scale",
    ):
        np.testing.assert_array_equal(rules[path].transform(stored), [0.0, 0.5, -0.75])


THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
CLASSES = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Phi3Config, Olmo2Config, GemmaConfig, Gemma2Config)


@pytest.mark.slow
@pytest.mark.parametrize("gguf", [False, True])
@pytest.mark.parametrize(
    "hf",
    [
        llama(attention_bias=True, mlp_bias=True),
        gemma3(),
        *(make(**THETA).to_dict() for make in CLASSES),
        GPTNeoXConfig(rope_parameters=THETA["rope_parameters"] | {"partial_rotary_factor": 0.25}).to_dict(),
        GPT2Config().to_dict(),
    ],
    ids=lambda hf: hf["model_type"],
)
def test_tables_reach_every_parameter(hf, gguf):
    config = config_from_hf(hf)
    if gguf and FAMILIES[config.family].gguf_table is None:
        with pytest.raises(ValueError, match=f"GGUF files of {config.family} are not supported"):
            table_for(config, gguf)
        return
    assert set(flatten(param_shapes(config))) <= {rule.path for rule in table_for(config, gguf).rules}


def test_family_names_agree():
    assert all(name == family.name for name, family in FAMILIES.items())


def test_what_each_class_means():
    """Facts that are easily got wrong, from Hugging Face's own classes."""
    mistral = config_from_hf(MistralConfig(**THETA).to_dict())
    assert all(mistral.is_local) and mistral.window == 4096 and not mistral.attention_bias
    assert not any(config_from_hf(MistralConfig(sliding_window=None, **THETA).to_dict()).is_local)
    qwen2 = config_from_hf(Qwen2Config(**THETA).to_dict())
    assert qwen2.attention_bias and not qwen2.output_bias and not any(qwen2.is_local)
    late = config_from_hf(Qwen2Config(use_sliding_window=True, max_window_layers=30, **THETA).to_dict())
    assert late.is_local == (False,) * 30 + (True,) * 2 and late.window == 4096
    qwen3 = config_from_hf(Qwen3Config(**THETA).to_dict())
    assert qwen3.qk_norm == "head" and qwen3.head_dim == 128 and not qwen3.attention_bias
    gemma = config_from_hf(GemmaConfig(**THETA).to_dict() | {"hidden_act": "gelu"})
    assert gemma.activation == "gelu_tanh" and gemma.tied and gemma.norm_offset == 1 and not gemma.post_norms
    gemma2 = config_from_hf(Gemma2Config(**THETA).to_dict())
    assert gemma2.is_local == (True, False) * 13 and (gemma2.attn_softcap, gemma2.final_softcap) == (50, 30)
    gpt2 = config_from_hf(GPT2Config().to_dict())
    assert gpt2.d_mlp == 4 * 768 and gpt2.rope is None and gpt2.learned_positions and gpt2.tied and not gpt2.gated
    pythia = {"rotary_pct": 0.25, "rotary_emb_base": 10000, "layer_norm_eps": 1e-5}
    neox = config_from_hf(without(GPTNeoXConfig().to_dict(), "rope_parameters") | pythia)
    assert neox.rotary_dim == 24 and neox.parallel and neox.rope == Rope(1e4) and neox.attention_bias
    olmo2 = config_from_hf(Olmo2Config(**THETA).to_dict())
    assert (olmo2.pre_norms, olmo2.post_norms, olmo2.qk_norm) == (False, True, "full")


def test_longrope_in_its_three_spellings():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    base = without(Phi3Config(**THETA).to_dict(), "rope_parameters") | {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 1e4,
    }
    read = [
        config_from_hf(base | {"rope_scaling": {"type": kind, **factors}}).rope for kind in ("longrope", "su", "yarn")
    ]
    assert read[0] == read[1] == read[2]
    scaling = dict(read[0].scaling)
    assert scaling["attention_factor"] == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert scaling["original_max_position_embeddings"] == 4096 and "factor" not in scaling


OLD = {"transformers_version": "4.31.0.dev0", "torch_dtype": "float16", "use_cache": True}


def test_configurations_as_they_stand_on_the_hub():
    """Attributes that published files carry and no class of today writes."""
    llama2 = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    llama2 |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu"}
    llama2 |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "pretraining_tp": 1}
    llama2 |= {"rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2, **OLD}  # no rope_theta
    assert config_from_hf(llama2).rope == Rope(1e4)
    smollm2 = llama2 | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "mlp_bias": False}
    assert config_from_hf(smollm2 | {"transformers.js_config": {}, "attention_bias": False}).rope == Rope(1e5)
    medium = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024}
    medium |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "vocab_size": 50257, "resid_pdrop": 0.1}
    medium |= {"n_special": 0, "predict_special_tokens": True, "output_past": True, "initializer_range": 0.02}
    assert config_from_hf({"n_inner": None, "intermediate_size": 64, **medium}).d_mlp == 64
    assert config_from_hf(medium | {"task_specific_params": {"text-generation": {}}}).tied
    neox = {"model_type": "gpt_neox", "hidden_act": "gelu_fast", "hidden_size": 6144, "intermediate_size": 24576}
    neox |= {"num_attention_heads": 64, "num_hidden_layers": 44, "layer_norm_eps": 1e-5, "rotary_pct": 0.25}
    neox |= {"rotary_emb_base": 10000, "max_position_embeddings": 2048, "vocab_size": 50432, **OLD}
    neox |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "tie_word_embeddings": False}
    assert config_from_hf(neox).rotary_dim == 24 and config_from_hf(neox).activation == "gelu_tanh"
