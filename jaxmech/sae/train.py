"""Training of sparse autoencoders: all layers in one compiled program, resumable to the bit.

`B` denotes a batch of activations, `D` the width at the site, `F` dictionary features, `L'` the layers trained.

TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410), with unit decoder rows
and AuxK. Activations are centred and scaled per layer while training; the export undoes it, so that a dictionary eats
raw activations, its decoder rows have unit norm, and a feature's activation is a length in the residual stream.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import struct

from jaxmech.progress import progress as progress_bar
from jaxmech.sae.checkpoint import Checkpoints
from jaxmech.sae.module import SAE, SAEConfig, make_sae, matmul
from jaxmech.sae.stream import BatchStream
from jaxmech.sae.topk import largest


@dataclasses.dataclass(frozen=True)
class SAETrainConfig:
    """How dictionaries are trained. The batch size belongs to the stream.

    Attributes:
      d_sae: features of each layer's dictionary.
      k: features active per token: on average ("batchtopk") or exactly ("topk").
      kind: "batchtopk" keeps the k*B largest of a batch and is exported as JumpReLU with the threshold learnt on the
        way, so that a few features can later be encoded alone; "topk" keeps the k largest of each token.
      steps: batches.
      lr: Adam's step size, after `warmup` steps of linear rise and before the linear fall to 0 that takes the last
        `decay` share of the steps.
      b1, b2: Adam's decay rates.
      max_spread: dimensions that vary more than this many times the median dimension are scaled down to it for
        training: a few massive dimensions of a residual stream would otherwise be all that is learnt.
      max_norm: activations whose centred norm is more than this many times the typical one (attention sinks) are
        shortened to it for training; in a batch they would take every place.
      init: decoder rows start as "data" (centred activations of the first batches) or "random" directions.
      dead_after: steps without firing that make a feature dead.
      aux_features: dead features, drawn anew each step, that reconstruct what the others left over (AuxK).
      aux_coefficient: weight of that loss.
      threshold_rate: rate of the running mean of a batch's smallest kept pre-activation (SAELens' `topk_threshold_lr`;
        the start is corrected for, as short trainings need).
      log_every, checkpoint_every: steps.
    """

    d_sae: int
    k: int = 32
    kind: str = "batchtopk"
    steps: int = 1000
    lr: float = 3e-3
    warmup: int = 20
    decay: float = 0.3
    b1: float = 0.9
    b2: float = 0.999
    max_spread: float = 4.0
    max_norm: float = 3.0
    init: str = "data"
    dead_after: int = 50
    aux_features: int = 256
    aux_coefficient: float = 1 / 32
    threshold_rate: float = 0.05
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self):
        if self.kind not in ("batchtopk", "topk"):
            raise ValueError(f"kind: expected 'batchtopk' or 'topk', got {self.kind!r}")
        if self.init not in ("data", "random"):
            raise ValueError(f"init: expected 'data' or 'random', got {self.init!r}")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k: expected 1..d_sae={self.d_sae}, got {self.k}")
        if not 0 <= self.decay <= 1 or self.warmup < 0 or self.steps < 1 or self.lr <= 0:
            raise ValueError(
                "expected steps >= 1, lr > 0, warmup >= 0 and decay in [0, 1], got"
                f" steps={self.steps}, lr={self.lr}, warmup={self.warmup}, decay={self.decay}"
            )
        if not 0 < self.threshold_rate <= 1 or self.dead_after < 1 or self.log_every < 1:
            raise ValueError("expected threshold_rate in (0, 1], dead_after >= 1 and log_every >= 1")


@struct.dataclass
class TrainState:
    """All that a training carries; every leaf but `step` and `key` leads with L'.

    params: E [L',F,D] the encoder in rows, b_enc [L',F], W_dec [L',F,D], b_dec [L',D], on centred, scaled activations.
    silent: [L',F] int32 steps since a feature fired. threshold: [L'] the running mean, not yet corrected for its start.
    last: [L'] the smallest pre-activation kept in the last batch. mean, scale: [L',D] see `_normalise`.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, jax.Array]
    optimizer: Any
    silent: jax.Array
    threshold: jax.Array
    last: jax.Array
    mean: jax.Array
    scale: jax.Array


