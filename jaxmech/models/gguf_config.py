"""The Hugging Face configuration that a GGUF file implies: its metadata, and what llama.cpp keeps in its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmech.models.config import Rope
from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_tokenizer import adds_bos, special_ids
from jaxmech.models.rope import inverse_frequencies

_SHARED_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_MAY_BE_ABSENT = ("head_dim", "num_key_value_heads")
_INERT_PREFIXES = ("general.", "tokenizer.", "quantize.", "split.")
# Written by old converters for every architecture and read by llama.cpp for none of ours.
_INERT = ("rope.scaling.finetuned", "use_parallel_residual")
_ROPE_FREQS = "rope_freqs.weight"
_CONTROL = 3  # among llama.cpp's token types
# What ends a turn, by name: llama.cpp stops at these wherever they are control tokens, whatever the file's eos is.
_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>")


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face configuration that the file describes, as `config_from_hf` takes it.

    `bos_token_id` is given only where the file wants the token put before a text. The sliding window of Mistral 7B v0.1
    is not in such files (llama.cpp runs that model without it), so it is missing here too.

    Raises:
      ValueError: an architecture without an entry here, one shard of several; or, all in one message, every key that is
        missing, not understood or at a value that is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{file.name}: GGUF architecture {architecture!r} is not supported; "
            f"expected one of {', '.join(sorted(_ARCHITECTURES))}"
        )
    if (shards := file.metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{file.name} is one of {shards} shards; join them with `llama-gguf-split --merge` and load the result"
        )
    keys = _Keys(file, architecture)
    config = _shared(keys)
    if "vocab_size" in config:  # else too little is known to continue
        config |= _ARCHITECTURES[architecture](keys, config)
        keys.problems += keys.not_understood()
    if keys.problems:
        raise ValueError("\n  ".join([f"{file.name} cannot be loaded:", *keys.problems]))
    return config


class _Keys:
    """The `{architecture}.*` keys of a file, and what is wrong with them; asking for one marks it as understood."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix = file, f"{architecture}."
        self.seen = {self.prefix + key for key in _INERT}
        self.problems: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self.prefix + key)
        return self.file.metadata.get(self.prefix + key, default)

    def need(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            self.problems.append(f"metadata key {self.prefix + key!r} is missing")
        return value

    def uniform(self, key: str) -> Any:
        """A value that may be given once per layer, and must then be the same in all."""
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            self.refuse(key, "layers that differ in it are not supported")
        return value[0] if value else None

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"{self.prefix}{key}={self.get(key)!r}: {why}")

    def not_understood(self) -> list[str]:
        left = [k for k in self.file.metadata if k not in self.seen and not k.startswith(_INERT_PREFIXES)]
        return [f"{k}={self.file.metadata[k]!r}: not understood, the model might come out wrong" for k in sorted(left)]


