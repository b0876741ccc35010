"""Memory pressure costs a little quality instead of a cache miss.

Past the high mark of stored bytes the sessions are made smaller, the coldest first, and all of
them by one step before any by the next: quantized to 8 bits, to 4, then shrunk again and again
down to a floor. Only when nothing of that is left to do are sessions evicted. It ends below the
low mark.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import prometheus_client

from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.compaction import Compactor, Target
from services.runtime.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.runtime.telemetry import get_logger
from services.store.base import Store
from services.store.lease import turn_lease

SHRINK: Final = 0.7

# One of several compression processes relieves a store at a time: who holds this lease. No
# tenant's name is empty, so it is no session's.
_LEASE: Final = ("", "pressure")
_PAGE_SIZE: Final = 64
_READS_AT_ONCE: Final = 16

_STORED: Final = prometheus_client.Gauge(
    "chunkserve_stored_bytes", "Bytes of the segments that living sessions name.", ["tenant"]
)
_EVICTED: Final = prometheus_client.Counter(
    "chunkserve_evicted_sessions", "Sessions deleted because memory was short.", ["tenant"]
)

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Marks:
    """When to begin, and when to end.

    Attributes:
        high_bytes: Above it, sessions are made smaller. 0: never.
        low_bytes: At it, or below, they are left alone.
    """

    high_bytes: int
    low_bytes: int


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as it was read.

    Attributes:
        tenant: Owner.
        session_id: Its id.
        updated_ns: When its last turn was committed, nanoseconds since the epoch.
        sizes: Bytes of each of its segments, by id.
    """

    tenant: str
    session_id: str
    updated_ns: int
    sizes: dict[str, int]


class StoredBytes:
    """Counts what sessions store, shared segments once."""

    def __init__(self, sessions: Iterable[StoredSession] = ()) -> None:
        self.total = 0
        self._names: Counter[str] = Counter()
        for session in sessions:
            self.add(session.sizes)

    def add(self, sizes: dict[str, int]) -> None:
        """Count a session's segments."""
        for name, size in sizes.items():
            self.total += 0 if self._names[name] else size
            self._names[name] += 1

    def remove(self, sizes: dict[str, int]) -> None:
        """Count them no more."""
        for name, size in sizes.items():
            self._names[name] -= 1
            self.total -= 0 if self._names[name] else size


