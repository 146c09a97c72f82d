"""saprmarks/dictionary_learning: `ae.pt` and `config.json`, whose `trainer.dict_class` says what the dictionary is.

After dictionary_learning/dictionary.py and trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py of release 0.1.0 (and
of commit 60ec6bf), which differ in more than the activation: AutoEncoderTopK ignores its stored threshold, the
BatchTopK kinds use theirs. Features have the units of each class's own `encode` on the stored weights, those of
GatedAutoEncoder and JumpReluAutoEncoder too, whose `normalize_decoder` is off by default. (The library's
`AutoEncoder.from_pretrained` switches to decoder rows of norm 1, which its trainers keep them at anyway.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmech.sae.formats import folds
from jaxmech.sae.formats.files import Given, agree, read_config, read_tensors
from jaxmech.sae.formats.hooks import locate
from jaxmech.sae.formats.tensors import assemble
from jaxmech.sae.module import SAEConfig, param_shapes

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {"encoder.weight": ("W_enc", True), "encoder.bias": ("b_enc", False), "decoder.weight": ("W_dec", True)}
_CANONICAL = {name: (name, False) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_B_DEC = {"b_dec": ("b_dec", False)}
_GATED = {name: (ours, False) for name, ours in
          {"decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}.items()}  # fmt: skip


class _Class(NamedTuple):
    """What a `dict_class` is; `batch`: trained with BatchTopK, one threshold for all features."""

    activation: str
    rules: dict[str, tuple[str, bool]]
    subtracts: bool = True
    batch: bool = False
    ignored: tuple[str, ...] = ()


_CLASSES = {
    "AutoEncoder": _Class("relu", _LINEAR | {"bias": ("b_dec", False)}),
    "AutoEncoderNew": _Class("relu", _LINEAR | {"decoder.bias": ("b_dec", False)}, subtracts=False),
    "GatedAutoEncoder": _Class("jumprelu", {n: _LINEAR[n] for n in ("encoder.weight", "decoder.weight")} | _GATED),
    "AutoEncoderTopK": _Class("topk", _LINEAR | _B_DEC, ignored=("threshold",)),
    "BatchTopKSAE": _Class("jumprelu", _LINEAR | _B_DEC, batch=True),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _CANONICAL, batch=True, ignored=("group_sizes",)),
    "JumpReluAutoEncoder": _Class("jumprelu", _CANONICAL | {"threshold": ("threshold", False)}, subtracts=False),
}  # fmt: skip
_SITES = {"resid_post": "", "resid_out": "", "resid": "", "mlp_out": ".mlp", "mlp": ".mlp", "attn_out": ".attn",
          "attn": ".attn", "attention": ".attn"}  # fmt: skip
"""What `submodule_name` starts with -> the module whose output is meant; without one it is the layer."""


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file() or _checkpoint_config(path) is not None


def _checkpoint_config(path: Path) -> Path | None:
    """The configuration of a single file: "ae_final.pt" has it in its folder or the one above."""
    if not (path.is_file() and re.fullmatch(r"ae\w*\.pt", path.name)):
        return None
    return next((folder / CONFIG for folder in path.absolute().parents[:2] if (folder / CONFIG).is_file()), None)


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads a folder, or a file "ae_....pt". It belongs to the output of the layer, if nothing else is given.

    Raises:
      ValueError: an unknown class, a BatchTopK threshold that was never set, tensors that do not fit.
    """
    where, file = _checkpoint_config(path) or path / CONFIG, path if path.is_file() else path / WEIGHTS
    content = read_config(where)
    trainer = content.get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"{where}: trainer: expected an object with dict_class, activation_dim, ..., got {trainer!r}")
    if faults := _faults(trainer, given):
        raise ValueError(f"{where}: {'; '.join(faults)}")
    kind, tensors = _CLASSES[trainer["dict_class"]], read_tensors(file)
    ranked = kind.batch or kind.activation == "topk"
    stored, learnt = tensors.pop("k", None) if ranked else None, tensors.pop("threshold", None) if kind.batch else None
    k = agree(path, "k", None if stored is None else int(stored), trainer.get("k")) if ranked else None
    k = agree(path, "k", k, given.k, needed=kind.activation == "topk" or given.batch_topk)
    model = agree(where, "model", trainer.get("lm_name"), given.model)
    site, layer = _locate(where, content, trainer, given, model)
    activation = "batchtopk" if given.batch_topk else kind.activation
    config = SAEConfig(
        d_in=trainer["activation_dim"],
        d_sae=trainer["dict_size"],
        activation=activation,
        k=k if activation in ("topk", "batchtopk") else None,
        subtract_b_dec=kind.subtracts,
        site=site,
        layers=(layer,),
        l0=(k,),
        model=model,
    )
    shapes = {name: shape for name, shape in param_shapes(config).items() if name != "threshold" or not kind.batch}
    if trainer["dict_class"] == "GatedAutoEncoder":
        gates = dict.fromkeys(("r_mag", "b_gate", "b_mag"), (config.d_sae,))
        shapes = {name: shape for name, shape in shapes.items() if name not in ("b_enc", "threshold")} | gates
    weights = assemble(file, tensors, kind.rules, shapes, kind.ignored)
    if "r_mag" in weights:
        weights = folds.gated(weights)
    if kind.batch and not given.batch_topk:
        weights["threshold"] = np.full(config.d_sae, _threshold(file, learnt), np.float32)
    return weights, config


def _faults(trainer: dict[str, Any], given: Given) -> list[str]:
    name, faults = trainer.get("dict_class"), []
    if "CrossCoder" in str(name):
        faults.append(f"dict_class: {name!r}, which reads several layers or models; not supported")
    elif name not in _CLASSES:
        faults.append(f"dict_class: expected one of {', '.join(_CLASSES)}, got {name!r}")
    for key in ("activation_dim", "dict_size"):
        value = trainer.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            faults.append(f"{key}: expected a positive whole number, got {value!r}")
    if given.batch_topk and name in _CLASSES and not _CLASSES[name].batch:
        faults.append(f"batch_topk: a {name} was not trained with BatchTopK; leave it out")
    return faults


def _locate(where: Path, content: dict[str, Any], trainer: dict[str, Any], given: Given, model: str | None):
    """Site and layer from `submodule_name` and the buffer, which says whether in- or outputs were read."""
    layer = agree(where, "layer", trainer.get("layer"), given.layer, needed=True)
    name = trainer.get("submodule_name") or "resid_post"
    start = re.sub(r"_?layer_?\d+$", "", name)
    side = (content.get("buffer") or {}).get("io", "out")
    if start not in _SITES or side not in ("in", "out"):
        if given.site is None:
            what = f"submodule_name {name!r}" if start not in _SITES else f"buffer.io {side!r}"
            raise ValueError(f"{where}: {what} settles no site; pass load_sae(..., site=)")
        return given.site, layer
    number = re.search(r"(\d+)$", name)
    module = f"layers.{number[1] if number else layer}{_SITES[start]}.{side}put"
    return locate(where, {"submodule_name": module}, given._replace(layer=layer), model)


def _threshold(where: Path, learnt: np.ndarray | None) -> float:
    if learnt is None or not np.isfinite(learnt).all() or np.size(learnt) != 1 or np.ravel(learnt)[0] < 0:
        value = "missing" if learnt is None else f"{np.ravel(learnt)[0] if np.size(learnt) == 1 else np.shape(learnt)}"
        raise ValueError(
            f"{where}: threshold: {value}; expected one number >= 0 (-1 means that none was learnt); load it with"
            " batch_topk=True to keep the k largest of a batch, as in training"
        )
    return float(np.ravel(learnt)[0])
