"""What Hugging Face's own models compute: logits, the residual stream after every layer, greedy continuations.

Needs torch. Everything runs without a cache, so that what it says depends on the tokens alone.
"""

from __future__ import annotations

import torch

TEXTS = (
    "The capital of France is",
    "Q: A generous player has $100. How much does the player give?\nA: $50\n\nQ: A selfish player has $100.",
    "In 1969,  three astronauts\n\n flew to the moon — 月 — and\tcame back",
)


def layers_of(model) -> torch.nn.ModuleList:
    """The decoder's layers, wherever the family keeps them."""
    for path in ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise ValueError(f"{type(model).__name__}: its layers are in none of the known places")


@torch.no_grad()
def run(model, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B,T,V] and the residual stream after each layer [L,B,T,D] (HF's hidden_states norm the last one).

    With mask [B,T], positions count real tokens, as HF's `generate` counts them; zeros where the mask is zero.
    """
    residuals: list[torch.Tensor] = []

    def keep(_, __, out):
        residuals.append(out[0] if isinstance(out, tuple) else out)

    padding = {}
    if mask is not None:
        padding = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    hooks = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        logits = model(tokens, use_cache=False, **padding).logits
    finally:
        for hook in hooks:
            hook.remove()
    stacked = torch.stack(residuals)
    if mask is not None:
        real = mask.bool()[..., None]
        logits, stacked = logits.where(real, 0.0), stacked.where(real, 0.0)
    return logits, stacked


def continuation(model, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy, past any end of text, [B,new]."""
    for _ in range(new):
        tokens = torch.cat([tokens, run(model, tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, -new:]


def left_padded(texts: list[torch.Tensor], length: int, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B,length] with each text at the right end, and the mask [B,length] of real ones."""
    tokens = torch.full((len(texts), length), pad)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, length - len(text) :] = text
        mask[row, length - len(text) :] = 1
    return tokens, mask
