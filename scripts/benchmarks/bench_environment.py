"""The process that every tool is timed in: the same allocator settings for all of them, and no network."""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {
    # glibc gives large buffers back to the system and faults them in again at every step unless told not to, which
    # slows every side down. It reads this when a process starts.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    # Only buffers of the main thread would be kept: those of XLA's threads come from arenas that are mapped anew.
    "MALLOC_ARENA_MAX": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


def enter() -> None:
    """Starts the running script again in `ENVIRONMENT`, unless it is in it; called before anything else is imported."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
