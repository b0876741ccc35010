"""Compacts stored sessions: segments in, smaller ones out, the manifest committed. No model.

A session is compacted under its turn lease, so no turn runs meanwhile and none sees half of it.
Whoever fails in between leaves the session as it was, and segments that expire.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.memory import ReceivePool
from services.compress.policy import PRECISIONS
from services.compress.segments import (
    covered_tokens,
    encode_as,
    fetched_segments,
    find_segment,
    library_errors,
    owner_of,
    put_encoded,
)
from services.runtime.errors import MismatchError
from services.store.base import Store
from services.store.lease import completed, finish, turn_lease

# Changes when segments of the same name would mean something else.
_ID_VERSION: Final = b"recompressed/1"

# A precision is only ever given up: what a coarser one lost is not found again.
_COARSENESS: Final[dict[chunkkv.Precision, int]] = {"native": 0, "fp8": 1, "int8": 1, "int4": 2}

_NUMBERS: Final = {name: number for number, name in PRECISIONS.items()}

_SESSIONS: Final = Counter("chunkserve_compacted_sessions", "Sessions made smaller.", ["by"])
_SEGMENTS: Final = Counter(
    "chunkserve_compacted_segments", "Segments made smaller.", ["by", "action"]
)
_BYTES_BEFORE: Final = Counter(
    "chunkserve_compacted_bytes_before", "Bytes of these segments before.", ["by", "action"]
)
_BYTES_AFTER: Final = Counter(
    "chunkserve_compacted_bytes_after", "Bytes of these segments after.", ["by", "action"]
)


@dataclass(frozen=True, slots=True)
class Target:
    """How small a session is to become. What it cannot be told of stays.

    Attributes:
        keep_ratio: Of its tokens that have KV, in ``(0, 1]``.
        max_kept_tokens: Of all its kept tokens, at least 1; exclusive with the former.
        precision: How keys and values are stored, unless they are coarser already.
        shrink: Fraction of its kept tokens that each segment keeps, if it can be pruned at all.
        floor_ratio: Fraction of its tokens that each segment keeps however often it is shrunk.
    """

    keep_ratio: float | None = None
    max_kept_tokens: int | None = None
    precision: chunkkv.Precision | None = None
    shrink: float | None = None
    floor_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Compacted:
    """What became of a session.

    Attributes:
        version: Of its manifest.
        before: Its segments as they were.
        after: As they are. Equal if there was nothing to do.
    """

    version: int
    before: Sequence[session_pb2.Segment]
    after: Sequence[session_pb2.Segment]


@dataclass(frozen=True, slots=True)
class _Job:
    """One session, as it was read, and what is to be done to it."""

    manifest: manifest_pb2.Manifest
    target: Target
    ttl_s: float
    by_pressure: bool


class Compactor:
    """Compacts sessions.

    Args:
        store: Where they are.
        lease_ttl_s: Of the turn lease that is held meanwhile.
    """

    def __init__(self, store: Store, *, lease_ttl_s: float) -> None:
        self._store = store
        self._lease_ttl_s = lease_ttl_s
        self._pool = ReceivePool()

    async def compact(
        self, tenant: str, session_id: str, target: Target, *, by_pressure: bool = False
    ) -> Compacted:
        """Make a session's segments as small as the target says, all or nothing.

        Its life is neither longer nor shorter afterwards: this was no use of it.

        Raises:
            NotFoundError: There is no such session, or a segment has expired.
            ConflictError: A turn holds it.
            MismatchError: Segments without scores alone are larger than the target (``NO_SCORES``).
            CorruptError: A segment is damaged.
            UnavailableError, OverloadedError: The store is away, or full.
        """
        async with turn_lease(self._store, tenant, session_id, ttl_s=self._lease_ttl_s):
            stored = await self._store.get_manifest(tenant, session_id)
            manifest = manifest_pb2.Manifest.FromString(stored.body)
            job = _Job(manifest, target, ttl_s=stored.expires_in_s, by_pressure=by_pressure)
            before = list(manifest.segments)
            try:
                after = await completed(asyncio.to_thread(self._run, job))
                if after == before:
                    return Compacted(stored.version, before, before)
                version = await self._commit(job, stored.version, after)
            finally:
                # What the session does not name: it was not committed, or was of no use.
                await finish(
                    "compaction.release",
                    self._store.release_reserved(tenant, session_id),
                )
        _count(before, after, by="pressure" if by_pressure else "request")
        return Compacted(version, before, after)

    async def _commit(
        self, job: _Job, read_version: int, after: Sequence[session_pb2.Segment]
    ) -> int:
        manifest = job.manifest
        named = [segment.segment_id for segment in after]
        dropped = [s.segment_id for s in manifest.segments if s.segment_id not in named]
        del manifest.segments[:]
        manifest.segments.extend(after)
        manifest.version = read_version + 1
        return await self._store.commit_manifest(
            manifest.tenant,
            manifest.session_id,
            manifest.SerializeToString(),
            expected_version=read_version,
            ttl_s=job.ttl_s,
            segment_ids=named,
            dropped_segment_ids=dropped,
        )

    def _run(self, job: _Job) -> list[session_pb2.Segment]:
        """Store the smaller segments and return the manifest's entries for them. Blocks."""
        segments = list(job.manifest.segments)
        shapes = [self._shape(segment.segment_id) for segment in segments]
        budgets = _budgets(shapes, job.target, num_tokens=covered_tokens(job.manifest))
        return [
            self._smaller(job, segment, shape, budget)
            for segment, shape, budget in zip(segments, shapes, budgets, strict=True)
        ]

    def _shape(self, segment_id: str) -> chunkkv.SpanShape:
        data = self._store.get_header(segment_id)
        with library_errors():
            header = chunkkv.read_header(data)
            header.expect(identity=segment_id)
        return header.shape

    def _smaller(
        self,
        job: _Job,
        segment: session_pb2.Segment,
        shape: chunkkv.SpanShape,
        budget: int | None,
    ) -> session_pb2.Segment:
        """Return the entry of what a segment becomes; the segment itself if nothing is gained."""
        precision = job.target.precision
        if precision is None or _COARSENESS[precision] <= _COARSENESS[shape.precision]:
            precision = None
        if budget is None and precision is None:
            return segment
        name = recompressed_id(segment.segment_id, max_kept_tokens=budget, precision=precision)
        made = find_segment(self._store, name, ttl_s=job.ttl_s, owner=owner_of(job.manifest))
        if made is None:
            made = self._store_smaller(job, segment, name, budget, precision)
        if budget is None and made.size_bytes >= segment.size_bytes:
            return segment  # too short for its scales to pay; what was stored is released
        described = session_pb2.Segment()
        described.CopyFrom(segment)
        described.segment_id = made.segment_id
        described.num_kept_tokens = made.num_kept_tokens
        described.size_bytes = made.size_bytes
        described.kv_bytes = made.kv_bytes
        _note(described, segment, budget, precision or shape.precision, job.by_pressure)
        return described

    def _store_smaller(
        self,
        job: _Job,
        segment: session_pb2.Segment,
        name: str,
        budget: int | None,
        precision: chunkkv.Precision | None,
    ) -> session_pb2.Segment:
        fingerprint = job.manifest.model_fingerprint
        fetched = fetched_segments(self._store, [segment], fingerprint=fingerprint, pool=self._pool)
        with fetched as spans, library_errors():
            smaller = chunkkv.recompress(spans.kv[0], max_kept_tokens=budget, precision=precision)
            encoded = encode_as(smaller, name, owner=owner_of(job.manifest))
            return put_encoded(self._store, encoded, ttl_s=job.ttl_s)


