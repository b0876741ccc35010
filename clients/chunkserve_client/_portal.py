"""An event loop on a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

from chunkserve_client.errors import cancelled

_SIGNALS_S: Final = 0.5  # Python loses a signal that comes just before a lock is waited for
_CANCEL_WAIT_S: Final = 5.0
_END: Final = object()

T = TypeVar("T")


class Portal:
    """Runs coroutines for other threads. Starts its thread at the first one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop: asyncio.Event | None = None
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether coroutines can still be run."""
        return not self._closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for it; Ctrl-C while waiting cancels it.

        Raises:
            Cancelled: The portal was closed meanwhile.
            RuntimeError: The portal is closed.
        """
        try:
            loop = self._started_loop()
        except RuntimeError:
            coroutine.close()
            raise
        task: list[asyncio.Task[T]] = []
        done: Future[T] = Future()

        def start() -> None:
            task.append(loop.create_task(coroutine))
            task[0].add_done_callback(lambda ended: _hand_over(ended, done))

        def cancel() -> None:
            if task:
                task[0].cancel()
            else:  # interrupted before it was scheduled
                coroutine.close()
                done.set_exception(cancelled(""))

        try:
            # Inside: Ctrl-C may come as soon as the coroutine is scheduled.
            loop.call_soon_threadsafe(start)
            return _result(done)
        except BaseException:
            if not done.done():
                # Wait for the end: what the coroutine holds must be free when we return.
                loop.call_soon_threadsafe(cancel)
                wait([done], timeout=_CANCEL_WAIT_S)
            raise

    def iterate(self, source: AsyncGenerator[T]) -> Iterator[T]:
        """Yield what ``source`` yields, and close it however the iteration ends."""

        async def step() -> T | object:
            return await anext(source, _END)

        try:
            while (item := self.run(step())) is not _END:
                yield item  # type: ignore[misc]  # not the sentinel, so a T
        finally:
            if self.is_open:
                self.run(source.aclose())

    def close(self) -> None:
        """Cancel what runs and end the thread. Harmless if it is closed."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is None or self._stop is None:
            return
        self._ready.result().call_soon_threadsafe(self._stop.set)
        thread.join()

    def _started_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._thread is None:
                # A daemon, so that a client that nobody closed cannot hold up the exit.
                self._thread = threading.Thread(
                    target=lambda: asyncio.run(self._serve()), name="chunkserve", daemon=True
                )
                self._thread.start()
        return self._ready.result()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._stop.wait()


def _result(done: Future[T]) -> T:
    """Wait for the result; a signal is handled at once, or at the latest after ``_SIGNALS_S``."""
    while True:
        try:
            return done.result(timeout=_SIGNALS_S)
        except TimeoutError:
            if done.done():
                return done.result()  # the error was its own, or it ended just now


def _hand_over(task: asyncio.Task[T], done: Future[T]) -> None:
    if task.cancelled():
        done.set_exception(cancelled(""))
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(task.result())
