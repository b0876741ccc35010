"""Manifests, turn leases and the list of sessions in Redis.

The list is a sorted set per tenant whose members begin with the time of creation. It lies in
another slot than the sessions that it lists, so it is a hint and never the truth: a page shows an
entry only if its manifest is there and was created at that time, entries without one are removed
by whoever meets them, and every commit puts its session's entry back.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from services.runtime.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
)
from services.store import keys, lease_scripts, owners
from services.store.accounts import RedisAccounts
from services.store.base import SessionPage, StoredManifest, TurnRecord
from services.store.breaker import CircuitBreaker
from services.store.connect import AsyncClient
from services.store.failures import segment_not_found, ttl_ms

# Results of turns that a session keeps.
MAX_TURN_RESULTS: Final = 64

# Entries read at once, so that a small page does not crawl over many expired ones.
_MIN_LIST_BATCH: Final = 64

# KEYS: manifest, turn results, turn order. ARGV: body, time, lifetime, segments.
_CREATE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'version', 1, 'body', ARGV[1], 'created_us', ARGV[2],
  'segments', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

# KEYS: manifest, turn results, turn order, reserved segments. ARGV: expected version, body,
# lifetime, segments, and, if the turn has a result, its request id and body. Answers {version,
# created_us, reserved segments, segments of the version before}: the new version, or the stored one
# negated; nothing if it is gone. What is reserved stays noted until it is released.
_COMMIT: Final = f"""
local stored = redis.call('HMGET', KEYS[1], 'version', 'created_us', 'segments')
if not stored[1] then
  redis.call('DEL', KEYS[4])
  return {{}}
end
if stored[1] ~= ARGV[1] then return {{-tonumber(stored[1]), stored[2]}} end
local version = redis.call('HINCRBY', KEYS[1], 'version', 1)
redis.call('HSET', KEYS[1], 'body', ARGV[2], 'segments', ARGV[4])
if ARGV[5] then
  redis.call('LREM', KEYS[3], 0, ARGV[5])
  redis.call('RPUSH', KEYS[3], ARGV[5])
  redis.call('HSET', KEYS[2], ARGV[5], ARGV[6])
  if redis.call('LLEN', KEYS[3]) > {MAX_TURN_RESULTS} then
    redis.call('HDEL', KEYS[2], redis.call('LPOP', KEYS[3]))
  end
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
return {{version, stored[2], redis.call('SMEMBERS', KEYS[4]), stored[3]}}
"""

# KEYS: manifest, turn results, turn order, reserved segments.
_DELETE: Final = """
local stored = redis.call('HMGET', KEYS[1], 'created_us', 'segments')
local reserved = redis.call('SMEMBERS', KEYS[4])
redis.call('DEL', unpack(KEYS))
return {stored[1], stored[2], reserved}
"""

# KEYS: lease, manifest, turn results, turn order. ARGV: token, lifetime. Answers whether the lease
# is ours, and the session's segments if it would have expired before the lease.
_RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return {0} end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if redis.call('PEXPIRE', KEYS[2], ARGV[2], 'GT') == 0 then return {1} end
redis.call('PEXPIRE', KEYS[3], ARGV[2], 'GT')
redis.call('PEXPIRE', KEYS[4], ARGV[2], 'GT')
return {1, redis.call('HGET', KEYS[2], 'segments')}
"""


