"""Which features, layers or positions: chosen by index or mask, checked, padded to arrays.

`S` denotes sets, `L` layers, `K` selected features per layer.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.reprs import short_repr

_TWICE = "feature ({}, {}) is listed twice, and would act twice; list each feature once"


class Selection(NamedTuple):
    """Chosen features, padded to K per layer. index [L,K] int32; valid [L,K], False on padding."""

    index: jax.Array  # type: ignore[assignment]  # a tuple has a method of that name
    valid: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


def select(pairs: Iterable[tuple[int, int]], n_layers: int, width: int | None = None) -> Selection:
    """The features (layer, index) as a `Selection`, padded to `width` per layer (by default the fullest layer's count).

    Raises:
      ValueError: a layer outside the model, a negative index, a feature listed twice, or more features at one
        layer than `width`.
    """
    by_layer: list[list[int]] = [[] for _ in range(n_layers)]
    for layer, feature in _pairs(pairs):
        if not 0 <= layer < n_layers or feature < 0:
            raise ValueError(
                f"feature ({layer}, {feature}): expected a layer of 0..{n_layers - 1} and an index from 0 on"
            )
        if feature in by_layer[layer]:
            raise ValueError(_TWICE.format(layer, feature))
        by_layer[layer].append(feature)
    fullest = max(map(len, by_layer), default=0)
    width = max(fullest, 1) if width is None else width
    if fullest > width:
        raise ValueError(f"width: one layer has {fullest} features, more than the {width} that fit")
    index, valid = np.zeros((n_layers, width), np.int32), np.zeros((n_layers, width), bool)
    for layer, chosen in enumerate(by_layer):
        index[layer, : len(chosen)], valid[layer, : len(chosen)] = chosen, True
    return Selection(jnp.asarray(index), jnp.asarray(valid))


def _pairs(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of Python ints."""
    try:
        listed = [(layer, feature) for layer, feature in pairs]
        if any(isinstance(number, bool | np.bool_) for pair in listed for number in pair):
            raise TypeError
        return [(operator.index(layer), operator.index(feature)) for layer, feature in listed]
    except (TypeError, ValueError):
        raise ValueError(f"features: expected pairs (layer, index) of whole numbers, got {pairs!r:.80}") from None


def select_sets(sets: Sequence[Iterable[tuple[int, int]]], n_layers: int, width: int | None = None) -> Selection:
    """Feature sets as one `Selection` with the sweep axis in front, [S,L,K]; K as for `select`, the same for all.

    Raises:
      ValueError: no sets (such as `each_pair` of a single feature), or as `select`.
    """
    sets = [_pairs(pairs) for pairs in sets]
    if not sets:
        raise ValueError("sets: expected at least one set of features, got none")
    if width is None:
        width = max((count for pairs in sets for count in Counter(layer for layer, _ in pairs).values()), default=1)
    return jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *(select(pairs, n_layers, width) for pairs in sets))


def check_selection(config: Any, selection: Selection) -> None:
    """Refuses, by name, a feature that no dictionary of `config` has, or that is listed twice in a set [...,L,K].

    A traced selection passes: there, features that do not exist give NaN.
    """
    if isinstance(selection.index, jax.core.Tracer) or isinstance(selection.valid, jax.core.Tracer):
        return
    index, valid = np.asarray(selection.index), np.asarray(selection.valid)
    known = np.isin(np.arange(index.shape[-2]), config.layers)[:, None] & (index >= 0) & (index < config.d_sae)
    if len(missing := np.argwhere(valid & ~known)):
        raise ValueError(
            f"feature ({missing[0][-2]}, {index[tuple(missing[0])]}) does not exist: there are dictionaries at layers "
            f"{', '.join(map(str, config.layers))}, with features 0..{config.d_sae - 1}"
        )
    order = np.argsort(np.where(valid, index, -1), axis=-1, kind="stable")
    listed = np.take_along_axis(np.where(valid, index, -1), order, axis=-1)
    if len(twice := np.argwhere((listed[..., 1:] == listed[..., :-1]) & (listed[..., 1:] >= 0))):
        raise ValueError(_TWICE.format(twice[0][-2], listed[tuple(twice[0])]))
