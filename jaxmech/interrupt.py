"""Ctrl-C during long work: a word on how to go on, and an end within two seconds, whatever is being computed."""

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
_GRACE_SECONDS = 1.5


@contextlib.contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ends the process on Ctrl-C, with `advice` on standard error and exit code 130.

    A compiled program does not let Python act on a signal before it is done, nor do threads that write. The end is
    therefore watched over by a thread, which the system's own handler wakes. What is written is whole or absent, so
    that the process can be left at any time.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield
        return
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while signals := woken.recv(16):
            if signal.SIGINT in signals:
                os.write(sys.__stderr__.fileno(), f"\n{advice}\n".encode())
                time.sleep(_GRACE_SECONDS)
                os._exit(EXIT_CODE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_CODE)  # its threads get the watcher's time to end
    finally:
        signal.set_wakeup_fd(before)
        if sys.exc_info()[0] is None or not issubclass(sys.exc_info()[0], SystemExit):
            wakes.close()
            watcher.join()
            woken.close()
