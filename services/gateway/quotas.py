"""How much a tenant may use: sessions, stored bytes, and turns at once.

Usage is counted in the store, for all gateways together. Sessions and bytes are checked before
what would add to them begins, so what runs at the same moment may exceed a limit by itself;
turns never do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from services.gateway.config import GatewaySettings
from services.runtime.errors import OverloadedError
from services.store.base import SessionStore
from services.store.lease import counted_turn

_RETRY_TURN_AFTER_S: Final = 1.0


class Quotas:
    """The limits of a tenant. A limit of 0 is none, and costs nothing.

    Args:
        settings: Name the tenant and its limits.
        store: Where usage is counted.
    """

    def __init__(self, settings: GatewaySettings, store: SessionStore) -> None:
        self._settings = settings
        self._tenant = settings.tenant
        self._store = store

    async def check_new_session(self) -> None:
        """Raise unless one more session, with bytes of its own, may be made.

        Raises:
            OverloadedError: There are too many (reason ``QUOTA_EXCEEDED``).
        """
        limit = self._settings.quota_sessions
        if limit:
            usage = await self._store.usage(self._tenant)
            if usage.num_sessions >= limit:
                raise self._exceeded("sessions", usage.num_sessions, limit, "delete some")
        await self.check_stored_bytes()

    async def check_stored_bytes(self) -> None:
        """Raise unless more may be stored.

        Raises:
            OverloadedError: The sessions take too much (reason ``QUOTA_EXCEEDED``).
        """
        limit = self._settings.quota_stored_bytes
        if limit:
            usage = await self._store.usage(self._tenant)
            if usage.stored_bytes >= limit:
                do = "delete or compress some sessions"
                raise self._exceeded("stored bytes", usage.stored_bytes, limit, do)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Count a turn while the block runs.

        Raises:
            OverloadedError: Too many run (reason ``QUOTA_EXCEEDED``).
        """
        limit = self._settings.quota_concurrent_turns
        if not limit:
            yield
            return
        ttl_s = self._settings.lease_ttl_s
        async with counted_turn(self._store, self._tenant, limit=limit, ttl_s=ttl_s) as has_room:
            if not has_room:
                raise self._exceeded(
                    "concurrent turns",
                    limit,
                    limit,
                    "retry when one has ended",
                    retry_after_s=_RETRY_TURN_AFTER_S,
                )
            yield

    def _exceeded(
        self, what: str, used: int, limit: int, do: str, *, retry_after_s: float | None = None
    ) -> OverloadedError:
        return OverloadedError(
            f"tenant {self._tenant} has {used} {what} and may have {limit}; {do}",
            reason="QUOTA_EXCEEDED",
            metadata={"quota": what.replace(" ", "_"), "used": str(used), "limit": str(limit)},
            quota_subject=f"tenant:{self._tenant}",
            retry_after_s=retry_after_s,
        )
