"""Which dictionaries a folder or a hub repository holds, by the names of its files, and where they are."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from glob import escape
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub.errors import GatedRepoError

from jaxmech.io import folders, hub
from jaxmech.io.folders import some
from jaxmech.sae.formats import suites
from jaxmech.sae.formats.files import TENSOR_SUFFIXES

_WEIGHTS = {"sae_weights.safetensors", "sae.safetensors", "params.safetensors", "params.npz", "ae.pt"}
_WEIGHTS_BELOW = "checkpoints/final.safetensors"
"""Weights whose folder is the dictionary; any other file with tensors is a dictionary by itself."""
_CONFIGS = ("config.json", "config.yaml", "cfg.json")
"""What folders further up may say about the dictionaries below."""
_OWN_CONFIGS = {"cfg.json", "config.json", "hyperparams.json"}
"""Files beside a dictionary's weights that say what they mean."""
_LAYER = r"(?:layers?|blocks)[._-]?(\d+)|-[Ll](\d+)(?:R|A|M|TC)?(?=[-./]|$)|(?:^|/)(\d+)\.pt$"
# circuit-tracer's and Gemma Scope 2's, whose single files are not dictionaries.
_ACROSS_LAYERS = {
    r"(?:^|/)W_(?:enc|dec)_\d+\.safetensors$|(?:^|/)clt/[^/]*width_": "a cross-layer transcoder",
    r"(?:^|/)crosscoder/[^/]*width_": "a crosscoder",
}


class Place(NamedTuple):
    """A dictionary: its folder or file here, its name for the record, and the layer that its name gives."""

    path: Path
    name: str
    layer: int | None


def find(source: str | Path, layers: Collection[int] | None, revision: str | None, single: bool = False) -> list[Place]:
    """The dictionaries of `source`, fetched if it is on the hub: those of `layers`, by their names, or all.

    Args:
      source: a local folder or file, a suite's short name, or "owner/repository[/path/in/it]".
      single: exactly one is wanted.

    Raises:
      ValueError: there are none, or none of a layer asked for, or one without its weights, several where one was
        wanted, or several of one layer.
    """
    local = Path(source).expanduser()
    if local.exists():
        if revision is not None:
            raise ValueError(f"revision: {source} is a local path, which has none")
        local = Path(os.path.abspath(local))  # "." and ".." are no names to read a site or layer from
        if local.is_file():
            root = local.parents[local.as_posix().endswith(f"/{_WEIGHTS_BELOW}")]
            files = [local.relative_to(root).as_posix()]
        else:
            root, below = local, folders.walk(local)
            files = below.files
            if lost := _without_weights(below, layers):
                raise ValueError(f"{source}: {some(lost)}: without weights: half copied, or a broken link; copy or "
                                 "download it again, delete it, or say which layers to load: layers=")  # fmt: skip
        chosen = _choose(source, files, "", layers, single)
        return [Place(root / inside, str(root / inside), layer_of(inside)) for inside in chosen]
    if known := suites.find(str(source).rstrip("/")):
        files = hub.list_files(known.repo, revision)
        names = known.choose(dictionaries(files), layers)
        return _fetch(known.repo, files, _one_per_layer(source, names, layers, single), revision)
    repo, inside = hub_id(source)
    hint = folders.instead_of(source)
    if inside and Path(repo).is_dir():
        raise ValueError(f"source: {source} does not exist: {hint}")
    try:
        files = hub.list_files(repo, revision)
    except ValueError as error:
        if Path(repo).parent.is_dir() and not isinstance(error.__cause__, GatedRepoError):
            raise ValueError(f"source: {source} does not exist, nor is it on the hub: {hint}") from error
        local_hint = f"\nAmong local paths: {hint}" if hint else ""
        raise ValueError(f"{error}{local_hint}{_hint(source)}") from error
    return _fetch(repo, files, _choose(source, files, inside, layers, single), revision)


