"""Tables of tensor names: what the families share, for Hugging Face's checkpoints and for llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from jaxmech.models.config import ModelConfig
from jaxmech.models.convert import Rule, Table, Transform

ROTARY_BUFFER = r".*\brotary_emb\.inv_freq"  # in checkpoints of old transformers
LAYER = r"(?P<layer>\d+)\."


def split_out(heads: int, x: np.ndarray) -> np.ndarray:
    """[H*h, D] -> [D, H, h]."""
    return x.reshape(heads, -1, x.shape[1]).transpose(2, 0, 1)


def split_in(heads: int, x: np.ndarray) -> np.ndarray:
    """[D, H*h] -> [H, h, D]."""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 2, 0)


def split_heads(heads: int, x: np.ndarray) -> np.ndarray:
    """[H*h] -> [H, h]: biases, and norms over all heads."""
    return x.reshape(heads, -1)


def same(x: np.ndarray) -> np.ndarray:
    """Stored as we keep it."""
    return x


def transposed(x: np.ndarray) -> np.ndarray:
    """Torch's [out, in] -> [in, out]."""
    return x.T


def then(first: Transform, second: Transform) -> Transform:
    """One transform after another."""
    return lambda x: second(first(x))


def layer_rules(
    config: ModelConfig, prefix: str, names: Mapping[str, str], fix: Mapping[str, Transform] | None = None
) -> Iterator[Rule]:
    """Rules of a layer's tensors that are stored one per part.

    Args:
      prefix: pattern before the layer's number.
      names: part ("attn/q", "mlp/gate", "attn_norm", ...) -> tensor name without ".weight" or ".bias".
      fix: part or "norm" -> transform that makes the stored values Hugging Face's, applied first.
    """
    H, G, fix = config.n_heads, config.n_kv_heads, fix or {}
    kernels: dict[str, tuple[Transform, Transform]] = {
        "attn/q": (partial(split_out, H), partial(split_heads, H)),
        "attn/k": (partial(split_out, G), partial(split_heads, G)),
        "attn/v": (partial(split_out, G), partial(split_heads, G)),
        "attn/o": (partial(split_in, H), same),
        **dict.fromkeys(("mlp/gate", "mlp/up", "mlp/down"), (transposed, same)),
    }
    full = config.qk_norm == "full"
    norms = {"attn/q_norm": partial(split_heads, H), "attn/k_norm": partial(split_heads, G)} if full else {}
    for part, name in names.items():
        stem = prefix + LAYER + name.replace(".", r"\.")
        if part in kernels:
            first, (kernel, bias) = fix.get(part, same), kernels[part]
            yield Rule(rf"{stem}\.weight", f"layers/{part}/kernel", then(first, kernel))
            yield Rule(rf"{stem}\.bias", f"layers/{part}/bias", then(first, bias))
        else:
            scale = then(fix.get("norm", same), norms.get(part, same))
            yield Rule(rf"{stem}\.weight", f"layers/{part}/scale", scale)
            yield Rule(rf"{stem}\.bias", f"layers/{part}/bias")


def ends(
    config: ModelConfig,
    embed: str,
    norm: str,
    head: str,
    layers: Iterable[Rule],
    strays: tuple[str, ...],
    fix: Transform = same,
    head_name: str = "lm_head",
) -> Table:
    """The whole table: embedding, final norm and unembedding around the layers' rules.

    Args:
      embed, norm, head: patterns of their tensors' names without ".weight" or ".bias".
      fix: makes the stored final norm Hugging Face's.
      head_name: what a message calls the unembedding when it is missing.
    """
    rules = (
        Rule(rf"{embed}\.weight", "embed/embedding"),
        Rule(rf"{norm}\.weight", "final_norm/scale", fix),
        Rule(rf"{norm}\.bias", "final_norm/bias"),
        *layers,
    )
    head = rf"{head}\.weight"
    if config.tied:
        return Table(rules, strays, ((head, "embed/embedding"),))
    absent = (
        f"{head_name}.weight (if the model ties it to its embedding, set tie_word_embeddings to true in config.json)"
    )
    return Table((*rules, Rule(head, "unembed/kernel", transposed)), strays, names={"unembed/kernel": absent})


# Llama's names, which most families have taken over ------------------------------------------------------------------

# A bare decoder, a causal language model, and the two layouts of a decoder inside a multimodal model.
HF_PREFIX = r"(?:language_model\.model\.|model\.language_model\.|model\.|)"

HF_NAMES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def hf_table(
    names: Mapping[str, str], config: ModelConfig, more: tuple[Rule, ...] = (), strays: tuple[str, ...] = ()
) -> Table:
    """The table of a decoder whose tensors are named as Llama's; `names` as for `layer_rules`."""
    layers = (*layer_rules(config, HF_PREFIX + r"layers\.", names), *more)
    head = r"(?:language_model\.)?lm_head"
    return ends(config, HF_PREFIX + "embed_tokens", HF_PREFIX + "norm", head, layers, (ROTARY_BUFFER, *strays))


GGUF_NAMES = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "attn/q_norm": "attn_q_norm",
    "attn/k_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm",
}


def gguf_table(config: ModelConfig, fix: Mapping[str, Transform] | None = None) -> Table:
    """The table of a GGUF file; `fix` as for `layer_rules`."""
    # The factors of scaled rotary embeddings are checked against the configuration when that is read.
    strays, layers = (r"rope_freqs\.weight",), layer_rules(config, r"blk\.", GGUF_NAMES, fix)
    return ends(config, "token_embd", "output_norm", "output", layers, strays, (fix or {}).get("norm", same))