def recompressed_id(
    segment_id: str, *, max_kept_tokens: int | None, precision: chunkkv.Precision | None
) -> str:
    """Return the content address of what a segment becomes.

    A hash over the segment and what is done to it: sessions that share a segment share what
    becomes of it.
    """
    digest = hashlib.sha256(_ID_VERSION)
    for name in (segment_id, str(max_kept_tokens or 0), precision or ""):
        digest.update(len(name).to_bytes(4, "little") + name.encode())
    return digest.hexdigest()[:32]


def spread(kept: Sequence[int], budget: int) -> list[int]:
    """Share a budget out in proportion to what each has, exactly; everybody gets at least 1.

    Args:
        kept: At least 1 each.
        budget: At least ``len(kept)``.

    Returns:
        Integers of at most ``kept``, whose sum is ``min(budget, sum(kept))``.
    """
    rest, wanted = budget - len(kept), sum(kept) - len(kept)
    if rest >= wanted:
        return list(kept)
    parts = [divmod((own - 1) * rest, wanted) for own in kept]
    missing = rest - sum(whole for whole, _ in parts)
    # The largest remainders round up; of equals, the earlier.
    first = sorted(range(len(kept)), key=lambda index: -parts[index][1])[:missing]
    return [1 + whole + (index in first) for index, (whole, _) in enumerate(parts)]


