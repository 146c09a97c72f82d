"""circuit-tracer's per-layer transcoders: `layer_{i}.safetensors` beside one `config.yaml`.

`f = act(x @ W_enc.T + b_enc)`, `y = f @ W_dec + b_dec (+ x @ W_skip.T)`, with W_enc and W_dec [F, D]; after
circuit_tracer/transcoder/single_layer_transcoder.py. The activation is JumpReLU where the file has a threshold, TopK
where config.yaml says so, else ReLU. Its TopK has no ReLU, so a token with fewer than k positive pre-activations would
keep negative ones there, which are 0 here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.sae.formats.files import Given, agree, read_tensors, refuse_rank
from jaxmech.sae.formats.hooks import site_of
from jaxmech.sae.formats.tensors import assemble, matrix_shape
from jaxmech.sae.module import SAEConfig, param_shapes

CONFIG = "config.yaml"

_RULES = {
    "W_enc": ("W_enc", True),
    "b_enc": ("b_enc", False),
    "W_dec": ("W_dec", False),
    "b_dec": ("b_dec", False),
    "activation_function.threshold": ("threshold", False),
    "W_skip": ("W_skip", True),
}
_KEYS = {
    *("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k", "transcoders"),
    *("scan", "scan_name", "repo_id", "revision", "subfolder"),
}


def matches(path: Path) -> bool:
    return layer_of(path) is not None or (path.is_dir() and (path / CONFIG).is_file() and bool(_config(path)))


def layer_of(path: Path) -> int | None:
    match = re.fullmatch(r"layer_(\d+)\.safetensors", path.name)
    return int(match[1]) if match else None


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads one layer's file; without a config.yaml the caller says the site.

    Raises:
      ValueError: a cross-layer transcoder, a list of links, hooks that are no sites, tensors that do not fit.
    """
    cfg = _config(path if path.is_dir() else path.parent)
    if faults := _faults(cfg):
        raise ValueError(f"{path}: {CONFIG}: {'; '.join(faults)}")
    if path.is_dir():
        raise ValueError(f"{path}: expected layer_0.safetensors, layer_1.safetensors, ... beside {CONFIG}")
    layer = layer_of(path)
    assert layer is not None  # `matches`
    site, site_out = (_site(cfg, key, path) for key in ("feature_input_hook", "feature_output_hook"))
    tensors = read_tensors(path)
    stored, k = tensors.pop("k", None), None
    d_sae, d_in = matrix_shape(path, tensors, "W_enc")
    activation = cfg.get("activation") or "jumprelu"
    if activation == "jumprelu" and "activation_function.threshold" not in tensors:
        activation = "relu"
    refuse_rank(path, given._replace(k=None) if activation == "topk" else given, activation)
    if activation == "topk":
        k = agree(path, "k", None if stored is None else int(stored), cfg.get("k"))
        k = agree(path, "k", k, given.k, needed=True)
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=matrix_shape(path, tensors, "W_dec")[1],
        activation=activation,
        k=k,
        subtract_b_dec=False,
        skip="W_skip" in tensors,
        site=agree(path, "site", site, given.site, needed=True),
        site_out=site_out or "mlp_out",
        layers=(agree(path, "layer", layer, given.layer),),
        model=agree(path, "model", cfg.get("model_name"), given.model),
    )
    weights = assemble(path, tensors, _RULES, param_shapes(config))
    if activation == "jumprelu" and (weights["threshold"] < 0).any():
        raise ValueError(f"{path}: activation_function.threshold: negative ones let negative features through in "
                         "circuit-tracer, which JumpReLU does not do here")  # fmt: skip
    return weights, config


def _config(folder: Path) -> dict[str, Any]:
    """config.yaml as plain data; {} if it is missing or another library's."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not (folder / CONFIG).is_file():
        return {}
    try:
        cfg: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error}); download or copy it again") from None
    return cfg if isinstance(cfg, dict) and "model_kind" in cfg else {}


def _faults(cfg: dict[str, Any]) -> list[str]:
    kind = cfg.get("model_kind", "transcoder_set")
    if kind == "cross_layer_transcoder":
        return ["model_kind: a cross-layer transcoder, which writes several layers; not supported"]
    faults = [f"model_kind: expected 'transcoder_set', got {kind!r}"] if kind != "transcoder_set" else []
    faults += [f"{key}: unknown key" for key in cfg if key not in _KEYS]
    if cfg.get("activation") not in (None, "relu", "topk", "jumprelu"):
        faults.append(f"activation: expected relu, topk or nothing (JumpReLU), got {cfg['activation']!r}")
    if links := cfg.get("transcoders"):
        first = str(links[0]).removeprefix("hf://").removesuffix("/params.npz")
        faults.append(f"transcoders: links are not followed; load what they point to: load_saes([{first!r}, ...])")
    return faults


def _site(cfg: dict[str, Any], key: str, where: Path) -> str | None:
    hook = cfg.get(key)
    if hook is None:
        return None
    relative = str(hook).removeprefix("blocks.{layer}.")
    site, _ = site_of(f"blocks.0.{relative}", cfg.get("model_name"))
    if site is None:
        raise ValueError(f"{where}: {CONFIG}: {key}: {hook!r} is not a known site")
    return site
