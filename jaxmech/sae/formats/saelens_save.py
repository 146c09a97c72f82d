"""Writes dictionaries in SAELens' format (`cfg.json` + `sae_weights.safetensors`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxmech.io.files import disk_errors, whole
from jaxmech.sae.formats.hooks import HOOKS
from jaxmech.sae.formats.saelens import BATCH_TOPK, CONFIG_FILE, KINDS, NORMALIZATIONS, WEIGHTS_FILE, Kind
from jaxmech.sae.module import SAE, SAEConfig

SAELENS_VERSION = "6.54.12"
"""The schema written; SAELens takes anything that names no version >= 6 for its older, flat schema."""


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Writes a single dictionary in SAELens' format; a half-written folder never has a `cfg.json`.

    A "batchtopk" dictionary is written as SAELens' trainer saves it, without a threshold: SAELens opens it as a
    `TrainingSAE`, `load_sae` with `batch_topk=True`.

    Returns:
      The folder.

    Raises:
      ValueError: a stack (`save_saes` writes one), a form that SAELens does not have, weights that are not finite, or
        a folder that cannot be written.
    """
    if sae.stacked:
        raise ValueError("sae: expected a single dictionary, got a stack; use save_saes or sae.at(layer)")
    folder, architecture = Path(folder), _architecture(sae.config)
    weights = _weights(sae, architecture)
    text = json.dumps(_cfg(sae.config, architecture), indent=2) + "\n"
    with disk_errors(folder, "make room, or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        with whole(folder / WEIGHTS_FILE) as path:
            save_file(weights, path)
        with whole(folder / CONFIG_FILE) as path:
            path.write_text(text, encoding="utf-8")
    return folder


def save_saes(stack: SAE, folder: str | Path) -> Path:
    """Writes each dictionary of a stack to `folder/layer_{layer}`; raises as `save_sae`."""
    for layer in stack.config.layers:
        single = stack.at(layer) if stack.stacked else stack
        save_sae(single, Path(folder) / f"layer_{layer}")
    return Path(folder)


def _architecture(c: SAEConfig) -> str:
    """SAELens' name of the form; refuses a form that has none."""
    transcoder = c.skip or c.site_out != c.site or c.d_in != c.d_out
    form = Kind("jumprelu" if c.activation == "batchtopk" else c.activation, transcoder, c.skip, c.by_rank)
    name = next((name for name, kind in KINDS.items() if kind == form and name != "gated"), None)
    if name is None:
        raise ValueError(f"sae: SAELens has no {c.activation} transcoder; it has relu and jumprelu ones")
    if transcoder and c.normalize != "none":
        raise ValueError(f"sae: SAELens has no transcoder that normalises each token ({c.normalize}) and undoes it")
    if unknown := [site for site in (c.site, c.site_out) if site not in HOOKS]:
        raise ValueError(f"site: SAELens has no hook for {unknown[0]!r}; it has one for {', '.join(HOOKS)}")
    return name


def _cfg(c: SAEConfig, architecture: str) -> dict[str, Any]:
    kind, hook = KINDS[architecture], HOOKS[c.site].format(c.layers[0])
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": c.model,
        "hook_name": hook,
        "prepend_bos": True,
        "trained_with": "jaxmech",
        "units": c.units,
        "source": c.source,
        "l0": None if c.l0[0] is None else float(c.l0[0]),
        "skip_first": c.skip_first,
    }
    config = {
        "architecture": architecture,
        "d_in": c.d_in,
        "d_sae": c.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": c.subtract_b_dec and not kind.transcoder,
        "normalize_activations": next(name for name, ours in NORMALIZATIONS.items() if ours == c.normalize),
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if kind.transcoder:
        config["d_out"] = c.d_out
        metadata["hook_name_out"] = HOOKS[c.site_out].format(c.layers[0])
    if kind.ranked:
        assert c.k is not None
        config |= {"k": c.k if architecture in BATCH_TOPK else int(c.k), "rescale_acts_by_decoder_norm": False}
    return config


def _weights(sae: SAE, architecture: str) -> dict[str, np.ndarray]:
    weights = {name: np.asarray(leaf, np.float32) for name, leaf in sae.params.items()}
    # A threshold of +inf is a feature that never fires, which some trainers write on purpose.
    bad = {name: int((np.isnan(w) if name == "threshold" else ~np.isfinite(w)).sum()) for name, w in weights.items()}
    if faults := [f"{name}: {n} values are NaN or infinite" for name, n in bad.items() if n]:
        raise ValueError(f"sae: {'; '.join(faults)}")
    if KINDS[architecture].transcoder and sae.config.subtract_b_dec:
        # SAELens' transcoders never subtract it: (x - b_dec) @ W_enc = x @ W_enc - b_dec @ W_enc.
        shift = weights["b_dec"].astype(np.float64) @ weights["W_enc"].astype(np.float64)
        weights["b_enc"] = (weights["b_enc"] - shift).astype(np.float32)
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T
    if architecture in BATCH_TOPK:
        weights["topk_threshold"] = np.zeros((), np.float64)
    return {name: np.ascontiguousarray(w) if w.ndim else w for name, w in weights.items()}
