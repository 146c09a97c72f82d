"""What a Hugging Face configuration says, family by family: nothing is ignored or defaulted silently."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.convert import Table

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
}

_CORE = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id".split()
)
ROPE = frozenset({"rope_parameters", "rope_theta", "rope_scaling"})
# About training, generation, bookkeeping or how another library runs the model: none of it changes the function.
_INERT = frozenset(
    "architectures transformers_version torch_dtype dtype _name_or_path use_cache pad_token_id unk_token_id auto_map "
    "initializer_range attention_dropout output_attentions output_hidden_states return_dict return_dict_in_generate "
    "chunk_size_feed_forward id2label label2id problem_type pretraining_tp cache_implementation task_specific_params "
    "_attn_implementation_autoset _attn_implementation num_labels _num_labels transformers.js_config "
    # What transformers 4 wrote into every configuration.
    "finetuning_task prefix tokenizer_class sep_token_id decoder_start_token_id gradient_checkpointing torchscript "
    "use_bfloat16 tf_legacy_loss tie_encoder_decoder cross_attention_hidden_size max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens output_past "
    # What tuning tools and mirrors write: who saved it, and how their own code is to run it.
    "model_name _attn_implementation_internal _experts_implementation "
    "_experts_implementation_internal attn_implementation _flash_attn_2_enabled use_flash_attention_2 "
    "_use_flash_attention_2 use_flash_attn _commit_hash use_liger_kernel "
    # Which RoPE keys transformers 5.0 to 5.3 leaves unchecked.
    "ignore_keys_at_rope_validation".split()
)
# Understood only at these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "quantization_config": (None,),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0, None),
}

_ROPE_NEEDS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "longrope": frozenset({"short_factor", "long_factor", "original_max_position_embeddings"}),
}
_ROPE_MAY = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "truncate"}),
    "longrope": frozenset({"attention_factor", "factor"}),
}


class Family(NamedTuple):
    """One family of decoders.

    Attributes:
      name: as in `ModelConfig.family`.
      model_types: the `model_type`s it answers to.
      config: checked configuration -> the `ModelConfig` fields particular to the family.
      table: ModelConfig -> table of Hugging Face tensor names.
      gguf_table: ModelConfig -> table of GGUF tensor names; None where GGUF files are not read.
      handled: configuration attributes that are read, besides the common ones.
      inert: attributes that do not change the function, besides the common ones.
      neutral: attribute -> the values at which it changes nothing; any other raises.
      defaults: what the family's configuration class means when an attribute is left out.
      renames: attribute -> the name that Llama's configuration has for it.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    table: Callable[[ModelConfig], Table]
    gguf_table: Callable[[ModelConfig], Table] | None = None
    handled: frozenset[str] = ROPE
    inert: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = {}
    defaults: Mapping[str, Any] = {}
    renames: Mapping[str, str] = {}


