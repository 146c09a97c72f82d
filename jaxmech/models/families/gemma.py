"""Gemma 1, 2 and 3, and the decoder inside a multimodal Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Table
from jaxmech.models.families import attributes, tensors

_HANDLED = attributes.ROPE | {"attention_bias"}
_GEMMA_2_3 = _HANDLED | set(
    "hidden_activation query_pre_attn_scalar sliding_window layer_types final_logit_softcapping".split()
)
_NEUTRAL = {"use_bidirectional_attention": (False, None)}
_TIED = {"tie_word_embeddings": True}

# What the decoder's attributes mean when left out of a multimodal configuration (checkpoints from before transformers 5
# store only what differs from the class).
NESTED_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def _gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What all three share: norms of 1 + w, embeddings scaled by the root of their width."""
    return {**attributes.biases(hf), "norm_offset": 1.0, "embed_scale": math.sqrt(attributes.need(hf, "hidden_size"))}


def _gemma1(hf: Mapping[str, Any]) -> dict[str, Any]:
    act = attributes.activation(hf)  # the releases say "gelu" and mean its tanh form
    return {**_gemma(hf), **attributes.rotary(hf), "activation": "gelu_tanh" if act == "gelu" else act}


def _gemma_2_3(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_gemma(hf),
        "activation": attributes.activation(hf, "hidden_activation"),
        "query_scale": attributes.need(hf, "query_pre_attn_scalar") ** -0.5,
        "post_norms": True,
        "final_softcap": hf.get("final_logit_softcapping"),
    }


def _gemma2(hf: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key not in hf:  # None switches it off
            raise ValueError(f"configuration of gemma2: {key} is missing")
    windows = attributes.windows(hf, lambda i: i % 2 == 0)
    return {**_gemma_2_3(hf), **attributes.rotary(hf), **windows, "attn_softcap": hf["attn_logit_softcapping"]}


def _gemma3(hf: Mapping[str, Any]) -> dict[str, Any]:
    new, pattern = hf.get("rope_parameters"), hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern"))
    if new is None:
        full, local = (
            attributes.old_rope(hf, "rope_theta"),
            attributes.old_rope(hf, "rope_local_base_freq", scaled=False),
        )
    else:
        if hf.get("rope_scaling") is not None:
            raise ValueError(f"rope_scaling={hf['rope_scaling']} beside rope_parameters: expected one of them")
        if absent := {"full_attention", "sliding_attention"} - {k for k, v in new.items() if v}:
            raise ValueError(f"rope_parameters: {sorted(absent)} missing; Gemma 3 has one entry per layer type")
        kinds = ("full_attention", "sliding_attention")
        full, local = (attributes.parse_rope(new[k], f"rope_parameters[{k!r}]", hf) for k in kinds)
    if hf.get("layer_types") is None and pattern is None:
        raise ValueError("layer_types: missing, and there is no sliding_window_pattern either")
    windows = attributes.windows(hf, lambda i: (i + 1) % pattern)
    return {**_gemma_2_3(hf), **windows, "rope": full, "rope_local": local, "qk_norm": "head"}


def _gguf(config: ModelConfig) -> Table:
    return tensors.gguf_table(config, {"norm": lambda x: x - np.float32(1)})  # llama.cpp stores 1 + w


_SANDWICH = {  # Gemma 2 and 3: a norm before and one after each sublayer
    **tensors.HF_NAMES,
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_VISION = (r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*",)

GEMMA = attributes.Family(
    name="gemma",
    model_types=("gemma",),
    config=_gemma1,
    table=partial(tensors.hf_table, tensors.HF_NAMES | tensors.PRE_NORMS),
    gguf_table=_gguf,
    handled=_HANDLED | {"hidden_act"},
    neutral={**_NEUTRAL, "hidden_activation": (None, "gelu_pytorch_tanh")},
    defaults=_TIED,
)
GEMMA2 = attributes.Family(
    name="gemma2",
    model_types=("gemma2",),
    config=_gemma2,
    table=partial(tensors.hf_table, _SANDWICH),
    gguf_table=_gguf,
    handled=_GEMMA_2_3 | {"attn_logit_softcapping"},
    # HF's Gemma 2 and 3 read hidden_activation only, and never sliding_window_size.
    inert=frozenset({"hidden_act", "sliding_window_size"}),
    neutral=_NEUTRAL,
    defaults=_TIED,
)
GEMMA3 = attributes.Family(
    name="gemma3",
    model_types=("gemma3_text",),
    config=_gemma3,
    table=partial(tensors.hf_table, _SANDWICH, strays=_VISION),
    gguf_table=_gguf,
    handled=_GEMMA_2_3 | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"},
    inert=frozenset({"hidden_act"}),
    neutral={**_NEUTRAL, "attn_logit_softcapping": (None,)},  # HF reads it here and does not apply it
    defaults=_TIED,
)
