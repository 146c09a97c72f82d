"""Where arrays live: one table from the logical axes of parameters to the axes of a device mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import param_axes, param_shapes

MESH_AXES: Mapping[str, str] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv": "model",
    "mlp": "model",
    "feature": "model",
}
"""Logical axis -> mesh axis. Axes that are not named here (the residual width, a head's width, layers) are replicated,
and so is an axis whose size the devices do not divide, such as a single key/value head."""


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """A mesh of `data * model` devices: prompts and sweep points over "data"; heads, hidden units, words and dictionary
    features over "model".

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices()
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(
            f"data * model: expected 1 to {len(devices)} devices, the number available, got {data} * {model}"
        )
    # The compiler propagates shardings from the parameters; nothing in the decoder mentions devices.
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[: data * model]
    )


def param_shardings(config: ModelConfig, mesh: Mesh) -> Mapping[str, Any]:
    """The parameter tree with a `NamedSharding` for each leaf.

    Raises:
      ValueError: a mesh with neither of the axes of `make_mesh`.
    """
    mesh = auto_axes(mesh)
    if not set(mesh.axis_names) & set(MESH_AXES.values()):
        raise ValueError(f"mesh: expected an axis 'data' or 'model', got {', '.join(mesh.axis_names)}; see make_mesh")

    def place(leaf, axes):
        names = [MESH_AXES.get(axis) for axis in axes]
        fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, leaf.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*(n if ok else None for n, ok in zip(names, fits, strict=True))))

    return jax.tree.map(place, param_shapes(config), param_axes(config))


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays that lead with the batch axis, spread over the mesh's "data" axis.

    Raises:
      ValueError: a batch that the devices do not divide, or a mesh without a "data" axis.
    """
    if (axis := MESH_AXES["batch"]) not in mesh.shape:
        raise ValueError(f"mesh: expected an axis {axis!r} to spread rows over, got {', '.join(mesh.axis_names)}")
    rows = mesh.shape[axis]
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % rows:
            raise ValueError(f"batch: {leaf.shape[0]} rows cannot be spread evenly over {rows} devices; pad the batch")
    return jax.device_put(tree, NamedSharding(auto_axes(mesh), PartitionSpec(axis)))


def auto_axes(mesh: Mesh) -> Mesh:
    """The same devices; axes of another type would ask for shardings inside the decoder."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
