"""Constants of a file folded into its weights, so that one form remains: computed in float64, stored in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Params = dict[str, np.ndarray]


def gated(weights: Mapping[str, np.ndarray]) -> Params:
    """A gated encoder (W_enc, r_mag, b_gate, b_mag) as the JumpReLU one that it is.

    With u = x @ W_enc: the gate opens where u + b_gate > 0, and the feature is relu(pre), pre = u * exp(r_mag) + b_mag
    (Rajamanoharan et al. 2024, arXiv 2404.16014). exp(r_mag) > 0, so u > -b_gate is equivalent to
    pre > b_mag - exp(r_mag) * b_gate: that is the threshold, and it may be negative.
    """
    gain, b_mag, b_gate = (np.asarray(weights[name], np.float64) for name in ("r_mag", "b_mag", "b_gate"))
    gain = np.exp(gain)
    kept = {name: weight for name, weight in weights.items() if name not in ("r_mag", "b_gate", "b_mag")}
    threshold = b_mag - gain * b_gate
    return kept | _float32(W_enc=weights["W_enc"] * gain, b_enc=b_mag, threshold=threshold)


def unit_rows(params: Params) -> Params:
    """Decoder rows of norm 1, their norms moved to the encoder: feature j and its threshold are scaled by |W_dec_j|.

    A feature without a direction (norm 0) never fires: its pre-activation becomes 0.
    """
    norm = np.linalg.norm(params["W_dec"].astype(np.float64), axis=1)
    scaled = {name: params[name] * norm for name in ("W_enc", "b_enc")}
    if "threshold" in params:
        # inf * 0 is NaN, and a feature that never fires by its threshold keeps it.
        infinite = np.isinf(params["threshold"])
        scaled["threshold"] = np.where(infinite, np.inf, np.where(infinite, 0, params["threshold"]) * norm)
    return params | _float32(W_dec=params["W_dec"] / np.where(norm > 0, norm, 1)[:, None], **scaled)


def input_scale(params: Params, scale: float) -> Params:
    """A dictionary trained on `scale * x`, as one on x with the same features: SAELens folds it the same way."""
    s = float(scale)
    return params | _float32(
        W_enc=params["W_enc"] * np.float64(s),
        W_dec=params["W_dec"] / np.float64(s),
        b_dec=params["b_dec"] / np.float64(s),
    )


def _float32(**params: np.ndarray) -> Params:
    return {name: np.asarray(value, np.float32) for name, value in params.items()}
