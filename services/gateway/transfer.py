"""Sessions as streams of pieces: out of the store, and into it again.

The manifest first, then each segment's header and parts, last an end mark with a checksum over all
of it. Whoever passes a session on holds one piece at a time. Nothing of an import is visible before
its last piece was checked.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from google.protobuf.message import DecodeError

from chunkserve.v1 import manifest_pb2, session_pb2
from services.gateway import validation
from services.gateway.manifests import duration, read_manifest, timestamp
from services.gateway.segment_header import (
    SegmentHeader,
    read_segment_header,
    renamed_segment_header,
)
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    InvalidRequestError,
    NotFoundError,
)
from services.store.base import SegmentOwner, Store, StoredManifest
from services.store.lease import completed, finish


async def export_session(
    store: Store, tenant: str, session_id: str
) -> AsyncGenerator[session_pb2.SessionPiece]:
    """Yield the pieces of a session as it is now. Every byte is checked before it is sent.

    No lease is taken: segments never change, so one version is exported whole although turns go on.

    Raises:
        NotFoundError: There is no such session, or one of its segments has expired.
        ConflictError: A segment was dropped meanwhile: the session was changed.
        CorruptError: A segment is damaged.
    """
    manifest, stored = await read_manifest(store, tenant, session_id)
    seal = _Seal()
    yield seal.sealed(session_pb2.SessionPiece(manifest=manifest.SerializeToString()))
    for segment in manifest.segments:
        try:
            async with aclosing(_segment_pieces(store, segment.segment_id)) as pieces:
                async for piece in pieces:
                    yield seal.sealed(piece)
        except NotFoundError:
            await _check_unchanged(store, tenant, stored, session_id)
            raise
    yield session_pb2.SessionPiece(end=seal.end())


async def import_session(
    store: Store,
    tenant: str,
    requests: AsyncIterator[session_pb2.ImportSessionRequest],
    *,
    max_ttl_s: float,
) -> tuple[manifest_pb2.Manifest, StoredManifest]:
    """Store the session that a stream describes, as version 1.

    Its segments get names of their own: a content address says what was computed, and only a
    worker that computed it can vouch for that. So no other session shares what was imported.

    Raises:
        InvalidRequestError: It is no export, or in wrong order.
        CorruptError: It is damaged, or was cut off.
        AlreadyExistsError: There is a session of this id.
    """
    pieces = _Pieces(requests)
    data = await pieces.next("manifest")
    manifest = _imported_manifest(data, tenant, pieces.new_session_id, max_ttl_s)
    ttl_s = validation.seconds(manifest.ttl)
    segments = _SegmentWriter(store, SegmentOwner(tenant, manifest.session_id), ttl_s)
    try:
        for segment in manifest.segments:
            await segments.take(segment, pieces, manifest.model_fingerprint)
        await pieces.expect_end()
        body = manifest.SerializeToString()
        await completed(
            store.create_manifest(
                tenant, manifest.session_id, body, ttl_s=ttl_s, segment_ids=segments.stored_ids
            )
        )
    except BaseException:
        await finish("import.discard", segments.discard())
        raise
    return manifest, StoredManifest(body=body, version=1, expires_in_s=ttl_s)


class _Seal:
    """Counts and hashes pieces as they pass."""

    def __init__(self) -> None:
        self._num_pieces = 0
        self._hash = hashlib.sha256()

    def sealed(self, piece: session_pb2.SessionPiece) -> session_pb2.SessionPiece:
        self._num_pieces += 1
        self._hash.update(getattr(piece, piece.WhichOneof("piece") or ""))
        return piece

    def end(self) -> session_pb2.SessionEnd:
        return session_pb2.SessionEnd(num_pieces=self._num_pieces, sha256=self._hash.digest())


class _Pieces:
    """The pieces of a stream that must come in a certain order."""

    def __init__(self, requests: AsyncIterator[session_pb2.ImportSessionRequest]) -> None:
        self._requests = aiter(requests)
        self._seal = _Seal()
        self._num_read = 0
        self.new_session_id = ""

    async def next(self, kind: str) -> bytes:
        """Return what the next piece holds, which must be of this kind."""
        piece = await self._read(kind)
        self._seal.sealed(piece)
        data: bytes = getattr(piece, kind)
        return data

    async def expect_end(self) -> None:
        """Check the end mark, and that nothing follows it."""
        piece = await self._read("end")
        if piece.end != self._seal.end():
            raise CorruptError(
                "the export does not match the checksum at its end; export the session again",
                reason="EXPORT_DAMAGED",
            )
        if await anext(self._requests, None) is not None:
            raise InvalidRequestError("a piece follows the end of the export", field="piece")

    async def _read(self, kind: str) -> session_pb2.SessionPiece:
        request = await anext(self._requests, None)
        if request is None:
            raise CorruptError(
                f"the export was cut off after {self._num_read} pieces; send it whole",
                reason="EXPORT_CUT_OFF",
            )
        if self._num_read == 0:
            self.new_session_id = request.new_session_id
        found = request.piece.WhichOneof("piece")
        if found != kind:
            raise InvalidRequestError(
                f"piece {self._num_read} is {found}; {kind} must follow here; send the pieces in "
                "the order in which they were exported",
                field="piece",
            )
        self._num_read += 1
        return request.piece


class _SegmentWriter:
    """Stores segments from pieces, and knows what to take back if it comes to nothing."""

    def __init__(self, store: Store, owner: SegmentOwner, ttl_s: float) -> None:
        self._store = store
        self._owner = owner
        self._ttl_s = ttl_s
        self.stored_ids: list[str] = []

    async def take(self, segment: session_pb2.Segment, pieces: _Pieces, fingerprint: str) -> None:
        """Store the next segment, and write its name and size into its entry."""
        data = await pieces.next("segment_header")
        header = read_segment_header(data)
        _check_is_segment(header, segment, fingerprint)
        segment.segment_id = secrets.token_hex(16)
        named = renamed_segment_header(data, segment.segment_id)
        segment.size_bytes = len(named) + sum(header.part_sizes)

        copy = self._store.new_copy(segment.segment_id)
        num_parts = len(header.part_sizes)
        try:
            for index in range(num_parts):
                part = await pieces.next("segment_part")
                header.check_part(index, part)
                await completed(self._store.write_part(copy, index, part, ttl_s=self._ttl_s))
            self.stored_ids.append(segment.segment_id)
            await completed(
                self._store.publish_copy(
                    copy, named, num_parts, ttl_s=self._ttl_s, owner=self._owner
                )
            )
        except BaseException:
            await finish("import.discard", self._store.discard_copy(copy, num_parts))
            raise

    async def discard(self) -> None:
        await self._store.release_segments(*self._owner, self.stored_ids)


async def _segment_pieces(
    store: Store, segment_id: str
) -> AsyncGenerator[session_pb2.SessionPiece]:
    stored = await store.open_segment(segment_id)
    header = read_segment_header(stored.header)
    if header.identity != segment_id or len(header.part_sizes) != stored.num_parts:
        raise CorruptError(
            f"what is stored as segment {segment_id} is not it", resource=("segment", segment_id)
        )
    yield session_pb2.SessionPiece(segment_header=stored.header)
    for index in range(stored.num_parts):
        part = await store.read_part(stored.copy, index)
        header.check_part(index, part)
        yield session_pb2.SessionPiece(segment_part=part)


async def _check_unchanged(
    store: Store, tenant: str, stored: StoredManifest, session_id: str
) -> None:
    """Raise unless the session is still what was read: that explains a missing segment."""
    _, now = await read_manifest(store, tenant, session_id)
    if now.version != stored.version:
        raise ConflictError(
            f"session {session_id} was changed while it was exported; export it again",
            reason="SESSION_CHANGED",
            resource=("session", session_id),
        )


def _imported_manifest(
    data: bytes, tenant: str, new_session_id: str, max_ttl_s: float
) -> manifest_pb2.Manifest:
    """Return a manifest that was sent as one of ours, after checking what it says.

    Raises:
        InvalidRequestError: It cannot be that of a session.
    """
    try:
        manifest = manifest_pb2.Manifest.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError(
            f"piece 0 is no manifest: {error}; send what ExportSession sent", field="piece.manifest"
        ) from error
    now = timestamp(time.time())
    manifest.tenant = tenant
    manifest.session_id = new_session_id or manifest.session_id
    manifest.version = 1
    manifest.ttl.CopyFrom(duration(min(validation.seconds(manifest.ttl), max_ttl_s)))
    manifest.update_time.CopyFrom(now)
    manifest.ClearField("last_decode_worker")
    validation.check_session_id(manifest.session_id)
    validation.check_create_session(
        session_pb2.CreateSessionRequest(
            model=manifest.model, compression=manifest.compression, ttl=manifest.ttl
        ),
        max_ttl_s=max_ttl_s,
    )
    _check_spans(manifest)
    return manifest


def _check_spans(manifest: manifest_pb2.Manifest) -> None:
    end = 0
    for i, segment in enumerate(manifest.segments):
        if segment.first_token != end or segment.num_tokens < 1 or segment.num_kept_tokens < 0:
            raise InvalidRequestError(
                f"segment {i} of the manifest holds {segment.num_tokens} tokens from "
                f"{segment.first_token} on; {end} tokens precede it",
                field="piece.manifest",
            )
        end += segment.num_tokens
    if end > len(manifest.token_ids) or min(manifest.token_ids, default=0) < 0:
        raise InvalidRequestError(
            f"the manifest's segments hold {end} tokens and it has {len(manifest.token_ids)}, "
            "which must be 0 or more each",
            field="piece.manifest",
        )


def _check_is_segment(
    header: SegmentHeader, segment: session_pb2.Segment, fingerprint: str
) -> None:
    found = (header.identity, header.first_token, header.num_tokens, header.fingerprint)
    expected = (segment.segment_id, segment.first_token, segment.num_tokens, fingerprint)
    if found != expected:
        raise CorruptError(
            f"the header of segment {header.identity} (tokens from {header.first_token}, model "
            f"{header.fingerprint}) is not that of segment {segment.segment_id} of the manifest",
            resource=("segment", segment.segment_id),
        )
