"""The bridge between the engine's thread and a request on the event loop.

One thread puts, one coroutine takes. The queue between them is small and bounded, so that a reader
who falls behind stops his own sequence, and nobody else's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from chunkserve.v1 import types_pb2
from services.decode.sequence import DecodeSequence


class Generation:
    """One answer as the request sees it: an async iterator over its deltas, to be read once.

    Tokens that wait for the reader come as one delta. The iteration ends when the answer does, and
    raises what ended it early. After it, ``sequence`` is the reader's: no thread touches it.

    Args:
        sequence: The engine's state of the answer.
        capacity: Tokens that may wait for the reader.
        loop: Where the reader is.
        notify: Wakes the engine up; callable from the loop.
    """

    def __init__(
        self,
        sequence: DecodeSequence,
        *,
        capacity: int,
        loop: asyncio.AbstractEventLoop,
        notify: Callable[[], None],
    ) -> None:
        self.sequence = sequence
        self.is_cancelled = False
        self._capacity = capacity
        self._loop = loop
        self._notify = notify
        self._on_release: Callable[[], None] | None = None
        self._waiting: deque[types_pb2.TokenDelta] = deque()
        self._changed = asyncio.Event()
        self._is_released = False
        self._error: BaseException | None = None

    # On the event loop.

    async def __aiter__(self) -> AsyncIterator[types_pb2.TokenDelta]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            # Read before the queue is emptied: nothing is put after the release.
            is_released = self._is_released
            if deltas := self._take_waiting():
                yield merge(deltas)
            if is_released:
                break
        if self._error is not None:
            raise self._error

    def cancel(self, on_release: Callable[[], None]) -> None:
        """Ask the engine to let go of the sequence; it does before its next step.

        Args:
            on_release: Called once it has let go, at once if it has already.
        """
        if self._is_released:
            on_release()
            return
        self._on_release = on_release
        self.is_cancelled = True
        self._notify()

    def _take_waiting(self) -> Sequence[types_pb2.TokenDelta]:
        deltas = [self._waiting.popleft() for _ in range(len(self._waiting))]
        # Always: whether the queue was full when the engine looked cannot be told from here.
        self._notify()
        return deltas

    def _wake_reader(self) -> None:
        self._changed.set()

    def _mark_released(self, error: BaseException | None) -> None:
        self._error = error
        self._is_released = True
        self._changed.set()
        if self._on_release is not None:
            self._on_release()

    # On the engine's thread.

    @property
    def has_room(self) -> bool:
        """Whether one more delta may be put."""
        return len(self._waiting) < self._capacity

    def put(self, delta: types_pb2.TokenDelta) -> None:
        """Hand a delta to the reader."""
        self._waiting.append(delta)
        self._loop.call_soon_threadsafe(self._wake_reader)

    def release(self, error: BaseException | None) -> None:
        """Let go of the sequence for good.

        Args:
            error: What ended it early.
        """
        self._loop.call_soon_threadsafe(self._mark_released, error)


def merge(deltas: Iterable[types_pb2.TokenDelta]) -> types_pb2.TokenDelta:
    """Return deltas that follow one another as one."""
    deltas = list(deltas)
    return types_pb2.TokenDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=list(itertools.chain.from_iterable(delta.token_ids for delta in deltas)),
        first_token_index=deltas[0].first_token_index,
        logprobs=list(itertools.chain.from_iterable(delta.logprobs for delta in deltas)),
    )
