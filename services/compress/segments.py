"""Segments: compressed spans under their content address, to the store and back.

Turns errors of ``chunkkv`` into errors of the services; knows no model. Everything here blocks:
call it from a thread.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.memory import ReceivePool
from services.runtime.errors import (
    CorruptError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
)
from services.runtime.telemetry import get_logger
from services.store.base import SegmentOwner, SegmentStore

_log = get_logger()

# Changes when segments of the same name would mean something else.
_ID_VERSION = b"segment/1"


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """A span under its name, ready to be stored.

    Attributes:
        segment: The manifest's entry.
        encoded: Header and parts; the parts may be views of the span's memory.
        owner: The session that is about to name it; ``None`` for a one-off request.
    """

    segment: session_pb2.Segment
    encoded: chunkkv.EncodedKV
    owner: SegmentOwner | None = None


@dataclass(frozen=True, slots=True)
class FetchedSegments:
    """Segments that were fetched and found intact.

    Attributes:
        kv: The spans, in the order asked for.
        size_bytes: Bytes received.
        fetch_ms: Milliseconds to receive, check and open them.
    """

    kv: list[chunkkv.CompressedKV]
    size_bytes: int
    fetch_ms: float


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn the errors of ``chunkkv`` inside the block into errors of the services."""
    try:
        yield
    except (chunkkv.InvalidPolicyError, chunkkv.InvalidInputError) as error:
        raise InvalidRequestError(str(error)) from error
    except chunkkv.CorruptError as error:
        raise CorruptError(f"stored KV is damaged: {error}") from error
    except chunkkv.FormatError as error:
        raise MismatchError(str(error), reason="FORMAT_MISMATCH") from error
    except chunkkv.MismatchError as error:
        raise MismatchError(str(error)) from error


def segment_id(
    manifest: manifest_pb2.Manifest, *, num_tokens: int, policy: str, fingerprint: str
) -> str:
    """Return the content address of the segment that follows the manifest's last one.

    A hash chain over parent, tokens, policy, model and tenant: equal prefixes compressed equally
    have equal names, so nobody computes them twice. A one-off request's segments get names of
    their own, because they are deleted with it.

    Args:
        manifest: Its token ids must reach at least to the end of the new span.
        num_tokens: Tokens of the new span.
        policy: What it was compressed by (``CompressionPolicy.canonical()``).
        fingerprint: Of the model.
    """
    start = covered_tokens(manifest)
    tokens = manifest.token_ids[start : start + num_tokens]
    if len(tokens) < num_tokens:
        raise ValueError(f"manifest has {len(tokens)} of the span's {num_tokens} tokens")
    parent = manifest.segments[-1].segment_id if manifest.segments else ""
    digest = hashlib.sha256(_ID_VERSION)
    for name in (manifest.tenant, fingerprint, parent, policy):
        digest.update(len(name).to_bytes(4, "little") + name.encode())
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
    if not manifest.session_id:
        digest.update(secrets.token_bytes(16))
    return digest.hexdigest()[:32]


def covered_tokens(manifest: manifest_pb2.Manifest) -> int:
    """Return how many leading tokens have their KV in segments; those behind are pending."""
    if not manifest.segments:
        return 0
    last = manifest.segments[-1]
    return last.first_token + last.num_tokens


def store_segment(
    store: SegmentStore,
    kv: chunkkv.CompressedKV,
    manifest: manifest_pb2.Manifest,
    *,
    ttl_s: float,
) -> session_pb2.Segment:
    """Encode and store a span that follows the manifest's last segment; see ``put_encoded``."""
    return put_encoded(store, encode_segment(kv, manifest), ttl_s=ttl_s)


def encode_segment(kv: chunkkv.CompressedKV, manifest: manifest_pb2.Manifest) -> EncodedSegment:
    """Name and encode a span that follows the manifest's last segment.

    Raises:
        InvalidRequestError: It cannot be stored in the precision that was asked for.
    """
    name = segment_id(
        manifest,
        num_tokens=kv.num_tokens,
        policy=kv.shape.policy,
        fingerprint=kv.shape.fingerprint,
    )
    return encode_as(kv, name, owner=owner_of(manifest))


def encode_as(
    kv: chunkkv.CompressedKV, name: str, *, owner: SegmentOwner | None = None
) -> EncodedSegment:
    """Encode a span under a name; see ``encode_segment``."""
    with library_errors():
        encoded = chunkkv.encode(kv, identity=name)
    return EncodedSegment(describe(name, kv.shape, encoded.size_bytes), encoded, owner)


def put_encoded(
    store: SegmentStore, encoded: EncodedSegment, *, ttl_s: float
) -> session_pb2.Segment:
    """Store a segment, unless the store has it already, with a header that is not damaged.

    Returns:
        The manifest's entry for what is stored.

    Raises:
        UnavailableError, OverloadedError: The store is away, or full.
        MismatchError: Something else is stored under this name.
    """
    name = encoded.segment.segment_id
    found = find_segment(store, name, ttl_s=ttl_s, owner=encoded.owner)
    if found is not None:
        return found
    header, parts = encoded.encoded.header, encoded.encoded.parts
    store.put_segment(name, header, parts, ttl_s=ttl_s, owner=encoded.owner)
    return encoded.segment


