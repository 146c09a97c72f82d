"""Writes tests/goldens/sae: SAEs saved by SAELens with its own features and outputs. Needs torch, sae-lens.

python scripts/make_sae_goldens.py                 # writes the goldens
python scripts/make_sae_goldens.py check FOLDER    # opens every SAE under FOLDER (saved by jaxmech beside an
                                                   # io.npz of x, f, y) in SAELens and compares
"""

from __future__ import annotations

import json
import sys
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
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "sae"
D, F, N = 12, 40, 16


def fill(sae) -> None:
    """Random weights with unequal decoder norms, so that nothing that matters is zero or one."""
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D, F) / D**0.5)
        sae.W_dec.copy_(torch.randn(F, D) * torch.rand(F, 1).add(0.3))
        sae.b_enc.copy_(0.1 * torch.randn(F))
        sae.b_dec.copy_(torch.randn(D))
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(0.5 * torch.rand(F))


def golden(name: str, sae, write) -> None:
    """Saves the SAE by `write` and, read back by SAELens, its features and outputs on random input."""
    folder = GOLDENS / name
    write(folder)
    sae = SAE.load_from_disk(folder)
    x = 3 * torch.randn(N, D)
    with torch.no_grad():
        f = sae.encode(x)
        np.savez(folder / "io.npz", x=x.numpy(), f=f.numpy(), y=sae.decode(f).numpy(), whole=sae(x).numpy())
    cfg = json.loads((folder / "cfg.json").read_text())
    print(f"{name}: {cfg['architecture']}, L0 {(f > 0).sum(-1).float().mean():.1f}")


def main() -> None:
    torch.manual_seed(0)
    metadata = {"model_name": "gemma-3-270m", "hook_name": "blocks.9.hook_resid_post", "prepend_bos": True}
    kinds = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "jumprelu_raw_input": (JumpReLUSAE, JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
        "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    }
    for name, (cls, config, options) in kinds.items():
        sae = cls(config(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **options))
        fill(sae)
        golden(name, sae, sae.save_model)
    trained = {"batchtopk_exported": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 4.0})}
    trained["topk_exported"] = (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 5})
    for name, (cls, config, options) in trained.items():
        sae = cls(config(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **options))
        fill(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(1.5)
        golden(name, sae, sae.save_inference_model)


def check(root: Path) -> None:
    """Compares what jaxmech computed with what SAELens computes from the files that jaxmech wrote."""
    found = sorted(path.parent for path in root.rglob("cfg.json"))
    assert found, f"no cfg.json under {root}"
    for folder in found:
        io, sae = np.load(folder / "io.npz"), SAE.load_from_disk(folder)
        with torch.no_grad():
            f = sae.encode(torch.tensor(io["x"]))
            y = sae.decode(f)
        np.testing.assert_array_equal(f.numpy() > 0, io["f"] > 0)
        np.testing.assert_allclose(f.numpy(), io["f"], rtol=1e-4, atol=1e-4 * abs(io["f"]).max())
        np.testing.assert_allclose(y.numpy(), io["y"], rtol=1e-4, atol=1e-4 * abs(io["y"]).max())
        print(f"{folder}: {type(sae).__name__}, {sae.cfg.metadata.hook_name}: same features and outputs")


if __name__ == "__main__":
    check(Path(sys.argv[2])) if sys.argv[1:2] == ["check"] else main()
