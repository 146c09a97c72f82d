"""Fidelity as jaxmech and as SAELens measure it, on the same model, dictionaries and tokens. Needs torch, sae-lens.

python scripts/checks/check_evaluation.py

A small random Llama in TransformerLens and here, dictionaries saved by SAELens and read here, `run_evals` against
`evaluate_saes` and `loss_recovered`; both tables and their difference, and exit code 1 where one is over the tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

from jaxmech import load_sae
from jaxmech.activations.stream import ActivationStream
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import forward
from jaxmech.sae.evaluate import evaluate_saes, loss_recovered

TOLERANCE = 1e-4
LAYERS, D, HEADS, WIDTH, MLP, VOCAB, FEATURES, BOS = 3, 32, 4, 12, 48, 97, 80, 2
ROWS, LENGTH = 6, 20

CASES = {
    "standard, resid_post": ("standard", "blocks.1.hook_resid_post", {}),
    "jumprelu with layer_norm, mlp_out": ("jumprelu", "blocks.1.hook_mlp_out", {"normalize_activations": "layer_norm"}),
    "topk with constant norm, resid_pre": (
        "topk",
        "blocks.2.hook_resid_pre",
        {"k": 9, "normalize_activations": "constant_norm_rescale"},
    ),
    "gated, attn_z": ("gated", "blocks.1.attn.hook_z", {"reshape_activations": "hook_z"}),
    "abstopk, raw input, resid_mid": (
        "abstopk",
        "blocks.0.hook_resid_mid",
        {"k": 7, "apply_b_dec_to_input": False},
    ),
}

SAME = {
    "reconstruction_quality.mse": lambda r: r.mse,
    "reconstruction_quality.cossim": lambda r: r.cosine,
    "reconstruction_quality.explained_variance": lambda r: 1 - r.fvu,
    "reconstruction_quality.explained_variance_legacy": lambda r: 1 - r.fvu_token,
    "shrinkage.l2_ratio": lambda r: r.norm_ratio,
    "sparsity.l0": lambda r: r.l0,
    "sparsity.l1": lambda r: r.l1,
    "model_behavior_preservation.kl_div_with_sae": lambda r: r.kl_spliced,
    "model_behavior_preservation.kl_div_with_ablation": lambda r: r.kl_zero,
    "model_behavior_preservation.kl_div_score": lambda r: r.recovered_kl,
    "model_performance_preservation.ce_loss_without_sae": lambda r: r.ce,
    "model_performance_preservation.ce_loss_with_sae": lambda r: r.ce_spliced,
    "model_performance_preservation.ce_loss_with_ablation": lambda r: r.ce_zero,
    "model_performance_preservation.ce_loss_score": lambda r: r.recovered_zero,
}
"""SAELens' number -> ours, from the row of a layer."""