def owner_of(manifest: manifest_pb2.Manifest) -> SegmentOwner | None:
    """Return whose the segments of a manifest are; a one-off request's are nobody's."""
    if not manifest.session_id:
        return None
    return SegmentOwner(manifest.tenant, manifest.session_id)


def find_segment(
    store: SegmentStore, name: str, *, ttl_s: float, owner: SegmentOwner | None = None
) -> session_pb2.Segment | None:
    """Return the segment of this name if the store has it, its life extended.

    It is reserved for ``owner``: nobody frees it before the session that is about to name it does.

    One with a damaged header counts as absent, so that it is computed again and replaced: nobody
    who needs the same span has to wait until it expires. Parts are not looked at.

    Raises:
        MismatchError: Something else is stored under this name.
    """
    try:
        if not store.has_segment(name, ttl_s=ttl_s, owner=owner):
            return None
        data = store.get_header(name)
        with library_errors():
            header = chunkkv.read_header(data)
            header.expect(identity=name)
    except NotFoundError:  # it expired in between
        return None
    except CorruptError as error:
        _log.warning("segment.damaged", segment_id=name, error=error.message)
        return None
    return describe(name, header.shape, header.size_bytes + len(data))


def describe(name: str, shape: chunkkv.SpanShape, size_bytes: int) -> session_pb2.Segment:
    """Return a manifest's entry for a segment."""
    return session_pb2.Segment(
        segment_id=name,
        first_token=shape.first_token,
        num_tokens=shape.num_tokens,
        num_kept_tokens=shape.num_kept_tokens,
        size_bytes=size_bytes,
        kv_bytes=0 if shape.is_stored_native else chunkkv.size_bytes(shape),
    )


@contextmanager
def fetched_segments(
    store: SegmentStore,
    segments: Sequence[session_pb2.Segment],
    *,
    fingerprint: str,
    pool: ReceivePool,
) -> Iterator[FetchedSegments]:
    """Fetch segments, check every byte before it is used, and lend them for the block.

    Copy what is needed longer: the spans are views into memory of the pool.

    Raises:
        NotFoundError: A segment, or a part of it, is not in the store any more.
        CorruptError: A segment is damaged.
        MismatchError: A segment is another model's, or of another format version.
    """
    started = time.perf_counter()
    headers = [_header(store, segment.segment_id, fingerprint) for segment in segments]
    with pool.lend(sum(header.kv_bytes for header, _ in headers)) as memory:
        spans, start = [], 0
        for header, _ in headers:
            spans.append(_receive(store, header, memory[start : start + header.kv_bytes], pool))
            start += header.kv_bytes
        size_bytes = sum(header.size_bytes + length for header, length in headers)
        yield FetchedSegments(spans, size_bytes, (time.perf_counter() - started) * 1000)


def receive_segment(
    store: SegmentStore,
    name: str,
    memory: memoryview,
    *,
    fingerprint: str,
    staging: ReceivePool,
) -> chunkkv.CompressedKV:
    """Fetch one segment into memory of the caller's; every byte is checked before it is used.

    Keys and values arrive in the model's dtype and in every layer, however they are stored.

    Args:
        store: Where it is.
        name: Its content address.
        memory: Writable, at least ``held_bytes`` of the manifest's entry long. The span is views
            of its beginning.
        fingerprint: Of the model.
        staging: Where a segment that is not stored native is received.

    Raises:
        NotFoundError: The segment, or a part of it, is not in the store any more.
        CorruptError: It is damaged, or larger than the manifest said.
        MismatchError: It is another model's, or of another format version.
    """
    header, _ = _header(store, name, fingerprint)
    if header.kv_bytes > len(memory):
        raise CorruptError(
            f"segment {name} has {header.kv_bytes} bytes, more than the {len(memory)} that its "
            "session names"
        )
    return _receive(store, header, memory[: header.kv_bytes], staging)


def held_bytes(segment: session_pb2.Segment) -> int:
    """Return the bytes of memory that a segment takes at most where it is used."""
    held: int = segment.kv_bytes or segment.size_bytes
    return held


def _header(store: SegmentStore, name: str, fingerprint: str) -> tuple[chunkkv.Header, int]:
    """Return a segment's header and the bytes that it took."""
    data = store.get_header(name)
    with library_errors():
        header = chunkkv.read_header(data)
        header.expect(identity=name, fingerprint=fingerprint)
    return header, len(data)


def _receive(
    store: SegmentStore, header: chunkkv.Header, memory: memoryview, staging: ReceivePool
) -> chunkkv.CompressedKV:
    """Receive a segment into ``memory``, exactly ``header.kv_bytes`` of it."""
    if header.shape.is_stored_native:
        _receive_parts(store, header, memory)
        return header.open(memory)
    with staging.lend(header.size_bytes) as staged:
        _receive_parts(store, header, staged)
        return header.open(staged, out=memory)


def _receive_parts(store: SegmentStore, header: chunkkv.Header, memory: memoryview) -> None:
    """Receive a segment's parts; each is checked while it is still in the processor's cache."""
    with closing(store.fetch_parts(header.identity, header.part_sizes, memory)) as parts:
        for index, part in enumerate(parts):
            with library_errors():
                header.check_part(index, part)
