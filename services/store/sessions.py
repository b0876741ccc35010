"""Manifests, turn leases and the list of sessions in Redis.

The list is a sorted set per tenant whose members begin with the time of creation. It lies in
another slot than the sessions that it lists, so it is a hint and never the truth: a page shows an
entry only if its manifest is there and was created at that time, entries without one are removed
by whoever meets them, and every commit puts its session's entry back.
"""

from __future__ import annotations

import base64
import itertools
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Final

from services.runtime.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
)
from services.store import keys, lease_scripts
from services.store.base import SessionPage, StoredManifest
from services.store.connect import AsyncClient
from services.store.failures import segment_not_found, store_errors, ttl_ms

# Segments outlive the sessions that name them, so that a session that can be read can be used.
SEGMENT_GRACE_MS: Final = 60_000

# Entries read at once, so that a small page does not crawl over many expired ones.
_MIN_LIST_BATCH: Final = 64

_CREATE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'version', 1, 'body', ARGV[1], 'created_us', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

# Answers {version, created_us}: the new version, or the stored one negated; nothing if it is gone.
_COMMIT: Final = """
local stored = redis.call('HMGET', KEYS[1], 'version', 'created_us')
if not stored[1] then return {} end
if stored[1] ~= ARGV[1] then return {-tonumber(stored[1]), stored[2]} end
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'body', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {version, stored[2]}
"""

_DELETE: Final = """
local created_us = redis.call('HGET', KEYS[1], 'created_us')
redis.call('DEL', KEYS[1])
return created_us
"""

# GT treats a key without a TTL as one that lives for ever, hence NX first.
_LIST: Final = """
redis.call('ZADD', KEYS[1], 0, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'NX')
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'GT')
"""