def _budgets(
    shapes: Sequence[chunkkv.SpanShape], target: Target, *, num_tokens: int
) -> list[int | None]:
    """Return how many tokens each segment keeps at most; ``None``: all that it has.

    Raises:
        MismatchError: Segments that cannot be pruned leave too little for the others.
    """
    if target.shrink is not None:
        return [_shrunk(shape, target) for shape in shapes]
    kept = [shape.num_kept_tokens for shape in shapes]
    if target.keep_ratio is not None:
        policy = chunkkv.CompressionPolicy(keep_ratio=target.keep_ratio)
        budget = policy.budget(max(num_tokens, 1))
    else:
        budget = sum(kept) if target.max_kept_tokens is None else target.max_kept_tokens
    if budget >= sum(kept):
        return [None] * len(shapes)
    prunable = [index for index, shape in enumerate(shapes) if _can_shrink(shape)]
    left = budget - (sum(kept) - sum(kept[index] for index in prunable))
    if left < max(len(prunable), 1):
        raise MismatchError(
            f"{budget} of {sum(kept)} kept tokens were asked for; the segments that hold no scores "
            f"keep {budget - left}, and each of {len(prunable)} others at least 1: ask for more",
            reason="NO_SCORES",
        )
    shares = dict(zip(prunable, spread([kept[index] for index in prunable], left), strict=True))
    return [
        share if (share := shares.get(index)) is not None and share < own else None
        for index, own in enumerate(kept)
    ]


def _can_shrink(shape: chunkkv.SpanShape) -> bool:
    return chunkkv.is_prunable(shape) and shape.num_kept_tokens > 0


def _shrunk(shape: chunkkv.SpanShape, target: Target) -> int | None:
    """Return what one step leaves of a segment; ``None``: it is at the floor, or without scores."""
    assert target.shrink is not None
    floor = max(1, round(shape.num_tokens * target.floor_ratio))
    budget = max(int(shape.num_kept_tokens * target.shrink), floor)
    return budget if _can_shrink(shape) and budget < shape.num_kept_tokens else None


def _note(
    described: session_pb2.Segment,
    before: session_pb2.Segment,
    budget: int | None,
    precision: chunkkv.Precision,
    by_pressure: bool,
) -> None:
    """Write down what was done; what it was made of stays what it was made of first."""
    done = described.recompression
    if not before.HasField("recompression"):
        done.original_segment_id = before.segment_id
        done.original_bytes = before.size_bytes
        done.original_kept_tokens = before.num_kept_tokens
    if budget is not None:
        done.max_kept_tokens = budget
    done.precision = _NUMBERS[precision]
    done.by_pressure = by_pressure
    done.time.FromNanoseconds(time.time_ns())


def _count(
    before: Sequence[session_pb2.Segment], after: Sequence[session_pb2.Segment], *, by: str
) -> None:
    _SESSIONS.labels(by).inc()
    for old, new in zip(before, after, strict=True):
        if old == new:
            continue
        is_pruned = new.num_kept_tokens < old.num_kept_tokens
        action = "pruned" if is_pruned else "quantized"
        _SEGMENTS.labels(by, action).inc()
        _BYTES_BEFORE.labels(by, action).inc(old.size_bytes)
        _BYTES_AFTER.labels(by, action).inc(new.size_bytes)
