"""How many requests are worked on at once, and how many may wait. Event loop only."""

from __future__ import annotations

import asyncio

from services.runtime.errors import OverloadedError


class Slots:
    """A fixed number of slots, handed out in the order asked for.

    Args:
        num_slots: Held at once, at least 1.
        queue_size: Requests that may wait, at least 0; one more is refused at once.
        retry_after_s: What a refused caller is told to wait.
    """

    def __init__(self, num_slots: int, queue_size: int, *, retry_after_s: float = 1.0) -> None:
        self.num_slots = num_slots
        self._queue_size = queue_size
        self._retry_after_s = retry_after_s
        self._free = asyncio.Semaphore(num_slots)
        self._num_held = 0
        self._num_waiting = 0

    @property
    def num_active(self) -> int:
        """Requests that hold a slot or wait for one."""
        return self._num_held + self._num_waiting

    async def acquire(self) -> None:
        """Take a slot, or wait for one.

        Raises:
            OverloadedError: All slots are held and the queue is full.
        """
        if self._free.locked() and self._num_waiting >= self._queue_size:
            raise OverloadedError(
                f"all {self.num_slots} slots and {self._queue_size} places in the queue of this "
                "worker are taken; try again later",
                retry_after_s=self._retry_after_s,
            )
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        self._num_held += 1

    def release(self) -> None:
        """Give a slot back."""
        self._num_held -= 1
        self._free.release()
