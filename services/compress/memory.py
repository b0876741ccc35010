"""Memory to receive segments into, used again: fresh pages cost more than the bytes they take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReceivePool:
    """Lends memory. Thread-safe.

    Args:
        max_idle: Pieces that are kept while nobody uses them.
        max_idle_bytes: A piece larger than this is not kept.
    """

    def __init__(self, *, max_idle: int = 2, max_idle_bytes: int = 1 << 30) -> None:
        self._max_idle = max_idle
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[bytearray] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, size_bytes: int) -> Iterator[memoryview]:
        """Lend ``size_bytes`` of writable memory for the block, with whatever it holds."""
        memory = self._take(size_bytes)
        try:
            yield memoryview(memory)[:size_bytes]
        finally:
            with self._lock:
                if len(self._idle) < self._max_idle and len(memory) <= self._max_idle_bytes:
                    self._idle.append(memory)

    def _take(self, size_bytes: int) -> bytearray:
        with self._lock:
            # The smallest that is large enough; else the smallest gives way to a new one.
            self._idle.sort(key=len)
            for index, memory in enumerate(self._idle):
                if len(memory) >= size_bytes:
                    return self._idle.pop(index)
            if self._idle:
                self._idle.pop(0)
        return bytearray(size_bytes)
