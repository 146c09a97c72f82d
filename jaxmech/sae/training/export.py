"""From a trained state to dictionaries for raw activations, in canonical form: scales, gates and thresholds folded in.

`S` denotes sparsities, `L'` the layers trained, `D` the width at the site, `F` dictionary features.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxmech.activations.stream import BatchStream
from jaxmech.io.arguments import Array
from jaxmech.sae.module import SAE, SAEConfig, make_sae
from jaxmech.sae.training.config import SAETrainConfig
from jaxmech.sae.training.step import TrainState, corrected

_ACTIVATIONS = {"topk": "topk", "standard": "relu"}
"""Every other kind becomes JumpReLU."""


def export(config: SAETrainConfig, state: TrainState, stream: BatchStream) -> list[SAE]:
    """A stack over the stream's layers for each of `config.sparsities`, with the mean L0 of the last steps declared."""
    state = jax.device_get(state)
    return [_stack(config, state, stream, row) for row in range(len(config.sparsities))]


def _stack(config: SAETrainConfig, state: TrainState, stream: BatchStream, row: int) -> SAE:
    activation = _ACTIVATIONS.get(config.kind, "jumprelu")
    params, scale, mean = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        for tree in ({n: leaf[row] for n, leaf in state.params.items()}, state.scale, state.mean)
    )
    trained = f"{config.kind}, sparsity {config.sparsities[row]:g}, {config.steps} steps of {stream.batch_size}"
    return make_sae(
        raw_form(config, canonical(config, params, corrected(config, state.threshold[row], state.step)), mean, scale),
        SAEConfig(
            d_in=stream.d_in,
            d_sae=config.d_sae,
            activation=activation,
            k=int(config.sparsities[row]) if activation == "topk" else None,
            site=stream.site,
            layers=stream.layers,
            l0=tuple(float(n) for n in corrected(config, state.l0[row], state.step)),
            skip_first=stream.skip_first,
            model=stream.model,
            units="residual / layer" if activation == "topk" else "residual",
            source=f"trained by jaxmech ({trained})",
        ),
    )


def canonical(config: SAETrainConfig, params: dict[str, np.ndarray], threshold: Array) -> dict[str, np.ndarray]:
    """A kind's own parameters [L',...] as E, b_enc, W_dec, b_dec and, for JumpReLU, threshold [L',F].

    Args:
      threshold: [L'] the smallest pre-activation that a batch keeps, for the BatchTopK kinds.
    """
    p = {name: params[name] for name in ("E", "W_dec", "b_dec")}
    if config.kind == "gated":
        # The gate opens where raw > -b_gate, that is where the magnitude's pre-activation exceeds this threshold.
        gain = np.exp(params["r_mag"])
        p["E"] = p["E"] * gain[..., None]
        return p | {"b_enc": params["b_mag"], "threshold": params["b_mag"] - gain * params["b_gate"]}
    p["b_enc"] = params["b_enc"]
    if config.kind == "jumprelu":
        return p | {"threshold": np.exp(params["log_threshold"])}
    if config.kind in ("batchtopk", "matryoshka"):
        return p | {"threshold": np.broadcast_to(np.asarray(threshold, np.float64)[:, None], p["b_enc"].shape)}
    return p


def raw_form(
    config: SAETrainConfig, p: dict[str, np.ndarray], mean: np.ndarray, scale: np.ndarray
) -> dict[str, np.ndarray]:
    """The same dictionaries for raw activations.

    Trained on z = (x - mean) / scale, so for x the encoder is E / scale and the decoder W_dec * scale. ReLU and
    JumpReLU dictionaries bring their decoder rows back to norm 1 by multiplying feature, bias and threshold. A TopK
    dictionary ranks the features of a token against each other, so its features keep the units they were ranked in.
    """
    W_dec = p["W_dec"] * scale[:, None]
    length = np.linalg.norm(W_dec, axis=-1)  # [L',F]
    if config.kind == "topk":
        length = np.broadcast_to(length.mean(1, keepdims=True), length.shape)
    raw = {
        "W_enc": (p["E"] / scale[:, None] * length[..., None]).transpose(0, 2, 1),
        "b_enc": p["b_enc"] * length,
        "W_dec": W_dec / length[..., None],
        "b_dec": mean + p["b_dec"] * scale,
    }
    return raw | ({"threshold": p["threshold"] * length} if "threshold" in p else {})
