"""A child process that ends with its parent, however the parent ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` for ``subprocess.Popen``: SIGTERM when the parent is gone.

    Call it, and ``Popen``, from the main thread: the kernel sends the signal when the thread that
    started the child ends. ``None`` where the kernel is not Linux.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent_pid = os.getpid()

    def set_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:  # it ended before the call
            os._exit(1)

    return set_death_signal