class PressurePolicy:
    """Looks at the stored bytes, and makes room.

    Args:
        store: Where sessions are.
        compactor: Makes them smaller.
        tenants: Whose.
        total: Marks of all of them together.
        tenant: Marks of each.
        floor_ratio: Fraction of its tokens that a segment keeps however short memory is.
        lease_ttl_s: Of the leases held meanwhile.
    """

    def __init__(
        self,
        store: Store,
        compactor: Compactor,
        *,
        tenants: Sequence[str],
        total: Marks,
        tenant: Marks,
        floor_ratio: float,
        lease_ttl_s: float,
    ) -> None:
        self._store = store
        self._compactor = compactor
        self._tenants = tenants
        self._total = total
        self._tenant = tenant
        self._lease_ttl_s = lease_ttl_s
        self._has_busy = False
        self._has_waited = False
        self._steps: Sequence[Target] = (
            Target(precision="int8"),
            Target(precision="int4"),
            Target(shrink=SHRINK, floor_ratio=floor_ratio),
        )

    @property
    def is_enabled(self) -> bool:
        """Whether there is any mark."""
        return bool(self._total.high_bytes or self._tenant.high_bytes)

    async def run(self, *, interval_s: float) -> None:
        """Make room again and again, until cancelled. Outages of the store are survived."""
        while True:
            try:
                await self.relieve()
            except ServiceError as error:
                _log.warning("pressure.failed", reason=error.error_reason, error=error.message)
            await asyncio.sleep(interval_s)

    async def relieve(self) -> bool:
        """Make room once, if there is too little of it; whether it was our turn to look.

        Raises:
            UnavailableError, OverloadedError: The store is away, or full.
        """
        try:
            async with turn_lease(self._store, *_LEASE, ttl_s=self._lease_ttl_s):
                await self._relieve()
        except ConflictError:  # another process is at it
            return False
        return True

    async def _relieve(self) -> None:
        by_tenant = {tenant: await self._sessions(tenant) for tenant in self._tenants}
        for tenant, sessions in by_tenant.items():
            by_tenant[tenant] = await self._make_room(sessions, self._tenant)
        together = [session for sessions in by_tenant.values() for session in sessions]
        together = await self._make_room(together, self._total)
        for tenant in self._tenants:
            own = [session for session in together if session.tenant == tenant]
            _STORED.labels(tenant).set(StoredBytes(own).total)

    async def _make_room(
        self, sessions: Collection[StoredSession], marks: Marks
    ) -> list[StoredSession]:
        """Make sessions smaller until they are below the low mark; return those that are left."""
        used = StoredBytes(sessions)
        coldest_first = sorted(sessions, key=lambda session: session.updated_ns)
        if not marks.high_bytes or used.total <= marks.high_bytes:
            return coldest_first
        self._has_busy = False
        before = used.total
        left = {(session.tenant, session.session_id): session for session in coldest_first}
        async with aclosing(self._actions(left)) as actions:
            async for old, new in actions:
                used.remove(old.sizes)
                key = old.tenant, old.session_id
                if new is None:
                    del left[key]
                else:
                    used.add(new.sizes)
                    left[key] = new
                if used.total <= marks.low_bytes:
                    break
        if used.total <= marks.low_bytes:
            self._has_waited = False
        _log.info(
            "pressure.relieved",
            before_bytes=before,
            after_bytes=used.total,
            num_evicted=len(sessions) - len(left),
        )
        return list(left.values())

    async def _actions(
        self, left: dict[tuple[str, str], StoredSession]
    ) -> AsyncGenerator[tuple[StoredSession, StoredSession | None]]:
        """Do one thing after another, the mildest first; yield whose session became what.

        Before the first that costs tokens, sessions that were in use get a second chance at what
        costs none: their latest answers may be what is too much.
        """
        for step in self._steps:
            if step.shrink is not None and self._has_busy and not self._has_waited:
                self._has_waited = True
                return
            has_more = True
            while has_more:
                has_more = False
                for session in list(left.values()):
                    if (smaller := await self._compact(session, step)) is not None:
                        yield session, smaller
                        # Only shrinking can be done again.
                        has_more = step.shrink is not None
        for session in list(left.values()):
            if await self._evict(session):
                yield session, None

    async def _compact(self, session: StoredSession, step: Target) -> StoredSession | None:
        """Take one step with a session; ``None``: it has nothing to give, or is not to be had."""
        try:
            done = await self._compactor.compact(
                session.tenant, session.session_id, step, by_pressure=True
            )
        except (UnavailableError, OverloadedError):
            raise
        except ServiceError as error:  # in use, expired or damaged: others have to give
            self._has_busy = self._has_busy or isinstance(error, ConflictError)
            _skipped(session, error)
            return None
        if done.after == done.before:
            return None
        return StoredSession(
            session.tenant, session.session_id, session.updated_ns, _sizes(done.after)
        )

    async def _evict(self, session: StoredSession) -> bool:
        tenant, session_id = session.tenant, session.session_id
        try:
            async with turn_lease(self._store, tenant, session_id, ttl_s=self._lease_ttl_s):
                await self._store.delete_manifest(tenant, session_id)
        except NotFoundError:
            return True  # it has expired meanwhile
        except ConflictError as error:
            _skipped(session, error)
            return False
        _EVICTED.labels(tenant).inc()
        _log.warning("pressure.evicted", tenant=tenant, session_id=session_id)
        return True

    async def _sessions(self, tenant: str) -> list[StoredSession]:
        reads_at_once = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(session_id: str) -> StoredSession | None:
            async with reads_at_once:
                try:
                    stored = await self._store.get_manifest(tenant, session_id)
                except NotFoundError:  # it has expired since it was listed
                    return None
            manifest = manifest_pb2.Manifest.FromString(stored.body)
            updated_ns = manifest.update_time.ToNanoseconds()
            return StoredSession(tenant, session_id, updated_ns, _sizes(manifest.segments))

        found: list[StoredSession] = []
        token = ""
        while True:
            page = await self._store.list_sessions(tenant, page_size=_PAGE_SIZE, page_token=token)
            sessions = await asyncio.gather(*map(read, page.session_ids))
            found += [session for session in sessions if session is not None]
            if not (token := page.next_page_token):
                return found


def _sizes(segments: Iterable[session_pb2.Segment]) -> dict[str, int]:
    return {segment.segment_id: segment.size_bytes for segment in segments}


def _skipped(session: StoredSession, error: ServiceError) -> None:
    _log.info(
        "pressure.skipped",
        tenant=session.tenant,
        session_id=session.session_id,
        reason=error.error_reason,
    )
