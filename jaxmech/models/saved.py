"""Models in a folder format of our own, written by `save_model` and by the cache of converted ones: all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmech.io.files import disk_errors, plain, read_json, reason, require_space
from jaxmech.models import tokenizer as tokenizers
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import param_shapes
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.sharding import param_shardings

MANIFEST = "jaxmech_model.json"


_STALE_SECONDS = 3600


REMEDY = "make room, or set JAXMECH_CACHE to a writable folder on another disk"


_CHUNK_BYTES = 32 << 20


def save_model(lm: LanguageModel, folder: str | Path) -> Path:
    """Writes a model for `load_model`: parameters (Orbax), tokenizer and configuration. All of it or nothing.

    Raises:
      ValueError: the folder exists and is not empty, or the disk is full.
    """
    folder = Path(folder).expanduser()
    check_new(folder)
    write(lm, folder, {}, replace=True)
    return folder


def check_new(folder: Path) -> None:
    """Refuses a destination that holds something.

    Raises:
      ValueError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "exists and is not empty" if folder.is_dir() else "is a file"
        raise ValueError(f"folder: {folder} {what}; give a new one, or remove it first")


def load_saved(
    folder: str | Path, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None, own: bool = True
) -> LanguageModel:
    """Reads what `save_model` wrote, cast to `dtype` (by default as stored), onto the mesh as for `load_model`.

    Args:
      own: whether to load its own tokenizer; without it, the model has none.

    Raises:
      ValueError: the folder is damaged or of another version.
    """
    folder = Path(folder).expanduser().absolute()
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != 1:
        raise ValueError(f"{folder}: format {manifest.get('format')!r} of {MANIFEST} is not known; expected 1")
    try:
        config, stored = config_from_json(manifest["config"]), manifest["dtype"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged, or of another version of jaxmech ({error}); remove the "
                         "folder and load or save again") from error  # fmt: skip
    shapes = target(config, dtype or stored, mesh)
    try:
        with ThreadPoolExecutor(1) as pool:
            stored = own and manifest.get("tokenizer", True)
            tokenizer = pool.submit(tokenizers.load_saved, folder / "tokenizer") if stored else None
            params = _restore(folder / "params", shapes)
            return LanguageModel(manifest["name"], config, params, tokenizer and tokenizer.result())
    except Exception as error:
        raise ValueError(
            f"the saved model {folder} is damaged; remove it and load or save again ({reason(error)})"
        ) from error


def write(lm: LanguageModel, folder: Path, source: Mapping[str, Any], replace: bool) -> None:
    """Writes beside `folder`, then renames: a reader finds everything or nothing."""
    leaves = jax.tree.leaves(lm.params)
    folder = folder.absolute()
    with disk_errors(folder, REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        require_space(folder.parent, sum(leaf.nbytes for leaf in leaves) + (64 << 20), REMEDY)
        temporary = Path(tempfile.mkdtemp(suffix=".tmp", prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _save_params(temporary / "params", lm.params)
            manifest = {"format": 1, "name": lm.name, "dtype": str(leaves[0].dtype), **source}
            if lm.tokenizer is None:
                manifest["tokenizer"] = False
            else:
                (temporary / "tokenizer").mkdir()
                tokenizers.save(lm.tokenizer, temporary / "tokenizer")
            manifest["config"] = dataclasses.asdict(lm.config)
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            temporary.chmod(0o755)
            if replace and folder.exists():
                folder.rmdir()  # known to be empty
            with contextlib.suppress(FileExistsError) if not replace else contextlib.nullcontext():
                _rename_new(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename_new(temporary: Path, folder: Path) -> None:
    """Renames; FileExistsError when another process was first."""
    try:
        temporary.rename(folder)
    except OSError:
        if (folder / MANIFEST).is_file():
            raise FileExistsError(f"{folder} exists") from None
        raise


def _sweep(parent: Path) -> None:
    """Removes what killed conversions left behind."""
    for left in parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _checkpointer():
    import orbax.checkpoint as ocp

    # Compressing floats saves a third of the space and makes the second load several times slower.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))


def _save_params(path: Path, params) -> None:
    import orbax.checkpoint as ocp

    # Chunks let several threads read one array, which more than halves the time of a second load.
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    with plain(path.parent) as parent, _checkpointer() as checkpointer:
        checkpointer.save(parent / path.name, args=ocp.args.PyTreeSave(params, save_args=chunked))


def _restore(path: Path, shapes):
    import orbax.checkpoint as ocp

    with plain(path.parent) as parent, _checkpointer() as checkpointer:
        args = ocp.checkpoint_utils.construct_restore_args(shapes)
        return checkpointer.restore(parent / path.name, args=ocp.args.PyTreeRestore(item=shapes, restore_args=args))


def target(config: ModelConfig, dtype: str, mesh: jax.sharding.Mesh | None = None) -> Mapping[str, Any]:
    """The parameter tree to fill: shapes, dtype, and the devices each leaf goes to."""
    shapes = param_shapes(config)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())  # honours jax.default_device
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = param_shardings(config, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding), shapes, shardings
    )


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict` through JSON, which turns tuples into lists."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for key in ("rope", "rope_local"):
        if (rope := fields.get(key)) is not None:
            scaling = ((k, tuple(v) if isinstance(v, list) else v) for k, v in rope["scaling"])
            fields[key] = Rope(rope["theta"], tuple(scaling))
    return ModelConfig(**fields)
