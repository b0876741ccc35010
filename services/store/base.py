"""What a store of sessions does, whoever does it.

A store moves opaque bytes: it does not know what a tensor or a manifest message is. Segments are
immutable and content-addressed: a header, and parts of about 1 MiB. Manifests are small, mutable
and versioned. Every key has a TTL.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview


class SegmentOwner(NamedTuple):
    """A session that names segments, or is about to.

    Attributes:
        tenant: Its owner.
        session_id: Its id.
    """

    tenant: str
    session_id: str


class TurnRecord(NamedTuple):
    """What is kept of a turn with its commit.

    Attributes:
        request_id: Under which it is found again.
        body: The bytes to keep.
    """

    request_id: str
    body: bytes


class TenantUsage(NamedTuple):
    """What a tenant uses.

    Attributes:
        num_sessions: Sessions that live.
        stored_bytes: Bytes of their segments; one that several sessions name counts for each.
    """

    num_sessions: int
    stored_bytes: int


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
        role: ``prefill``, ``decode`` or ``compression`` (which has no model).
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


@dataclass(frozen=True, slots=True)
class SegmentCopy:
    """Where one copy of a segment lies.

    Attributes:
        segment_id: Whose copy.
        name: Tells it from other copies.
    """

    segment_id: str
    name: bytes


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment whose parts can be read one by one.

    Attributes:
        header: Its header.
        copy: Where its parts are.
        num_parts: How many.
    """

    header: bytes
    copy: SegmentCopy
    num_parts: int


class SegmentStore(Protocol):
    """Segments. Blocking, thread-safe: called from worker threads, never from an event loop.

    Every method raises ``UnavailableError`` if the store is away and ``OverloadedError`` if it is
    full.
    """

    def has_segment(
        self, segment_id: str, *, ttl_s: float, owner: SegmentOwner | None = None
    ) -> bool:
        """Whether the segment is complete; if it is, its life is extended to at least ``ttl_s``.

        Args:
            segment_id: Which.
            ttl_s: Seconds.
            owner: Session whose turn is about to name it. Until the session's next commit, its
                deletion or ``SessionStore.release_reserved``, nobody frees the segment, and it
                lives somewhat longer than ``ttl_s``.

        Raises:
            CorruptError: Its header is damaged.
        """

    def put_segment(
        self,
        segment_id: str,
        header: Buffer,
        parts: Sequence[Buffer],
        *,
        ttl_s: float,
        owner: SegmentOwner | None = None,
    ) -> None:
        """Store parts first, the header last; ``owner`` as in :meth:`has_segment`.

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

    def discard_damaged(self, segment_id: str) -> None:
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
        self,
        tenant: str,
        session_id: str,
        body: bytes,
        *,
        ttl_s: float,
        segment_ids: Iterable[str] = (),
    ) -> None:
        """Store version 1. The session owns the segments before it exists.

        Raises:
            AlreadyExistsError: There is a session of this id.
            NotFoundError: One of the segments is gone (reason ``SEGMENT_NOT_FOUND``).
            CorruptError: The header of a segment is damaged.
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
        dropped_segment_ids: Iterable[str] = (),
        result: TurnRecord | None = None,
    ) -> int:
        """Replace version ``expected_version`` and return the new one, all or nothing.

        The session owns the segments first, and they live at least ``ttl_s``. After
        ``UnavailableError`` it may or may not have happened: read the manifest again. After any
        other error, segments that the stored version does not name are the session's no longer.

        Args:
            tenant: Owner of the session.
            session_id: Its id.
            body: What to store.
            expected_version: The version that was read.
            ttl_s: Seconds that the session lives from now on.
            segment_ids: All segments that the new version names.
            dropped_segment_ids: Segments that it does not name. Freed at once if nobody else names
                them, as are those that the version before named, or that the turn reserved.
            result: What the turn answered. The newest 64 of a session are kept.

        Raises:
            ConflictError: Another version is stored.
            NotFoundError: The session, or one of the segments, is gone.
            CorruptError: The header of a segment is damaged.
        """

    async def get_turn_result(self, tenant: str, session_id: str, request_id: str) -> bytes | None:
        """Return what was committed under this request id; ``None`` if nothing was."""

    async def delete_manifest(self, tenant: str, session_id: str) -> None:
        """Delete a session, and at once the segments that only it named.

        Hold its lease: a new session of the same id must not own segments before this has ended.

        Raises:
            NotFoundError: There is none.
        """

    async def release_segments(
        self, tenant: str, session_id: str, segment_ids: Iterable[str]
    ) -> None:
        """Own these segments no longer, unless the session names them; free what nobody owns.

        For segments that were stored for a session that does not come to be.
        """

    async def release_reserved(self, tenant: str, session_id: str) -> None:
        """Free what was stored or found for a turn that was not committed, if nobody else owns it.

        It need not be known what workers had stored for it. A worker that commits at the same time
        either finds that it is too late, or owns the segments first. Hold the lease, or another
        turn loses what it has reserved. What a worker stores later than this is released with the
        session's next commit, or its deletion.
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
        """Extend a lease; ``False`` if it is not ours any more.

        A session that would expire before its lease is extended as well.
        """

    async def release_lease(self, tenant: str, session_id: str, token: str) -> None:
        """Give a lease back. Harmless if it is not ours any more."""

    async def usage(self, tenant: str) -> TenantUsage:
        """Return what a tenant uses."""

    async def begin_turn(self, tenant: str, *, limit: int, ttl_s: float) -> str | None:
        """Count one more turn and return its token; ``None`` if ``limit`` turns run.

        It counts for ``ttl_s`` unless it is renewed.
        """

    async def renew_turn(self, tenant: str, token: str, *, ttl_s: float) -> None:
        """Count a turn for ``ttl_s`` more."""

    async def end_turn(self, tenant: str, token: str) -> None:
        """Count a turn no more. Harmless if it is not counted."""


class SegmentTransfer(Protocol):
    """Segments part by part, for processes that hold none of them. Asynchronous."""

    async def open_segment(self, segment_id: str) -> StoredSegment:
        """Return a segment's header, and where its parts are.

        Raises:
            NotFoundError: There is none (reason ``SEGMENT_NOT_FOUND``).
            CorruptError: The header is damaged.
        """

    async def read_part(self, copy: SegmentCopy, index: int) -> bytes:
        """Return one part of a copy; who reads checks its content.

        Raises:
            NotFoundError: It is not there any more.
        """

    def new_copy(self, segment_id: str) -> SegmentCopy:
        """Return a copy that nobody else writes. Nobody sees it before it is published."""

    async def write_part(
        self, copy: SegmentCopy, index: int, part: Buffer, *, ttl_s: float
    ) -> None:
        """Store one part of a copy; it expires unless the copy is published and extended."""

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

    async def discard_copy(self, copy: SegmentCopy, num_parts: int) -> None:
        """Delete the parts of a copy that was not published."""


class Registry(Protocol):
    """Which workers live. Asynchronous."""

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """Write or renew a worker's entry; without renewal it is gone after ``ttl_s``."""

    async def withdraw(self, worker: WorkerInfo) -> None:
        """Remove a worker's entry at once."""

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return all living workers."""


class Store(SegmentStore, SegmentLeases, SessionStore, SegmentTransfer, Registry, Protocol):
    """All of it, over one server."""

    async def ping(self) -> None:
        """Raise ``UnavailableError`` unless the store answers."""

    async def close(self) -> None:
        """Close all connections."""
