"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`.

Trained on activations scaled to an average norm of sqrt(d), with the decoder's norms inside the gate. With
`s_in = sqrt(d) / norm_in` and `s_out` likewise, a feature of raw x is open where
`(s_in x @ W_enc + b_enc) |W_dec_j| / s_out > threshold`: the one threshold was fitted after folding, so it is in the
units of raw activations (over the layers it grows with their average norm). That is the code here, its decoder rows
have norm 1, and its units are the residual stream's; SAELens folds the same weights to other units.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.io.files import read_json
from jaxmech.sae.formats import folds
from jaxmech.sae.formats.files import Given, agree, described, read_tensors, refuse_rank
from jaxmech.sae.formats.hooks import site_of
from jaxmech.sae.formats.tensors import assemble
from jaxmech.sae.module import SAEConfig, param_shapes

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"

_RULES = {
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "decoder.bias": ("b_dec", False),
}
_FIXED = {
    "act_fn": "jumprelu",
    "apply_decoder_bias_to_pre_encoder": False,
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
}
"""Keys that change what the weights mean -> the only value the formula above holds for."""
_SHOWN_BY_TENSORS = {"use_decoder_bias", "use_glu_encoder"}
_NEEDED = ("hook_point_in", "hook_point_out", "d_model", "d_sae", "jump_relu_threshold", "norm_activation",
           *(key for key in _FIXED if key not in _SHOWN_BY_TENSORS))  # fmt: skip
_FOLDED = "inference"
"""What the trainers' library writes as `norm_activation` once the average norms are folded into the weights."""
_BFLOAT16_STEP = 2.0**-8


def matches(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads a folder and folds the scales and the decoder's norms.

    Raises:
      ValueError: a configuration that means something else, average norms that are missing or folded already, tensors
        that do not fit.
    """
    refuse_rank(path, given, "JumpReLU")
    cfg = read_json(path / CONFIG)
    if faults := _faults(cfg):
        raise ValueError(f"{path / CONFIG}: {'; '.join(faults)}")
    site, layer = site_of(str(cfg["hook_point_in"]))
    site_out, layer_out = site_of(str(cfg["hook_point_out"]))
    if site is None or site_out is None or layer != layer_out:
        raise ValueError(f"{path / CONFIG}: hook_point_in {cfg['hook_point_in']!r}, hook_point_out "
                         f"{cfg['hook_point_out']!r}: expected two known sites of one layer")  # fmt: skip
    top_k = cfg.get("top_k")
    config = SAEConfig(
        d_in=int(cfg["d_model"]),
        d_sae=int(cfg["d_sae"]),
        subtract_b_dec=False,
        site=agree(path, "site", site, given.site),
        site_out=site_out,
        layers=(agree(path, "layer", layer, given.layer, needed=True),),
        l0=(top_k,),  # trained as TopK; the threshold that replaced it was fitted to keep as many on average
        model=agree(path, "model", _model(described(path)), given.model),
        units="residual",
    )
    shapes = {name: shape for name, shape in param_shapes(config).items() if name != "threshold"}
    weights = assemble(path / WEIGHTS, read_tensors(path / WEIGHTS), _RULES, shapes)
    return _folded(path, cfg, weights), config


def _folded(path: Path, cfg: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    s_in = s_out = 1.0
    if cfg["norm_activation"] != _FOLDED:
        # Trained decoders have norms of every size; they are all 1 only after folding.
        norms = np.linalg.norm(weights["W_dec"], axis=1)
        if not cfg.get("decoder_exactly_fixed_norm") and np.all(np.abs(norms - 1) <= _BFLOAT16_STEP):
            raise ValueError(
                f"{path}: every decoder row has norm 1, so the scales seem to be folded into the weights already, but "
                f"norm_activation is {cfg['norm_activation']!r}, which would fold them twice; if they are, say "
                f"{_FOLDED!r} there"
            )
        average = cfg["dataset_average_activation_norm"]
        s_in, s_out = (cfg["d_model"] ** 0.5 / average[side] for side in ("in", "out"))
    raw = {name: value.astype(np.float64) for name, value in weights.items()}
    raw["b_enc"] /= s_in
    raw["W_dec"] *= s_in / s_out
    raw["b_dec"] /= s_out
    threshold = np.full(raw["b_enc"].shape, cfg["jump_relu_threshold"], np.float32)
    return folds.unit_rows(raw) | {"b_dec": raw["b_dec"].astype(np.float32), "threshold": threshold}


def _faults(cfg: dict[str, Any]) -> list[str]:
    faults = [f"{key}: missing" for key in _NEEDED if key not in cfg]
    faults += [
        f"{key}: expected {value!r}, got {cfg[key]!r}" for key, value in _FIXED.items() if cfg.get(key, value) != value
    ]
    for key in ("d_model", "d_sae", "top_k"):
        if key in cfg and not (_is_number(cfg[key]) and cfg[key] == int(cfg[key]) and cfg[key] > 0):
            faults.append(f"{key}: expected a positive whole number, got {cfg[key]!r}")
    # Its gate has no ReLU, which makes no difference as long as the threshold is not negative.
    if not (_is_number(cfg.get("jump_relu_threshold", 0)) and cfg.get("jump_relu_threshold", 0) >= 0):
        faults.append(f"jump_relu_threshold: expected a number >= 0, got {cfg['jump_relu_threshold']!r}")
    kind = cfg.get("norm_activation", "dataset-wise")
    if kind not in ("dataset-wise", _FOLDED):
        faults.append(f"norm_activation: expected 'dataset-wise' or {_FOLDED!r}, got {kind!r}")
    average = cfg.get("dataset_average_activation_norm")
    if kind == "dataset-wise" and not (
        isinstance(average, dict) and all(_is_number(average.get(s)) and average[s] > 0 for s in ("in", "out"))
    ):
        faults.append(
            f"dataset_average_activation_norm: norm_activation 'dataset-wise' needs its 'in' and 'out', got "
            f"{average!r}; if they are folded into the weights already, norm_activation must say {_FOLDED!r}"
        )
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _model(name: str) -> str | None:
    return "meta-llama/Llama-3.1-8B" if re.search(r"Llama3_1-?8?B?-?Base", name) else None
