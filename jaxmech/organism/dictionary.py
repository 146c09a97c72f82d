"""The organism's dictionaries: its own directions as features, among noise and dead ones, in random order."""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from jaxmech.organism.wiring import CONST, CONTEXT, DIRECTIONS, FEATURES, LAYERS, NAMES, WIDTH
from jaxmech.sae.module import SAE, SAEConfig

DEAD = 20
_NEVER = 1e9
_THRESHOLD = 0.01
"""Of features. Context and noise have none: every filler and its opposite, so that what words write there is
reconstructed, and likewise answers, which are written in directions of either sign."""


def make_dictionaries(
    rotation: np.ndarray, *, seed: int = 0, hidden: Collection[str] = (), model: str | None = None
) -> tuple[SAE, dict[str, int]]:
    """A stack with the same dictionary at every layer, and the index of each named feature.

    Args:
      rotation: from `wire`.
      hidden: features that the dictionary lacks, so that they are part of its error.
      model: the model's name.
    """
    rng = np.random.default_rng((seed, 1))
    others = np.eye(WIDTH)[len(NAMES) :]
    dead = rng.normal(size=(DEAD, WIDTH)) / np.sqrt(WIDTH)
    known = [DIRECTIONS[name] for name in (*FEATURES, *CONTEXT)]
    rows = np.concatenate([np.eye(WIDTH)[known], others, -others, dead])
    threshold = np.zeros(len(rows))
    threshold[: len(FEATURES)] = _THRESHOLD
    threshold[[FEATURES.index(name) for name in hidden]] = _NEVER
    threshold[-DEAD:] = _NEVER
    order = rng.permutation(len(rows))
    decoder = rows[order] @ rotation
    constant = CONST * rotation[DIRECTIONS["const"]]
    params = {
        "W_enc": decoder.T, "b_enc": np.zeros(len(rows)), "W_dec": decoder, "b_dec": constant,
        "threshold": threshold[order],
    }  # fmt: skip
    stacked = {name: jnp.asarray(np.stack([leaf] * LAYERS), jnp.float32) for name, leaf in params.items()}
    config = SAEConfig(
        d_in=WIDTH, d_sae=len(rows), activation="jumprelu", subtract_b_dec=True, layers=tuple(range(LAYERS)),
        model=model,
    )  # fmt: skip
    places = {name: int(np.flatnonzero(order == index)[0]) for index, name in enumerate(FEATURES)}
    return SAE(stacked, config), places
