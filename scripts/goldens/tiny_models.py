"""Tiny checkpoints of every family, in the structures of Hugging Face's own classes: goldens and live checks use them.

Needs torch and transformers. A model is small enough for a repository and large enough in its weights, biases and
unusual facts that a part left out shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

VOCAB = 97

_SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_SHAPE = {
    **_SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_SMALL = {
    **_SHAPE,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(theta: float, **scaling) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def first_configs() -> dict[str, transformers.PretrainedConfig]:
    """Small models with every structure on: grouped heads, a window shorter than the text, RoPE scaling, biases."""
    gemma3 = transformers.Gemma3TextConfig(
        **_SHAPE,
        head_dim=16,
        num_hidden_layers=4,
        query_pre_attn_scalar=24,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
        },
    )
    llama = transformers.LlamaConfig(**_SHAPE, num_hidden_layers=3, rope_parameters=_LLAMA3, tie_word_embeddings=True)
    biased = transformers.LlamaConfig(
        **_SHAPE,
        head_dim=12,
        num_hidden_layers=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return {"tiny-gemma3": gemma3, "tiny-llama": llama, "tiny-llama-bias": biased}


def family_configs() -> dict[str, transformers.PretrainedConfig]:
    """One or two models of each further family, with the facts on that are most easily forgotten."""
    return {**_gemma_configs(), **_llama_like_configs(), **_gpt_configs(), **_phi_configs()}


def _gemma_configs() -> dict[str, transformers.PretrainedConfig]:
    gemma = transformers.GemmaConfig(
        **_SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1},
        head_dim=12,
        hidden_act="gelu",
        rope_parameters=_rope(100.0),
    )
    gemma2 = transformers.Gemma2Config(
        **_SMALL,
        head_dim=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=5,
        rope_parameters=_rope(100.0),
    )
    return {"tiny-gemma": gemma, "tiny-gemma2": gemma2}


def _llama_like_configs() -> dict[str, transformers.PretrainedConfig]:
    mistral = transformers.MistralConfig(**_SMALL, head_dim=8, sliding_window=5, rope_parameters=_rope(200.0))
    qwen2 = transformers.Qwen2Config(
        **_SMALL | {"max_position_embeddings": 128},
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters=_rope(30.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    )
    qwen3 = transformers.Qwen3Config(**_SMALL, head_dim=8, rope_parameters=_rope(300.0))
    olmo2 = transformers.Olmo2Config(**_SMALL, rope_parameters=_rope(50.0))
    return {"tiny-mistral": mistral, "tiny-qwen2": qwen2, "tiny-qwen3": qwen3, "tiny-olmo2": olmo2}


def _gpt_configs() -> dict[str, transformers.PretrainedConfig]:
    gpt2 = transformers.GPT2Config(
        **_SPECIAL, n_embd=24, n_layer=3, n_head=4, n_inner=40, n_positions=64, layer_norm_epsilon=1e-3
    )
    shape = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    shape |= {"num_attention_heads": 3, "layer_norm_eps": 1e-3}
    neox = transformers.GPTNeoXConfig(**shape, rope_parameters=_rope(100.0, partial_rotary_factor=0.25))
    sequential = transformers.GPTNeoXConfig(
        **shape, use_parallel_residual=False, rope_parameters=_rope(100.0, partial_rotary_factor=0.5)
    )
    return {"tiny-gpt2": gpt2, "tiny-gpt-neox": neox, "tiny-gpt-neox-sequential": sequential}


def _phi_configs() -> dict[str, transformers.PretrainedConfig]:
    phi3 = transformers.Phi3Config(
        **_SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 40},
        original_max_position_embeddings=10,
        rope_parameters=_rope(
            100.0,
            rope_type="longrope",
            partial_rotary_factor=0.5,
            short_factor=[1.0, 1.3],
            long_factor=[1.6, 4.0],
            original_max_position_embeddings=10,
        ),
    )
    window = transformers.Phi3Config(**_SMALL, sliding_window=5, rope_parameters=_rope(100.0))
    return {"tiny-phi3": phi3, "tiny-phi3-window": window}


def randomise(model: torch.nn.Module, bias: float = 0.2) -> None:
    """Weights large enough that every part of the network shows in the output; `bias` scales the biases of layers."""
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, weight in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            weight.data += 0.3 * torch.randn_like(weight)
        else:
            inputs = weight.shape[0 if name in transposed or weight.ndim == 1 else 1]
            weight.data = torch.randn_like(weight) * (bias if weight.ndim == 1 else 1.5 * inputs**-0.5)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words t4 .. t96: enough for a folder to be complete."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(4, VOCAB))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def build(config: transformers.PretrainedConfig, bias: float = 0.2) -> torch.nn.Module:
    """A random float32 model, from torch's current seed."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model, bias)
    return model


def save(model: torch.nn.Module, folder: Path) -> None:
    """Model and tokenizer as a complete Hugging Face folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def publish(folder: Path) -> None:
    """Rewrites a folder's config.json as checkpoints on the hub have it that were written before transformers 5.

    RoPE as `rope_theta` and `rope_scaling`, `torch_dtype`, attributes left out where the class has a default, and the
    families' own words: Gemma's `hidden_act` "gelu" that means the tanh form, GPT-NeoX's `rotary_pct`.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = dict(config.pop("rope_parameters", None) or {})
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.38.0"}
    kind = config["model_type"]
    if kind in ("gemma", "gpt2"):
        del config["tie_word_embeddings"]
    if kind == "gemma":
        del config["use_bidirectional_attention"]
        config |= {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    if kind == "gpt2":
        config |= {"n_ctx": config["n_positions"], "task_specific_params": {"text-generation": {"do_sample": True}}}
    elif kind == "gpt_neox":
        if config["attention_bias"]:
            del config["attention_bias"]
        config |= {"rotary_emb_base": rope.pop("rope_theta"), "rotary_pct": rope.pop("partial_rotary_factor")}
    elif kind == "gemma3_text":
        rope, local = rope["full_attention"], rope["sliding_attention"]
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_local_base_freq": local["rope_theta"]}
    else:
        config["rope_theta"] = rope.pop("rope_theta")
    if kind == "phi3":
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        rope.pop("original_max_position_embeddings", None)  # beside the scaling
    if len(rope) > 1 or kind not in ("gpt2", "gpt_neox"):
        config["rope_scaling"] = rope if len(rope) > 1 else None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
