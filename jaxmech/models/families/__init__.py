"""Model families: Hugging Face configurations -> `ModelConfig`, and the tables that place their tensors.

A family is one `Family` entry, in the file of its kin: which `model_type`s it answers to, which configuration
attributes it understands, how they become a `ModelConfig`, and its tables for safetensors and for GGUF names. An
attribute on no list raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Table
from jaxmech.models.families import gemma, gpt, llama
from jaxmech.models.families.attributes import Family, model_config

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, llama.PHI3, llama.OLMO2,
        gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, gpt.GPT2, gpt.GPT_NEOX,
    )
}  # fmt: skip

# Multimodal models whose decoder is read, with what it leaves out of its configuration.
_NESTED: dict[str, Mapping[str, Any]] = {"gemma3": gemma.NESTED_GEMMA3}

_REFUSED: dict[str, str] = {
    "is a mixture of experts, and this decoder has one feed-forward sublayer per layer": "mixtral qwen2_moe qwen3_moe "
    "phimoe olmoe gpt_oss deepseek_v2 deepseek_v3 granitemoe llama4 llama4_text glm4_moe jamba dbrx minimax",
    "shares keys and values between layers, which this decoder does not": "gemma3n gemma3n_text gemma4 gemma4_text",
    "reads images, and gemma3 is the only multimodal model whose decoder is read": "mllama llava llava_next "
    "qwen2_vl qwen2_5_vl qwen3_vl paligemma idefics3 smolvlm mistral3 pixtral phi4_multimodal",
    "is not made of attention layers alone": "mamba mamba2 falcon_mamba rwkv recurrent_gemma bamba zamba2 qwen3_next "
    "falcon_h1 granitemoehybrid lfm2",
    "is not a causal decoder": "bert roberta distilbert modernbert t5 mt5 bart",
}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a `config.json`.

    Raises:
      ValueError: an unsupported `model_type`, an attribute that is absent, not understood, or at a value that this
        library cannot honour.
    """
    hf = _text_part(hf)
    return model_config(_by_type(hf.get("model_type")), hf)


def table_for(config: ModelConfig, gguf: bool = False) -> Table:
    """The table of the checkpoint format for a configuration's family.

    Raises:
      ValueError: GGUF files of the family are not read.
    """
    family = FAMILIES[config.family]
    table = family.gguf_table if gguf else family.table
    if table is None:
        raise ValueError(f"GGUF files of {family.name} are not supported; use its safetensors")
    return table(config)


def _by_type(model_type: Any) -> Family:
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    reason = next((f" ({model_type} {why})" for why, types in _REFUSED.items() if model_type in types.split()), "")
    known = sorted(t for family in FAMILIES.values() for t in family.model_types) + sorted(_NESTED)
    raise ValueError(f"model_type: expected one of {', '.join(known)}, got {model_type!r}{reason}")


def _text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own configuration, taken out of a multimodal one."""
    if "text_config" not in hf:
        return hf
    if hf.get("model_type") not in _NESTED:
        _by_type(hf.get("model_type"))
        raise ValueError(f"model_type: expected one of {', '.join(_NESTED)} beside a text_config, got "
                         f"{hf.get('model_type')!r}")  # fmt: skip
    defaults, text = dict(_NESTED[hf["model_type"]]), dict(hf["text_config"])
    # The newer spelling replaces the older defaults.
    replaced = {"layer_types": ["sliding_window_pattern"], "rope_parameters": ["rope_theta", "rope_local_base_freq"]}
    for key in (old for new, olds in replaced.items() if new in text for old in olds):
        del defaults[key]
    if text.get("final_logit_softcapping") is not None:
        raise ValueError("text_config.final_logit_softcapping: expected null; HF's multimodal class does not apply it")
    # These describe the whole model, so the outer level wins.
    shared = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    outer = {k: hf[k] for k in shared if hf.get(k) is not None}
    return {**defaults, **text, **outer}
