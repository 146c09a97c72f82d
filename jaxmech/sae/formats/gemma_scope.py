"""Gemma Scope 1 (Gemma 2; `params.npz`) and 2 (Gemma 3; `params.safetensors` and, mostly, `config.json`).

Both are JumpReLU dictionaries of raw activations in canonical orientation that never subtract b_dec. Their transcoders
read different places: the first suite the MLP's norm before its gain, the second after it. Facts: Lieberum et al. 2024
(arXiv 2408.05147), the configurations of google/gemma-scope-2-*.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxmech.io.files import read_json
from jaxmech.sae.formats.files import Given, agree, described, read_tensors, refuse_rank
from jaxmech.sae.formats.hooks import site_of
from jaxmech.sae.formats.tensors import assemble, matrix_shape
from jaxmech.sae.module import SAEConfig, param_shapes

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"

_RULES = {name: (name, False) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_RULES |= {"w_enc": ("W_enc", False), "w_dec": ("W_dec", False), "affine_skip_connection": ("W_skip", False)}
_SITES_1 = {
    "res": ("resid_post", "resid_post"),
    "mlp": ("mlp_out", "mlp_out"),
    "att": ("attn_z", "attn_z"),
    "transcoders": ("mlp_normed", "mlp_out"),
}
_SITES_2 = {
    "resid_post": ("resid_post", "resid_post"),
    "attn_out": ("attn_z", "attn_z"),  # the input of o_proj, whatever the folder is called
    "mlp_out": ("mlp_out", "mlp_out"),
    "transcoder": ("mlp_in", "mlp_out"),
}
_CONFIG_KEYS = {
    *("architecture", "type", "hf_hook_point_in", "hf_hook_point_out", "width", "model_name", "l0"),
    "affine_connection",
}
_SKIP_FIRST_IT = 4
"""Gemma Scope 2 on instruction-tuned models left out `<bos><start_of_turn>user\\n`."""


def matches(path: Path) -> bool:
    return (path / FIRST).is_file() or (path / SECOND).is_file()


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads a folder of either suite.

    Raises:
      ValueError: its site, layer or model is missing or contradictory, it is a crosscoder or a cross-layer transcoder,
        or the tensors are not those of such a dictionary.
    """
    refuse_rank(path, given, "JumpReLU")
    return _read_first(path, given) if (path / FIRST).is_file() else _read_second(path, given)


def _read_first(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """No configuration: site and model are in the repository's name, layer and L0 in the folders'."""
    name = described(path)
    if re.search(r"(^|/)embedding(/|$)", name):
        raise ValueError(f"{path}: a dictionary of token embeddings, which are no site of a layer; not supported")
    repo = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?=/|$)", name)
    site = _site(path, _SITES_1[repo[3]][0] if repo else None, given, _SITES_1)
    site_out = dict(_SITES_1.values())[site]
    model = f"google/gemma-2-{repo[1]}{'-it' if repo[2] == 'it' else ''}" if repo else None
    tensors = read_tensors(path / FIRST)
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not np.all(scale == 1):
        raise ValueError(f"{path / FIRST}: scaling_factor: a factor other than 1 is not part of Gemma Scope")
    l0 = _last(r"average_l0_(\d+)", name)
    config = _config(path / FIRST, tensors, given, site, site_out, name, l0=l0, model=model)
    return assemble(path / FIRST, tensors, _RULES, param_shapes(config)), config