class RedisSessions(RedisAccounts):
    """Implements ``SessionStore``.

    Args:
        client: For one event loop.
        breaker: Of the server.
    """

    def __init__(self, client: AsyncClient, breaker: CircuitBreaker) -> None:
        super().__init__(client, breaker)
        self._create = client.register_script(_CREATE)
        self._commit = client.register_script(_COMMIT)
        self._delete = client.register_script(_DELETE)
        self._renew = client.register_script(_RENEW)
        self._give_back = client.register_script(lease_scripts.RELEASE)

    async def create_manifest(
        self,
        tenant: str,
        session_id: str,
        body: bytes,
        *,
        ttl_s: float,
        segment_ids: Iterable[str] = (),
    ) -> None:
        """Store version 1. The session owns the segments before it exists."""
        created_us = time.time_ns() // 1000
        lifetime = ttl_ms(ttl_s)
        named = list(dict.fromkeys(segment_ids))
        with self._breaker.guard():
            async with self._owned(tenant, session_id, named, lifetime) as size_bytes:
                is_new = await self._create(
                    keys=_session_keys(tenant, session_id),
                    args=[body, created_us, lifetime, _joined(named)],
                )
                if not is_new:
                    raise AlreadyExistsError(
                        f"session {session_id} exists; choose another id",
                        resource=("session", session_id),
                    )
            await self._enlist(
                tenant,
                session_id,
                created_us=created_us,
                size_bytes=size_bytes,
                lifetime=lifetime,
            )

    async def get_manifest(self, tenant: str, session_id: str) -> StoredManifest:
        """Read a manifest."""
        key = keys.manifest(tenant, session_id)
        with self._breaker.guard():
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
        dropped_segment_ids: Iterable[str] = (),
        result: TurnRecord | None = None,
    ) -> int:
        """Replace version ``expected_version`` and return the new one, all or nothing."""
        lifetime = ttl_ms(ttl_s)
        named = list(dict.fromkeys(segment_ids))
        notes = keys.reserved_segments(tenant, session_id)
        with self._breaker.guard():
            async with (
                self._conflict_first(tenant, session_id, expected_version),
                self._unreserved_on_error(tenant, session_id, named),
                self._owned(tenant, session_id, named, lifetime) as size_bytes,
            ):
                answer = await self._commit(
                    keys=[*_session_keys(tenant, session_id), notes],
                    args=[expected_version, body, lifetime, _joined(named), *(result or ())],
                )
                if not answer:
                    raise _not_found(session_id)
                version, created_us = int(answer[0]), int(answer[1])
                if version < 0:
                    raise _conflict(session_id, -version, expected_version)
            await self._enlist(
                tenant,
                session_id,
                created_us=created_us,
                size_bytes=size_bytes,
                lifetime=lifetime,
            )
            reserved = _decoded(answer[2])
            # A commit that was cut off may have made the session own what it does not name.
            dropped = {*dropped_segment_ids, *_split(answer[3]), *reserved} - {*named}
            await self._release(keys.owner(tenant, session_id), dropped)
            await self._release(keys.reserver(tenant, session_id), reserved)
            if reserved:  # else, cut off before this, the next commit does it again
                await self._client.srem(notes, *reserved)
        return version

    async def get_turn_result(self, tenant: str, session_id: str, request_id: str) -> bytes | None:
        """Return what was committed under this request id; ``None`` if nothing was."""
        key = keys.turn_results(tenant, session_id)
        with self._breaker.guard():
            found: bytes | None = await self._client.execute_command("HGET", key, request_id)
        return found

    async def delete_manifest(self, tenant: str, session_id: str) -> None:
        """Delete a session, and at once the segments that only it named."""
        with self._breaker.guard():
            created_us, named, reserved = await self._delete(
                keys=[
                    *_session_keys(tenant, session_id),
                    keys.reserved_segments(tenant, session_id),
                ]
            )
            if created_us is None:
                raise _not_found(session_id)
            await self._strike(tenant, session_id, created_us=int(created_us))
            # A commit that was cut off may have made the session own what it does not name.
            owned = dict.fromkeys([*_split(named), *_decoded(reserved)])
            await self._release(keys.owner(tenant, session_id), owned)
            await self._release(keys.reserver(tenant, session_id), _decoded(reserved))

    async def release_segments(
        self, tenant: str, session_id: str, segment_ids: Iterable[str]
    ) -> None:
        """Own these segments no longer, unless the session names them; free what nobody owns."""
        with self._breaker.guard():
            unnamed = await self._unnamed(tenant, session_id, segment_ids)
            await self._release(keys.owner(tenant, session_id), unnamed)

    async def release_reserved(self, tenant: str, session_id: str) -> None:
        """Own no longer what turns reserved and the session does not name."""
        with self._breaker.guard():
            reserved = await self._client.execute_command(
                "SMEMBERS", keys.reserved_segments(tenant, session_id)
            )
            # They stay noted: a worker that does not know yet may be about to store one of them.
            unnamed = await self._unnamed(tenant, session_id, _decoded(reserved))
            await self._release(keys.reserver(tenant, session_id), unnamed)

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
        with self._breaker.guard():
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
        with self._breaker.guard():
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
        """Extend a lease, and its session; ``False`` if it is not ours any more."""
        lifetime = ttl_ms(ttl_s)
        with self._breaker.guard():
            is_ours, *segments = await self._renew(
                keys=[keys.lease(tenant, session_id), *_session_keys(tenant, session_id)],
                args=[token, lifetime],
            )
            # What is lost already, the turn finds out.
            with suppress(NotFoundError, CorruptError):
                for named in segments:
                    await self._claim(keys.owner(tenant, session_id), _split(named), lifetime)
        return bool(is_ours)

    async def release_lease(self, tenant: str, session_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""
        with self._breaker.guard():
            await self._give_back(keys=[keys.lease(tenant, session_id)], args=[token])

    @asynccontextmanager
    async def _owned(
        self, tenant: str, session_id: str, segment_ids: Sequence[str], lifetime: int
    ) -> AsyncIterator[int]:
        """Make the session own the segments, for the block to name them; yield their bytes.

        If the block fails for sure, the session owns no more than it names.

        Raises:
            NotFoundError: A segment is gone, or is not complete any more.
            CorruptError: What says which parts a segment has is damaged.
        """
        try:
            yield await self._claim(keys.owner(tenant, session_id), segment_ids, lifetime)
        except ServiceError:
            await self.release_segments(tenant, session_id, segment_ids)
            raise

    @asynccontextmanager
    async def _conflict_first(
        self, tenant: str, session_id: str, expected_version: int
    ) -> AsyncIterator[None]:
        """Let a conflict be told as one, also where the other turn freed what ours had reserved."""
        try:
            yield
        except NotFoundError:
            key = keys.manifest(tenant, session_id)
            version = await self._client.execute_command("HGET", key, "version")
            if version is not None and int(version) != expected_version:
                raise _conflict(session_id, int(version), expected_version) from None
            raise

    @asynccontextmanager
    async def _unreserved_on_error(
        self, tenant: str, session_id: str, segment_ids: Sequence[str]
    ) -> AsyncIterator[None]:
        """If the block fails for sure, free what the turn brought and the session does not name."""
        try:
            yield
        except ServiceError:
            unnamed = await self._unnamed(tenant, session_id, segment_ids)
            await self._release(keys.reserver(tenant, session_id), unnamed)
            raise

    async def _unnamed(self, tenant: str, session_id: str, segment_ids: Iterable[str]) -> list[str]:
        """Return the segments that the session does not name."""
        stored = await self._client.execute_command(
            "HGET", keys.manifest(tenant, session_id), "segments"
        )
        named = set(_split(stored))
        return [name for name in dict.fromkeys(segment_ids) if name not in named]

    async def _claim(self, owner: str, segment_ids: Sequence[str], lifetime: int) -> int:
        """Own the segments; return their bytes."""
        lifetime += owners.SEGMENT_GRACE_MS
        waiting, size_bytes = list(segment_ids), 0
        while waiting:
            calls = []
            for segment_id, value in (await self._segment_headers(waiting)).items():
                if value is None:
                    raise segment_not_found(segment_id)
                calls.append(owners.claim(segment_id, value, owner=owner, lifetime=lifetime))
            answers = dict(zip(waiting, await self._run(owners.CLAIM, calls), strict=True))
            for segment_id, answer in answers.items():
                if answer == owners.Outcome.INCOMPLETE:
                    raise segment_not_found(segment_id)
            waiting = [name for name, answer in answers.items() if answer < 0]
            size_bytes += sum(answer for answer in answers.values() if answer > 0)
        return size_bytes

    async def _release(self, owner: str, segment_ids: Iterable[str]) -> None:
        waiting = list(segment_ids)
        while waiting:
            headers = await self._segment_headers(waiting)
            calls = [
                owners.release(segment_id, value, owner=owner)
                for segment_id, value in headers.items()
            ]
            answers = zip(waiting, await self._run(owners.RELEASE, calls), strict=True)
            waiting = [name for name, answer in answers if answer < 0]

    async def _segment_headers(self, segment_ids: Sequence[str]) -> dict[str, bytes | None]:
        pipeline = self._client.pipeline(transaction=False)
        for segment_id in segment_ids:
            pipeline.execute_command("GET", keys.segment_header(segment_id))
        return dict(zip(segment_ids, await pipeline.execute(), strict=True))

    async def _run(self, script: str, calls: Sequence[owners.Call]) -> list[int]:
        # EVAL and not EVALSHA: a pipeline to several nodes cannot load what one of them forgot.
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            pipeline.execute_command("EVAL", script, len(call.keys), *call.keys, *call.args)
        answers: list[int] = await pipeline.execute()
        return answers

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


def _session_keys(tenant: str, session_id: str) -> list[str]:
    return [
        keys.manifest(tenant, session_id),
        keys.turn_results(tenant, session_id),
        keys.turn_order(tenant, session_id),
    ]


def _joined(segment_ids: Sequence[str]) -> str:
    return "\n".join(segment_ids)


def _split(segments: bytes | None) -> list[str]:
    """Inverse of ``_joined``."""
    return segments.decode().split("\n") if segments else []


def _decoded(segment_ids: Iterable[bytes]) -> list[str]:
    return [segment_id.decode() for segment_id in segment_ids]


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


def _conflict(session_id: str, version: int, expected_version: int) -> ConflictError:
    return ConflictError(
        f"session {session_id} was changed by another turn: version {version} is stored, "
        f"{expected_version} was expected; send the turn again",
        resource=("session", session_id),
    )