class RedisSessions:
    """Implements ``SessionStore``.

    Args:
        client: For one event loop.
        where: Address for messages.
    """

    def __init__(self, client: AsyncClient, where: str) -> None:
        self._client = client
        self._where = where
        self._create = client.register_script(_CREATE)
        self._commit = client.register_script(_COMMIT)
        self._delete = client.register_script(_DELETE)
        self._list = client.register_script(_LIST)
        self._renew = client.register_script(lease_scripts.RENEW)
        self._release = client.register_script(lease_scripts.RELEASE)

    async def create_manifest(
        self, tenant: str, session_id: str, body: bytes, *, ttl_s: float
    ) -> None:
        """Store version 1."""
        created_us = time.time_ns() // 1000
        lifetime = ttl_ms(ttl_s)
        with store_errors(self._where):
            is_new = await self._create(
                keys=[keys.manifest(tenant, session_id)], args=[body, created_us, lifetime]
            )
            if not is_new:
                raise AlreadyExistsError(
                    f"session {session_id} exists; choose another id",
                    resource=("session", session_id),
                )
            await self._enlist(tenant, keys.index_member(created_us, session_id), lifetime)

    async def get_manifest(self, tenant: str, session_id: str) -> StoredManifest:
        """Read a manifest."""
        key = keys.manifest(tenant, session_id)
        with store_errors(self._where):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.execute_command("HMGET", key, "version", "body")
            pipeline.execute_command("PTTL", key)
            (version, body), remaining_ms = await pipeline.execute()
        if version is None or remaining_ms < 0:
            raise _not_found(session_id)
        return StoredManifest(body=body, version=int(version), expires_in_s=remaining_ms / 1000)

    async def commit_manifest(
        self,
        tenant: str,
        session_id: str,
        body: bytes,
        *,
        expected_version: int,
        ttl_s: float,
        segment_ids: Iterable[str],
    ) -> int:
        """Replace version ``expected_version`` and return the new one, all or nothing."""
        lifetime = ttl_ms(ttl_s)
        with store_errors(self._where):
            await self._extend_segments(
                list(dict.fromkeys(segment_ids)), lifetime + SEGMENT_GRACE_MS
            )
            answer = await self._commit(
                keys=[keys.manifest(tenant, session_id)],
                args=[expected_version, body, lifetime],
            )
            if not answer:
                raise _not_found(session_id)
            version, created_us = int(answer[0]), int(answer[1])
            if version < 0:
                raise ConflictError(
                    f"session {session_id} was changed by another turn: version {-version} is"
                    f" stored, {expected_version} was expected; send the turn again",
                    resource=("session", session_id),
                )
            await self._enlist(tenant, keys.index_member(created_us, session_id), lifetime)
        return version

    async def delete_manifest(self, tenant: str, session_id: str) -> None:
        """Delete a session."""
        with store_errors(self._where):
            created_us = await self._delete(keys=[keys.manifest(tenant, session_id)])
            if created_us is None:
                raise _not_found(session_id)
            member = keys.index_member(int(created_us), session_id)
            await self._client.zrem(keys.session_index(tenant), member)

    async def list_sessions(self, tenant: str, *, page_size: int, page_token: str) -> SessionPage:
        """Return a page of sessions."""
        if page_size < 1:
            raise InvalidRequestError(
                f"page_size is {page_size}; send at least 1", field="page_size"
            )
        index = keys.session_index(tenant)
        # One more than the page holds tells whether there is another page.
        live: list[bytes] = []
        start = b"(" + _parse_page_token(page_token) if page_token else b"-"
        with store_errors(self._where):
            while len(live) <= page_size:
                limit = max(page_size + 1 - len(live), _MIN_LIST_BATCH)
                members: list[bytes] = await self._client.execute_command(
                    "ZRANGE", index, start, "+", "BYLEX", "LIMIT", 0, limit
                )
                found = await self._living(tenant, members)
                live += found
                if dead := [member for member in members if member not in found]:
                    await self._client.zrem(index, *dead)
                if len(members) < limit:
                    break
                start = b"(" + members[-1]
        page = live[:page_size]
        return SessionPage(
            session_ids=tuple(keys.parse_index_member(member)[1] for member in page),
            next_page_token=_page_token(page[-1]) if len(live) > page_size else "",
        )

    async def acquire_lease(self, tenant: str, session_id: str, *, ttl_s: float) -> str:
        """Take the turn lease and return its token."""
        token = secrets.token_hex(16)
        with store_errors(self._where):
            is_ours = await self._client.set(
                keys.lease(tenant, session_id), token, px=ttl_ms(ttl_s), nx=True
            )
        if not is_ours:
            raise ConflictError(
                f"session {session_id} is busy with another turn; retry when it has ended",
                resource=("session", session_id),
            )
        return token

    async def renew_lease(self, tenant: str, session_id: str, token: str, *, ttl_s: float) -> bool:
        """Extend a lease; ``False`` if it is not ours any more."""
        with store_errors(self._where):
            return bool(
                await self._renew(
                    keys=[keys.lease(tenant, session_id)], args=[token, ttl_ms(ttl_s)]
                )
            )

    async def release_lease(self, tenant: str, session_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""
        with store_errors(self._where):
            await self._release(keys=[keys.lease(tenant, session_id)], args=[token])

    async def _enlist(self, tenant: str, member: bytes, lifetime: int) -> None:
        await self._list(keys=[keys.session_index(tenant)], args=[member, lifetime])

    async def _extend_segments(self, segment_ids: Sequence[str], lifetime: int) -> None:
        """Extend the life of every part of every segment.

        Raises:
            NotFoundError: A segment is gone, or is not complete any more.
            CorruptError: What says which parts a segment has is damaged.
        """
        if not segment_ids:
            return
        pipeline = self._client.pipeline(transaction=False)
        for segment_id in segment_ids:
            pipeline.execute_command("GET", keys.segment_header(segment_id))
        values = await pipeline.execute()

        names = {}
        for segment_id, value in zip(segment_ids, values, strict=True):
            if value is None:
                raise segment_not_found(segment_id)
            parts = keys.segment_parts(segment_id, value)
            names[segment_id] = [keys.segment_header(segment_id), *parts]

        pipeline = self._client.pipeline(transaction=False)
        for name in itertools.chain.from_iterable(names.values()):
            pipeline.execute_command("PEXPIRE", name, lifetime, "GT")
        for segment_names in names.values():
            pipeline.execute_command("EXISTS", *segment_names)
        counts = (await pipeline.execute())[-len(names) :]
        for (segment_id, segment_names), count in zip(names.items(), counts, strict=True):
            if count != len(segment_names):
                raise segment_not_found(segment_id)

    async def _living(self, tenant: str, members: Sequence[bytes]) -> list[bytes]:
        """Return the members whose session exists and was created when the member says."""
        if not members:
            return []
        parsed = [keys.parse_index_member(member) for member in members]
        pipeline = self._client.pipeline(transaction=False)
        for _, session_id in parsed:
            pipeline.execute_command("HGET", keys.manifest(tenant, session_id), "created_us")
        found = await pipeline.execute()
        return [
            member
            for member, (created_us, _), stored in zip(members, parsed, found, strict=True)
            if stored is not None and int(stored) == created_us
        ]


def _page_token(member: bytes) -> str:
    return base64.urlsafe_b64encode(member).decode()


def _parse_page_token(page_token: str) -> bytes:
    try:
        member = base64.b64decode(page_token.encode(), altchars=b"-_", validate=True)
        keys.parse_index_member(member)
    except ValueError:
        raise InvalidRequestError(
            "page_token is not one that a list of sessions returned; send it unchanged, or none",
            field="page_token",
        ) from None
    return member


def _not_found(session_id: str) -> NotFoundError:
    return NotFoundError(
        f"session {session_id} does not exist, or has expired",
        reason="SESSION_NOT_FOUND",
        resource=("session", session_id),
    )
