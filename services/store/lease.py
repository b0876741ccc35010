"""The turn lease: one turn of a session at a time, whichever gateway serves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from services.runtime.errors import ConflictError, ServiceError, UnavailableError
from services.runtime.telemetry import get_logger
from services.store.base import SessionStore

_log = get_logger()


@asynccontextmanager
async def turn_lease(
    store: SessionStore, tenant: str, session_id: str, *, ttl_s: float
) -> AsyncIterator[None]:
    """Hold the lease while the block runs, and give it back however the block ends.

    The lease is renewed every third of ``ttl_s``. If it is lost, the block is cancelled: another
    turn may have begun, and two must not commit.

    Raises:
        ConflictError: Another turn holds it (reason ``SESSION_BUSY``), or it was lost
            (``LEASE_LOST``).
    """
    token = await store.acquire_lease(tenant, session_id, ttl_s=ttl_s)
    try:
        async with asyncio.TaskGroup() as tasks:
            renewal = tasks.create_task(_renew(store, tenant, session_id, token, ttl_s))
            yield
            renewal.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await finish("lease.release", store.release_lease(tenant, session_id, token))


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


async def _renew(
    store: SessionStore, tenant: str, session_id: str, token: str, ttl_s: float
) -> None:
    renewed_at = time.monotonic()
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            is_ours = await store.renew_lease(tenant, session_id, token, ttl_s=ttl_s)
        except UnavailableError:
            # A store that is back before the lease has run out does no harm.
            if time.monotonic() - renewed_at >= ttl_s:
                raise
            continue
        if not is_ours:
            raise ConflictError(
                f"the turn on session {session_id} took longer than its lease could be kept; "
                "send it again",
                reason="LEASE_LOST",
            )
        renewed_at = time.monotonic()
