"""EleutherAI's sparsify: a folder named after the module, with `cfg.json` and `sae.safetensors`.

`f = topk(relu((x - b_dec) @ encoder.weight.T + encoder.bias))`, without b_dec in a transcoder, and
`y = f @ W_dec + b_dec (+ x @ W_skip.T)`; after sparsify/sparse_coder.py and fused_encoder.py. Older "signed" ones keep
the k largest by magnitude. SAELens reads this format otherwise: it transposes W_dec and subtracts b_dec where
`normalize_decoder` is off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxmech.io.files import read_json
from jaxmech.sae.formats.files import Given, agree, read_config, read_tensors
from jaxmech.sae.formats.hooks import locate
from jaxmech.sae.formats.tensors import assemble
from jaxmech.sae.module import SAEConfig, param_shapes

CONFIG, WEIGHTS, RUN_CONFIG = "cfg.json", "sae.safetensors", "config.json"

_RULES = {
    "encoder.weight": ("W_enc", True),
    "encoder.bias": ("b_enc", False),
    "W_dec": ("W_dec", False),
    "b_dec": ("b_dec", False),
    "W_skip": ("W_skip", True),
}
_KEYS = set(
    """
    d_in k activation num_latents expansion_factor signed skip_connection transcode normalize_decoder multi_topk
    embed_skip gram_lookup lookup_max_order gram_table_hash
""".split()
)
_REFUSED = {
    "embed_skip": "its output takes the model's embeddings too",
    "gram_lookup": "a table of n-grams is subtracted from its input",
}


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads a folder; its name ("layers.3", "layers.3.mlp") says the site.

    Raises:
      ValueError: unknown or refused keys, a name that is none of our sites, tensors that do not fit.
    """
    where, cfg = path / CONFIG, read_config(path / CONFIG)
    if faults := _faults(cfg, given):
        raise ValueError(f"{where}: {'; '.join(faults)}")
    run = _run_config(path)
    model = agree(where, "model", run.get("model"), given.model)
    skip = bool(cfg.get("skip_connection"))
    # `transcode` was once a key of the run alone; such transcoders subtract b_dec all the same.
    transcoder = bool(cfg.get("transcode", run.get("transcode", skip)))
    name = path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
    if transcoder:  # the caller can name only one of its two sites
        remedy = "give the folder the name of the module whose output it reconstructs"
        output, layer = locate(path, {"module": name}, given._replace(site=None), model, remedy)
        site, _ = locate(path, {"module": f"{name}.input"}, given._replace(layer=layer), model)
    else:
        site, layer = locate(path, {"module": name}, given, model)
        output = site
    config = SAEConfig(
        d_in=cfg["d_in"],
        d_sae=cfg.get("num_latents") or cfg["d_in"] * cfg.get("expansion_factor", 32),
        activation="abstopk" if cfg.get("signed") else "topk",
        k=agree(where, "k", cfg.get("k", 32), given.k),
        subtract_b_dec=not cfg.get("transcode", False),
        skip=skip,
        site=site,
        site_out=output,
        layers=(layer,),
        l0=(cfg.get("k", 32),),
        model=model,
    )
    tensors = read_tensors(path / WEIGHTS)
    return assemble(path / WEIGHTS, tensors, _RULES, param_shapes(config)), config


def _faults(cfg: dict[str, Any], given: Given) -> list[str]:
    faults = [f"{key}: unknown key" for key in cfg if key not in _KEYS]
    faults += [f"{key}: not supported: {why}" for key, why in _REFUSED.items() if cfg.get(key)]
    if cfg.get("activation", "topk") != "topk":
        faults.append(f"activation: expected 'topk', got {cfg['activation']!r}")
    if "d_in" not in cfg:
        faults.append("d_in: missing")
    for key in ("d_in", "k", "num_latents", "expansion_factor"):
        value, least = cfg.get(key, 1), 0 if key == "num_latents" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            faults.append(f"{key}: expected a whole number from {least}, got {value!r}")
    if given.batch_topk:
        faults.append("batch_topk: this dictionary keeps the k largest of each token; leave it out")
    return faults


def _run_config(path: Path) -> dict[str, Any]:
    """What the run says of all its dictionaries, one or two folders up."""
    configs = (folder / RUN_CONFIG for folder in path.absolute().parents[:2] if (folder / RUN_CONFIG).is_file())
    cfg = next((read_json(file) for file in configs), {})
    return cfg if isinstance(cfg.get("model"), str) else {}
