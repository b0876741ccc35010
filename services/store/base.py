"""What a store of sessions does, whoever does it.

A store moves opaque bytes: it does not know what a tensor or a manifest message is. Segments are
immutable and content-addressed: a header, and parts of about 1 MiB. Manifests are small, mutable
and versioned. Every key has a TTL.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as it was read.

    Attributes:
        body: The bytes that were committed.
        version: Version of this body, at least 1.
        expires_in_s: Seconds until it is gone unless it is used again.
    """

    body: bytes
    version: int
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class SessionPage:
    """A page of session ids, by creation time.

    Attributes:
        session_ids: Oldest first. Expired sessions are left out.
        next_page_token: Where the next page begins; empty if there is none.
    """

    session_ids: Sequence[str]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker announces with every heartbeat.

    Attributes:
        worker_id: Unique among all workers that ever lived.
        role: ``prefill`` or ``decode``.
        address: ``host:port`` of its gRPC server.
        model: Name of its model.
        fingerprint: Identity of its model's weights.
        max_model_len: Tokens of prompt and answer together.
        num_active: Requests that it works on now.
        num_slots: Requests that it can work on at once.
        default_policy: Serialized ``CompressionPolicy`` that applies where nothing is asked.
    """

    worker_id: str
    role: str
    address: str
    model: str
    fingerprint: str
    max_model_len: int
    num_active: int
    num_slots: int
    default_policy: bytes = b""


class SegmentStore(Protocol):
    """Segments. Blocking, thread-safe: called from worker threads, never from an event loop.

    Every method raises ``UnavailableError`` if the store is away and ``OverloadedError`` if it is
    full.
    """

    def has_segment(self, segment_id: str, *, ttl_s: float) -> bool:
        """Whether the segment is complete; if it is, its life is extended to at least ``ttl_s``.

        Raises:
            CorruptError: Its header is damaged.
        """

    def put_segment(
        self, segment_id: str, header: Buffer, parts: Sequence[Buffer], *, ttl_s: float
    ) -> None:
        """Store parts first, the header last.

        Storing the same segment again is harmless: the first complete copy stays, and its life is
        extended. A copy with a damaged header is replaced; to replace one with damaged parts,
        discard it first.
        """

    def get_header(self, segment_id: str) -> bytes:
        """Return the header.

        Raises:
            NotFoundError: There is none (reason ``SEGMENT_NOT_FOUND``).
            CorruptError: It is damaged.
        """

    def fetch_parts(
        self, segment_id: str, part_sizes: Sequence[int], out: memoryview
    ) -> Generator[memoryview]:
        """Receive the parts, one after another, into ``out``; yield each one's view as it arrives.

        What was asked for and not yet received is thrown away when the iterator is closed early.

        Args:
            segment_id: Whose parts.
            part_sizes: Bytes of each part, from the header.
            out: Writable bytes, at least ``sum(part_sizes)`` long.

        Raises:
            NotFoundError: A part is missing.
            CorruptError: The header is damaged, or a part has another size than it says.
        """

    def delete_segments(self, segment_ids: Iterable[str]) -> None:
        """Delete segments that nobody else can name (those of one-off requests).

        Of a segment with a damaged header only that is deleted: its parts expire.
        """

    def discard_copy(self, segment_id: str) -> None:
        """Delete a segment's present copy, so that another one can be stored.

        For one that was found to be damaged: it is still named, and is stored again at once.
        """


class SegmentLeases(Protocol):
    """Who computes a segment that is not there, of all processes. Blocking and thread-safe.

    A hint, so that work is not done twice: whoever lost a lease may still store the segment.
    """

    def acquire_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
        """Take the lease under a token of the caller's making; ``False`` if another one has it."""

    def renew_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
        """Extend a lease; ``False`` if it is not ours any more."""

    def release_segment_lease(self, segment_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""


class SessionStore(Protocol):
    """Manifests, leases and the list of sessions. Asynchronous: called from event loops."""

    async def create_manifest(
        self, tenant: str, session_id: str, body: bytes, *, ttl_s: float
    ) -> None:
        """Store version 1.

        Raises:
            AlreadyExistsError: There is a session of this id.
        """

    async def get_manifest(self, tenant: str, session_id: str) -> StoredManifest:
        """Read a manifest.

        Raises:
            NotFoundError: There is none, or it has expired (reason ``SESSION_NOT_FOUND``).
        """

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
        """Replace version ``expected_version`` and return the new one, all or nothing.

        Extends the life of the segments first, to at least ``ttl_s``. After ``UnavailableError``
        it may or may not have happened: read the manifest again.

        Raises:
            ConflictError: Another version is stored.
            NotFoundError: The session, or one of the segments, is gone.
            CorruptError: The header of a segment is damaged.
        """

    async def delete_manifest(self, tenant: str, session_id: str) -> None:
        """Delete a session.

        Raises:
            NotFoundError: There is none.
        """

    async def list_sessions(self, tenant: str, *, page_size: int, page_token: str) -> SessionPage:
        """Return a page of sessions.

        Raises:
            InvalidRequestError: The token is not one that this method returned.
        """

    async def acquire_lease(self, tenant: str, session_id: str, *, ttl_s: float) -> str:
        """Take the turn lease and return its token.

        Raises:
            ConflictError: Another turn holds it.
        """

    async def renew_lease(self, tenant: str, session_id: str, token: str, *, ttl_s: float) -> bool:
        """Extend a lease; ``False`` if it is not ours any more."""

    async def release_lease(self, tenant: str, session_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""


class Registry(Protocol):
    """Which workers live. Asynchronous."""

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """Write or renew a worker's entry; without renewal it is gone after ``ttl_s``."""

    async def withdraw(self, worker: WorkerInfo) -> None:
        """Remove a worker's entry at once."""

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return all living workers."""


class Store(SegmentStore, SegmentLeases, SessionStore, Registry, Protocol):
    """All of it, over one server."""

    async def ping(self) -> None:
        """Raise ``UnavailableError`` unless the store answers."""

    async def close(self) -> None:
        """Close all connections."""
