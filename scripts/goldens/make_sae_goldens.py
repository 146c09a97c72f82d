"""Writes tests/goldens/sae: SAEs saved by SAELens with its own features and outputs. Needs torch, sae-lens.

python scripts/goldens/make_sae_goldens.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "sae"
D, F, N, D_OUT = 12, 40, 16, 10
METADATA = {"model_name": "gemma-3-270m", "hook_name": "blocks.9.hook_resid_post", "prepend_bos": True}
SCALE = 0.4

INFERENCE = {
    "standard": ("standard", {}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu_raw_input": ("jumprelu", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": 5}),
    "topk_rescaled": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
}
LATER = {
    "gated": ("gated", {}),
    "abstopk": ("abstopk", {"k": 5}),
    "gated_constant_norm": ("gated", {"normalize_activations": "constant_norm_rescale"}),
    "topk_layer_norm": ("topk", {"k": 5, "normalize_activations": "layer_norm"}),
    "standard_scaled": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "transcoder": ("transcoder", {}),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", {}),
}
"""Drawn after the first ones, so that those stay as they are."""


def fill(sae) -> None:
    """Random weights with unequal decoder norms, so that nothing that matters is zero or one."""
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D, F) / D**0.5)
        sae.W_dec.copy_(torch.randn(F, sae.W_dec.shape[1]) * torch.rand(F, 1).add(0.3))
        if sae.b_enc is not None:
            sae.b_enc.copy_(0.1 * torch.randn(F))
        sae.b_dec.copy_(torch.randn(sae.W_dec.shape[1]))
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(0.5 * torch.rand(F))
        for name in ("b_gate", "b_mag", "r_mag", "W_skip"):
            if hasattr(sae, name):
                value = getattr(sae, name)
                value.copy_(0.3 * torch.randn(value.shape))


def build(architecture: str, options):
    cls, config = SAE_CLASS_REGISTRY[architecture]
    metadata = dict(METADATA)
    if "transcoder" in architecture:
        options = options | {"d_out": D_OUT, "apply_b_dec_to_input": False}
        metadata |= {"hook_name": "blocks.9.ln2.hook_normalized", "hook_name_out": "blocks.9.hook_mlp_out"}
    sae = cls(config(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **options))
    fill(sae)
    return sae


def golden(name: str, sae, write) -> None:
    """Saves the SAE by `write` and, read back by SAELens, its features and outputs on random input."""
    folder = GOLDENS / name
    write(folder)
    sae = SAE.load_from_disk(folder)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(SCALE)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE}))
    x = 3 * torch.randn(N, D)
    with torch.no_grad():
        f = sae.encode(x)
        np.savez(folder / "io.npz", x=x.numpy(), f=f.numpy(), y=sae.decode(f).numpy(), whole=sae(x).numpy())
    cfg = json.loads((folder / "cfg.json").read_text())
    print(f"{name}: {cfg.get('architecture')}, L0 {(f != 0).sum(-1).float().mean():.1f}")


def before_6(name: str, source: str) -> None:
    """A golden with the flat cfg.json of SAELens 2, and what SAELens now makes of it."""

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        weights = (GOLDENS / source / "sae_weights.safetensors").read_bytes()
        (folder / "sae_weights.safetensors").write_bytes(weights)
        cfg = {
            "model_name": "gemma-3-270m", "model_class_name": "HookedTransformer",
            "hook_point": "blocks.9.hook_resid_post", "hook_point_layer": 9, "hook_point_head_index": None,
            "dataset_path": "a/b", "context_size": 128, "d_in": D, "d_sae": F, "dtype": "torch.float32",
            "device": "mps", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5},
            "normalize_activations": False, "prepend_bos": True, "lr": 4e-4, "l1_coefficient": 8e-5,
            "expansion_factor": 4, "use_ghost_grads": False, "from_pretrained_path": None,
            "run_name": "a run",
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(cfg))

    golden(name, None, write)


def batch_topk(name: str, sae) -> None:
    """What training saves of a BatchTopK SAE: the numbers with its threshold, and (f_trained) as trained."""
    folder = GOLDENS / name
    golden(name, sae, sae.save_inference_model)
    sae.save_model(folder)
    io = dict(np.load(folder / "io.npz"))
    with torch.no_grad():
        np.savez(folder / "io.npz", **io, f_trained=sae.encode(torch.tensor(io["x"])).numpy())


def main() -> None:
    torch.manual_seed(0)
    for name, (architecture, options) in INFERENCE.items():
        sae = build(architecture, options)
        golden(name, sae, sae.save_model)
    trained = {"batchtopk_exported": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4.0})}
    trained["topk_exported"] = (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5})
    for name, (cls, config, options) in trained.items():
        sae = cls(config(d_in=D, d_sae=F, metadata=SAEMetadata(**METADATA), **options))
        fill(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.5)
        golden(name, sae, sae.save_inference_model)
    for name, (architecture, options) in LATER.items():
        sae = build(architecture, options)
        golden(name, sae, sae.save_model)
    before_6("topk_before_6", "topk")
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, metadata=SAEMetadata(**METADATA), k=4.5))
    fill(sae)
    sae.topk_threshold.fill_(1.5)
    batch_topk("batchtopk_trainer", sae)


if __name__ == "__main__":
    main()
