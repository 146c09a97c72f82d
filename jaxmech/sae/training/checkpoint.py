"""Checkpoints of a training (Orbax): atomic, at most two kept, refused when they belong to another training."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxmech.io.files import disk_errors, plain, reason, require_space

_REMEDY = "make room, or choose another folder; started again, the training resumes from its last checkpoint"


class Checkpoints:
    """Saves and restores a state tree with its history.

    Args:
      folder: made if missing; Orbax writes to a temporary folder and renames, so a killed save keeps the last one.
      identity: JSON facts that an existing checkpoint must have been written with; names of hashes end in "_hash".

    Raises:
      ValueError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]):
        self._folder = Path(folder).absolute()
        self._identity = identity
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._link = contextlib.ExitStack()
        with disk_errors(self._folder, "choose another folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
            named = self._link.enter_context(plain(self._folder))
            self._manager = ocp.CheckpointManager(named, options=options)

    def restore(self, like: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """The latest state, shaped as `like`, and its history; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        about = self._read(step, about=ocp.args.JsonRestore()).about
        self._compare(about["identity"])
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._read(step, state=ocp.args.StandardRestore(shapes)).state, about["history"]

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds
            raise ValueError(
                f"checkpoint_dir: the checkpoint {self._folder / str(step)} is damaged ({reason(error)}); delete this "
                "folder, and the training resumes from the checkpoint before it, if there is one"
            ) from error

    def require_space(self, state: Any) -> None:
        """Checks that there is room for one checkpoint.

        Raises:
          ValueError: there is not.
        """
        size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state))
        require_space(self._folder, size + (1 << 20), _REMEDY)

    def save(self, step: int, state: Any, history: list[dict[str, Any]]) -> None:
        """Returns when the copy is taken; it is written while the training continues.

        Raises:
          ValueError: the disk is full.
        """
        # Orbax reports a full disk from several threads at once, each with its stack: better not to let it start.
        self.require_space(state)
        # A copy: it is written while the training continues and adds to the list that was given.
        about = {"identity": self._identity, "history": list(history)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with disk_errors(self._folder, _REMEDY):
            self._manager.save(step, args=args)

    def close(self) -> None:
        """Waits for what is being written."""
        with disk_errors(self._folder, _REMEDY):
            self._manager.wait_until_finished()
            self._manager.close()
        self._link.close()

    def _compare(self, stored: dict[str, Any]) -> None:
        names = sorted(stored.keys() | self._identity.keys())
        if differing := [n for n in names if stored.get(n) != self._identity.get(n)]:
            # Hashes tell nobody what to change, and mostly follow from a setting that differs.
            named = [n for n in differing if not n.endswith("_hash")]
            lines = [f"{n} was {stored.get(n)!r}, is {self._identity.get(n)!r}" for n in named]
            lines = lines or [f"other {n.removesuffix('_hash')}" for n in differing]
            raise ValueError(
                f"checkpoint_dir: {self._folder} holds a training that differs: {'; '.join(lines)};"
                " use another folder, or delete this one"
            )
