"""Segments in Redis: parts first, the header last.

A copy's parts lie under keys that no other writer uses, and its header names them. So a reader
never sees parts of two writers mixed, however many store the same segment at the same time, and a
copy without a header is invisible and expires.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar, cast

import redis
from redis.exceptions import MovedError

from services.runtime.errors import CorruptError
from services.store import keys, lease_scripts, owners, wire
from services.store.base import Buffer, SegmentOwner
from services.store.breaker import CircuitBreaker
from services.store.connect import Nodes
from services.store.failures import segment_not_found, ttl_ms

MAX_PART_BYTES: Final = 512 << 20  # Redis's own limit, past which it just hangs up

_T = TypeVar("_T")


class RedisSegments:
    """Implements ``SegmentStore`` and ``SegmentLeases``.

    Args:
        nodes: Where the segments are.
        breaker: Of the server.
    """

    def __init__(self, nodes: Nodes, breaker: CircuitBreaker) -> None:
        self._nodes = nodes
        self._breaker = breaker

    def has_segment(
        self, segment_id: str, *, ttl_s: float, owner: SegmentOwner | None = None
    ) -> bool:
        """Whether the segment is complete; if it is, it is extended, and reserved for ``owner``.

        Raises:
            CorruptError: What says which parts belong to it is damaged, or the header is.
        """
        claim = _Claim.of(owner, ttl_s)
        with self._breaker.guard():
            if self._at_node(segment_id, lambda node: _read(node, segment_id)) is None:
                return False
            self._reserve(segment_id, owner, claim)
            return self._at_node(segment_id, lambda node: _extend(node, segment_id, claim))

    def put_segment(
        self,
        segment_id: str,
        header: Buffer,
        parts: Sequence[Buffer],
        *,
        ttl_s: float,
        owner: SegmentOwner | None = None,
    ) -> None:
        """Store parts first, the header last. The first complete and undamaged copy stays.

        Raises:
            ValueError: A part is larger than ``MAX_PART_BYTES``.
        """
        views = [memoryview(part).cast("B") for part in parts]
        largest = max(map(len, views), default=0)
        if largest > MAX_PART_BYTES:
            raise ValueError(f"part of {largest} bytes; at most {MAX_PART_BYTES} can be stored")
        claim = _Claim.of(owner, ttl_s)
        with self._breaker.guard():
            self._reserve(segment_id, owner, claim)
            self._at_node(segment_id, lambda node: _put(node, segment_id, header, views, claim))

    def get_header(self, segment_id: str) -> bytes:
        """Return the header."""
        with self._breaker.guard():
            value = self._at_node(segment_id, lambda node: _read(node, segment_id))
        if value is None:
            raise segment_not_found(segment_id)
        return keys.stored_header(segment_id, value)

    def fetch_parts(
        self, segment_id: str, part_sizes: Sequence[int], out: memoryview
    ) -> Generator[memoryview]:
        """Receive the parts into ``out``; yield each one's view as it arrives.

        Raises:
            ValueError: ``out`` is too small.
        """
        out = out.cast("B")
        if len(out) < sum(part_sizes):
            raise ValueError(f"parts have {sum(part_sizes)} bytes; out has {len(out)}")
        with self._breaker.guard():
            part_keys = self._part_keys(segment_id)
            if len(part_keys) != len(part_sizes):
                raise CorruptError(
                    f"segment {segment_id} has {len(part_keys)} parts; its header lists"
                    f" {len(part_sizes)}",
                    resource=("segment", segment_id),
                )
            node = self._nodes.client(keys.segment_header(segment_id))
            try:
                with _exclusive_connection(node) as connection:
                    yield from wire.receive_values(connection, part_keys, part_sizes, out)
            except wire.ValueMissingError:
                raise segment_not_found(segment_id) from None
            except wire.ValueSizeError as error:
                raise CorruptError(
                    f"segment {segment_id}: {error}", resource=("segment", segment_id)
                ) from None
            except (redis.RedisError, OSError) as error:
                self._nodes.suspect(error)
                raise

    def delete_segments(self, segment_ids: Iterable[str]) -> None:
        """Delete segments that nobody else can name."""
        with self._breaker.guard():
            for segment_id in segment_ids:
                self._at_node(segment_id, partial(_delete, segment_id=segment_id))

    def discard_damaged(self, segment_id: str) -> None:
        """Delete a segment's present copy, so that another one can be stored."""
        with self._breaker.guard():
            self._at_node(segment_id, lambda node: _unlink(node, _copy_keys(node, segment_id)))

    def acquire_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
        """Take the lease under a token of the caller's making; ``False`` if another one has it."""
        key, lifetime = keys.segment_lease(segment_id), ttl_ms(ttl_s)
        with self._breaker.guard():
            return bool(
                self._at_node(segment_id, lambda node: node.set(key, token, px=lifetime, nx=True))
            )

    def renew_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
        """Extend a lease; ``False`` if it is not ours any more."""
        return bool(self._eval(segment_id, lease_scripts.RENEW, token, ttl_ms(ttl_s)))

    def release_segment_lease(self, segment_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""
        self._eval(segment_id, lease_scripts.RELEASE, token)

    def _eval(self, segment_id: str, script: str, *args: str | int) -> object:
        key = keys.segment_lease(segment_id)
        with self._breaker.guard():
            return self._at_node(segment_id, lambda node: node.eval(script, 1, key, *args))

    def _reserve(self, segment_id: str, owner: SegmentOwner | None, claim: _Claim) -> None:
        """Note that a turn owns a segment, before it does."""
        if owner is None:
            return
        key = keys.reserved_segments(*owner)
        self._at_key(key, lambda node: _note(node, key, segment_id, claim.lifetime))

    def _part_keys(self, segment_id: str) -> list[str]:
        value = self._at_node(segment_id, lambda node: _read(node, segment_id))
        if value is None:
            raise segment_not_found(segment_id)
        return keys.segment_parts(segment_id, value)

    def _at_node(self, segment_id: str, operation: Callable[[redis.Redis], _T]) -> _T:
        """Run an operation, which may be run twice, at the node that holds the segment."""
        return self._at_key(keys.segment_header(segment_id), operation)

    def _at_key(self, key: str, operation: Callable[[redis.Redis], _T]) -> _T:
        """Run an operation, which may be run twice, at the node that holds the key."""
        try:
            return operation(self._nodes.client(key))
        except MovedError as error:
            if not self._nodes.suspect(error):
                raise
            return operation(self._nodes.client(key))
        except (redis.RedisError, OSError) as error:
            self._nodes.suspect(error)
            raise


@dataclass(frozen=True, slots=True)
class _Claim:
    """For whom a segment lives, from ``keys.reserver`` or empty, and how many milliseconds."""

    owner: str
    lifetime: int

    @classmethod
    def of(cls, owner: SegmentOwner | None, ttl_s: float) -> _Claim:
        if owner is None:
            return cls("", ttl_ms(ttl_s))
        return cls(keys.reserver(*owner), ttl_ms(ttl_s) + owners.SEGMENT_GRACE_MS)


def _note(node: redis.Redis, key: str, segment_id: str, lifetime: int) -> None:
    pipeline = node.pipeline(transaction=False)
    pipeline.sadd(key, segment_id)
    # GT treats a key without a TTL as one that lives for ever, hence NX first.
    pipeline.pexpire(key, lifetime, nx=True)
    pipeline.pexpire(key, lifetime, gt=True)
    pipeline.execute()


def _put(
    node: redis.Redis, segment_id: str, header: Buffer, parts: Sequence[memoryview], claim: _Claim
) -> None:
    copy = os.urandom(keys.COPY_SIZE)
    part_keys = [keys.segment_part(segment_id, copy, index) for index in range(len(parts))]
    value = keys.segment_value(segment_id, copy, len(parts), bytes(header))
    try:
        with _exclusive_connection(node) as connection:
            wire.send_values(connection, part_keys, parts, ttl_ms=claim.lifetime)
        if _publish(node, segment_id, value, claim):
            return
        if not _extend_intact(node, segment_id, claim):
            # The copy that is there is damaged or has lost parts: ours replaces it.
            _publish(node, segment_id, value, claim, replaces=True)
            return
    except redis.exceptions.OutOfMemoryError:
        # Room for others. If even this fails, the parts expire.
        with contextlib.suppress(redis.RedisError):
            _unlink(node, part_keys)
        raise
    _unlink(node, part_keys)


def _publish(
    node: redis.Redis, segment_id: str, value: bytes, claim: _Claim, *, replaces: bool = False
) -> bool:
    call = owners.publish(
        segment_id, value, owner=claim.owner, lifetime=claim.lifetime, replaces=replaces
    )
    return bool(_run(node, owners.PUBLISH, call))


def _extend_intact(node: redis.Redis, segment_id: str, claim: _Claim) -> bool:
    try:
        return _extend(node, segment_id, claim)
    except CorruptError:
        return False


def _extend(node: redis.Redis, segment_id: str, claim: _Claim) -> bool:
    while (value := _read(node, segment_id)) is not None:
        call = owners.claim(segment_id, value, owner=claim.owner, lifetime=claim.lifetime)
        answer = _run(node, owners.CLAIM, call)
        if answer != owners.Outcome.CHANGED:
            return answer >= 0
    return False


def _run(node: redis.Redis, script: str, call: owners.Call) -> int:
    answer: int = node.register_script(script)(keys=call.keys, args=call.args)
    return answer


def _delete(node: redis.Redis, segment_id: str) -> None:
    _unlink(node, [*_copy_keys(node, segment_id), keys.segment_owners(segment_id)])


def _copy_keys(node: redis.Redis, segment_id: str) -> list[str]:
    """Return the keys of a segment's copy, as far as they can be known."""
    value = _read(node, segment_id)
    if value is None:
        return []
    # Parts that nothing names any more expire.
    part_keys: list[str] = []
    with contextlib.suppress(CorruptError):
        part_keys = keys.segment_parts(segment_id, value)
    return [keys.segment_header(segment_id), *part_keys]


def _read(node: redis.Redis, segment_id: str) -> bytes | None:
    """Return all that the header's key holds; ``None`` if there is none."""
    return cast("bytes | None", node.get(keys.segment_header(segment_id)))


def _unlink(node: redis.Redis, names: Sequence[str]) -> None:
    if names:
        node.unlink(*names)


@contextlib.contextmanager
def _exclusive_connection(node: redis.Redis) -> Iterator[wire.Connection]:
    """Lend a connection; close it unless the block ends well, so that no answer is left in it."""
    pool = node.connection_pool
    pooled = pool.get_connection()
    connection = cast(wire.Connection, pooled)
    is_clean = False
    try:
        yield connection
        is_clean = True
    finally:
        if not is_clean:
            connection.disconnect()
        pool.release(pooled)