def build_model() -> HookedTransformer:
    """Llama's structure with weights large enough that what is ablated shows."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=LAYERS, d_model=D, n_ctx=64, d_head=WIDTH, n_heads=HEADS, d_mlp=MLP, d_vocab=VOCAB,
            act_fn="silu", gated_mlp=True, normalization_type="RMS", eps=1e-5, positional_embedding_type="rotary",
            rotary_dim=WIDTH, rotary_base=100, final_rms=True, device="cpu",
        )
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if ".b_" in name or name.endswith((".b", "b_U")):
            weight.data.zero_()
        elif name.endswith(".w"):
            weight.data = 1 + 0.3 * torch.randn_like(weight)
        else:
            weight.data = torch.randn_like(weight) * 1.5 / weight.shape[-2] ** 0.5
    return model.eval()


def ours_of(model: HookedTransformer) -> tuple[ModelConfig, dict]:
    """The same model as jaxmech has it."""
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, n_layers=LAYERS, d_model=D, n_heads=HEADS, n_kv_heads=HEADS, head_dim=WIDTH,
        d_mlp=MLP, activation="silu", norm_eps=1e-5, rope=Rope(100.0), query_scale=WIDTH**-0.5, max_positions=64,
        is_local=(False,) * LAYERS, tied=False, bos_id=BOS,
    )  # fmt: skip
    weights = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}

    def stack(name: str, *axes: int):
        return jnp.stack([weights[f"blocks.{i}.{name}"].transpose(*axes) for i in range(LAYERS)])

    layers = {
        "attn_norm": {"scale": stack("ln1.w", 0)},
        "mlp_norm": {"scale": stack("ln2.w", 0)},
        "attn": {n: {"kernel": stack(f"attn.W_{n.upper()}", 1, 0, 2)} for n in "qkv"}
        | {"o": {"kernel": stack("attn.W_O", 0, 1, 2)}},
        "mlp": {
            "gate": {"kernel": stack("mlp.W_gate", 0, 1)},
            "up": {"kernel": stack("mlp.W_in", 0, 1)},
            "down": {"kernel": stack("mlp.W_out", 0, 1)},
        },
    }
    return config, {
        "embed": {"embedding": weights["embed.W_E"]},
        "layers": layers,
        "final_norm": {"scale": weights["ln_final.w"]},
        "unembed": {"kernel": weights["unembed.W_U"]},
    }


def save_dictionary(folder: Path, model: HookedTransformer, tokens, architecture: str, hook: str, options) -> None:
    """A random dictionary on the scale of what stands at its site, saved by SAELens."""
    _, cache = model.run_with_cache(tokens)
    x = cache[hook].flatten(2)[:, 1:].flatten(0, 1)
    cls, config = SAE_CLASS_REGISTRY[architecture]
    metadata = SAEMetadata(model_name="tiny", hook_name=hook, prepend_bos=True)
    sae = cls(config(d_in=x.shape[1], d_sae=FEATURES, metadata=metadata, **options))
    raw = "normalize_activations" not in options
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(FEATURES, x.shape[1]), dim=1)
        sae.W_enc.copy_(rows.T * 0.7)
        sae.W_dec.copy_(rows * 0.5)
        sae.b_dec.copy_(x.mean(0) if raw else 0.1 * torch.randn(x.shape[1]))
        for name in ("threshold", "b_enc", "b_gate", "b_mag", "r_mag"):
            if getattr(sae, name, None) is not None:
                value = getattr(sae, name)
                value.copy_(0.2 * torch.rand(FEATURES) if name == "threshold" else 0.1 * torch.randn(FEATURES))
    sae.save_model(folder)


class FixedTokens:
    """What `run_evals` asks of an ActivationsStore: the same batch of tokens every time."""

    def __init__(self, tokens):
        self.tokens, self.store_batch_size_prompts, self.context_size = tokens, *tokens.shape

    def get_batch_tokens(self, *_):
        return self.tokens

    def reset_input_dataset(self):
        pass


def theirs(folder: Path, model: HookedTransformer, tokens, skip_bos: bool) -> tuple[dict[str, float], np.ndarray]:
    everything = get_eval_everything_config(len(tokens), 1, 1)
    found, features = run_evals(
        SAE.load_from_disk(folder), FixedTokens(tokens), model, ActivationScaler(), everything,
        exclude_special_tokens=[BOS] if skip_bos else False,
    )  # fmt: skip
    numbers = {f"{group}.{name}": value for group, part in found.items() for name, value in part.items()}
    return numbers, np.array(features["feature_density"])


def ours(folder: Path, config: ModelConfig, params, tokens, skip_bos: bool) -> tuple[SimpleNamespace, np.ndarray]:
    sae = load_sae(folder)
    stream = ActivationStream(
        config, params, tokens, layers=sae.config.layers, site=sae.config.site, batch_size=1, skip_first=int(skip_bos)
    )
    found = evaluate_saes(sae, stream.chunks())
    losses = loss_recovered(config, params, tokens, saes=sae, skip_first=int(skip_bos), zero_skipped=True)
    return SimpleNamespace(**losses.iloc[0], **found.table.drop(columns=["layer", "tokens"]).iloc[0]), found.density[0]


def main() -> int:
    torch.manual_seed(0)
    model = build_model()
    config, params = ours_of(model)
    tokens = torch.randint(3, VOCAB, (ROWS, LENGTH))
    tokens[:, 0] = BOS
    mine = np.asarray(forward(config, params, jnp.asarray(tokens.numpy()), logits="all").logits)
    print(f"logits of the model itself differ by {np.abs(mine - model(tokens).detach().numpy()).max():.1e}\n")
    worst = 0.0
    for name, (architecture, hook, options) in CASES.items():
        for skip_bos in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "sae"
                save_dictionary(path, model, tokens, architecture, hook, options)
                a, density = theirs(path, model, tokens, skip_bos)
                row, mine = ours(path, config, params, tokens.numpy(), skip_bos)
            table = pd.DataFrame(
                {key: [a[key], float(get(row))] for key, get in SAME.items()}, ["SAELens", "jaxmech"]
            ).T
            table.loc["density, the feature furthest off"] = [density[at := np.abs(density - mine).argmax()], mine[at]]
            table["difference"] = (table["SAELens"] - table["jaxmech"]).abs() / table["SAELens"].abs().clip(lower=1)
            print(f"{name}; {'BOS left out' if skip_bos else 'all tokens'}\n{table.to_string()}\n")
            worst = np.maximum(worst, table["difference"].max(skipna=False))  # no number is no agreement
    print(f"largest difference (relative above 1): {worst:.1e}, tolerance {TOLERANCE:g}")
    return int(not worst < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
