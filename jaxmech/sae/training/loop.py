"""The training loop: dictionaries for all layers and sparsities in one compiled program, resumable bit for bit."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh

from jaxmech.activations.stream import BatchStream
from jaxmech.io.progress import console
from jaxmech.io.progress import progress as progress_bar
from jaxmech.io.reprs import short_repr
from jaxmech.models.sharding import auto_axes
from jaxmech.sae.module import SAE
from jaxmech.sae.training.checkpoint import Checkpoints
from jaxmech.sae.training.config import SAETrainConfig
from jaxmech.sae.training.export import export
from jaxmech.sae.training.metrics import MetricsLog
from jaxmech.sae.training.step import FEATURES, ROWS, batch_sharding, init_state, state_shardings, train_step


class Trained(NamedTuple):
    """saes: a stack of dictionaries for each sparsity; history: a row per logged step, sparsity and layer."""

    saes: list[SAE]
    history: pd.DataFrame

    def __repr__(self) -> str:
        return short_repr(self)


def train_saes(
    config: SAETrainConfig,
    stream: BatchStream,
    *,
    key: jax.Array,
    mesh: Mesh | None = None,
    checkpoint_dir: str | Path | None = None,
    log_dir: str | Path | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> Trained:
    """Trains a dictionary for each of the stream's layers at each of the config's sparsities.

    Args:
      stream: batch i must be a pure function of i (see `jaxmech.activations.stream`).
      key: random directions and the draws of AuxK.
      mesh: devices to train on (`jaxmech.make_mesh`): a batch's rows are spread over its "data" axis, features over
        its "model" axis. None: one device.
      checkpoint_dir: where to save, and to resume from if it holds a training of the same config, stream and key.
      log_dir: a folder for metrics.csv, the history as it grows, and, with `tensorboard`, for events.
      progress: whether to show a progress bar; `jaxmech.show_progress` switches all of them.

    Returns:
      A stack of dictionaries for each sparsity, in order, and the history: a row per logged step, sparsity and layer
      with fvu, l0, dead, aux (AuxK's loss) and threshold: the mean of a layer's thresholds for "jumprelu", else the
      running mean of the smallest activation in a batch, which the BatchTopK kinds are exported with.

    Raises:
      ValueError: a checkpoint of another training, devices that do not divide batch or features, a folder that cannot
        be written, a disk without room for a checkpoint, or a loss that is no longer finite.
    """
    if tensorboard and log_dir is None:
        raise ValueError("log_dir: tensorboard=True needs a folder to write to")
    mesh = checked_mesh(mesh, config, stream)
    checkpoints = Checkpoints(checkpoint_dir, _identity(config, stream, key)) if checkpoint_dir else None
    state = init_state(config, stream, key)
    rows: list[dict[str, Any]] = []
    if mesh is not None:
        state = jax.device_put(state, state_shardings(config, state, mesh))
    with ExitStack() as stack:
        if checkpoints:
            stack.enter_context(closing(checkpoints))
            state, rows = checkpoints.restore(state) or (state, rows)
            if not rows:
                checkpoints.require_space(state)
        log = stack.enter_context(closing(MetricsLog(log_dir, rows, tensorboard=tensorboard))) if log_dir else None
        logged = int(state.step)
        if progress and logged:
            console().print(f"resumes from step {logged} of {config.steps}", highlight=False)
        bar = progress_bar("training SAEs", config.steps - logged, unit="step") if progress else None
        advance = stack.enter_context(bar) if bar else None
        for step in range(logged, config.steps):
            x = stream.batch(step)
            x = x if mesh is None else jax.device_put(x, batch_sharding(mesh))
            state, metrics = train_step(config, state, x, mesh)
            if _due(config, step, config.log_every):
                rows += (new := _rows(config, stream, step + 1, jax.device_get(metrics)))
                if log:
                    log.add(new)
                if advance:
                    advance(step + 1 - logged, _note(new))
                logged = step + 1
            if checkpoints and _due(config, step, config.checkpoint_every):
                checkpoints.save(step + 1, state, rows)
    return Trained(export(config, state, stream), pd.DataFrame(rows))


def _due(config: SAETrainConfig, step: int, every: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == config.steps


def checked_mesh(mesh: Mesh | None, config: SAETrainConfig, stream: BatchStream) -> Mesh | None:
    """The mesh as `train_saes` uses it.

    Raises:
      ValueError: its devices do not divide batch or features, or it has neither axis.
    """
    if mesh is None:
        return None
    sizes = {ROWS: ("batch_size", stream.batch_size), FEATURES: ("d_sae", config.d_sae)}
    if not sizes.keys() & set(mesh.axis_names):
        raise ValueError(
            f"mesh: expected an axis {ROWS!r} or {FEATURES!r}, got {', '.join(mesh.axis_names)}; see make_mesh"
        )
    for axis, (name, size) in sizes.items():
        if size % (devices := mesh.shape.get(axis, 1)):
            raise ValueError(
                f"{name}: {size} cannot be spread evenly over the {devices} devices of the mesh's {axis!r} axis"
            )
    return auto_axes(mesh)


def _rows(config: SAETrainConfig, stream: BatchStream, step: int, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of numbers per lane, from metrics [S,L']."""
    lanes = [(s, layer) for s in config.sparsities for layer in stream.layers]
    finite = np.isfinite(metrics["fvu"]).ravel()
    if not finite.all():
        bad = ", ".join(f"{layer} (sparsity {s:g})" for (s, layer), ok in zip(lanes, finite, strict=True) if not ok)
        raise ValueError(f"training: the loss is not finite at step {step}, layers {bad}; lower lr")
    names = ("fvu", "l0", "dead", "aux", "threshold")
    columns = [metrics[name].ravel().tolist() for name in names]
    return [
        {"step": step, "tokens": step * stream.batch_size, "layer": layer, "sparsity": float(s)}
        | dict(zip(names, values, strict=True))
        for (s, layer), *values in zip(lanes, *columns, strict=True)
    ]


def _note(rows: list[dict[str, Any]]) -> str:
    """One line on the logged rows of a step, one per lane."""
    fvu, l0 = ([row[name] for row in rows] for name in ("fvu", "l0"))
    sparsity = f"L0 {min(l0):.0f}" + (f" to {max(l0):.0f}" if max(l0) - min(l0) >= 1 else "")
    return f"FVU {min(fvu):.3f} to {max(fvu):.3f}, {sparsity}, dead {np.mean([row['dead'] for row in rows]):.1%}"


def _identity(config: SAETrainConfig, stream: BatchStream, key: jax.Array) -> dict[str, Any]:
    """What a checkpoint must agree with; how often to log or save, and on which devices to train, is free to change."""
    facts = dataclasses.asdict(config) | stream.settings()
    facts["key"] = np.asarray(jax.random.key_data(key)).tolist()
    free = ("log_every", "checkpoint_every")
    return json.loads(json.dumps({name: value for name, value in facts.items() if name not in free}))
