"""Ctrl-C during long work: advice on how to resume, and an exit within two seconds, whatever is being computed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 130
_GRACE_SECONDS = 1.0


@contextlib.contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ends the process on Ctrl-C, with `advice` on standard error and exit code 130.

    A compiled program does not let Python act on a signal before it is done, nor do threads that write. So a thread,
    which the system's own handler wakes, ends the process. Files are complete or absent, so that it can end at any
    time.
    """
    if threading.current_thread() is not threading.main_thread():  # signals arrive only there
        yield
        return
    woken, wakes = socket.socketpair()
    advised = threading.Event()
    wakes.setblocking(False)
    # A handler of our own, since asyncio (in Orbax) replaces Python's and its wakeup file with its own.
    handler = signal.signal(signal.SIGINT, _stop)
    before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while signals := woken.recv(16):
            if signal.SIGINT in signals:
                bar_ends = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a bar hid the cursor and will not end itself
                os.write(2, f"{bar_ends}\n{advice}\n".encode())
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # threads still running complain
                advised.set()
                time.sleep(_GRACE_SECONDS)
                os._exit(EXIT_CODE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if advised.wait(_GRACE_SECONDS):
            os._exit(EXIT_CODE)  # without Python's own shutdown, which crashes while XLA's threads compute
        print(f"\n{advice}", file=sys.stderr)  # raised without a signal
        raise SystemExit(EXIT_CODE) from None
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, handler)
        wakes.close()
        watcher.join()
        woken.close()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
