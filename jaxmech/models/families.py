"""Model families: Hugging Face configurations -> `ModelConfig`, and the tables that place their tensors.

A family is one `Family` entry: which `model_type`s it answers to, which configuration attributes it understands, how
they become a `ModelConfig`, and its tables for safetensors and for GGUF names. An attribute on no list raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.convert import Rule, Table, Transform

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_CORE = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_theta rope_scaling "
    "attention_bias bos_token_id eos_token_id".split()
)
# About training, generation, bookkeeping or how another library runs the model: none of it changes the function.
_INERT = frozenset(
    "architectures transformers_version torch_dtype dtype _name_or_path use_cache pad_token_id unk_token_id "
    "initializer_range attention_dropout output_attentions output_hidden_states return_dict return_dict_in_generate "
    "chunk_size_feed_forward id2label label2id problem_type pretraining_tp cache_implementation "
    "_attn_implementation_autoset _attn_implementation num_labels".split()
)
# Understood only at these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"is_encoder_decoder": (False, None), "quantization_config": (None,)}

_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


class Family(NamedTuple):
    """One family of decoders.

    Attributes:
      name: as in `ModelConfig.family`.
      model_types: the `model_type`s it answers to.
      handled: configuration attributes that are read, besides the common ones.
      inert: attributes that do not change the function, besides the common ones.
      neutral: attribute -> the values at which it changes nothing; any other raises.
      defaults: what the family's configuration class means when an attribute is left out.
      config: checked configuration -> the `ModelConfig` fields particular to the family.
      table: ModelConfig -> table of Hugging Face tensor names.
      gguf_table: ModelConfig -> table of GGUF tensor names.
    """

    name: str
    model_types: tuple[str, ...]
    handled: frozenset[str]
    inert: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: Callable[[ModelConfig], Table]
    gguf_table: Callable[[ModelConfig], Table]


# Configurations -----------------------------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a `config.json`.

    Raises:
      ValueError: an unsupported `model_type`, an attribute that is absent, not understood, or at a value that this
        library cannot honour.
    """
    hf = _text_part(hf)
    family = _by_type(hf.get("model_type"))
    hf = {**family.defaults, **{k: v for k, v in hf.items() if v is not None or k not in family.defaults}}
    _check_attributes(family, hf)
    heads, width = _need(hf, "num_attention_heads"), _need(hf, "hidden_size")
    ends = hf.get("eos_token_id")
    common = {
        "family": family.name,
        "vocab_size": _need(hf, "vocab_size"),
        "n_layers": _need(hf, "num_hidden_layers"),
        "d_model": width,
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or width // heads,
        "d_mlp": _need(hf, "intermediate_size"),
        "norm_eps": float(_need(hf, "rms_norm_eps")),
        "max_positions": _need(hf, "max_position_embeddings"),
        "attention_bias": bool(hf.get("attention_bias")),
        "output_bias": bool(hf.get("attention_bias")),
        "tied": bool(_need(hf, "tie_word_embeddings")),
        "bos_id": hf.get("bos_token_id"),
        "eos_ids": tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,),
    }
    return ModelConfig(**common, **family.config(hf))


def table_for(config: ModelConfig, gguf: bool = False) -> Table:
    """The table of the checkpoint format for a configuration's family."""
    family = FAMILIES[config.family]
    return (family.gguf_table if gguf else family.table)(config)


def _by_type(model_type: Any) -> Family:
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = sorted(t for family in FAMILIES.values() for t in family.model_types) + sorted(_NESTED)
    raise ValueError(f"model_type: expected one of {', '.join(known)}, got {model_type!r}")


