"""Makes a segment once, however many ask for it at the same time, here and in other processes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from prometheus_client import Counter

from services.runtime.errors import UnavailableError
from services.runtime.tasks import end_task
from services.runtime.telemetry import get_logger
from services.store.base import SegmentLeases
from services.store.lease import finish

_log = get_logger()

_WAITS = Counter(
    "chunkserve_prefill_single_flight_waits",
    "Requests that waited for a segment that another one was computing.",
    ["where"],  # process: in this worker; cluster: in another one
)

# How often a segment is looked for that another process computes.
_FIRST_LOOK_S: Final = 0.02
_LAST_LOOK_S: Final = 1.0

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    num_waiting: int = 0


class SingleFlight(Generic[T]):
    """Computations that run, by segment.

    Args:
        leases: Tell other processes which segments are being computed.
        lease_ttl_s: Seconds after the death of a process until another one computes its segment.
    """

    def __init__(self, leases: SegmentLeases, *, lease_ttl_s: float) -> None:
        self._leases = leases
        self._lease_ttl_s = lease_ttl_s
        self._flights: dict[str, _Flight[T]] = {}

    async def run(
        self,
        segment_id: str,
        *,
        find: Callable[[], Awaitable[T | None]],
        make: Callable[[], Awaitable[T]],
    ) -> tuple[T, bool]:
        """Return the segment, and whether this call is the one that looked for it or made it.

        The making goes on as long as anybody waits for it, also when the caller that began it is
        cancelled. What it raises, all of them raise.

        Args:
            segment_id: Calls with the same one at the same time share one making.
            find: Returns the segment if it is in the store. Asked before it is made, and while
                another process holds the lease.
            make: Computes and stores it.
        """
        flight = self._flights.get(segment_id)
        is_first = flight is None
        if flight is None:
            flight = _Flight(asyncio.create_task(self._fly(segment_id, find, make)))
            self._flights[segment_id] = flight
            flight.task.add_done_callback(lambda _: self._forget(segment_id, flight))
        else:
            _WAITS.labels("process").inc()
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task), is_first
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0 and not flight.task.done():
                self._forget(segment_id, flight)  # who comes now must not join what ends
                await end_task(flight.task)

    async def _fly(
        self,
        segment_id: str,
        find: Callable[[], Awaitable[T | None]],
        make: Callable[[], Awaitable[T]],
    ) -> T:
        token, look_after_s = secrets.token_hex(16), _FIRST_LOOK_S
        while not await asyncio.to_thread(
            self._leases.acquire_segment_lease, segment_id, token, ttl_s=self._lease_ttl_s
        ):
            if look_after_s == _FIRST_LOOK_S:
                _WAITS.labels("cluster").inc()
            await asyncio.sleep(look_after_s)
            look_after_s = min(2 * look_after_s, _LAST_LOOK_S)
            if (found := await find()) is not None:
                return found
        async with self._held(segment_id, token):
            # Whoever had the lease before may have stored it.
            found = await find()
            return found if found is not None else await make()

    def _forget(self, segment_id: str, flight: _Flight[T]) -> None:
        if self._flights.get(segment_id) is flight:
            del self._flights[segment_id]

    @asynccontextmanager
    async def _held(self, segment_id: str, token: str) -> AsyncIterator[None]:
        """Renew the lease while the block runs, and give it back however the block ends."""
        renewal = asyncio.create_task(self._renew(segment_id, token))
        try:
            yield
        finally:
            await end_task(renewal)
            release = asyncio.to_thread(self._leases.release_segment_lease, segment_id, token)
            await finish("segment_lease.release", release)

    async def _renew(self, segment_id: str, token: str) -> None:
        """Keep the lease until it is lost: then another process may compute the same, no more."""
        is_ours = True
        while is_ours:
            await asyncio.sleep(self._lease_ttl_s / 3)
            try:
                is_ours = await asyncio.to_thread(
                    self._leases.renew_segment_lease, segment_id, token, ttl_s=self._lease_ttl_s
                )
            except UnavailableError as error:
                _log.warning("segment_lease.not_renewed", error=error.message)