def available_layers(source: str | Path, layers: Collection[int] | None) -> list[int | None]:
    """The layers, as far as names give them, of the dictionaries that `find` would give; fetches none of them.

    Raises:
      ValueError: as `find`.
    """
    if Path(source).expanduser().exists():
        return [place.layer for place in find(source, layers, None)]
    if known := suites.find(str(source).rstrip("/")):
        names = _one_per_layer(source, known.choose(dictionaries(hub.list_files(known.repo)), layers), layers, False)
    else:
        repo, inside = hub_id(source)
        names = _choose(source, hub.list_files(repo), inside, layers, False)
    return [layer_of(name) for name in names]


def hub_id(source: str | Path) -> tuple[str, str]:
    """ "owner/repository/path/in/it" -> ("owner/repository", "path/in/it").

    Raises:
      ValueError: it does not have this form.
    """
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+?))?/?", str(source))
    if not match or ".." in str(source).split("/"):
        hint = folders.instead_of(source)
        raise ValueError(f"source: {str(source)!r} does not exist; expected a folder, a file, a hub id "
                         "'owner/repository[/path/in/it]' or a suite's short name"
                         f"{f'; {hint}' if hint else '.'}{_hint(source)}")  # fmt: skip
    return match[1], match[2] or ""


def _hint(source: str | Path) -> str:
    near = suites.nearest(str(source))
    return f"\nThe nearest short name of a suite is {near!r}." if near else ""


def layer_of(name: str) -> int | None:
    """The layer that a path names, the last one if several: "layer_3/width_16k", "layers.3.mlp", "Base-L3R-8x"."""
    matches = re.findall(_LAYER, name)
    return int("".join(matches[-1])) if matches else None


def dictionaries(files: Iterable[str]) -> list[str]:
    """Relative paths of the folders or single files that are dictionaries; "" when it is the folder itself."""
    folders, alone = set(), []
    for name in files:
        path = PurePosixPath(name)
        if name.endswith(_WEIGHTS_BELOW) and path.parent.name == "checkpoints":
            folders.add(_text(path.parent.parent))
        elif path.name in _WEIGHTS:
            folders.add(_text(path.parent))
        elif path.suffix in TENSOR_SUFFIXES:
            alone.append(name)
    if "" in folders:
        return [""]
    # Other files in a dictionary's folder belong to it: sparsity, an optimizer's state.
    within = [name for name in alone if not any(_text(folder) in folders for folder in PurePosixPath(name).parents)]
    return sorted(folders) + sorted(within)


def _without_weights(below: folders.Below, layers: Collection[int] | None) -> list[str]:
    """Folders and links that should be dictionaries of the layers wanted but are not.

    Those are broken links; folders without tensors at or below them whose name gives a layer, or that hold the same
    configuration file as the dictionaries beside them; and empty ones in a folder whose name gives a layer.
    """
    names = dictionaries(below.files)
    if names == [""]:
        return []
    within = set(names) | {_text(folder) for name in below.files if PurePosixPath(name).suffix in TENSOR_SUFFIXES
                           for folder in PurePosixPath(name).parents}  # fmt: skip
    filled = {_text(folder) for name in (*below.files, *below.folders) for folder in PurePosixPath(name).parents}
    configs = {path.name for path in map(PurePosixPath, below.files) if _text(path.parent) in names} & _OWN_CONFIGS
    described = {_text(path.parent) for path in map(PurePosixPath, below.files) if path.name in configs}

    def unrelated(name: str) -> bool:
        """Whether it holds files, but none that a dictionary is made of: plots, logs."""
        files = [path for path in map(PurePosixPath, below.files) if _text(path.parent) == name]
        made_of = [f for f in files if f.name in _OWN_CONFIGS or f.name[0] == "." or {*TENSOR_SUFFIXES} & {*f.suffixes}]
        return bool(files) and not made_of

    def is_meant(name: str) -> bool:
        own = layer_of(PurePosixPath(name).name) is not None and not unrelated(name)
        return own or name in described or name not in filled and layer_of(name) is not None

    lost = [name for name in below.lost if PurePosixPath(name).suffix in TENSOR_SUFFIXES
            or PurePosixPath(name).name in _OWN_CONFIGS or layer_of(name) is not None]  # fmt: skip
    lost += [name for name in below.folders if name not in within and is_meant(name)]
    # A folder in a dictionary belongs to it, and one in a folder that is reported need not be reported too.
    covered = {*names, *lost}
    lost = [name for name in lost if not any(_text(folder) in covered for folder in PurePosixPath(name).parents)]
    # A name without a layer may not be one asked for; if it was, it is reported as missing later.
    return [name for name in lost if (layers is None or layer_of(name) in layers) and not re.search(r"(^|/)\.", name)]


