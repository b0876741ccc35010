"""The turn lease: one turn of a session at a time, whichever gateway serves it.

And the place among a tenant's turns, which is held in the same way.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

from services.runtime.errors import ConflictError, ServiceError, UnavailableError
from services.runtime.telemetry import get_logger
from services.store.base import SessionStore

_FIRST_PAUSE_S: Final = 0.01
_LONGEST_PAUSE_S: Final = 0.25

_LATE_PAUSE_S: Final = 0.25

_T = TypeVar("_T")

# Leases that wait for the store to be given back; the event loop alone would not keep the tasks.
_late: Final[set[asyncio.Task[None]]] = set()

_log = get_logger()


@asynccontextmanager
async def turn_lease(
    store: SessionStore, tenant: str, session_id: str, *, ttl_s: float, waits: bool = False
) -> AsyncIterator[None]:
    """Hold the lease while the block runs, and give it back however the block ends.

    The lease is renewed every third of ``ttl_s``, and with it the session, so that it does not
    expire during its own turn. If it is lost, the block is cancelled: another turn may have begun,
    and two must not commit. The error says so, unless it ran out because the store was away.

    Args:
        store: Where the session is.
        tenant: Its owner.
        session_id: Its id.
        ttl_s: After how long another turn may begin, should this process die.
        waits: Whether to wait, until cancelled, for a turn that runs. Who waits longest is not
            necessarily first.

    Raises:
        ConflictError: Another turn holds it (reason ``SESSION_BUSY``), or it was lost
            (``LEASE_LOST``).
        UnavailableError: The store is away, or was for longer than the lease lives.
    """

    async def take() -> str:
        return await store.acquire_lease(tenant, session_id, ttl_s=ttl_s)

    async def renew(token: str) -> None:
        if not await store.renew_lease(tenant, session_id, token, ttl_s=ttl_s):
            raise ConflictError(
                f"the turn on session {session_id} took longer than its lease could be kept; "
                "send it again",
                reason="LEASE_LOST",
            )

    async def give_back(token: str) -> None:
        await store.release_lease(tenant, session_id, token)

    taken = partial(_take, take, give_back)
    token = await (_wait_for(taken) if waits else taken())
    async with _held(token, renew, give_back, ttl_s):
        yield


@asynccontextmanager
async def counted_turn(
    store: SessionStore, tenant: str, *, limit: int, ttl_s: float
) -> AsyncIterator[bool]:
    """Count a turn of the tenant while the block runs.

    Yields whether there was room; without it, nothing is counted. A store that goes away meanwhile
    does not end the block.

    Args:
        store: Where the tenant's account is.
        tenant: Whose turn.
        limit: Turns that may run at once, at least 1.
        ttl_s: How long it counts, should this process die. Renewed every third of it.
    """

    async def take() -> str:
        return await store.begin_turn(tenant, limit=limit, ttl_s=ttl_s) or ""

    async def renew(token: str) -> None:
        with suppress(UnavailableError):
            await store.renew_turn(tenant, token, ttl_s=ttl_s)

    async def give_back(token: str) -> None:
        await store.end_turn(tenant, token)

    token = await _take(take, give_back)
    if not token:
        yield False
        return
    async with _held(token, renew, give_back, ttl_s):
        yield True


async def completed(work: Coroutine[Any, Any, _T]) -> _T:
    """Run work to its end, also if the caller is cancelled meanwhile, and return its result.

    For what must not happen by halves, or after what cleans up behind it: a command that was sent
    to a store cannot be called back.

    Args:
        work: Ends by itself within a bounded time.

    Raises:
        CancelledError: The caller was cancelled; the work has ended before.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # was looked at: the cancellation counts
        raise cancelled
    return task.result()


async def finish(what: str, cleanup: Coroutine[Any, Any, None]) -> None:
    """Run a cleanup to its end, also if the caller is cancelled meanwhile.

    A failure is logged and not raised: what is left behind expires by itself, and the request's
    own outcome counts.

    Args:
        what: Name of the log event.
        cleanup: Ends by itself within a bounded time.
    """
    task = asyncio.ensure_future(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    try:
        task.result()
    except ServiceError as error:
        _log.warning(f"{what}.failed", reason=error.error_reason, error=error.message)
    if cancelled is not None:
        raise cancelled


async def _take(
    take: Callable[[], Coroutine[Any, Any, str]], give_back: Callable[[str], Awaitable[None]]
) -> str:
    """Take something and return its token; cancelled meanwhile, leave nothing behind."""
    taking = asyncio.ensure_future(take())
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:

        async def undo() -> None:
            with suppress(ConflictError):
                await give_back(await taking)

        await finish("lease.release", undo())
        raise


@asynccontextmanager
async def _held(
    token: str,
    renew: Callable[[str], Awaitable[None]],
    give_back: Callable[[str], Coroutine[Any, Any, None]],
    ttl_s: float,
) -> AsyncIterator[None]:
    """Renew what was taken while the block runs, and give it back however the block ends."""
    has_ended = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as tasks:
            renewal = tasks.create_task(_renew(partial(renew, token), ttl_s, has_ended))
            try:
                yield
            finally:
                # Both: a cancellation alone can be lost in a command to the store (``end_task``
                # says how). The group would then wait, and the lease be kept, for ever.
                has_ended.set()
                renewal.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await finish("lease.release", _give_back_or_later(partial(give_back, token), ttl_s))


async def _give_back_or_later(
    give_back: Callable[[], Coroutine[Any, Any, None]], ttl_s: float
) -> None:
    """Give back now, or once the store is back: a short outage must not keep a session busy."""
    try:
        await give_back()
    except UnavailableError:
        task = asyncio.create_task(_give_back_later(give_back, ttl_s))
        _late.add(task)
        task.add_done_callback(_late.discard)
        raise


async def _give_back_later(give_back: Callable[[], Awaitable[None]], ttl_s: float) -> None:
    ends_at = time.monotonic() + ttl_s  # by then it has expired by itself
    while (left_s := ends_at - time.monotonic()) > 0:
        await asyncio.sleep(min(_LATE_PAUSE_S, left_s))
        with suppress(UnavailableError):
            await give_back()
            return


async def _wait_for(take: Callable[[], Awaitable[str]]) -> str:
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await take()
        except ConflictError:
            # Jitter, so that those who wait do not come all at once.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _renew(
    renew: Callable[[], Awaitable[None]], ttl_s: float, has_ended: asyncio.Event
) -> None:
    renewed_at = time.monotonic()
    outage: UnavailableError | None = None
    while not has_ended.is_set():
        await asyncio.sleep(ttl_s / 3)
        try:
            await renew()
        except UnavailableError as error:
            # A store that is back before the lease has run out does no harm.
            if time.monotonic() - renewed_at >= ttl_s:
                raise
            outage = error
            continue
        except ConflictError:
            if outage is not None:  # in which it ran out, between two attempts: say that
                raise outage from None
            raise
        renewed_at, outage = time.monotonic(), None
