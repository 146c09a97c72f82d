"""Dictionaries in SAELens' format (`cfg.json` + `sae_weights.safetensors`): every architecture, current and older.

Follows SAELens 6 (`sae_lens/saes/*.py`, and `loading/pretrained_sae_loaders.py` for the flat `cfg.json` of versions
before 6). Tensors have the canonical orientation, but for `W_skip [d_out, d_in]`. What is folded into the weights: the
gate (a gated dictionary is a JumpReLU one), `rescale_acts_by_decoder_norm`, a finetuning scale, the factor of
"expected_average_only_in". A dictionary saved in training form is read as SAELens' `save_inference_model` writes it.
`saelens_save.py` writes the format.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmech.io.files import read_json
from jaxmech.sae.formats import folds
from jaxmech.sae.formats.files import Given, agree, described, read_config, read_tensors
from jaxmech.sae.formats.hooks import locate, site_of
from jaxmech.sae.formats.tensors import assemble
from jaxmech.sae.module import SAEConfig, param_shapes

CONFIG_FILE, WEIGHTS_FILE, SCALER_FILE = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"


class Kind(NamedTuple):
    """What an architecture is: its activation, whether it has an output site of its own, a skip term, a rank of k."""

    activation: str
    transcoder: bool = False
    skip: bool = False
    ranked: bool = False


KINDS = {
    "standard": Kind("relu"),
    "gated": Kind("jumprelu"),
    "jumprelu": Kind("jumprelu"),
    "topk": Kind("topk", ranked=True),
    "abstopk": Kind("abstopk", ranked=True),
    "batchtopk": Kind("jumprelu", ranked=True),
    "matryoshka_batchtopk": Kind("jumprelu", ranked=True),
    "transcoder": Kind("relu", transcoder=True),
    "skip_transcoder": Kind("relu", transcoder=True, skip=True),
    "jumprelu_transcoder": Kind("jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", transcoder=True, skip=True),
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
_REFUSED = {
    "temporal": "its code depends on the tokens before",
    "matching_pursuit": "its code is found by a search, not by an encoder",
}
NORMALIZATIONS = {"none": "none", "constant_norm_rescale": "norm", "layer_norm": "layer_norm"}
_FOLDED = "expected_average_only_in"

# Keys of cfg.json ----------------------------------------------------------------------------------------------------

_KEYS = {"architecture", "d_in", "d_sae", "d_out", "k", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input",
         "normalize_activations", "reshape_activations", "finetuning_scaling_factor", "metadata"}  # fmt: skip
_METADATA = {
    "model_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out", "hook_head_index",
    "hook_head_index_out", "hook_layer", "prepend_bos", "exclude_special_tokens", "seqpos_slice", "context_size",
    "dataset_path", "dataset_trust_remote_code", "model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id",
    "sae_lens_version", "sae_lens_training_version",
}  # fmt: skip
"""What a flat config has at the top and a current one in `metadata`, which may hold anything else too."""

_RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
            "activation_fn_str": "activation_fn"}  # fmt: skip
_OF_TRAINING = set(
    """
    dtype device decoder_init_norm l1_coefficient lp_norm l1_warm_up_steps l0_coefficient l0_warm_up_steps target_l0
    jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input
    pre_act_loss_coefficient use_sparse_activations aux_loss_coefficient topk_threshold_lr matryoshka_widths
    use_matryoshka_aux_loss
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm b_dec_init_method base_sae
    cached_activations_path checkpoint_path compile_llm compile_sae dead_feature_estimation_method
    dead_feature_threshold dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm
    decoder_orthogonal_init disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs expansion_factor
    feature_reinit_scale feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens
    from_pretrained_path hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    llm_compilation_mode log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb lr lr_decay_steps
    lr_end lr_scheduler_name lr_warm_up_steps model_batch_size model_kwargs mse_loss_normalization n_batches_in_buffer
    n_checkpoints n_eval_batches n_restart_cycles noise_scale normalize_sae_decoder resample_batches resume run_name
    sae_compilation_mode scale_sparsity_penalty_by_decoder_norm seed sequence_separator_token store_batch_size
    store_batch_size_prompts streaming tokens_per_buffer total_training_steps total_training_tokens train_batch_size
    train_batch_size_tokens training_tokens use_cached_activations use_ghost_grads verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
    hook_point_template llm_device log_weights_to_wandb logger n_batches_for_norm_estimate output_path
    prefetch_llm_batches resume_from_checkpoint save_final_checkpoint use_chat_formatting
""".split()
)
"""Keys of every version's trainer that say nothing of what the dictionary computes."""

_CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
_CORRECTED: dict[str, dict[str, Any]] = {
    "Mistral-7B-Residual-Stream-SAEs": {"normalize_activations": "constant_norm_rescale"},
    "GPT2-Small-SAEs-Reformatted": _CENTRED,
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8": _CENTRED,
    "gpt2-small-mlp-out-saes": _CENTRED,
}
"""Repositories whose configs do not say what was done: the overrides in SAELens' `pretrained_saes.yaml`."""


def matches(path: Path) -> bool:
    return (path / WEIGHTS_FILE).is_file()


def read(path: Path, given: Given) -> tuple[dict[str, np.ndarray], SAEConfig]:
    """Canonical parameters and config of the dictionary in a folder.

    Raises:
      ValueError: every unknown, missing or refused key at once, every unknown, missing or mis-shaped tensor at once, an
        unknown scale or BatchTopK threshold, a site that is none of ours.
    """
    where = path / CONFIG_FILE
    repo = next((repo for repo in _CORRECTED if f"/{repo}/" in f"{described(path)}/"), None)
    cfg, faults = _current(read_config(where) | _CORRECTED.get(repo or "", {}))
    faults += _faults(cfg, given)
    scale = None if faults else _input_scale(path, cfg, faults)
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}")
    config = _config(where, cfg, given)
    _warn_of_processing(where, cfg)
    return _weights(path / WEIGHTS_FILE, cfg, config, scale), config