def _read_second(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    name = described(path)
    cfg = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    folder = _last(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|crosscoder|clt)(?:_all)?/[^/]*$", name)
    for kind in (folder, cfg.get("type")):
        if kind in ("crosscoder", "clt"):
            raise ValueError(f"{path}: a {_LONG[kind]}, which reads or writes several layers; not supported")
    tensors = read_tensors(path / SECOND)
    if np.ndim(tensors.get("w_dec", 0)) == 3:
        raise ValueError(
            f"{path}: w_dec has an axis of layers: a crosscoder or a cross-layer transcoder; not supported"
        )
    (site, site_out), layer, faults = _places(cfg, folder, name)
    skip = "affine_skip_connection" in tensors
    declared = cfg.get("affine_connection", "_affine" in name.rpartition("/")[2] if folder == "transcoder" else None)
    if declared is not None and bool(declared) != skip:
        faults.append(
            f"affine_skip_connection: {'present' if skip else 'missing'}, contrary to {CONFIG} or the folder's name"
        )
    width = matrix_shape(path / SECOND, tensors, "w_enc", "W_enc")[1]
    if cfg.get("width", width) != width:
        faults.append(f"width: {CONFIG} says {cfg['width']!r}, w_enc has {width} columns")
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    site = _site(path, site, given, _SITES_2)
    site_out = site_out or dict(_SITES_2.values()).get(site, site)
    model = _model(cfg.get("model_name"), name)
    config = _config(path / SECOND, tensors, given, site, site_out, name,
                     layer=layer, l0=cfg.get("l0"), model=model, skip=skip)  # fmt: skip
    return assemble(path / SECOND, tensors, _RULES, param_shapes(config)), config


def _site(path: Path, said: str | None, given: Given, suite: dict[str, tuple[str, str]]) -> str:
    """The site, if need be from the caller, who may easily name one that is not the suite's."""
    sites = dict(suite.values())
    if said is None and given.site not in (None, *sites):
        raise ValueError(f"{path}: site: {given.site!r} is none of this suite's: {', '.join(sites)}")
    return agree(path, "site", said, given.site, needed=True)


_LONG = {"crosscoder": "crosscoder", "clt": "cross-layer transcoder"}


def _places(cfg: dict[str, Any], folder: str | None, name: str):
    """((site, site_out), layer, faults), from the configuration and the folders' names, which must agree."""
    faults = [f"{key}: unknown key in {CONFIG}" for key in cfg if key not in _CONFIG_KEYS]
    if cfg and cfg.get("architecture") != "jump_relu":
        faults.append(f"architecture: expected 'jump_relu', got {cfg.get('architecture')!r}")
    if cfg.get("type", "sae") not in ("sae", "transcoder"):
        faults.append(f"type: expected 'sae' or 'transcoder', got {cfg['type']!r}")
    site, site_out = _SITES_2[folder] if folder in _SITES_2 else (None, None)
    layer = _last(r"layer_(\d+)", name)
    # An SAE's configuration names its output too, or leaves it empty.
    points: dict[str, str | None] = {"hf_hook_point_in": site, "hf_hook_point_out": site_out}
    for key, expected in points.items():
        if not cfg.get(key):
            continue
        named, number = site_of(str(cfg[key]), "gemma-3")
        if named is None:
            faults.append(f"{key}: {cfg[key]!r} is not a known site")
        elif expected is not None and named != expected:
            faults.append(f"{key}: {cfg[key]!r} is {named}, the folder {folder!r} holds {expected}")
        if None not in (number, layer) and number != layer:
            faults.append(f"{key}: layer {number}, the folder's name says layer {layer}")
        points[key], layer = expected or named, number if layer is None else layer
    return (points["hf_hook_point_in"], points["hf_hook_point_out"]), layer, faults


def _model(named: str | None, name: str) -> str | None:
    """The hub's name of the model, which configurations write in several ways."""
    repo = re.search(r"gemma-scope-2-(\w+-(?:pt|it))(?=/|$)", name)
    if not named and repo is None:
        return None
    model = (named or f"gemma-3-{cast(re.Match, repo)[1]}").removeprefix("google/").replace("gemma-v3", "gemma-3")
    return "google/" + ("gemma-3-270m" if model == "gemma-3-270m-pt" else model)


def _config(where, tensors, given: Given, site, site_out, name, *, layer=None, l0=None, model=None, skip=False):
    d_in, d_sae = matrix_shape(where, tensors, "W_enc", "w_enc")
    model = agree(where, "model", model, given.model)
    second = where.name == SECOND
    return SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=matrix_shape(where, tensors, "W_dec", "w_dec")[1],
        subtract_b_dec=False,
        skip=skip,
        site=site,
        site_out=site_out,
        layers=(agree(where, "layer", _last(r"layer_(\d+)", name) if layer is None else layer, given.layer, True),),
        l0=(l0,),
        skip_first=_SKIP_FIRST_IT if second and model and model.endswith("-it") else 1,
        model=model,
    )


def _last(pattern: str, text: str) -> Any:
    """What the last match of `pattern` holds, as a number if it is one."""
    matches = re.findall(pattern, text)
    return None if not matches else int(matches[-1]) if matches[-1].isdigit() else matches[-1]