# Multimodal configurations that nest the decoder, and what the decoder's attributes mean when left out there
# (checkpoints from before transformers 5 store only what differs from the class).
_NESTED: dict[str, dict[str, Any]] = {
    "gemma3": {
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
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
}


def _text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's own configuration, taken out of a multimodal one."""
    if "text_config" not in hf:
        return hf
    if hf.get("model_type") not in _NESTED:
        raise ValueError(f"model_type: expected one of {', '.join(_NESTED)} beside a text_config, got "
                         f"{hf.get('model_type')!r}")  # fmt: skip
    defaults, text = dict(_NESTED[hf["model_type"]]), dict(hf["text_config"])
    if "layer_types" in text:
        del defaults["sliding_window_pattern"]
    if "rope_parameters" not in text:
        defaults |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    # The outer level names the tokens of the whole model.
    outer = {k: hf[k] for k in ("bos_token_id", "eos_token_id") if hf.get(k) is not None}
    return {**defaults, **text, **outer}


def _check_attributes(family: Family, hf: Mapping[str, Any]) -> None:
    neutral = {**_NEUTRAL, **family.neutral}
    known = _CORE | _INERT | family.handled | family.inert | set(neutral)
    bad = [f"{k}={hf[k]!r} (not understood)" for k in sorted(hf) if k not in known]
    bad += [f"{k}={hf[k]!r} (expected {neutral[k][0]!r})" for k in sorted(neutral) if hf.get(k) not in neutral[k]
            and k in hf]  # fmt: skip
    if bad:
        raise ValueError(f"configuration of {family.model_types[0]}: the model might come out wrong with "
                         + "; ".join(bad))  # fmt: skip


def _need(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ValueError(f"configuration of {hf.get('model_type')}: {key} is missing")
    return hf[key]


def _activation(hf: Mapping[str, Any], key: str) -> str:
    name = _need(hf, key)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{key}: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _rope(parameters: Mapping[str, Any], where: str) -> Rope:
    """One layer type's RoPE from `rope_parameters`, or from `rope_scaling` with the theta put in."""
    given = {k: v for k, v in parameters.items() if v is not None}
    theta, old_kind = given.pop("rope_theta", None), given.pop("type", None)
    kind = given.pop("rope_type", old_kind or "default")
    if theta is None:
        raise ValueError(f"{where}: rope_theta is missing; expected it in rope_parameters or beside rope_scaling")
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(_ROPE_KEYS)}")
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        given.pop("partial_rotary_factor", None)
    if set(given) != _ROPE_KEYS[kind]:
        raise ValueError(f"{where}: rope_type {kind!r} takes {sorted(_ROPE_KEYS[kind])}, got {sorted(given)}")
    scaling = {"rope_type": kind, **given} if given else {}
    return Rope(float(theta), tuple(sorted(scaling.items())))


def _old_rope(hf: Mapping[str, Any], theta: str, scaled: bool = True) -> Rope:
    if hf.get(theta) is None:
        raise ValueError(f"configuration of {hf['model_type']}: neither rope_parameters nor {theta} is given")
    return _rope({**((hf.get("rope_scaling") or {}) if scaled else {}), "rope_theta": hf[theta]}, theta)


def _llama_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    new = hf.get("rope_parameters")
    if new is not None and hf.get("rope_theta", new.get("rope_theta")) != new.get("rope_theta"):
        raise ValueError(f"rope_theta={hf['rope_theta']} contradicts rope_parameters={new}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return {
        "rope": _old_rope(hf, "rope_theta") if new is None else _rope(new, "rope_parameters"),
        "activation": _activation(hf, "hidden_act"),
        "query_scale": head_dim**-0.5,
        "is_local": (False,) * hf["num_hidden_layers"],
        "mlp_bias": bool(hf.get("mlp_bias")),
    }


def _gemma3_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    new, types = hf.get("rope_parameters"), hf.get("layer_types")
    if new is None:
        whole, local = _old_rope(hf, "rope_theta"), _old_rope(hf, "rope_local_base_freq", scaled=False)
    else:
        if absent := {"full_attention", "sliding_attention"} - {k for k, v in new.items() if v}:
            raise ValueError(f"rope_parameters: {sorted(absent)} missing; Gemma 3 has one entry per layer type")
        whole, local = (_rope(new[k], f"rope_parameters[{k!r}]") for k in ("full_attention", "sliding_attention"))
    if types is None:
        pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern"))
        if pattern is None:
            raise ValueError("layer_types: missing, and there is no sliding_window_pattern either")
        is_local = tuple(bool((i + 1) % pattern) for i in range(hf["num_hidden_layers"]))
    else:
        if unknown := set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types: expected sliding_attention or full_attention, got {sorted(unknown)}")
        is_local = tuple(t == "sliding_attention" for t in types)
    return {
        "rope": whole,
        "rope_local": local,
        "is_local": is_local,
        "window": _need(hf, "sliding_window") if any(is_local) else None,
        "activation": _activation(hf, "hidden_activation"),
        "query_scale": _need(hf, "query_pre_attn_scalar") ** -0.5,
        "embed_scale": math.sqrt(hf["hidden_size"]),
        "norm_offset": 1.0,
        "qk_norm": True,
        "post_norms": True,
        "attn_softcap": hf.get("attn_logit_softcapping"),
        "final_softcap": hf.get("final_logit_softcapping"),
    }


# Tables -------------------------------------------------------------------------------------------------------------


def _split_out(heads: int, x: np.ndarray) -> np.ndarray:
    """[H*h, D] -> [D, H, h]."""
    return x.reshape(heads, -1, x.shape[1]).transpose(2, 0, 1)


def _split_in(heads: int, x: np.ndarray) -> np.ndarray:
    """[D, H*h] -> [H, h, D]."""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 2, 0)


def _split_bias(heads: int, x: np.ndarray) -> np.ndarray:
    """[H*h] -> [H, h]."""
    return x.reshape(heads, -1)


def _unpermuted(heads: int, x: np.ndarray) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows (pairs side by side), back to HF's (halves)."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _after(first: Transform, second: Transform) -> Transform:
    return lambda x: second(first(x))