def train(
    config: SAETrainConfig,
    stream: BatchStream,
    *,
    key: jax.Array,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[SAE, pd.DataFrame]:
    """Trains one dictionary for each of the stream's layers.

    Args:
      stream: batch i must be a pure function of i (see `jaxmech.sae.stream`).
      key: random directions and the draws of AuxK.
      checkpoint_dir: where to save and, if a training of the same config, stream and key stands there, to go on.
      progress: whether to show a progress bar.

    Returns:
      The stack of dictionaries, and the history: a row per logged step and layer with fvu, l0, dead, aux, threshold.

    Raises:
      ValueError: a checkpoint of another training, or a loss that is no longer finite.
    """
    checkpoints = Checkpoints(checkpoint_dir, _identity(config, stream, key)) if checkpoint_dir else None
    state, rows = init_state(config, stream, key), []
    if checkpoints and (found := checkpoints.restore(state)):
        state, rows = found
    begin = int(state.step)
    bar = progress_bar("training SAEs", config.steps - begin, unit="step") if progress else nullcontext(_silent)
    with closing(checkpoints) if checkpoints else nullcontext(), bar as advance:
        for step in range(begin, config.steps):
            state, metrics = train_step(config, state, stream.batch(step))
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                rows += _log(stream, step + 1, jax.device_get(metrics))
                advance(step + 1 - begin, _note(rows[-len(stream.layers) :]))
                begin = step + 1
            if checkpoints and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
                checkpoints.save(step + 1, state, rows)
    return export(config, state, stream), pd.DataFrame(rows)


def init_state(config: SAETrainConfig, stream: BatchStream, key: jax.Array) -> TrainState:
    """Encoder = decoder transposed, unit rows, biases zero (b_dec is the mean, as activations are centred)."""
    L, D, F = len(stream.layers), stream.d_in, config.d_sae
    mean, scale = _normaliser(config, *stream.statistics())
    init_key, key = jax.random.split(key)
    # A layer's draws depend on the layer alone, not on which others are trained beside it.
    keys = jax.vmap(partial(jax.random.fold_in, init_key))(jnp.asarray(stream.layers))
    rows = jax.vmap(lambda k: jax.random.normal(k, (F, D)))(keys)
    if config.init == "data":
        needed = -(-F // stream.batch_size)
        data = np.concatenate([np.asarray(stream.batch(i)) for i in range(needed)], axis=1)[:, :F]
        # A little noise keeps tokens that occur twice from making the same feature twice.
        rows = 0.1 * rows + jax.vmap(partial(_normalise, config))(data, mean, scale)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    first = jax.vmap(partial(_normalise, config))(stream.batch(0), mean, scale)
    size = jax.vmap(partial(_encoder_size, config))(first, rows)[:, None, None]
    params = {"E": size * rows, "b_enc": jnp.zeros((L, F)), "W_dec": rows, "b_dec": jnp.zeros((L, D))}
    return TrainState(
        step=jnp.int32(0),
        key=jax.random.key_data(key),
        params=params,
        optimizer=jax.vmap(_optimizer(config).init)(params),
        silent=jnp.zeros((L, F), jnp.int32),
        threshold=jnp.zeros(L),
        last=jnp.ones(L),
        mean=jnp.asarray(mean),
        scale=jnp.asarray(scale),
    )


def _encoder_size(config: SAETrainConfig, x: jax.Array, rows: jax.Array) -> jax.Array:
    """The factor on an encoder equal to the decoder with which the first reconstruction has the least error.

    Data directions overlap, so that their k codes add up to many times x.
    """
    pre = matmul(x, rows.T)
    y = matmul(jnp.where(_select(config, pre, 1.0), pre, 0.0), rows)
    return jnp.sum(x * y) / jnp.maximum(jnp.sum(y * y), 1e-12)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(config: SAETrainConfig, state: TrainState, x: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch of raw activations x [L',B,D]."""
    x = jax.vmap(partial(_normalise, config))(x, state.mean, state.scale)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # The same draw for every layer: what a layer learns must not depend on which others are trained beside it.
    draw = jax.random.uniform(key, (config.d_sae,))
    one = partial(_layer_step, config, draw)
    params, optimizer, silent, last, metrics = jax.vmap(one)(state.params, state.optimizer, state.silent, state.last, x)
    threshold = state.threshold + config.threshold_rate * (last - state.threshold)
    step = state.step + 1
    metrics["threshold"] = _corrected(config, threshold, step)
    state = state.replace(
        step=step, params=params, optimizer=optimizer, silent=silent, last=last, threshold=threshold
    )  # fmt: skip
    return state, metrics


def _layer_step(config: SAETrainConfig, draw, params, optimizer, silent, last, x):
    """One step of one layer; x [B,D] centred and scaled."""
    dead = silent >= config.dead_after
    pool = min(config.aux_features, config.d_sae)
    _, helpers = jax.lax.top_k(jnp.where(dead, draw, -1.0), pool)
    revive = dead[helpers]

    def loss_fn(p):
        pre = matmul(x - p["b_dec"], p["E"].T) + p["b_enc"]
        kept = _select(config, jax.lax.stop_gradient(pre), last)
        y = matmul(jnp.where(kept, pre, 0.0), p["W_dec"]) + p["b_dec"]
        error = x - y
        left = jax.lax.stop_gradient(error)
        # A pool of fixed size keeps AuxK a small product of fixed shape, however many features are dead.
        help_pre = matmul(jax.lax.stop_gradient(x - p["b_dec"]), p["E"][helpers].T) + p["b_enc"][helpers]
        help_y = matmul(jax.nn.relu(help_pre) * revive, p["W_dec"][helpers])
        aux = jnp.mean((left - help_y) ** 2) / (jnp.mean(left**2) + 1e-8)
        aux = jnp.where(revive.any(), aux, 0.0)
        loss = jnp.mean(error**2)
        smallest = jnp.min(jnp.where(kept, pre, jnp.inf))
        return loss + config.aux_coefficient * aux, (loss, aux, kept.any(0), kept.sum(), smallest)

    grads, (loss, aux, fired, active, smallest) = jax.grad(loss_fn, has_aux=True)(params)
    W = params["W_dec"]
    grads["W_dec"] -= jnp.sum(grads["W_dec"] * W, axis=-1, keepdims=True) * W  # only turn the rows
    updates, optimizer = _optimizer(config).update(grads, optimizer, params)
    params = optax.apply_updates(params, updates)
    params["W_dec"] /= jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
    silent = jnp.where(fired, 0, silent + 1)
    variance = jnp.mean((x - x.mean(0)) ** 2)
    metrics = {"fvu": loss / variance, "l0": active / x.shape[0], "dead": jnp.mean(silent >= config.dead_after)}
    return params, optimizer, silent, jnp.where(active > 0, smallest, last), metrics | {"aux": aux}


def _normaliser(config: SAETrainConfig, mean: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale [L',D] with which `(x - mean) / scale` has a mean square of 1 over dimensions and tokens."""
    limit = config.max_spread * np.median(spread, axis=1, keepdims=True)
    tame = np.maximum(spread / limit, 1.0) if limit.all() else np.ones_like(spread)
    size = np.sqrt(np.mean((spread / tame) ** 2, axis=1, keepdims=True))
    return mean, tame * size


def _normalise(config: SAETrainConfig, x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    """What a layer's dictionary is trained on, for raw x [B,D]."""
    z = (x - mean) / scale
    limit = config.max_norm * x.shape[-1] ** 0.5
    return z * jnp.minimum(1.0, limit / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-12))


def _select(config: SAETrainConfig, pre: jax.Array, guess: jax.Array) -> jax.Array:
    """Which pre-activations [B,F] are kept."""
    if config.kind == "batchtopk":
        return largest(pre, config.k * pre.shape[0], guess)
    lowest = jax.lax.top_k(pre, config.k)[0][:, -1:]
    return (pre >= lowest) & (pre > 0)


def _optimizer(config: SAETrainConfig) -> optax.GradientTransformation:
    fall = int(round(config.decay * config.steps))
    parts = [
        optax.linear_schedule(config.lr / max(config.warmup, 1), config.lr, max(config.warmup - 1, 1)),
        optax.linear_schedule(config.lr, 0.0, max(fall, 1)),
    ]
    schedule = optax.join_schedules(parts, [config.steps - fall])
    return optax.adam(schedule, b1=config.b1, b2=config.b2)


def _corrected(config: SAETrainConfig, threshold: jax.Array, step: jax.Array) -> jax.Array:
    """The running mean without the weight of its start at 0."""
    return threshold / (1 - (1 - config.threshold_rate) ** step)


def export(config: SAETrainConfig, state: TrainState, stream: BatchStream) -> SAE:
    """The dictionaries for raw activations, in canonical form.

    With z = (x - mean) / scale trained on: x's encoder is E / scale, its decoder W_dec * scale, whose rows a JumpReLU
    dictionary brings back to norm 1 by multiplying feature, bias and threshold. A TopK dictionary ranks the features
    of a token against each other, so its features keep the units that they were ranked in.
    """
    p = jax.tree.map(partial(np.asarray, dtype=np.float64), state.params)
    scale, mean = np.asarray(state.scale, np.float64), np.asarray(state.mean, np.float64)
    W_dec = p["W_dec"] * scale[:, None]
    length = np.linalg.norm(W_dec, axis=-1)  # [L',F]
    if config.kind == "topk":
        length = np.broadcast_to(length.mean(1, keepdims=True), length.shape)
    params = {
        "W_enc": (p["E"] / scale[:, None] * length[..., None]).transpose(0, 2, 1),
        "b_enc": p["b_enc"] * length,
        "W_dec": W_dec / length[..., None],
        "b_dec": mean + p["b_dec"] * scale,
    }
    if config.kind == "batchtopk":
        params["threshold"] = np.asarray(_corrected(config, state.threshold, state.step))[:, None] * length
    return make_sae(
        params,
        SAEConfig(
            d_in=stream.d_in,
            d_sae=config.d_sae,
            activation="jumprelu" if config.kind == "batchtopk" else "topk",
            k=None if config.kind == "batchtopk" else config.k,
            site=stream.site,
            layers=stream.layers,
            model=stream.model,
            units="residual" if config.kind == "batchtopk" else "residual / layer",
            source=f"trained by jaxmech ({config.kind}, k={config.k}, {config.steps} steps of {stream.batch_size})",
        ),
    )


def _log(stream: BatchStream, step: int, metrics: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    if not np.isfinite(metrics["fvu"]).all():
        bad = [layer for layer, fvu in zip(stream.layers, metrics["fvu"], strict=True) if not np.isfinite(fvu)]
        raise ValueError(f"training: the loss is not finite at step {step}, layers {bad}; lower lr")
    names = ("fvu", "l0", "dead", "aux", "threshold")
    return [
        {"step": step, "tokens": step * stream.batch_size, "layer": layer} | {n: float(metrics[n][i]) for n in names}
        for i, layer in enumerate(stream.layers)
    ]


def _silent(done: int, note: str) -> None:
    pass


def _note(rows: list[dict[str, Any]]) -> str:
    """One line on the logged rows of a step, one a layer."""
    fvu = [row["fvu"] for row in rows]
    l0, dead = (np.mean([row[name] for row in rows]) for name in ("l0", "dead"))
    return f"FVU {min(fvu):.3f} to {max(fvu):.3f}, L0 {l0:.0f}, dead {dead:.1%}"


def _identity(config: SAETrainConfig, stream: BatchStream, key: jax.Array) -> dict[str, Any]:
    """What a checkpoint must agree with; how often to log or save is free to change."""
    facts = dataclasses.asdict(config) | {"stream": stream.fingerprint()}
    facts["key"] = np.asarray(jax.random.key_data(key)).tolist()
    return {name: value for name, value in facts.items() if name not in ("log_every", "checkpoint_every")}
