"""What effects are compared with: feature sets matched to the selection, directions, both of the same norm.

`B` denotes prompts, `L` layers, `L'` those with a dictionary, `F` features, `K` chosen ones per layer, `D` the residual
width.

A selected set stands out among the features that it is compared with, so that sets matched on firing are a quarter of
its length. What edits write (`added`) is therefore measured, and the comparators are vectors of that norm.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import score
from jaxmech.interventions import edits
from jaxmech.interventions.patching import donor_values
from jaxmech.io.arguments import Array, rng_of
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap
from jaxmech.sae.module import SAE

_TINY = 1e-9


@partial(jax.jit, static_argnames="config")
def added(config: ModelConfig, params: Params, prompts: Prompts, edit: edits.Edit) -> jax.Array:
    """What an edit adds to its site at the decision token, [L,B,D], once it has acted at the layers below.

    Args:
      edit: one that knows its site, such as `patching.patch_edit` makes.
    """
    assert edit.site is not None
    slot, site = prompts.tokens.shape[1] - 1, edit.site

    def at_layer(layer):
        below = (jnp.arange(config.n_layers) < layer)[:, None, None]
        upstream = edit.replace(spans=edit.spans.replace(prompt=edit.spans.prompt & below))
        tap = Tap(edit.reads or site, lambda _, x: x[:, slot])
        _, out = score(config, params, prompts, edits={site: (upstream,)}, taps={"x": tap})
        here = jax.tree.map(lambda leaf: leaf[layer], edit)
        return jnp.where(here.spans.prompt[:, -1:], here.change(out.taps["x"][layer][:, None])[:, 0], 0.0)

    return jax.lax.map(at_layer, jnp.arange(config.n_layers))


@struct.dataclass
class AddDirection:
    """Edits for a sweep over directions [L,D]: each is added with the norm [L,B]; zeros stay zeros."""

    norm: jax.Array
    spans: edits.Spans
    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, direction: jax.Array) -> edits.Edits:
        return {self.site: (edits.add_vector(with_norm(direction[:, None], self.norm), self.spans),)}


@struct.dataclass
class AddMatched:
    """Edits for a sweep over selections: what setting each to the donors' values would add, with the norm [L,B].

    donor, base: residuals [L,B,D].
    """

    saes: SAE
    donor: jax.Array
    base: jax.Array
    norm: jax.Array
    spans: edits.Spans

    __repr__ = short_repr

    def __call__(self, selection: edits.Selection) -> edits.Edits:
        vector = with_norm(self.direction(selection), self.norm)
        return {self.saes.config.site_out: (edits.add_vector(vector, self.spans),)}

    def direction(self, selection: edits.Selection) -> jax.Array:
        """[L,B,D], of any norm; zeros where no feature of the set differs between donor and base."""
        encoder, W_dec = edits.gather(self.saes, selection)
        difference = donor_values(encoder, self.donor) - donor_values(encoder, self.base)
        return jnp.einsum("lbk,lkd->lbd", difference, W_dec, precision=jax.lax.Precision.HIGHEST)

    def achieved(self, selections: edits.Selection) -> np.ndarray:
        """How much of the norm each set [S,L,K] reaches, as a share, [S]: less than 1 where it does not differ."""
        return np.asarray(_achieved(self, selections))


@jax.jit
def _achieved(matched: AddMatched, selections: edits.Selection) -> jax.Array:
    def share(selection):
        reached = jnp.where(jnp.linalg.norm(matched.direction(selection), axis=-1) > _TINY, matched.norm, 0.0)
        return jnp.linalg.norm(reached) / jnp.linalg.norm(matched.norm)

    return jax.lax.map(share, selections)


@jax.jit
def with_norm(vector: Array, norm: Array | float) -> jax.Array:
    """Vectors [...,D] with the norm [...], or what broadcasts to it; zeros stay zeros."""
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    return jnp.where(length > _TINY, vector / jnp.maximum(length, _TINY), 0.0) * jnp.asarray(norm)[..., None]


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


@partial(jax.jit, static_argnames="count")
def random_directions(like: Array, *, count: int, key: jax.Array) -> jax.Array:
    """[count,L,D] Gaussian directions with the norm of `like` [L,D] at every layer."""
    noise = jax.random.normal(key, (count, *like.shape))
    return noise / jnp.linalg.norm(noise, axis=-1, keepdims=True) * jnp.linalg.norm(like, axis=-1, keepdims=True)
