"""Dictionaries on disk in SAELens' format (`cfg.json` + `sae_weights.safetensors`): read strictly and written.

Follows SAELens 6 (`sae_lens/saes/{standard,jumprelu,topk}_sae.py`): tensors have the canonical orientation,
`apply_b_dec_to_input` is `subtract_b_dec`, and a BatchTopK dictionary is saved as `jumprelu`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmech.sae.module import SAE, SAEConfig, make_sae, param_shapes, stack_saes

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The schema written; SAELens takes anything that names no version >= 6 for its older, flat schema."""

_ARCHITECTURES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_REQUIRED = ("architecture", "d_in", "d_sae", "metadata")
_OPTIONAL = {
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
_TOPK = {"k": None, "rescale_acts_by_decoder_norm": False}
_HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Writes a single dictionary in SAELens' format; a folder half written never carries a `cfg.json`.

    Returns:
      The folder.

    Raises:
      ValueError: a stack (`save_saes` writes one), or weights that are not finite.
    """
    if sae.stacked:
        raise ValueError("sae: expected a single dictionary, got a stack; use save_saes or sae.at(layer)")
    c, folder = sae.config, Path(folder)
    if c.d_in != c.d_out:
        raise ValueError(f"sae: SAELens' SAE format needs d_in == d_out, got {c.d_in} and {c.d_out}")
    if c.site not in _HOOKS:
        raise ValueError(f"site: SAELens has no hook for {c.site!r}; it has one for {', '.join(_HOOKS)}")
    weights = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in sae.params.items()}
    _refuse_non_finite(weights, "sae")
    config: dict[str, Any] = {
        **{"d_in": c.d_in, "d_sae": c.d_sae},
        **_OPTIONAL,
        "apply_b_dec_to_input": c.subtract_b_dec,
        "architecture": next(name for name, act in _ARCHITECTURES.items() if act == c.activation),
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": c.model,
            "hook_name": _HOOKS[c.site].format(c.layers[0]),
            "prepend_bos": True,
            "trained_with": "jaxmech",
            "units": c.units,
            "source": c.source,
        },
    }
    if c.activation == "topk":
        config |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(weights, path))
    text = json.dumps(config, indent=2) + "\n"
    _write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def save_saes(stack: SAE, folder: str | Path) -> Path:
    """Writes each dictionary of a stack to `folder/layer_{layer}`."""
    for layer in stack.config.layers:
        single = stack.at(layer) if stack.stacked else stack
        save_sae(single, Path(folder) / f"layer_{layer}")
    return Path(folder)


def load_saes(folder: str | Path) -> SAE:
    """Reads every `folder/layer_{layer}` as one stack, in the order of the layers."""
    found = [
        (int(m[1]), path) for path in Path(folder).glob("layer_*") if (m := re.fullmatch(r"layer_(\d+)", path.name))
    ]
    if not found:
        raise ValueError(f"{folder}: expected folders named layer_0, layer_1, ...; one dictionary is read by load_sae")
    saes = [load_sae(path) for _, path in sorted(found)]
    for (layer, path), sae in zip(sorted(found), saes, strict=True):
        if sae.config.layers != (layer,):
            raise ValueError(f"{path}: the folder says layer {layer}, its cfg.json layer {sae.config.layers[0]}")
    return stack_saes([SAE(s.params, dataclasses.replace(s.config, source=str(folder))) for s in saes])


def load_sae(folder: str | Path, *, site: str | None = None, layer: int | None = None) -> SAE:
    """Reads a dictionary in SAELens' format into canonical form, float32.

    Args:
      folder: holds `cfg.json` and `sae_weights.safetensors`.
      site, layer: where it belongs, for files whose metadata does not say; otherwise they must agree with it.

    Raises:
      ValueError: a file that is missing or truncated, every unknown, missing or refused config key and every unknown,
        missing or mis-shaped tensor (all at once), weights that are not finite.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() and list(folder.glob("layer_*")):
        raise ValueError(f"{folder}: holds dictionaries of several layers; read them with load_saes")
    cfg = _read_config(folder / CONFIG_FILE)
    faults = _config_faults(cfg)
    if faults:
        raise ValueError(f"{folder / CONFIG_FILE}: {'; '.join(faults)}")
    site, layer = _locate(cfg["metadata"], site, layer, folder)
    metadata = cfg["metadata"]
    config = SAEConfig(
        d_in=cfg["d_in"],
        d_sae=cfg["d_sae"],
        activation=_ARCHITECTURES[cfg["architecture"]],
        k=cfg.get("k"),
        subtract_b_dec=cfg["apply_b_dec_to_input"],
        site=site,
        layers=(layer,),
        model=metadata.get("model_name"),
        units=metadata.get("units") or "unknown",
        source=str(folder),
    )
    weights = _read_weights(folder / WEIGHTS_FILE, config)
    if cfg.get("rescale_acts_by_decoder_norm"):
        # SAELens ranks `pre * |W_dec_j|` and decodes `f / |W_dec_j|`: the same as unit rows and a scaled encoder.
        norm = np.linalg.norm(weights["W_dec"], axis=1)
        if not norm.all():
            raise ValueError(f"{folder}: rescale_acts_by_decoder_norm with decoder rows of norm 0")
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    return make_sae(weights, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a dictionary in SAELens' format has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON, or truncated ({error})") from None
    if not isinstance(cfg, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(cfg).__name__}")
    if not isinstance(cfg.get("metadata"), dict):
        raise ValueError(
            f"{path}: no metadata, so it is in SAELens' schema before version 6; open it in SAELens and save_model it"
        )
    return cfg


def _config_faults(cfg: dict[str, Any]) -> list[str]:
    """Everything wrong with a config; fills in the defaults of optional keys as SAELens does."""
    architecture = cfg.get("architecture")
    optional = _OPTIONAL | (_TOPK if architecture == "topk" else {})
    faults = [f"{key}: missing" for key in _REQUIRED if key not in cfg]
    faults += [f"{key}: unknown key" for key in cfg if key not in (*_REQUIRED, *optional)]
    if "architecture" in cfg and architecture not in _ARCHITECTURES:
        faults.append(
            f"architecture: expected one of {', '.join(_ARCHITECTURES)}, got {architecture!r}"
            " (a dictionary saved in training form is exported by SAELens' save_inference_model)"
        )
    for key, default in optional.items():
        cfg.setdefault(key, default)
    for key in ("d_in", "d_sae", *(["k"] if architecture == "topk" else [])):
        if key in cfg and (isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < 1):
            faults.append(f"{key}: expected a positive integer, got {cfg[key]!r}")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(cfg.get(key, False), bool):
            faults.append(f"{key}: expected true or false, got {cfg[key]!r}")
    if cfg["normalize_activations"] != "none":
        faults.append(
            f"normalize_activations: {cfg['normalize_activations']!r} is not supported, only 'none';"
            " a constant factor is folded in by SAELens' fold_activation_norm_scaling_factor"
        )
    hook = cfg["metadata"].get("hook_name") or ""
    if cfg["reshape_activations"] not in ("none", "hook_z") or (
        cfg["reshape_activations"] == "hook_z" and hook and not hook.endswith("hook_z")
    ):
        faults.append(f"reshape_activations: {cfg['reshape_activations']!r} does not go with hook {hook!r}")
    return faults


def _locate(metadata: dict[str, Any], site: str | None, layer: int | None, folder: Path) -> tuple[str, int]:
    """Site and layer of a TransformerLens hook name, checked against what the caller says."""
    hook = metadata.get("hook_name")
    if hook:
        for name, pattern in _HOOKS.items():
            if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), hook):
                said = (name, int(match[1]))
                asked = (site or said[0], said[1] if layer is None else layer)
                if asked != said:
                    raise ValueError(
                        f"{folder}: was trained at {said[0]} of layer {said[1]} ({hook}), asked for {asked}"
                    )
                return said
        if site is None or layer is None:
            raise ValueError(
                f"{folder}: hook_name {hook!r} is none of {', '.join(_HOOKS.values())}; if it is one of the sites"
                f" {', '.join(_HOOKS)}, say so: load_sae(..., site=, layer=)"
            )
    if site is None or layer is None:
        raise ValueError(f"{folder}: its metadata has no hook_name; say where it belongs: load_sae(..., site=, layer=)")
    return site, layer


