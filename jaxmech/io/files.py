"""Files that are complete or absent, and messages for damaged files and for disks that are full or not writable."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def read_json(path: Path, remedy: str = "download or copy it again") -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file is damaged; `remedy` says what to do.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; {remedy}")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is Git LFS's note of where its content is, as a clone without LFS leaves it."""
    with path.open("rb") as start:
        return start.read(23) == b"version https://git-lfs"


def reason(error: BaseException) -> str:
    """An error in one short line: TensorStore's fill a page."""
    first = next(iter(str(error).splitlines()), "").partition(" [tensorstore_spec=")[0]
    return f"{type(error).__name__}: {first:.200}" if first else type(error).__name__


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """The folder, which exists, by a name without what Orbax takes for a pattern of names ("*", "?", brackets)."""
    if not set(str(folder)) & set("*?[]"):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jaxmech-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which replaces `path` at the end; on an error nothing changes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_space(folder: Path, needed: int, remedy: str) -> None:
    """Asks for `needed` bytes before writing starts, since a full disk shows in many kinds of error.

    Raises:
      ValueError: there is less room on the disk of `folder`, which exists; `remedy` says what to do.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; {remedy}")


@contextlib.contextmanager
def disk_errors(target: Path, remedy: str) -> Iterator[None]:
    """Turns what writing to `target` raises, Orbax's and safetensors' own kinds of error too, into one message.

    Raises:
      ValueError: instead of an OSError; `remedy` says what to do.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{target} could not be written ({error.strerror or error}); {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"{target} could not be written ({error}); {remedy}") from error
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{target} could not be written (no space left on device); {remedy}") from error
