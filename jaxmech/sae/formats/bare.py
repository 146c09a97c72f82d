"""Files of tensors that name no format: Goodfire's `.pth`, OpenAI's GPT-2 `.pt`, Qwen-Scope's `layer{n}.sae.pt`.

Goodfire: ReLU, nothing subtracted; layer and model from the file's name ("Llama-3.1-8B-Instruct-SAE-l19.pth").

OpenAI (openai/sparse_autoencoder, model.py): each token is layer-normed, TopK then ReLU, `pre_bias` on both sides; site
and layer from the path ("resid_post_mlp_v5_32k/autoencoders/6.pt"). A file that names no activation is read as
TopK(32), which all of version 5 are, but as plain ReLU of raw activations where its path is one of versions 1 and 4.

Qwen-Scope: TopK, nothing subtracted; k from the folder's name ("SAE-Res-Qwen3-8B-Base-W64K-L0_50"), a `config.json` or
the caller. Its model card keeps the k largest pre-activations without a ReLU after it. Here there is one, as in every
TopK dictionary: the same as long as a token has k positive pre-activations, which has not been checked on real weights.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jaxmech.io.files import read_json
from jaxmech.sae.formats.files import Given, agree, described, read_tensors
from jaxmech.sae.formats.tensors import assemble, matrix_shape
from jaxmech.sae.module import SAEConfig, param_shapes

_GOODFIRE = {
    "encoder_linear.weight": ("W_enc", True),
    "encoder_linear.bias": ("b_enc", False),
    "decoder_linear.weight": ("W_dec", True),
    "decoder_linear.bias": ("b_dec", False),
}
_OPENAI = {
    "encoder.weight": ("W_enc", True),
    "latent_bias": ("b_enc", False),
    "decoder.weight": ("W_dec", True),
    "pre_bias": ("b_dec", False),
}
_OPENAI_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_OPENAI_SITES: dict[str, str | None] = {
    "resid_post_mlp": "resid_post",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_attn": "attn_out",
    "mlp_post_act": None,
}
_OPENAI_K = 32
_QWEN = {"W_enc": ("W_enc", True), "b_enc": ("b_enc", False), "W_dec": ("W_dec", True), "b_dec": ("b_dec", False)}


def matches(path: Path) -> bool:
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Reads one file, told apart by the names of its tensors.

    Raises:
      ValueError: none of the three, an unknown site, layer or k, tensors that do not fit.
    """
    tensors = read_tensors(path)
    if given.batch_topk:
        raise ValueError(f"{path}: batch_topk: this dictionary was not trained with BatchTopK; leave it out")
    if "encoder_linear.weight" in tensors:
        return _goodfire(path, tensors, given)
    if "pre_bias" in tensors:
        return _openai(path, tensors, given)
    if re.fullmatch(r"layer\d+\.sae\.pt", path.name):
        return _qwen(path, tensors, given)
    raise ValueError(
        f"{path}: tensors {', '.join(sorted(tensors)[:8]) or 'none'}: neither Goodfire's (encoder_linear.weight, ...)"
        " nor OpenAI's (pre_bias, ...), and not named layer0.sae.pt, as Qwen-Scope's are"
    )


def _goodfire(path: Path, tensors: dict[str, np.ndarray], given: Given):
    name = re.fullmatch(r"(.+)-SAE-l(\d+)", path.stem)
    d_sae, d_in = matrix_shape(path, tensors, "encoder_linear.weight")
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation="relu",
        subtract_b_dec=False,
        site=given.site or "resid_post",
        layers=(agree(path, "layer", int(name[2]) if name else None, given.layer, needed=True),),
        model=agree(path, "model", f"meta-llama/{name[1]}" if name else None, given.model),
    )
    return assemble(path, tensors, _GOODFIRE, param_shapes(config)), config


def _openai(path: Path, tensors: dict[str, np.ndarray], given: Given):
    place = re.search(rf"({'|'.join(_OPENAI_SITES)})(_v\w+)?/autoencoders/(\d+)\.pt$", described(path))
    first = place is not None and not str(place[2]).startswith("_v5")
    default = "ReLU" if first else "TopK"
    stated, after, stored = (tensors.pop(name, None) for name in
                           ("activation", "activation_state_dict.postact_fn", "activation_state_dict.k"))  # fmt: skip
    activation = default if stated is None else str(stated)
    if activation not in ("ReLU", "TopK") or str("ReLU" if after is None else after) != "ReLU":
        raise ValueError(f"{path}: activation: expected ReLU, or TopK followed by ReLU, got {activation}, {after}")
    top = activation == "TopK"
    k = agree(path, "k", None if stored is None else int(stored), given.k) if top else None
    d_sae, d_in = matrix_shape(path, tensors, "encoder.weight")
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation="topk" if top else "relu",
        k=(k or _OPENAI_K) if top else None,
        normalize="layer_norm" if top else "none",
        site=agree(path, "site", _OPENAI_SITES[place[1]] if place else None, given.site, needed=True),
        layers=(agree(path, "layer", int(place[3]) if place else None, given.layer, needed=True),),
        l0=((k or _OPENAI_K) if top else None,),
        model=agree(path, "model", "gpt2" if place else None, given.model),
    )
    return assemble(path, tensors, _OPENAI, param_shapes(config), _OPENAI_STATISTICS), config


def _qwen(path: Path, tensors: dict[str, np.ndarray], given: Given):
    name = re.search(r"SAE-Res-([^/]+?)-W\d+K-L0_(\d+)", described(path))
    config_file = path.parent / "config.json"
    cfg = read_json(config_file) if config_file.is_file() else {}
    k = agree(path, "k", cfg.get("k"), int(name[2]) if name else None)
    k = agree(path, "k", k, given.k, needed=True)
    model = cfg.get("base_model") or (f"Qwen/{name[1]}" if name else None)
    d_sae, d_in = matrix_shape(path, tensors, "W_enc")
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation="topk",
        k=k,
        subtract_b_dec=False,
        site=agree(path, "site", cfg.get("hook_point", "resid_post"), given.site),
        layers=(agree(path, "layer", int(re.findall(r"\d+", path.name)[0]), given.layer),),
        l0=(k,),
        model=agree(path, "model", model, given.model),
    )
    return assemble(path, tensors, _QWEN, param_shapes(config)), config
