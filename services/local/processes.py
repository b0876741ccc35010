"""Child processes that end when they should: asked first, killed last, never left behind."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from services.runtime.child import ending_with_parent

_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class Child:
    """A service that runs.

    Attributes:
        name: For people.
        process: The process.
        log: Where its output goes.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def last_words(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-10:])


def start_child(name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> Child:
    """Start a service. From the main thread: it ends when the thread that started it ends.

    It gets a session of its own, so that Ctrl-C in a terminal reaches only its parent, which
    ends the services in their order.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            ending_with_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )
    return Child(name, process, log)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop_children(children: Sequence[Child], *, grace_s: float) -> None:
    """End services and everything that they started.

    Args:
        children: Asked to end (SIGTERM) all at once.
        grace_s: Seconds until what still runs is killed.
    """
    descendants = psutil.Process().children(recursive=True)
    for child in children:
        if child.is_running:
            child.process.send_signal(signal.SIGTERM)
    asked = [psutil.Process(c.process.pid) for c in children if c.is_running]
    psutil.wait_procs(asked, timeout=grace_s)
    # What they left behind was adopted by this process, or is a child that did not listen.
    end_all({*descendants, *psutil.Process().children(recursive=True)})
    for child in children:
        child.process.wait()


def end_all(processes: set[psutil.Process], *, grace_s: float = 3.0) -> None:
    """End processes: asked first, killed after ``grace_s`` seconds."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(list(processes), timeout=grace_s)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=grace_s)
