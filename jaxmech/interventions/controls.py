"""What effects are compared with: feature sets matched to the selection, directions of the same norm.

`L` denotes layers, `L'` those with a dictionary, `F` features, `D` the residual width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.arguments import Array, rng_of


def matched_sets(
    selection: list[tuple[int, int]],
    *,
    fires: np.ndarray,
    strength: np.ndarray,
    layers: tuple[int, ...],
    sets: int,
    key: jax.Array,
    neighbours: int = 20,
) -> list[list[tuple[int, int]]]:
    """Random feature sets matched to the selection on layer, firing rate and |dz| * ||D_j||.

    Each selected feature is replaced by one drawn from its `neighbours` nearest unselected features of the same layer,
    by rank of firing rate and of strength. Within a set no feature occurs twice.

    Args:
      selection: (layer, feature) pairs; fires, strength: [L',F] over `layers`.

    Raises:
      ValueError: a layer has too few live features to draw from.
    """
    rng, slot = rng_of(key), {layer: i for i, layer in enumerate(layers)}
    pools = {}
    for layer, feature in selection:
        i = slot[layer]
        taken = {f for selected_layer, f in selection if selected_layer == layer}
        pool = np.array([f for f in np.flatnonzero(fires[i] > 0) if f not in taken])
        need = len(taken)
        if len(pool) <= need:
            raise ValueError(
                f"layer {layer} has {len(pool)} unselected features that fire, too few to match {need} selected ones: "
                "train larger dictionaries or select fewer features"
            )
        rank = lambda a: np.argsort(np.argsort(a))  # noqa: E731
        compared = np.append(pool, feature)
        coordinates = np.stack([rank(fires[i, compared]), rank(strength[i, compared])])
        distance = np.abs(coordinates[:, :-1] - coordinates[:, -1:]).sum(0)
        pools[layer, feature] = pool[np.argsort(distance, kind="stable")[: max(neighbours, 2 * need)]]
    out = []
    for _ in range(sets):
        chosen: list[tuple[int, int]] = []
        for pair in selection:
            free = [f for f in pools[pair] if (pair[0], int(f)) not in chosen]
            chosen.append((pair[0], int(rng.choice(free))))
        out.append(chosen)
    return out


def random_directions(like: Array, *, count: int, key: jax.Array) -> jax.Array:
    """[count,L,D] Gaussian directions with the norm of `like` [L,D] at every layer."""
    noise = jax.random.normal(key, (count, *like.shape))
    return noise / jnp.linalg.norm(noise, axis=-1, keepdims=True) * jnp.linalg.norm(like, axis=-1, keepdims=True)
