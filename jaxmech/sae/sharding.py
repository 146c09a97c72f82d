"""Where dictionaries live on a device mesh: features over the axis of the model's hidden units."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmech.models.sharding import MESH_AXES, auto_axes
from jaxmech.sae.module import SAE, SparseCoder


def sae_shardings(saes: SAE, mesh: Mesh) -> SAE:
    """`saes`, of arrays or of shapes, with a `NamedSharding` for each leaf; an axis that the devices do not divide is
    replicated, and so are the layers of a stack."""
    mesh, config = auto_axes(mesh), saes.config
    coder = jax.eval_shape(SparseCoder(config).init, jax.random.key(0), jnp.zeros(config.d_in, jnp.float32))["params"]

    def place(name: str, leaf) -> NamedSharding:
        axes = coder[name].names
        lead, sizes = leaf.ndim - len(axes), leaf.shape[leaf.ndim - len(axes) :]
        names = [MESH_AXES.get(axis) for axis in axes]
        fits = [n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, sizes, strict=True)]
        spec = [n if ok else None for n, ok in zip(names, fits, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*[None] * lead, *spec))

    return saes.replace(params={name: place(name, leaf) for name, leaf in saes.params.items()})


def shard_saes(saes: SAE, mesh: Mesh) -> SAE:
    """A dictionary or a stack, spread over the devices of a mesh as `sae_shardings` says."""
    return jax.device_put(saes, sae_shardings(saes, mesh))
