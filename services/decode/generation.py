"""The bridge between the engine's thread and a request on the event loop.

One thread puts, one coroutine takes. The queue between them is small and bounded, so that a reader
who falls behind stops his own sequence, and nobody else's.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TypeAlias

from chunkserve.v1 import types_pb2
from services.decode.sequence import DecodeSequence
from services.decode.sequence_kv import SequenceKV

# Takes a delta, and returns what takes it further.
Sink: TypeAlias = Callable[[types_pb2.TokenDelta], Callable[[], None]]


class Generation:
    """One answer as the request sees it: an async iterator over its deltas, to be read once.

    Tokens that wait for the reader come as one delta. The iteration ends when the answer does, and
    raises what ended it early. After it, ``sequence`` and ``kv`` are the reader's: no thread
    touches them. With a ``sink``, the deltas go there, and the iteration only ends.

    Args:
        sequence: The engine's state of the answer.
        kv: The KV that it extends.
        capacity: Tokens that may wait for the reader.
        notify: Wakes the engine up; callable from the event loop.
        on_released: Called on the event loop when the engine has let go.
        sink: Takes the deltas on the engine's thread, and returns what sends them, to be called
            on the event loop.
    """

    def __init__(
        self,
        sequence: DecodeSequence,
        kv: SequenceKV,
        *,
        capacity: int,
        notify: Callable[[], None],
        on_released: Callable[[], None],
        sink: Sink | None = None,
    ) -> None:
        self.sequence = sequence
        self.kv = kv
        self.is_cancelled = False
        self._is_held = False
        self._sink = sink
        self._capacity = capacity
        self._notify = notify
        self._on_released = on_released
        self._waiting: deque[types_pb2.TokenDelta] = deque()
        self._changed = asyncio.Event()
        self._is_released = False
        self._error: Exception | None = None

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

    def cancel(self) -> None:
        """Ask the engine to let go of the sequence; it does before its next step. Idempotent."""
        self.is_cancelled = True
        self._notify()

    def hold(self, is_held: bool) -> None:
        """Let the engine pause the sequence before its next step, or go on with it."""
        self._is_held = is_held
        self._notify()

    def _take_waiting(self) -> Sequence[types_pb2.TokenDelta]:
        deltas = [self._waiting.popleft() for _ in range(len(self._waiting))]
        # Always: whether the queue was full when the engine looked cannot be told from here.
        self._notify()
        return deltas

    def _mark_released(self, error: Exception | None) -> None:
        self._error = error
        self._is_released = True
        self._changed.set()
        self._on_released()

    # On the engine's thread.

    @property
    def has_room(self) -> bool:
        """Whether one more delta may be put."""
        return not self._is_held and len(self._waiting) < self._capacity

    def put(self, delta: types_pb2.TokenDelta) -> Callable[[], None]:
        """Hand a delta to the reader.

        Returns:
            What takes it there, to be called on the event loop.
        """
        if self._sink is not None:
            return self._sink(delta)
        self._waiting.append(delta)
        return self._changed.set

    def released(self, error: Exception | None) -> Callable[[], None]:
        """Let go of the sequence for good.

        Args:
            error: What ended it early.

        Returns:
            What tells the reader, to be called on the event loop.
        """
        return functools.partial(self._mark_released, error)


def merge(deltas: Iterable[types_pb2.TokenDelta]) -> types_pb2.TokenDelta:
    """Return deltas that follow one another as one."""
    deltas = list(deltas)
    if len(deltas) == 1:
        return deltas[0]
    return types_pb2.TokenDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=list(itertools.chain.from_iterable(delta.token_ids for delta in deltas)),
        first_token_index=deltas[0].first_token_index,
        logprobs=list(itertools.chain.from_iterable(delta.logprobs for delta in deltas)),
    )
