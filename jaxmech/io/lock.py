"""One process per folder: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FILE = ".lock"


@contextlib.contextmanager
def sole_user(folder: str | Path) -> Iterator[None]:
    """Keeps other processes that ask for the same folder out. Where files cannot be locked, nothing is kept out.

    Args:
      folder: made if missing; the holder is written to its file `.lock`, which stays.

    Raises:
      ValueError: another process holds it, which is named; or the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _FILE).open("a+")
    except OSError as error:
        raise ValueError(f"run_dir: cannot write to {folder}: {error.strerror}; choose another run_dir") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"run_dir: {folder} is in use by {holder}; wait for it to end, or choose another run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
