"""Segments part by part over the event loop's connections, for exports and imports.

A process that passes sessions on holds one part at a time, however large the segment is. What it
writes is a copy of its own, invisible until it is published.
"""

from __future__ import annotations

import os

from services.store import keys, owners
from services.store.base import Buffer, SegmentCopy, SegmentOwner, StoredSegment
from services.store.breaker import CircuitBreaker
from services.store.connect import AsyncClient
from services.store.failures import segment_not_found, ttl_ms


class RedisTransfer:
    """Implements ``SegmentTransfer``.

    Args:
        client: For one event loop.
        breaker: Of the server.
    """

    def __init__(self, client: AsyncClient, breaker: CircuitBreaker) -> None:
        self._client = client
        self._breaker = breaker
        self._publish = client.register_script(owners.PUBLISH)

    async def open_segment(self, segment_id: str) -> StoredSegment:
        """Return a segment's header, and where its parts are."""
        with self._breaker.guard():
            value: bytes | None = await self._client.execute_command(
                "GET", keys.segment_header(segment_id)
            )
        if value is None:
            raise segment_not_found(segment_id)
        num_parts, name = keys.segment_copy(segment_id, value)
        header = keys.stored_header(segment_id, value)
        return StoredSegment(header, SegmentCopy(segment_id, name), num_parts)

    async def read_part(self, copy: SegmentCopy, index: int) -> bytes:
        """Return one part of a copy; who reads checks its content."""
        with self._breaker.guard():
            part: bytes | None = await self._client.execute_command("GET", _part(copy, index))
        if part is None:
            raise segment_not_found(copy.segment_id)
        return part

    def new_copy(self, segment_id: str) -> SegmentCopy:
        """Return a copy that nobody else writes. Nobody sees it before it is published."""
        return SegmentCopy(segment_id, os.urandom(keys.COPY_SIZE))

    async def write_part(
        self, copy: SegmentCopy, index: int, part: Buffer, *, ttl_s: float
    ) -> None:
        """Store one part of a copy."""
        with self._breaker.guard():
            lifetime = ttl_ms(ttl_s) + owners.SEGMENT_GRACE_MS
            await self._client.set(_part(copy, index), bytes(part), px=lifetime)

    async def publish_copy(
        self,
        copy: SegmentCopy,
        header: Buffer,
        num_parts: int,
        *,
        ttl_s: float,
        owner: SegmentOwner,
    ) -> bool:
        """Make the copy the segment, owned by ``owner``; ``False`` if there is one already."""
        value = keys.segment_value(copy.segment_id, copy.name, num_parts, bytes(header))
        call = owners.publish(
            copy.segment_id,
            value,
            owner=keys.owner(*owner),
            lifetime=ttl_ms(ttl_s) + owners.SEGMENT_GRACE_MS,
        )
        with self._breaker.guard():
            return bool(await self._publish(keys=call.keys, args=call.args))

    async def discard_copy(self, copy: SegmentCopy, num_parts: int) -> None:
        """Delete the parts of a copy that was not published."""
        if num_parts:
            with self._breaker.guard():
                await self._client.unlink(*(_part(copy, index) for index in range(num_parts)))


def _part(copy: SegmentCopy, index: int) -> str:
    return keys.segment_part(copy.segment_id, copy.name, index)