def _text(path: PurePosixPath) -> str:
    return "" if path.as_posix() == "." else path.as_posix()


def _choose(
    source: str | Path, files: Sequence[str], inside: str, layers: Collection[int] | None, single: bool
) -> list[str]:
    """The dictionaries at or below `inside` of the layers wanted, as paths of `files`."""
    below = [name for name in files if not inside or name == inside or name.startswith(f"{inside}/")]
    if not below:
        raise ValueError(f"source: {source}: {f'no {inside!r} there' if inside else 'nothing there'}")
    start = len(inside) + 1 if inside and inside not in below else 0
    relative = [name.strip("/") for name in dictionaries(name[start:] for name in below)]
    names = [f"{inside}/{name}".strip("/") if start else name for name in relative]
    for pattern, kind in _ACROSS_LAYERS.items():
        if names and all(re.search(pattern, f"{Path(source).absolute().as_posix()}/{name}") for name in names):
            raise ValueError(f"{source}: {kind}, which reads or writes several layers; not supported")
    if not names:
        raise ValueError(f"{source}: no dictionary there; it holds {some(below)}")
    return _one_per_layer(source, names, layers, single)


def _one_per_layer(source, names: Sequence[str], layers: Collection[int] | None, single: bool) -> list[str]:
    layer_by_name = {name: layer_of(name) for name in names}
    if len(names) > 1 and any(layer is not None for layer in layer_by_name.values()):
        known = {name: layer for name, layer in layer_by_name.items() if layer is not None}
        if layers is not None:
            if missing := sorted(set(layers) - set(known.values())):
                raise ValueError(f"{source}: nothing for layer {', '.join(map(str, missing))}; it has layers "
                                 f"{', '.join(map(str, sorted(set(known.values()))))}")  # fmt: skip
            known = {name: layer for name, layer in known.items() if layer in layers}
        layer_by_name = {**known}
    if single and len(layer_by_name) > 1:
        which = "the path of one" if layers else "load_sae(..., layer=) or the path of one"
        raise ValueError(f"{source}: holds {len(layer_by_name)} dictionaries ({some(layer_by_name)}); say which: "
                         f"{which}; load_saes reads a stack over layers")  # fmt: skip
    numbers = [layer for layer in layer_by_name.values() if layer is not None]
    if twice := sorted({layer for layer in numbers if numbers.count(layer) > 1}):
        several = [name for name, layer in layer_by_name.items() if layer == twice[0]]
        raise ValueError(f"{source}: several dictionaries of layer {', '.join(map(str, twice))} ({some(several)}); a "
                         "stack has one per layer: give a folder that holds only one kind, or list them: "
                         "load_saes([...])")  # fmt: skip
    return sorted(layer_by_name, key=lambda name: (layer_by_name[name] is None, layer_by_name[name] or 0, name))


def _fetch(repo: str, files: Sequence[str], names: Sequence[str], revision: str | None) -> list[Place]:
    """Fetches each dictionary with the configurations of the folders above it."""
    wanted = set()
    for name in names:
        own = (name, f"{name}/{_WEIGHTS_BELOW}".lstrip("/"))
        wanted |= {file for file in files if file in own or _text(PurePosixPath(file).parent) == name}
        above = {(folder / config).as_posix() for folder in PurePosixPath(name).parents for config in _CONFIGS}
        wanted |= above & set(files)
    root = hub.fetch(repo, sorted(map(escape, wanted)), revision)
    commit = f"@{root.name[:12]}" if root.parent.name == "snapshots" else ""
    return [Place(root / name, f"{repo}/{name}".rstrip("/") + commit, layer_of(name)) for name in names]
