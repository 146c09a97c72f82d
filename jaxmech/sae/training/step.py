"""The state of training and its one compiled step, over all lanes: every layer at every sparsity.

`S` denotes sparsities, `L'` the layers trained, `B` a batch of activations, `D` the width at the site, `F` features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmech.activations.stream import BatchStream
from jaxmech.models.sharding import MESH_AXES
from jaxmech.sae.module import matmul
from jaxmech.sae.topk import largest
from jaxmech.sae.training.config import SAETrainConfig, largest_k, optimizer, sparsity_at
from jaxmech.sae.training.objectives import OBJECTIVES, kept, revival, sparsely
from jaxmech.sae.training.sparse import fits

ROWS, FEATURES = MESH_AXES["batch"], MESH_AXES["feature"]
"""Mesh axes of a batch's rows and of features."""


@struct.dataclass
class TrainState:
    """All that training carries from step to step.

    params: each [S,L',...], see `jaxmech.sae.training.objectives.Params`; on centred, scaled activations.
    sparsity: [S] as configured. silent: [S,L',F] int32 steps since a feature fired.
    threshold, l0: [S,L'] running means of the smallest pre-activation kept and of L0, not yet corrected for their
    start. last: [S,L'] the smallest pre-activation kept in the last batch. mean, scale: [L',D] see `normalise`.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, jax.Array]
    optimizer: Any
    sparsity: jax.Array
    silent: jax.Array
    threshold: jax.Array
    l0: jax.Array
    last: jax.Array
    mean: jax.Array
    scale: jax.Array


def init_state(config: SAETrainConfig, stream: BatchStream, key: jax.Array) -> TrainState:
    """Encoder = decoder transposed, unit rows; b_dec zero, as activations are centred.

    Raises:
      ValueError: activations that are not finite or do not vary.
    """
    L, D, F = len(stream.layers), stream.d_in, config.d_sae
    mean, scale = normaliser(config, *stream.statistics())
    init_key, key = jax.random.split(key)
    # A layer's draws depend on the layer alone, not on which others are trained with it.
    keys = jax.vmap(partial(jax.random.fold_in, init_key))(jnp.asarray(stream.layers))
    rows = jax.vmap(lambda k: jax.random.normal(k, (F, D), jnp.float32))(keys)
    normalised: Callable[..., jax.Array] = jax.vmap(partial(normalise, config))
    if config.init == "data":
        needed = -(-F // stream.batch_size)
        data = np.concatenate([np.asarray(stream.batch(i)) for i in range(needed)], axis=1)[:, :F]
        # A little noise keeps tokens that occur twice from making the same feature twice.
        rows = 0.1 * rows + normalised(data, mean, scale)
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    first = normalised(stream.batch(0), mean, scale)
    sparsity = jnp.asarray(config.sparsities, jnp.float32)
    params = jax.vmap(jax.vmap(partial(_init_params, config), (None, 0, 0)), (0, None, None))(sparsity, first, rows)
    lanes = (len(config.sparsities), L)
    return TrainState(
        step=jnp.int32(0),
        key=jax.random.key_data(key),
        params=params,
        optimizer=jax.vmap(jax.vmap(optimizer(config).init))(params),
        sparsity=sparsity,
        silent=jnp.zeros((*lanes, F), jnp.int32),
        threshold=jnp.zeros(lanes, jnp.float32),
        l0=jnp.zeros(lanes, jnp.float32),
        last=jnp.ones(lanes, jnp.float32),
        mean=jnp.asarray(mean, jnp.float32),
        scale=jnp.asarray(scale, jnp.float32),
    )


def _init_params(config: SAETrainConfig, sparsity, x: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
    """One lane's parameters, for its first batch x [B,D] and its decoder rows [F,D].

    Data directions overlap, so that an encoder equal to the decoder would give codes that add up to many times x: it
    is scaled to the length with which the first reconstruction has the least error. Kinds with a penalty start with
    the threshold (or bias) at which `start_l0` features per token fire, since they are slow to get there.
    """
    pre, b_dec = matmul(x, rows.T), jnp.zeros(x.shape[1], jnp.float32)
    if config.selects:
        mask = kept(config, pre, sparsity_at(config, sparsity, jnp.int32(0)))
    else:
        mask = largest(pre, min(config.start_l0, config.d_sae) * len(x))
    start = jnp.min(jnp.where(mask, pre, jnp.inf))
    y = matmul(jnp.where(mask, pre - start if config.kind == "standard" else pre, 0.0), rows)
    size = jnp.sum(x * y) / jnp.maximum(jnp.sum(y * y), 1e-12)
    params, zero, start = (
        {"E": size * rows, "W_dec": rows, "b_dec": b_dec},
        jnp.zeros(len(rows), jnp.float32),
        size * start,
    )
    if config.kind == "gated":
        return params | {"b_gate": zero - start, "b_mag": zero, "r_mag": zero}
    if config.kind == "jumprelu":
        return params | {"b_enc": zero, "log_threshold": zero + jnp.log(start)}
    return params | {"b_enc": zero - start if config.kind == "standard" else zero}


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="state")
def train_step(
    config: SAETrainConfig, state: TrainState, x: jax.Array, mesh: Mesh | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch of raw activations x [L',B,D]; metrics are [S,L'] each.

    With a mesh, state and batch are sharded by `state_shardings` and `batch_sharding`.
    """
    x = jax.vmap(partial(normalise, config))(x, state.mean, state.scale)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    # The same draw for every lane: what a lane learns must not depend on which others are trained with it.
    draw = jax.random.uniform(key, (config.d_sae,), jnp.float32)
    sparsity = sparsity_at(config, state.sparsity, state.step)
    sparse = mesh is None and can_be_sparse(config, x.shape[1])
    step_lane = partial(_lane_step, config, sparsely if sparse else OBJECTIVES[config.kind], draw)
    lanes = (state.params, state.optimizer, state.silent, state.last)
    if sparse:  # its kernel takes one lane at a time
        params, opt, silent, last, metrics = jax.lax.map(
            lambda s: jax.lax.map(lambda lane: step_lane(s[0], *lane), (*s[1:], x)), (sparsity, *lanes)
        )
    else:
        layers = jax.vmap(step_lane, (None, 0, 0, 0, 0, 0))
        params, opt, silent, last, metrics = jax.vmap(layers, (0, 0, 0, 0, 0, None))(sparsity, *lanes, x)
    threshold = state.threshold + config.threshold_rate * (last - state.threshold)
    l0 = state.l0 + config.threshold_rate * (metrics["l0"] - state.l0)
    step = state.step + 1
    if config.kind == "jumprelu":
        metrics["threshold"] = jnp.exp(params["log_threshold"]).mean(-1)
    else:
        metrics["threshold"] = corrected(config, threshold, step).astype(jnp.float32)
    state = dataclasses.replace(
        state, step=step, params=params, optimizer=opt, silent=silent, last=last, threshold=threshold, l0=l0
    )  # fmt: skip
    if mesh is not None:
        state = jax.lax.with_sharding_constraint(state, state_shardings(config, state, mesh))
    return state, metrics