def _current(cfg: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config in the schema of version 6 with the defaults filled in, and what is wrong with an older one."""
    faults = []
    cfg = dict(cfg)
    if not isinstance(cfg.get("metadata"), dict):
        cfg = {_RENAMED.get(key, key): value for key, value in cfg.items() if key != "metadata"}
        cfg["metadata"] = {key: cfg.pop(key) for key in _METADATA & cfg.keys()}
        cfg.setdefault("architecture", "standard")
        activation, kwargs = cfg.pop("activation_fn", None) or "relu", dict(cfg.pop("activation_fn_kwargs", None) or {})
        if "topk" in (activation, cfg["architecture"]):
            cfg |= {"architecture": "topk", "k": kwargs.pop("k", cfg.get("k"))}
        elif activation != "relu":
            faults.append(f"activation_fn: expected 'relu' or 'topk', got {activation!r}")
        faults += [f"activation_fn_kwargs: {key}: unknown key" for key in kwargs]
        if isinstance(cfg.get("normalize_activations"), bool):
            cfg["normalize_activations"] = _FOLDED if cfg["normalize_activations"] else "none"
        if "hook_z" in str(cfg["metadata"].get("hook_name")):
            cfg.setdefault("reshape_activations", "hook_z")
    kind = KINDS.get(cfg.get("architecture", ""))
    cfg["normalize_activations"] = cfg.get("normalize_activations") or "none"
    cfg.setdefault("reshape_activations", "none")
    cfg.setdefault("apply_b_dec_to_input", not (kind and kind.transcoder))
    cfg.setdefault("rescale_acts_by_decoder_norm", cfg.get("architecture") in BATCH_TOPK)
    return cfg, faults


def _faults(cfg: dict[str, Any], given: Given) -> list[str]:
    """Everything else wrong with a config."""
    name: Any = cfg.get("architecture")
    metadata = cfg["metadata"]
    faults = [f"{key}: unknown key" for key in cfg if key not in _KEYS | _OF_TRAINING]
    if name in _REFUSED:
        faults.append(f"architecture: {name!r} is not supported: {_REFUSED[name]}")
    elif name not in KINDS:
        faults.append(f"architecture: expected one of {', '.join(KINDS)}, got {name!r}")
    kind = KINDS.get(name, Kind("relu"))
    for key in ("d_in", "d_sae", *["d_out"] * kind.transcoder, *["k"] * kind.ranked):
        kinds = (int, float) if key == "k" and name in BATCH_TOPK else int
        if key not in cfg:
            faults.append(f"{key}: missing")
        elif isinstance(cfg[key], bool) or not isinstance(cfg[key], kinds) or cfg[key] <= 0:
            what = "whole number" if kinds is int else "number"
            faults.append(f"{key}: expected a positive {what}, got {cfg[key]!r}")
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"):
        if not isinstance(cfg.get(key) or False, bool):
            faults.append(f"{key}: expected true or false, got {cfg[key]!r}")
    faults += [f"{key}: does not go with {name!r}" for key, fits in (
        ("k", kind.ranked), ("rescale_acts_by_decoder_norm", kind.ranked), ("d_out", kind.transcoder),
        ("apply_b_dec_to_input", not kind.transcoder)) if cfg.get(key) and not fits]  # fmt: skip
    normalize, hook = cfg["normalize_activations"], metadata.get("hook_name") or ""
    if normalize not in (*NORMALIZATIONS, _FOLDED):
        hint = "; SAELens folds it at the end of training" if normalize == "covariance_whitening" else ""
        faults.append(f"normalize_activations: expected one of {', '.join(NORMALIZATIONS)}, {_FOLDED}, "
                      f"got {normalize!r}{hint}")  # fmt: skip
    elif normalize != "none" and kind.transcoder:
        faults.append(f"normalize_activations: {normalize!r} is not supported for a transcoder, whose output SAELens "
                      "leaves in other units than the model's")  # fmt: skip
    if cfg["reshape_activations"] not in ("none", "hook_z") or (
        cfg["reshape_activations"] == "hook_z" and hook and not hook.endswith("_z")
    ):
        faults.append(f"reshape_activations: {cfg['reshape_activations']!r} does not go with hook {hook!r}")
    faults += [f"{key}: {metadata[key]}: the activations of one head are none of our sites"
               for key in ("hook_head_index", "hook_head_index_out") if metadata.get(key) is not None]  # fmt: skip
    if given.batch_topk and _batch_k(cfg) is None:
        faults.append(f"batch_topk: this is a {name!r} dictionary, not one trained with BatchTopK; leave it out")
    if given.k is not None and not kind.ranked and _batch_k(cfg) is None:
        faults.append(f"k: a {name!r} dictionary has none, asked for {given.k}")
    return faults


def _batch_k(cfg: dict[str, Any]) -> float | None:
    """The k of a dictionary trained with BatchTopK, exported by SAELens as `jumprelu` or not."""
    if cfg.get("architecture") in BATCH_TOPK:
        return cfg.get("k")
    if cfg.get("architecture") == "jumprelu" and cfg["metadata"].get("training_architecture") in BATCH_TOPK:
        return (cfg["metadata"].get("training_architecture_details") or {}).get("k")
    return None


def _input_scale(folder: Path, cfg: dict[str, Any], faults: list[str]) -> float | None:
    """The factor that the activations were multiplied by in training, where it is not folded in yet."""
    path = folder / SCALER_FILE
    scale = read_json(path).get("scaling_factor") if path.is_file() else None
    if cfg["normalize_activations"] == _FOLDED:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < np.inf:
            faults.append(
                f"normalize_activations: {_FOLDED!r} needs its factor, sqrt(d_in) / (mean norm of the activations): "
                "fold it in by SAELens' fold_activation_norm_scaling_factor, or write "
                f'{{"scaling_factor": FACTOR}} to {path}'
            )
        return scale
    if scale is not None:
        faults.append(
            f"normalize_activations: {cfg['normalize_activations']!r}, but {path} has a scaling_factor of {scale}: "
            "write null there if it is folded in already, since folding it twice would be wrong"
        )
    return None


def _config(where: Path, cfg: dict[str, Any], given: Given) -> SAEConfig:
    metadata, kind = cfg["metadata"], KINDS[cfg["architecture"]]
    model = agree(where, "model", metadata.get("model_name"), given.model)
    hooks = {key: value for key in ("hook_name", "hf_hook_name") if (value := metadata.get(key))}
    layer = metadata.get("hook_layer")
    if layer is not None:
        hooks = {key: name.replace("{layer}", str(layer)) for key, name in hooks.items()}
        if wrong := [name for name in hooks.values() if site_of(name)[1] not in (None, layer)]:
            raise ValueError(f"{where}: hook_layer {layer} contradicts hook name {wrong[0]!r}")
    site, layer = locate(where, hooks, given._replace(layer=agree(where, "layer", layer, given.layer)), model)
    site_out = _site_out(where, metadata, site, layer, model) if kind.transcoder else site
    batch_k = _batch_k(cfg)
    k = agree(where, "k", batch_k if given.batch_topk else cfg.get("k") if kind.ranked else None, given.k)
    rank = kind.activation in ("topk", "abstopk") or given.batch_topk
    l0 = metadata.get("l0")
    slice_: Sequence[Any] = metadata.get("seqpos_slice") or ()
    start = slice_[0] if len(slice_) > 1 else 0
    return SAEConfig(
        d_in=cfg["d_in"],
        d_sae=cfg["d_sae"],
        d_out=cfg["d_in"] if cfg.get("d_out") is None else cfg["d_out"],
        activation="batchtopk" if given.batch_topk else kind.activation,
        k=k if rank else None,
        subtract_b_dec=cfg["apply_b_dec_to_input"],
        normalize=NORMALIZATIONS.get(cfg["normalize_activations"], "none"),
        skip=kind.skip,
        site=site,
        site_out=site_out,
        layers=(layer,),
        l0=(l0 if isinstance(l0, int | float) else k or batch_k,),
        skip_first=metadata.get("skip_first", max(1, start or 0)),
        model=model,
        units=metadata.get("units") or ("residual" if cfg["rescale_acts_by_decoder_norm"] else "unknown"),
    )


def _site_out(where: Path, metadata: dict[str, Any], site: str, layer: int, model: str | None) -> str:
    """Where a transcoder's output belongs: as declared, or mlp_out where it reads what the MLP reads."""
    hooks = {key: value for key in ("hook_name_out", "hf_hook_name_out") if (value := metadata.get(key))}
    if not hooks and site in ("mlp_normed", "mlp_in"):
        return "mlp_out"
    if not hooks:
        raise ValueError(f"{where}: metadata: hook_name_out: missing; it says where a transcoder's output belongs")
    site_out, written = locate(where, hooks, Given(), model, remedy="write that site's name there")
    if written != layer:
        raise ValueError(f"{where}: a cross-layer transcoder (layer {layer} to {written}); not supported")
    return site_out


def _warn_of_processing(where: Path, cfg: dict[str, Any]) -> None:
    """Some dictionaries were trained on activations that the model itself does not have."""
    if cfg["normalize_activations"] == "layer_norm":  # which removes the shift of each token
        return
    processing = cfg["metadata"].get("model_from_pretrained_kwargs") or {}
    names = ("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")
    if changed := [name for name in names if processing.get(name)]:
        warnings.warn(
            f"{where}: trained on a model that TransformerLens had processed ({', '.join(changed)}), whose activations"
            " differ from the model's own; expect a worse reconstruction",
            stacklevel=2,
        )


# Weights -------------------------------------------------------------------------------------------------------------


def _weights(path: Path, cfg: dict[str, Any], config: SAEConfig, scale: float | None) -> dict[str, np.ndarray]:
    """The tensors, checked and folded into canonical parameters."""
    name, tensors, where = cfg["architecture"], read_tensors(path), f"{path}, a {cfg['architecture']} dictionary"
    features, shapes = (config.d_sae,), param_shapes(config)
    if name == "gated":
        shapes = {"W_enc": shapes["W_enc"], "r_mag": features, "b_gate": features, "b_mag": features,
                  "W_dec": shapes["W_dec"], "b_dec": shapes["b_dec"]}  # fmt: skip
    if name in BATCH_TOPK:
        shapes = {key: shape for key, shape in shapes.items() if key != "threshold"} | {"topk_threshold": ()}
    if name == "jumprelu" and config.activation == "batchtopk":
        shapes["threshold"] = features
    rules = {key: (key, key == "W_skip") for key in shapes}
    if "log_threshold" in tensors:  # of JumpReLU trainers before 6
        tensors["log_threshold"] = np.exp(tensors["log_threshold"].astype(np.float32))
        rules["log_threshold"] = ("threshold", False)
    # Tensors of finetuning: of all ones in many older files.
    finetuned = {"scaling_factor", "finetuning_scaling_factor"} & tensors.keys()
    if finetuned:
        rules |= dict.fromkeys(finetuned, ("scaling_factor", False))
        shapes["scaling_factor"] = features
    weights = assemble(where, tensors, rules, shapes)
    finetuned_by = weights.pop("scaling_factor", np.ones(features, np.float32))
    if not np.allclose(finetuned_by, 1):
        if not cfg.get("finetuning_scaling_factor"):
            raise ValueError(f"{where}: scaling_factor: not all 1, but cfg.json has no finetuning_scaling_factor: true")
        weights["W_dec"] = (weights["W_dec"] * finetuned_by.astype(np.float64)[:, None]).astype(np.float32)
    return _folded(where, weights, cfg, config, scale)


def _folded(where: str, weights: folds.Params, cfg: dict[str, Any], config: SAEConfig, scale: float | None):
    name, rescaled = cfg["architecture"], cfg["rescale_acts_by_decoder_norm"]
    # BatchTopK's threshold is compared with what it ranks, which is already multiplied by the decoder's norm.
    learnt = weights.pop("topk_threshold", None)
    if name == "gated":
        weights = folds.gated(weights)
    if scale is not None:
        weights = folds.input_scale(weights, scale)
        learnt = learnt / scale if learnt is not None and rescaled else learnt
    if rescaled:
        weights = folds.unit_rows(weights)
    if config.activation == "batchtopk":
        weights.pop("threshold", None)
        return weights
    if learnt is not None:
        weights["threshold"] = np.full(config.d_sae, learnt, np.float32)
    if _batch_k(cfg) is not None and not weights["threshold"].any():
        raise ValueError(f"{where}: its BatchTopK threshold is 0, which means that none was learnt (training sets it);"
                         " load it with batch_topk=True to keep the k largest of a batch, as in training")  # fmt: skip
    return weights
