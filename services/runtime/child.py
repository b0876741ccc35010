"""A child process that ends with its parent, however the parent ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Runs in the child and then becomes the command. Not a ``preexec_fn``: Python between fork and exec
# is not safe where other threads run, and gRPC's do.
_BECOME: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
parent, command = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != parent:  # it ended before the call
    sys.exit(1)
os.execv(command[0], command)
"""


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """Return ``command`` so that it gets SIGTERM when the process that starts it is gone.

    Start it from the main thread: the kernel sends the signal when the thread that started the
    child ends. Unchanged where the kernel is not Linux.

    Args:
        command: Its first word is the path of a program.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command]
