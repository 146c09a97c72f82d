"""Random tiny checkpoints of every family, with random facts: heads, widths, windows, RoPE scaling, biases, caps.

Needs torch and transformers. `check_parity.py --random all` loads them with jaxmech and transformers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from scripts.goldens.tiny_models import VOCAB, publish, randomise, save, tiny_tokenizer

LONGEST = 32
"""Tokens of the texts these models are compared on; windows and original contexts are shorter."""

_SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def _shape(rng: random.Random, grouped: bool = True) -> dict[str, Any]:
    heads = rng.choice((2, 3, 4, 6))
    shape = {
        **_SPECIAL,
        "hidden_size": heads * rng.choice((6, 8, 12)),
        "intermediate_size": rng.randint(10, 60),
        "num_hidden_layers": rng.randint(2, 5),
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    if grouped:
        shape |= {"num_key_value_heads": rng.choice([n for n in (1, 2, 3, 4, 6) if heads % n == 0])}
        shape |= {"rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3))}
    return shape


def _head_dim(rng: random.Random) -> dict[str, int]:
    return {"head_dim": rng.choice((6, 8, 10, 16))}


def _rope(rng: random.Random, kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": rng.choice(kinds), "rope_theta": 10 ** rng.uniform(1.3, 6)}
    if rope["rope_type"] != "default":
        rope["factor"] = rng.choice((2.0, 4.0, 8.0))
    if rope["rope_type"] in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = rng.choice((16, 32, 64))
    if rope["rope_type"] == "llama3":
        low = rng.choice((0.5, 1.0))
        rope |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice((2.0, 4.0))}
    if rope["rope_type"] == "yarn":
        rope |= rng.choice(({}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"attention_factor": 0.8}, {"truncate": False}))
    return rope


def _layer_types(rng: random.Random, layers: int) -> list[str]:
    return [rng.choice(("sliding_attention", "full_attention")) for _ in range(layers)]


def _window(rng: random.Random) -> int:
    return rng.randint(2, LONGEST // 2)


def _llama(rng: random.Random) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        **_shape(rng),
        **_head_dim(rng),
        attention_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
        hidden_act=rng.choice(("silu", "silu", "gelu")),
        rope_parameters=_rope(rng),
    )


def _mistral(rng: random.Random) -> transformers.PretrainedConfig:
    window = rng.choice((None, _window(rng)))
    return transformers.MistralConfig(
        **_shape(rng), **_head_dim(rng), sliding_window=window, rope_parameters=_rope(rng)
    )


def _qwen_windows(rng: random.Random, layers: int) -> dict[str, Any]:
    """Unused, from a layer on, or layer by layer."""
    window = {"sliding_window": _window(rng)}
    if rng.random() < 0.3:
        return {**window, "use_sliding_window": False, "max_window_layers": rng.randint(0, layers)}
    if rng.random() < 0.5:
        return {**window, "use_sliding_window": True, "max_window_layers": rng.randint(0, layers - 1)}
    return {**window, "use_sliding_window": True, "layer_types": _layer_types(rng, layers)}


def _qwen2(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng)
    windows = _qwen_windows(rng, shape["num_hidden_layers"])
    return transformers.Qwen2Config(**shape, **windows, rope_parameters=_rope(rng))


def _qwen3(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng)
    windows = _qwen_windows(rng, shape["num_hidden_layers"])
    bias = {"attention_bias": rng.random() < 0.5}
    return transformers.Qwen3Config(**shape, **_head_dim(rng), **windows, **bias, rope_parameters=_rope(rng))


def _olmo2(rng: random.Random) -> transformers.PretrainedConfig:
    return transformers.Olmo2Config(**_shape(rng), attention_bias=rng.random() < 0.5, rope_parameters=_rope(rng))


def _phi3(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng) | {"num_attention_heads": 3, "num_key_value_heads": rng.choice((1, 3)), "hidden_size": 36}
    rope = _rope(rng, ("default",)) | {"partial_rotary_factor": rng.choice((0.5, 0.67, 1.0))}
    original = rng.randint(6, LONGEST)
    if rng.random() < 0.7:
        pairs = int(12 * rope["partial_rotary_factor"]) // 2
        short, long = ([rng.uniform(a, b) for _ in range(pairs)] for a, b in ((1.0, 1.5), (1.5, 8.0)))
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope |= {"original_max_position_embeddings": original}
    return transformers.Phi3Config(
        **shape,
        sliding_window=rng.choice((None, _window(rng))),
        original_max_position_embeddings=original,
        rope_parameters=rope,
    )


def _gemma(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng) | {"tie_word_embeddings": True}
    return transformers.GemmaConfig(
        **shape, **_head_dim(rng), attention_bias=rng.random() < 0.3, rope_parameters=_rope(rng)
    )


def _caps(rng: random.Random) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": rng.randint(3, 30),
        "attn_logit_softcapping": rng.choice((None, rng.uniform(1, 5))),
        "final_logit_softcapping": rng.choice((None, rng.uniform(1, 5))),
        "sliding_window": _window(rng),
    }


def _gemma2(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng) | {"tie_word_embeddings": True}
    types = rng.choice((None, _layer_types(rng, shape["num_hidden_layers"])))
    return transformers.Gemma2Config(
        **shape, **_head_dim(rng), **_caps(rng), layer_types=types, rope_parameters=_rope(rng)
    )


def _gemma3(rng: random.Random) -> transformers.PretrainedConfig:
    shape = _shape(rng) | {"tie_word_embeddings": True}
    ropes = {
        "sliding_attention": _rope(rng, ("default",)),
        "full_attention": _rope(rng, ("default", "linear")),
    }
    types = _layer_types(rng, shape["num_hidden_layers"])
    types[:2] = rng.sample(["sliding_attention", "full_attention"], 2)  # transformers wants both where both have RoPE
    caps = _caps(rng) | {"attn_logit_softcapping": None}  # transformers reads it and does not apply it
    return transformers.Gemma3TextConfig(**shape, **_head_dim(rng), **caps, layer_types=types, rope_parameters=ropes)


def _gemma3_multimodal(rng: random.Random) -> transformers.PretrainedConfig:
    """The decoder inside a model that also reads (very small) images."""
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4, "vision_use_head": False, "model_type": "siglip_vision_model"}
    return transformers.Gemma3Config(
        text_config=_gemma3(rng).to_dict() | {"final_logit_softcapping": None},  # not applied here either
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=3,
        eoi_token_index=3,
    )


def _gpt2(rng: random.Random) -> transformers.PretrainedConfig:
    heads = rng.choice((2, 3, 4))
    return transformers.GPT2Config(
        **_SPECIAL,
        n_embd=heads * rng.choice((5, 8, 12)),
        n_layer=rng.randint(2, 5),
        n_head=heads,
        n_inner=rng.choice((None, 30)),
        n_positions=rng.choice((64, 128)),
        layer_norm_epsilon=rng.choice((1e-5, 1e-3)),
        activation_function=rng.choice(("gelu_new", "gelu")),
    )


def _gpt_neox(rng: random.Random) -> transformers.PretrainedConfig:
    rope = _rope(rng, ("default", "default", "linear")) | {"partial_rotary_factor": rng.choice((0.25, 0.5, 1.0))}
    shape = _shape(rng, grouped=False)
    return transformers.GPTNeoXConfig(
        **shape | {"hidden_size": shape["num_attention_heads"] * rng.choice((8, 16))},
        layer_norm_eps=rng.choice((1e-5, 1e-3)),
        use_parallel_residual=rng.random() < 0.6,
        hidden_act=rng.choice(("gelu", "gelu_new")),
        attention_bias=rng.random() < 0.7,
        rope_parameters=rope,
    )


FAMILIES: dict[str, Callable[[random.Random], transformers.PretrainedConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3-multimodal": _gemma3_multimodal,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}


def write_random(family: str, seed: int, folder: Path) -> str:
    """Writes a checkpoint of `family`, in one file or in shards, its configuration in the new or the old spelling.

    Returns:
      Its facts in a few words.
    """
    rng = random.Random(f"{family} {seed}")
    torch.manual_seed(rng.getrandbits(32))
    config = FAMILIES[family](rng)
    nested = config.get_text_config() is not config
    kind = transformers.AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model, bias=0.5)
    shards = rng.random() < 0.4
    if shards:
        model.save_pretrained(folder, max_shard_size="30KB")
        tiny_tokenizer().save_pretrained(folder)
    else:
        save(model, folder)
    old = not nested and rng.random() < 0.5
    if old:
        publish(folder)
    return _facts(config.get_text_config()) + (", sharded" if shards else "") + (", old configuration" if old else "")


def _facts(config: transformers.PretrainedConfig) -> str:
    """What is unusual about a model."""
    fields = json.loads(config.to_json_string(use_diff=False))
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    facts = [f"{config.num_hidden_layers} layers", f"{heads}/{groups or heads} heads"]
    rope = fields.get("rope_parameters") or {}
    kinds = {r["rope_type"] for r in (rope.values() if "rope_type" not in rope else [rope]) if r} - {"default"}
    facts += sorted(kinds)
    if fields.get("sliding_window") and fields.get("use_sliding_window", True):
        facts.append(f"window {fields['sliding_window']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        facts.append(f"rotary {rope['partial_rotary_factor']}")
    facts += [name.split("_")[0] + " bias" for name in ("attention_bias", "mlp_bias") if fields.get(name)]
    facts += [name.split("_")[0] + " cap" for name in ("attn_logit_softcapping", "final_logit_softcapping")
              if fields.get(name)]  # fmt: skip
    facts += ["sequential"] if fields.get("use_parallel_residual") is False else []
    return ", ".join(facts)
