"""What to say when a file is damaged, a disk is full or a folder may not be written."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: Path, remedy: str = "download or copy it again") -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: the file is damaged; `remedy` says the way out.
    """
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; {remedy}")
    return content


def require_space(folder: Path, needed: int, remedy: str) -> None:
    """Asks for `needed` bytes before writing starts, since a file system tells of its end in many words.

    Raises:
      ValueError: there is less room on the disk of `folder`, which exists; `remedy` says the way out.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; {remedy}")


@contextlib.contextmanager
def disk_errors(target: Path, remedy: str) -> Iterator[None]:
    """Turns what writing to `target` raises, Orbax's own kind of error too, into one message.

    Raises:
      ValueError: instead of an OSError; `remedy` says the way out.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{target} could not be written ({error.strerror or error}); {remedy}") from error
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(f"{target} could not be written (no space left on device); {remedy}") from error
