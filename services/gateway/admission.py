"""How many requests run at once: more are refused at the door, not queued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from services.runtime.errors import OverloadedError

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts running requests.

    Args:
        limit: Requests at once, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request for as long as the block runs.

        Raises:
            OverloadedError: As many as the limit run already.
        """
        if self._num_running >= self._limit:
            raise OverloadedError(
                f"{self._num_running} requests are running, the gateway's limit; retry later",
                reason="TOO_MANY_REQUESTS",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request runs, cleaning up included."""
        await self._idle.wait()
