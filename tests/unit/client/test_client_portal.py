"""The event loop behind the synchronous client, when Ctrl-C comes at the worst time."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from chunkserve_client._portal import Portal


@pytest.fixture
def portal() -> Iterator[Portal]:
    opened = Portal()
    yield opened
    opened.close()


def interrupt_main() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@pytest.mark.parametrize("spins", range(40))
def test_interrupt_at_any_moment_closes_the_source(portal: Portal, spins: int):
    closed = threading.Event()

    async def source() -> AsyncIterator[int]:
        try:
            for _ in range(spins * 10):
                pass
            interrupt_main()
            await asyncio.Event().wait()
            yield 0
        finally:
            await asyncio.sleep(0)
            closed.set()

    with pytest.raises(KeyboardInterrupt):
        list(portal.iterate(source()))

    assert closed.is_set()
    assert portal.run(asyncio.sleep(0, "alive")) == "alive"


def test_interrupt_before_the_coroutine_is_scheduled_drops_it(portal: Portal):
    portal.run(asyncio.sleep(0))
    loop = portal._ready.result()
    schedule = loop.call_soon_threadsafe

    def interrupted_once(*args: object) -> object:
        loop.call_soon_threadsafe = schedule  # type: ignore[assignment]
        raise KeyboardInterrupt

    loop.call_soon_threadsafe = interrupted_once  # type: ignore[assignment, method-assign]
    coroutine = asyncio.sleep(0)

    with pytest.raises(KeyboardInterrupt):
        portal.run(coroutine)

    assert coroutine.cr_frame is None  # closed: it will not warn that nobody awaited it
    assert portal.run(asyncio.sleep(0, "alive")) == "alive"


def test_closed_portal_refuses_and_drops_the_coroutine(portal: Portal):
    portal.close()
    coroutine = asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="closed"):
        portal.run(coroutine)

    assert coroutine.cr_frame is None


def test_closing_ends_what_runs(portal: Portal):
    started = threading.Event()

    async def wait_forever() -> None:
        started.set()
        await asyncio.Event().wait()

    raised: list[BaseException] = []

    def call() -> None:
        try:
            portal.run(wait_forever())
        except BaseException as error:
            raised.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert started.wait(10)
    portal.close()
    caller.join(10)

    assert [type(error).__name__ for error in raised] == ["Cancelled"]
