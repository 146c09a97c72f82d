"""Local folders: what lies below one, through links too, and what there is in place of a path that does not exist."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Below(NamedTuple):
    """Relative paths of all files and folders below a folder; lost: of links that lead nowhere."""

    files: list[str]
    folders: list[str]
    lost: list[str]


def walk(folder: Path) -> Below:
    """What lies below a folder. Links to folders are entered, but not one to a folder that it lies in.

    Raises:
      ValueError: a folder that may not be read.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename} could not be read ({error.strerror})") from error

    below = Below([], [], [])
    for path, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        parent = Path(path).relative_to(folder)
        above = os.path.realpath(path) + os.sep
        folders[:] = [name for name in folders if not above.startswith(os.path.realpath(f"{path}/{name}") + os.sep)]
        below.folders.extend((parent / name).as_posix() for name in folders)
        for name in files:
            is_file = os.path.isfile(os.path.join(path, name))
            (below.files if is_file else below.lost).append((parent / name).as_posix())
    return below


def instead_of(path: str | Path) -> str | None:
    """What there is in place of a path that does not exist, in words; None where nothing is similar."""
    missing = Path(path).expanduser()
    existing = next(folder for folder in missing.parents if folder.is_dir())
    wanted = missing.relative_to(existing).parts[0]
    names = [name for name in os.listdir(existing) if not name.startswith(".")]
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"did you mean {str(existing / near[0])!r}?" if near else None
    if existing == Path("."):
        return hint
    return f"{existing} has no {wanted!r}, but {some(names) or 'nothing at all'}" + (f"; {hint}" if hint else "")


def some(names: Iterable[str], shown: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