def model_config(family: Family, hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a decoder's own configuration.

    Raises:
      ValueError: an attribute that is absent, not understood, or at a value that this library cannot honour.
    """
    hf = _renamed(family, hf)
    hf = {**family.defaults, **{k: v for k, v in hf.items() if v is not None or k not in family.defaults}}
    _check(family, hf)
    heads, ends = hf["num_attention_heads"], hf.get("eos_token_id")
    common = {
        "family": family.name,
        "vocab_size": hf["vocab_size"],
        "n_layers": hf["num_hidden_layers"],
        "d_model": hf["hidden_size"],
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim(hf),
        "d_mlp": hf.get("intermediate_size"),
        "norm_eps": float(hf["rms_norm_eps"]),
        "max_positions": hf["max_position_embeddings"],
        "query_scale": head_dim(hf) ** -0.5,
        "is_local": (False,) * hf["num_hidden_layers"],
        "tied": bool(hf["tie_word_embeddings"]),
        "bos_id": hf.get("bos_token_id"),
        "eos_ids": tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,),
    }
    facts = common | family.config(hf)
    if facts["d_mlp"] is None:  # only GPT-2 defines what that means
        need(hf, "intermediate_size")
    return ModelConfig(**facts)


def _renamed(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in hf.items():
        name = family.renames.get(key, key)
        if value is not None and renamed.get(name) not in (None, value):
            kind = family.model_types[0]
            raise ValueError(
                f"configuration of {kind}: {key}={value!r} contradicts {renamed[name]!r} of its other name"
            )
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


_NEEDED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings rms_norm_eps "
    "tie_word_embeddings"
).split()


def _check(family: Family, hf: Mapping[str, Any]) -> None:
    neutral = {k: v for k, v in {**_NEUTRAL, **family.neutral}.items() if k not in family.handled}
    known = _CORE | _INERT | family.handled | family.inert | set(neutral)
    bad = [f"{k}={hf[k]!r} (not understood)" for k in sorted(hf) if k not in known and not k.startswith("unsloth_")]
    bad += [
        f"{k}={hf[k]!r} (expected {neutral[k][0]!r})" for k in sorted(neutral) if k in hf and hf[k] not in neutral[k]
    ]
    bad += [f"{k}={hf[k]!r} (expected a number)" for k in _NEEDED if isinstance(hf.get(k), str)]
    if absent := [key for key in _NEEDED if hf.get(key) is None]:
        old = {new: old for old, new in family.renames.items()}
        bad.append(", ".join(old.get(key, key) for key in absent) + (" are" if len(absent) > 1 else " is") + " missing")
    if bad:
        raise ValueError(
            f"configuration of {family.model_types[0]} refused, the model might come out wrong: {'; '.join(bad)}. "
            "If model_type is right and what is not understood has no effect on the model, remove it from the file"
        )


def need(hf: Mapping[str, Any], key: str) -> Any:
    """The attribute; ValueError when it is absent."""
    if hf.get(key) is None:
        raise ValueError(f"configuration of {hf.get('model_type')}: {key} is missing")
    return hf[key]


def head_dim(hf: Mapping[str, Any]) -> int:
    """Stated, or the residual width shared among the heads."""
    return hf.get("head_dim") or need(hf, "hidden_size") // need(hf, "num_attention_heads")


def activation(hf: Mapping[str, Any], key: str = "hidden_act") -> str:
    """The activation by our name for it."""
    if (name := need(hf, key)) not in ACTIVATIONS:
        raise ValueError(f"{key}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def biases(hf: Mapping[str, Any]) -> dict[str, bool]:
    """Biases of the families whose `attention_bias` covers all four projections."""
    return dict.fromkeys(("attention_bias", "output_bias"), bool(hf.get("attention_bias")))


def windows(hf: Mapping[str, Any], is_local: Callable[[int], bool]) -> dict[str, Any]:
    """`is_local` and `window`, from `layer_types` where given, else by the family's rule for layer i."""
    types, layers = hf.get("layer_types"), need(hf, "num_hidden_layers")
    if types is None:
        local = tuple(bool(is_local(i)) for i in range(layers))
    elif unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: expected sliding_attention or full_attention, got {sorted(unknown)}")
    else:
        local = tuple(t == "sliding_attention" for t in types)
    return {"is_local": local, "window": need(hf, "sliding_window") if any(local) else None}


# Rotary embeddings ---------------------------------------------------------------------------------------------------


def rotary(hf: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """`rope` and `rotary_dim` of a family with one rotary embedding, in the new spelling or the old one.

    Args:
      partial: whether the family can leave a head's last dimensions unrotated.
    """
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    if new is None:
        rope = old_rope(hf, "rope_theta")
    else:
        _check_agreement({**hf, "type": None, **(old or {})}, new)
        rope = parse_rope({"rope_theta": hf.get("rope_theta"), **new}, "rope_parameters", hf)
    part = (new or old or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1.0) and not partial:
        raise ValueError(f"partial_rotary_factor={part}: expected 1; {hf['model_type']} rotates whole heads")
    return {"rope": rope, "rotary_dim": None if part in (None, 1.0) else int(head_dim(hf) * part)}


def _check_agreement(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses old attributes beside `rope_parameters` that contradict them."""
    names = {"rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "short_factor"}
    for name in sorted(names | {"long_factor", "attention_factor"}):
        stated = new.get("rope_type" if name == "type" else name)
        if old.get(name) is not None and old[name] != stated and not (name == "rope_theta" and stated is None):
            raise ValueError(f"{name}={old[name]} contradicts rope_parameters={dict(new)}")


def old_rope(hf: Mapping[str, Any], theta: str, scaled: bool = True) -> Rope:
    """From the attributes of configurations before transformers 5."""
    if hf.get(theta) is None:
        raise ValueError(f"configuration of {hf['model_type']}: neither rope_parameters nor {theta} is given")
    scaling = (hf.get("rope_scaling") or {}) if scaled else {}
    if scaling.get("rope_theta", hf[theta]) != hf[theta]:
        raise ValueError(f"{theta}={hf[theta]} contradicts rope_scaling={dict(scaling)}")
    return parse_rope({**scaling, "rope_theta": hf[theta]}, theta, hf)


def parse_rope(parameters: Mapping[str, Any], where: str, hf: Mapping[str, Any]) -> Rope:
    """One layer type's RoPE from `rope_parameters`, or from `rope_scaling` with theta added."""
    given = {k: v for k, v in parameters.items() if v is not None and k != "partial_rotary_factor"}
    theta, old_kind = given.pop("rope_theta", None), given.pop("type", None)
    kind = given.pop("rope_type", old_kind or "default")
    if theta is None:
        raise ValueError(f"{where}: rope_theta is missing; expected it in rope_parameters or beside rope_scaling")
    if kind not in _ROPE_NEEDS:
        raise ValueError(f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(_ROPE_NEEDS)}")
    if (absent := _ROPE_NEEDS[kind] - set(given)) or set(given) - _ROPE_NEEDS[kind] - _ROPE_MAY.get(kind, frozenset()):
        also = f" and may take {sorted(_ROPE_MAY[kind])}" if kind in _ROPE_MAY and not absent else ""
        raise ValueError(f"{where}: rope_type {kind!r} takes {sorted(_ROPE_NEEDS[kind])}{also}, got {sorted(given)}")
    if kind in ("yarn", "longrope"):
        given["attention_factor"] = given.get("attention_factor") or _attention_factor(kind, given, hf)
        if kind == "longrope":
            given.pop("factor", None)  # it matters to the attention factor only
    scaling = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in given.items()}
    return Rope(float(theta), tuple(sorted({"rope_type": kind, **scaling}.items())) if scaling else ())


def _attention_factor(kind: str, given: Mapping[str, Any], hf: Mapping[str, Any]) -> float:
    """What the papers recommend: attention sharpens as the context is stretched."""
    original = given["original_max_position_embeddings"]
    factor = given.get("factor") or need(hf, "max_position_embeddings") / original
    if factor <= 1:
        return 1.0
    return 0.1 * math.log(factor) + 1 if kind == "yarn" else math.sqrt(1 + math.log(factor) / math.log(original))