def _layer_rules(config: ModelConfig, prefix: str, names: Mapping[str, str], fix: Mapping[str, Transform]):
    """Rules of the parts that the dense families share.

    Args:
      prefix: pattern before a layer's tensor names, with the group `layer`.
      names: part ("attn/q", "mlp/gate", "attn_norm", ...) -> tensor name without ".weight" or ".bias".
      fix: part or "norm" -> transform that makes the stored values Hugging Face's, applied first.
    """
    H, G = config.n_heads, config.n_kv_heads
    kernels = {
        "attn/q": (partial(_split_out, H), partial(_split_bias, H)),
        "attn/k": (partial(_split_out, G), partial(_split_bias, G)),
        "attn/v": (partial(_split_out, G), partial(_split_bias, G)),
        "attn/o": (partial(_split_in, H), lambda x: x),
        **dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), (_transposed, lambda x: x)),
    }
    for part, name in names.items():
        stem, same = prefix + name.replace(".", r"\."), lambda x: x
        if part not in kernels:
            yield Rule(rf"{stem}\.weight", f"layers/{part}/scale", fix.get("norm", same))
            continue
        kernel, bias = kernels[part]
        first = fix.get(part, same)
        yield Rule(rf"{stem}\.weight", f"layers/{part}/kernel", _after(first, kernel))
        yield Rule(rf"{stem}\.bias", f"layers/{part}/bias", _after(first, bias))


_HF_PARTS = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_HF_LLAMA = {**_HF_PARTS, "mlp_norm": "post_attention_layernorm"}
_HF_GEMMA3 = {
    **_HF_PARTS,
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GGUF_PARTS = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
}
_GGUF_GEMMA3 = {
    **_GGUF_PARTS,
    "attn/q_norm": "attn_q_norm",
    "attn/k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}


def _hf_table(parts: Mapping[str, str], strays: tuple[str, ...], config: ModelConfig) -> Table:
    # A bare decoder, a causal language model, and the two layouts of a decoder inside a multimodal model.
    prefix = r"(?:language_model\.model\.|model\.language_model\.|model\.|)"
    head = r"(?:language_model\.)?lm_head\.weight"
    rules = (
        Rule(prefix + r"embed_tokens\.weight", "embed/embedding"),
        Rule(prefix + r"norm\.weight", "final_norm/scale"),
        *_layer_rules(config, prefix + r"layers\.(?P<layer>\d+)\.", parts, {}),
    )
    if config.tied:
        return Table(rules, strays, ((head, "embed/embedding"),))
    return Table((*rules, Rule(head, "unembed/kernel", _transposed)), strays)


def _gguf_table(parts: Mapping[str, str], fix: Callable[[ModelConfig], Mapping[str, Transform]], config: ModelConfig):
    fixes = fix(config)
    rules = (
        Rule(r"token_embd\.weight", "embed/embedding"),
        Rule(r"output_norm\.weight", "final_norm/scale", fixes.get("norm", lambda x: x)),
        *_layer_rules(config, r"blk\.(?P<layer>\d+)\.", parts, fixes),
    )
    return Table(rules if config.tied else (*rules, Rule(r"output\.weight", "unembed/kernel", _transposed)))


def _llama_gguf_fix(config: ModelConfig) -> dict[str, Transform]:
    return {"attn/q": partial(_unpermuted, config.n_heads), "attn/k": partial(_unpermuted, config.n_kv_heads)}


def _gemma_gguf_fix(config: ModelConfig) -> dict[str, Transform]:
    return {"norm": lambda x: x - np.float32(1)}  # llama.cpp stores 1 + w


_ROTARY_BUFFER = r".*\brotary_emb\.inv_freq"  # checkpoints of old transformers

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            model_types=("llama",),
            handled=frozenset({"hidden_act", "mlp_bias"}),
            inert=frozenset(),
            neutral={},
            defaults={"tie_word_embeddings": False},
            config=_llama_config,
            table=partial(_hf_table, _HF_LLAMA, (_ROTARY_BUFFER,)),
            gguf_table=partial(_gguf_table, _GGUF_PARTS, _llama_gguf_fix),
        ),
        Family(
            name="gemma3",
            model_types=("gemma3_text",),
            handled=frozenset(
                "hidden_activation query_pre_attn_scalar sliding_window layer_types sliding_window_pattern "
                "_sliding_window_pattern rope_local_base_freq attn_logit_softcapping final_logit_softcapping".split()
            ),
            inert=frozenset({"hidden_act"}),  # never read by HF's Gemma 3, which has hidden_activation
            neutral={"use_bidirectional_attention": (False, None)},
            defaults={"tie_word_embeddings": True},
            config=_gemma3_config,
            table=partial(
                _hf_table, _HF_GEMMA3, (_ROTARY_BUFFER, r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*")
            ),
            gguf_table=partial(_gguf_table, _GGUF_GEMMA3, _gemma_gguf_fix),
        ),
    )
}