def _shared(keys: _Keys) -> dict[str, Any]:
    """The part of the configuration that all architectures share."""
    config = {hf: keys.uniform(key) for key, hf in _SHARED_KEYS.items()}
    missing = [key for key, hf in _SHARED_KEYS.items() if config[hf] is None and hf not in _MAY_BE_ABSENT]
    for key in missing:
        keys.need(key)
    if "token_embd.weight" not in keys.file.tensors:
        missing.append("token_embd.weight")
        keys.problems.append("the tensor token_embd.weight is missing")
    if missing:
        return config
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    config["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, config["head_dim"]) != config["head_dim"]:
            keys.refuse(key, f"values other than the head width, {config['head_dim']}, are not supported")
    keys.get("vocab_size")  # the embedding decides: it may be padded
    return config | {
        "vocab_size": keys.file.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        **_special_tokens(keys.file),
    }


def _special_tokens(file: GGUFFile) -> dict[str, Any]:
    metadata = file.metadata
    ids, tokens = special_ids(metadata), metadata.get("tokenizer.ggml.tokens", ())
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    typed = enumerate(zip(tokens, kinds, strict=False))
    ends = {i for i, (token, kind) in typed if kind == _CONTROL and token in _STOPS}
    ends |= {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    return {"eos_token_id": sorted(ends), "bos_token_id": ids.get("bos") if adds_bos(metadata) else None}


# Rotary embeddings ---------------------------------------------------------------------------------------------------


def _rope(keys: _Keys, config: dict[str, Any], theta: float | None = None) -> dict[str, Any]:
    """`rope_parameters` of one rotary embedding.

    Args:
      theta: what an absent base means, for architectures whose files may leave it out.
    """
    base = keys.need("rope.freq_base") if theta is None else keys.get("rope.freq_base", theta)
    scaling = _scaling(keys, config)
    if _ROPE_FREQS in keys.file.tensors:
        if keys.prefix == "llama." and scaling["rope_type"] == "default":
            scaling = _llama3(keys, base, config["head_dim"])
        else:
            keys.problems.append(
                f"{_ROPE_FREQS}: not understood for {keys.prefix[:-1]} with RoPE scaling {scaling['rope_type']!r}"
            )
    return {"rope_theta": base, **scaling}


def _scaling(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """The scaling that the metadata state, in Hugging Face's terms."""
    # As llama.cpp: a factor without a kind is linear, 0 is none, and the oldest files have another name for it.
    kind, old = keys.get("rope.scaling.type", "linear"), keys.get("rope.scale_linear")
    factor = keys.get("rope.scaling.factor", old) or None
    original = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if kind not in ("none", "linear", "yarn"):
        keys.refuse("rope.scaling.type", "expected 'none', 'linear' or 'yarn'")
    if kind == "linear" and factor not in (None, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        return {"rope_type": "default"}
    if keys.get("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        keys.refuse("rope.scaling.yarn_ext_factor", "expected 1")
    # llama.cpp multiplies with it what Hugging Face's attention_factor replaces: they agree only at 1.
    if keys.get("rope.scaling.yarn_attn_factor", 1.0) != 1.0:
        keys.refuse("rope.scaling.yarn_attn_factor", "expected 1")
    optional = {name: keys.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": factor or keys.need("rope.scaling.factor"),
        "original_max_position_embeddings": original,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _llama3(keys: _Keys, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, which llama.cpp stores as one divisor [head_dim / 2] per frequency.

    Its converter computes them with these three constants, and the largest is the factor.
    """
    divisors = keys.file.read(_ROPE_FREQS).ravel()
    factor, low, high, original = float(f"{divisors.max():.5g}"), 1.0, 4.0, 8192
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    scaled = inverse_frequencies(Rope(theta, tuple(scaling.items())), head_dim)
    expected = inverse_frequencies(Rope(theta), head_dim) / scaled
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3, atol=0):
        keys.problems.append(
            f"{_ROPE_FREQS} {divisors.shape}: not Llama 3's scaling with factor {factor:g}, low_freq_factor {low:g}, "
            f"high_freq_factor {high:g} and an original context of {original} for heads of width {head_dim}; no other "
            "scaling by frequency is supported"
        )
    return scaling


# Architectures -------------------------------------------------------------------------------------------------------


def _llama(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Llama, SmolLM2 and Mistral. Files of Llama 2 leave out its RoPE base."""
    for key in ("expert_count", "expert_used_count"):
        if keys.get(key, 0):
            keys.refuse(key, "mixtures of experts are not supported")
    if keys.get("tensor_data_layout", _PERMUTED) != _PERMUTED:
        keys.refuse("tensor_data_layout", f"expected {_PERMUTED!r}")
    biased = "blk.0.ffn_up.bias" in keys.file.tensors
    rope = _rope(keys, config, theta=10_000.0)
    return {"model_type": "llama", "hidden_act": "silu", "mlp_bias": biased, "rope_parameters": rope}


_PERMUTED = "Meta AI original pth"


def _qwen2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """q, k and v always have biases, o never: the configuration has no attribute for it."""
    del config["attention_bias"]
    return {"model_type": "qwen2", "hidden_act": "silu", "rope_parameters": _rope(keys, config)}


def _qwen3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.need("attention.key_length")  # not the residual width shared among the heads
    return {"model_type": "qwen3", "hidden_act": "silu", "rope_parameters": _rope(keys, config)}


def _gemma(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    keys.need("attention.key_length")
    rope = _rope(keys, config, theta=10_000.0)
    return {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "rope_parameters": rope}


def _gemma2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """From llama.cpp's code: the RoPE base, alternating local layers, the 27B's query scale; absent caps and window."""
    keys.need("attention.key_length")
    rope = _rope(keys, config, theta=10_000.0)
    if keys.get("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
        keys.refuse("rope.freq_base_swa", "Gemma 2 has one RoPE base for all layers")
    return {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, config, period=2),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "rope_parameters": rope,
    }


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """From llama.cpp's code: the local layers' RoPE base, five of them per global one, the 27B's query scale."""
    keys.need("attention.key_length")
    window = keys.get("attention.sliding_window") or None  # without one all layers are global
    types = _layer_types(keys, config, period=6)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
        "sliding_window": window,
        "layer_types": types if window else ["full_attention"] * config["num_hidden_layers"],
        "attn_logit_softcapping": keys.get("attn_logit_softcapping") or None,
        "final_logit_softcapping": keys.get("final_logit_softcapping") or None,
        "rope_parameters": {
            "full_attention": _rope(keys, config),
            "sliding_attention": {"rope_theta": keys.get("rope.freq_base_swa", 10_000.0), "rope_type": "default"},
        },
    }


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """llama.cpp tells the 27B, whose queries are not scaled by the head's width, by its number of layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _layer_types(keys: _Keys, config: dict[str, Any], period: int) -> list[str]:
    """Every `period`-th layer is global; a file may state another period, or a flag per layer."""
    pattern, layers = keys.get("attention.sliding_window_pattern", period), config["num_hidden_layers"]
    local = pattern if isinstance(pattern, list) else [(i + 1) % pattern for i in range(layers)]
    if len(local) != layers:
        keys.refuse("attention.sliding_window_pattern", f"expected one flag for each of {layers} layers")
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


_ARCHITECTURES: dict[str, Callable[[_Keys, dict[str, Any]], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
