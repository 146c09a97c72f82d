"""GPT-2, and GPT-NeoX with Pythia: LayerNorms, biases, plain feed-forward sublayers, fused q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Rule, Table
from jaxmech.models.families import attributes, tensors

_NORMED = {"norm": "layer", "gated": False, "output_bias": True, "attention_bias": True, "mlp_bias": True}


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    width = hf.get("intermediate_size") or 4 * hf["hidden_size"]
    own = bool(hf.get("scale_attn_by_inverse_layer_idx"))
    return {
        **_NORMED,
        "d_mlp": width,
        "rope": None,
        "learned_positions": True,
        "activation": attributes.activation(hf),
        "query_scale": attributes.head_dim(hf) ** -0.5 if hf.get("scale_attn_weights", True) else 1.0,
        "score_scales": tuple(1 / (i + 1) for i in range(hf["num_hidden_layers"])) if own else None,
    }


def _neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    parallel = bool(hf["use_parallel_residual"])
    return {
        **_NORMED,
        **attributes.biases(hf),
        **attributes.rotary(hf, partial=True),
        "parallel": parallel,
        "activation": attributes.activation(hf),
    }


def _third(i: int, heads: int, x: np.ndarray) -> np.ndarray:
    """GPT-2 keeps kernels as [in, out], q, k and v one after the other: [D, 3*H*h] -> [D, H, h]; [3*H*h] -> [H, h]."""
    return np.split(x, 3, axis=-1)[i].reshape(*x.shape[:-1], heads, -1)


def _interleaved(i: int, heads: int, x: np.ndarray) -> np.ndarray:
    """GPT-NeoX keeps q, k and v head by head: [H*3*h, D] -> [D, H, h]; [H*3*h] -> [H, h]."""
    part = x.reshape(heads, 3, -1, *x.shape[1:])[:, i]
    return np.moveaxis(part, -1, 0) if x.ndim == 2 else part


def _fused(name: str, heads: int, take) -> list[Rule]:
    rules = []
    for i, part in enumerate("qkv"):
        for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
            rules.append(Rule(rf"{name}\.{kind}", f"layers/attn/{part}/{leaf}", partial(take, i, heads)))
    return rules


def _gpt2_table(config: ModelConfig) -> Table:
    stem, H = r"(?:transformer\.|)", config.n_heads
    layer = stem + r"h\." + tensors.LAYER
    rules = _fused(layer + r"attn\.c_attn", H, _third)
    rules.append(Rule(layer + r"attn\.c_proj\.weight", "layers/attn/o/kernel", lambda x: x.reshape(H, -1, x.shape[1])))
    rules.append(Rule(layer + r"attn\.c_proj\.bias", "layers/attn/o/bias"))
    for name, part in (("c_fc", "up"), ("c_proj", "down")):
        rules.append(Rule(layer + rf"mlp\.{name}\.weight", f"layers/mlp/{part}/kernel"))
        rules.append(Rule(layer + rf"mlp\.{name}\.bias", f"layers/mlp/{part}/bias"))
    rules += tensors.layer_rules(config, stem + r"h\.", {"attn_norm": "ln_1", "mlp_norm": "ln_2"})
    rules.append(Rule(stem + r"wpe\.weight", "positions/embedding"))
    causal_mask = layer + r"attn\.(?:bias|masked_bias)"  # a buffer, despite its name
    return tensors.ends(config, stem + "wte", stem + "ln_f", "lm_head", rules, (causal_mask,))


def _neox_table(config: ModelConfig) -> Table:
    stem = r"(?:gpt_neox\.|)"
    layer = stem + r"layers\." + tensors.LAYER
    names = {"attn/o": "attention.dense", "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"}
    rules = [
        *_fused(layer + r"attention\.query_key_value", config.n_heads, _interleaved),
        *tensors.layer_rules(config, stem + r"layers\.", names | tensors.PRE_NORMS),
    ]
    strays = (tensors.ROTARY_BUFFER, layer + r"attention\.(?:bias|masked_bias)")
    head = r"(?:embed_out|lm_head)"
    return tensors.ends(
        config, stem + "embed_in", stem + "final_layer_norm", head, rules, strays, head_name="embed_out"
    )


GPT2 = attributes.Family(
    name="gpt2",
    model_types=("gpt2",),
    config=_gpt2,
    table=_gpt2_table,
    handled=frozenset({"hidden_act", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"}),
    inert=frozenset(
        "n_ctx resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn n_special predict_special_tokens".split()
    ),
    defaults={"tie_word_embeddings": True},
    renames={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
)
GPT_NEOX = attributes.Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    config=_neox,
    table=_neox_table,
    handled=attributes.ROPE | {"hidden_act", "use_parallel_residual", "attention_bias", "partial_rotary_factor"},
    inert=frozenset({"hidden_dropout", "classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}),
    defaults={
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.25,
    },
    renames={"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
)
