"""Dictionaries on disk, in every format of the field, and the one canonical form they become.

A reader is a module with `matches(path) -> bool` and `read(path, given) -> (params, SAEConfig)`; the first that matches
a dictionary's folder or file reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmech.io.arguments import whole_number, whole_numbers
from jaxmech.io.progress import counted, progress
from jaxmech.sae.formats import (
    bare,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    places,
    saelens,
    sparsify,
)
from jaxmech.sae.formats.files import Given
from jaxmech.sae.formats.hooks import HOOKS
from jaxmech.sae.formats.saelens_save import save_sae, save_saes
from jaxmech.sae.module import SAE, make_sae, stack_saes

__all__ = ["load_sae", "load_saes", "save_sae", "save_saes"]

READERS = (saelens, sparsify, dictionary_learning, gemma_scope, llama_scope, circuit_tracer, bare)


def load_sae(
    source: str | Path,
    *,
    site: str | None = None,
    layer: int | None = None,
    k: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    batch_topk: bool = False,
) -> SAE:
    """Loads one dictionary in canonical form, float32, whatever its format.

    Args:
      source: a folder or file; a hub id "owner/repository[/path/in/it]"; or a suite's short name, such as
        "gemma-scope-2-270m-pt/resid_post_all/16k/small" (`jaxmech.sae.formats.suites` lists them).
      site, layer, k, model: for files that do not say; otherwise they must agree with them. `layer` also picks one out
        of many.
      revision: of a hub id or suite: a branch, tag or commit.
      batch_topk: loads a BatchTopK dictionary as trained, where what a token keeps depends on the other tokens of the
        call; without it, its threshold is needed.

    Raises:
      ValueError: there is no such source, it holds several dictionaries, its format is not known, its files are damaged
        or contradict each other or the caller; the message names every fault of one file at once.
    """
    _check_site(site)
    layer = None if layer is None else whole_number("layer", layer)
    k = None if k is None else whole_number("k", k, 1)
    layers = None if layer is None else [layer]
    (place,) = places.find(source, layers, revision, single=True)
    return _read(place, Given(site, layer, k, model, batch_topk))


def load_saes(
    source: str | Path | Sequence[str | Path],
    *,
    layers: Sequence[int] | None = None,
    site: str | None = None,
    k: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    batch_topk: bool = False,
) -> SAE:
    """Loads dictionaries of several layers, otherwise alike, as a stack in the order of the layers.

    Args:
      source: as for `load_sae`, holding one dictionary per layer; or a list of sources of one dictionary each.
      layers: those to load, in this order; by default all.
      site, k, model, revision, batch_topk: as for `load_sae`, for all of them.

    Raises:
      ValueError: as `load_sae`; a layer that is missing or given twice; dictionaries that differ in more than the
        layer.
    """
    _check_site(site)
    if layers is not None:
        layers = whole_numbers("layers", layers)
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers: expected distinct layers, at least one, got {list(layers)}")
    k = None if k is None else whole_number("k", k, 1)
    if isinstance(source, str | Path):
        located = places.find(source, layers, revision)
    else:
        located = [place for item in source for place in places.find(item, None, revision, single=True)]
    with progress("reading dictionaries", len(located), unit="layers") as advance:
        saes = [_read(place, Given(site, place.layer, k, model, batch_topk)) for place in counted(located, advance)]
    by_layer: dict[int, SAE] = {}
    for sae, place in zip(saes, located, strict=True):
        number = sae.config.layers[0]
        if number in by_layer:
            raise ValueError(f"{source}: layer {number} twice: {by_layer[number].config.source} and {place.name}")
        by_layer[number] = sae
    if missing := sorted(set(layers or ()) - set(by_layer)):
        raise ValueError(f"{source}: nothing for layer {', '.join(map(str, missing))}; it has layers "
                         f"{', '.join(map(str, sorted(by_layer)))}")  # fmt: skip
    stack = stack_saes([by_layer[number] for number in layers or sorted(by_layer)])
    if isinstance(source, str | Path):
        stack = SAE(stack.params, dataclasses.replace(stack.config, source=_common(source, located)))
    return stack


def _check_site(site: str | None) -> None:
    if site not in (None, *HOOKS):
        raise ValueError(f"site: expected one of {', '.join(HOOKS)}, got {site!r}")


def _read(place: places.Place, given: Given) -> SAE:
    for reader in READERS:
        if reader.matches(place.path):
            params, config = reader.read(place.path, given)
            if config.units == "unknown" and config.normalize == "none" and _unit_rows(params["W_dec"]):
                config = dataclasses.replace(config, units="residual")
            return make_sae(params, dataclasses.replace(config, source=place.name))
    known = ", ".join(reader.__name__.rpartition(".")[2] for reader in READERS)
    raise ValueError(f"{place.path}: in none of the formats known here ({known})")


def _unit_rows(W_dec: np.ndarray) -> bool:
    """Whether every decoder row has norm 1, so that a feature's activation is a length in the residual stream."""
    return bool(np.abs(np.linalg.norm(W_dec, axis=1) - 1).max() < 1e-2)  # half-precision floats round


def _common(source: str | Path, located: Sequence[places.Place]) -> str:
    """One name for a stack's record: the caller's, with the commit if there is just one."""
    commits = {place.name.rpartition("@")[2] for place in located if not Path(source).expanduser().exists()}
    return f"{source}@{commits.pop()}" if len(commits) == 1 else str(source)