def can_be_sparse(config: SAETrainConfig, B: int) -> bool:
    """Whether the sparse products support this training, and are worth it."""
    rare = 4 * largest_k(config) <= config.d_sae
    supported = config.kind in ("topk", "batchtopk") and config.compute_dtype == "float32"
    return supported and rare and jax.default_backend() == "cpu" and fits(B, config.d_sae)


def _lane_step(config: SAETrainConfig, objective, draw, sparsity, params, opt, silent, last, x):
    """One step of one lane; x [B,D] centred and scaled."""
    dead = silent >= config.dead_after
    _, helpers = jax.lax.top_k(jnp.where(dead, draw, -1.0), min(config.aux_features, config.d_sae))

    def loss_fn(p):
        terms = objective(config, p, x, sparsity, last)
        # In a lane that is not vmapped, this is skipped while no feature is dead.
        aux = jax.lax.cond(
            dead.any(), lambda: revival(config, p, x, terms.error, helpers, dead[helpers]), lambda: jnp.float32(0)
        )
        stats = (jnp.mean(terms.error**2), aux, terms.fired, terms.active, terms.smallest)
        return terms.loss + config.aux_coefficient * aux, stats

    grads, (error, aux, fired, active, smallest) = jax.grad(loss_fn, has_aux=True)(params)
    W, unit_rows = params["W_dec"], config.kind != "standard"
    if unit_rows:  # only turn the rows
        grads["W_dec"] -= jnp.sum(grads["W_dec"] * W, axis=-1, keepdims=True) * W
    updates, opt = optimizer(config).update(grads, opt, params)
    if config.kind == "jumprelu":
        updates["log_threshold"] *= config.threshold_speed
    params = optax.apply_updates(params, updates)
    if unit_rows:
        params["W_dec"] /= jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
    silent = jnp.where(fired, 0, silent + 1)
    variance = jnp.mean((x - x.mean(0)) ** 2)
    dead_now = jnp.mean(silent >= config.dead_after, dtype=jnp.float32)
    metrics = {"fvu": error / variance, "l0": active.astype(jnp.float32) / x.shape[0], "dead": dead_now}
    return params, opt, silent, jnp.where(active > 0, smallest, last), metrics | {"aux": aux}


def normaliser(config: SAETrainConfig, mean: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale [L',D] with which `(x - mean) / scale` has a mean square of 1 over dimensions and tokens."""
    limit = config.max_spread * np.median(spread, axis=1, keepdims=True)
    tame = np.maximum(spread / limit, 1.0) if limit.all() else np.ones_like(spread)
    size = np.sqrt(np.mean((spread / tame) ** 2, axis=1, keepdims=True))
    return mean, tame * size


def normalise(config: SAETrainConfig, x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    """What a layer's dictionary is trained on, for raw x [B,D]."""
    z = (x - mean) / scale
    limit = config.max_norm * x.shape[-1] ** 0.5
    return z * jnp.minimum(1.0, limit / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-12))


def corrected(config: SAETrainConfig, running: jax.Array, step: jax.Array) -> jax.Array:
    """A running mean without the weight of its start at 0."""
    return running / (1 - (1 - config.threshold_rate) ** step)


def state_shardings(config: SAETrainConfig, state: TrainState, mesh: Mesh) -> Any:
    """A `NamedSharding` for each leaf of the state: features over the mesh's model axis, all else everywhere."""
    axis = FEATURES if FEATURES in mesh.shape else None

    def place(leaf):
        by_feature = leaf.ndim > 2 and leaf.shape[2] == config.d_sae  # [S,L',F] or [S,L',F,D]
        return NamedSharding(mesh, PartitionSpec(None, None, axis) if by_feature else PartitionSpec())

    return jax.tree.map(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [L',B,D]: rows over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS if ROWS in mesh.shape else None))
