"""Llama and its kin: Llama 2 and 3, SmolLM2, Mistral, Qwen 2 and 3, Phi-3, OLMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Rule, Table
from jaxmech.models.families import attributes, tensors

_ROPE_ACT = attributes.ROPE | {"hidden_act"}
_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}


def _basic(hf: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    return {**attributes.rotary(hf, partial), "activation": attributes.activation(hf)}


def _llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("rope_parameters") is None and hf.get("rope_theta") is None:
        hf = {**hf, "rope_theta": 10_000.0}  # the files of Llama 2 are older than the attribute
    return {**_basic(hf), **attributes.biases(hf), "mlp_bias": bool(hf.get("mlp_bias"))}


def _everywhere_local(hf: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """Mistral and Phi-3: every layer looks back over the window, if there is one."""
    return {**_basic(hf, partial), **attributes.windows(hf, lambda _: hf.get("sliding_window") is not None)}


def _qwen_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` is inert unless `use_sliding_window`; it then holds from layer `max_window_layers` on."""
    if not hf.get("use_sliding_window"):
        if "sliding_attention" in (hf.get("layer_types") or ()):
            raise ValueError("layer_types: some are sliding_attention, yet use_sliding_window is off")
        return {}
    return attributes.windows(hf, lambda i: i >= attributes.need(hf, "max_window_layers"))


def _qwen2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**_basic(hf), **_qwen_windows(hf), "attention_bias": True}


def _qwen3(hf: Mapping[str, Any]) -> dict[str, Any]:
    attributes.need(hf, "head_dim")  # not the residual width shared among the heads
    return {**_basic(hf), **_qwen_windows(hf), **attributes.biases(hf), "qk_norm": "head"}


def _olmo2(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {**_basic(hf), **attributes.biases(hf), "pre_norms": False, "post_norms": True, "qk_norm": "full"}


def _phi3(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The original context stands beside the scaling, and wins over one inside it; "su" and "yarn" are old names."""
    hf, original = dict(hf), hf["original_max_position_embeddings"]
    for key in ("rope_parameters", "rope_scaling"):
        if scaling := hf.get(key):
            scaling = dict(scaling)
            name = "rope_type" if "rope_type" in scaling else "type"
            if scaling.get(name) in ("su", "yarn"):
                scaling[name] = "longrope"
            if scaling.get(name) == "longrope":
                scaling["original_max_position_embeddings"] = original
            hf[key] = scaling
    return _everywhere_local(hf, partial=True)


def _slice(start: int, stop: int, x: np.ndarray) -> np.ndarray:
    return x[start:stop]


def _phi3_table(config: ModelConfig) -> Table:
    """q, k and v are one tensor, and so are gate and up."""
    h, H, G, M = config.head_dim, config.n_heads, config.n_kv_heads, config.d_mlp
    names = {part: tensors.HF_NAMES[part] for part in ("attn/o", "mlp/down")}
    at_layer, more = tensors.HF_PREFIX + r"layers\." + tensors.LAYER, []
    start = 0
    for part, heads in (("q", H), ("k", G), ("v", G)):
        take = partial(_slice, start * h, (start + heads) * h)
        transform = tensors.then(take, partial(tensors.split_out, heads))
        more.append(Rule(at_layer + r"self_attn\.qkv_proj\.weight", f"layers/attn/{part}/kernel", transform))
        start += heads
    for i, part in enumerate(("gate", "up")):
        transform = tensors.then(partial(_slice, i * M, (i + 1) * M), tensors.transposed)
        more.append(Rule(at_layer + r"mlp\.gate_up_proj\.weight", f"layers/mlp/{part}/kernel", transform))
    return tensors.hf_table(names | tensors.PRE_NORMS, config, tuple(more))


def _unpermuted(heads: int, x: np.ndarray) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows (pairs side by side), back to HF's (halves)."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _llama_gguf(config: ModelConfig) -> Table:
    fix = {"attn/q": partial(_unpermuted, config.n_heads), "attn/k": partial(_unpermuted, config.n_kv_heads)}
    return tensors.gguf_table(config, fix)


_plain_table = partial(tensors.hf_table, tensors.HF_NAMES | tensors.PRE_NORMS)
_QWEN = _ROPE_ACT | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

LLAMA = attributes.Family(
    name="llama",
    model_types=("llama",),
    config=_llama,
    table=_plain_table,
    gguf_table=_llama_gguf,
    handled=_ROPE_ACT | {"attention_bias", "mlp_bias"},
    inert=frozenset({"is_llama_config"}),
    neutral={"rope_interleaved": (False, None)},  # SmolLM2 states both
    defaults={"tie_word_embeddings": False},
)
MISTRAL = attributes.Family(
    name="mistral",
    model_types=("mistral",),
    config=_everywhere_local,
    table=_plain_table,
    handled=_ROPE_ACT | {"sliding_window"},
    neutral=_NO_BIAS,
    defaults={"tie_word_embeddings": False},
)
QWEN2 = attributes.Family(
    name="qwen2",
    model_types=("qwen2",),
    config=_qwen2,
    table=_plain_table,
    gguf_table=tensors.gguf_table,
    handled=_QWEN,
    neutral={"use_mrope": (False, None)},
    defaults={"tie_word_embeddings": False},
)
QWEN3 = attributes.Family(
    name="qwen3",
    model_types=("qwen3",),
    config=_qwen3,
    table=_plain_table,
    gguf_table=tensors.gguf_table,
    handled=_QWEN | {"attention_bias"},
    defaults={"tie_word_embeddings": False},
)
PHI3 = attributes.Family(
    name="phi3",
    model_types=("phi3",),
    config=_phi3,
    table=_phi3_table,
    handled=_ROPE_ACT | {"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"},
    inert=frozenset({"embd_pdrop", "resid_pdrop"}),
    neutral={**_NO_BIAS, "lm_head_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)},
    defaults={"tie_word_embeddings": False, "original_max_position_embeddings": 4096},
)
OLMO2 = attributes.Family(
    name="olmo2",
    model_types=("olmo2",),
    config=_olmo2,
    table=partial(
        tensors.hf_table,
        tensors.HF_NAMES
        | {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    ),
    handled=_ROPE_ACT | {"attention_bias"},
    defaults={"tie_word_embeddings": False},
)