def _read_weights(path: Path, config: SAEConfig) -> dict[str, np.ndarray]:
    expected, weights, faults = param_shapes(config), {}, []
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                weights[name] = np.asarray(file.get_tensor(name)).astype(np.float32)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a dictionary in SAELens' format has one") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error})") from None
    scale = weights.pop("scaling_factor", None)
    if scale is not None and not np.all(scale == 1):
        faults.append("scaling_factor: a finetuning scale other than 1 is not supported")
    for name in expected:
        if name not in weights:
            hint = " (a BatchTopK dictionary gets one from SAELens' save_inference_model)" * (name == "threshold")
            faults.append(f"{name}: missing{hint}")
        elif weights[name].shape != expected[name]:
            faults.append(f"{name}: expected {expected[name]}, got {weights[name].shape}")
    faults += [f"{name}: unknown tensor" for name in weights if name not in expected]
    if faults:
        raise ValueError(f"{path}, a {config.activation} dictionary: {'; '.join(faults)}")
    _refuse_non_finite(weights, path)
    return weights


def _refuse_non_finite(weights: dict[str, np.ndarray], where) -> None:
    # A threshold of +inf is a feature that never fires, which some trainers write on purpose.
    bad = {name: int((np.isnan(w) if name == "threshold" else ~np.isfinite(w)).sum()) for name, w in weights.items()}
    if faults := [f"{name}: {n} values are NaN or infinite" for name, n in bad.items() if n]:
        raise ValueError(f"{where}: {'; '.join(faults)}")


def _write_atomically(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
