"""Makes segments: fetches what precedes a span, runs the model over it, stores what is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import chunkkv
from chunkserve.v1 import session_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import (
    encode_as,
    fetched_segments,
    find_segment,
    library_errors,
    put_encoded,
)
from services.models.loader import LoadedModel
from services.prefill.runner import PrefillRunner, RunResult
from services.runtime.errors import CorruptError, NotFoundError
from services.runtime.telemetry import get_logger
from services.store.base import SegmentOwner, SegmentStore

_log = get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MadeSegment:
    """A segment that is in the store.

    Attributes:
        segment: Name, span and sizes.
        kv: Its KV as it is stored; ``None`` if it was not read.
        is_computed: The model ran for it.
        prefill_ms: Milliseconds of forward passes.
        compression_ms: Milliseconds to score, select, gather and encode.
        store_ms: Milliseconds to write it.
    """

    segment: session_pb2.Segment
    kv: chunkkv.CompressedKV | None = None
    is_computed: bool = False
    prefill_ms: float = 0.0
    compression_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens to make a segment of.

    Attributes:
        name: The segment's content address.
        token_ids: The tokens.
        policy: What to keep of them; ``None``: everything.
        before: The segments before it, from position 0.
        ttl_s: How long the segment lives at least.
        owner: The session that it is for; ``None`` for a one-off request.
        known: KV of some of those before as it is stored, by name: the others are fetched.
    """

    name: str
    token_ids: Sequence[int]
    policy: chunkkv.CompressionPolicy | None
    before: Sequence[session_pb2.Segment]
    ttl_s: float
    owner: SegmentOwner | None = None
    known: Mapping[str, chunkkv.CompressedKV] = field(default_factory=dict)


class SegmentMaker:
    """Computes and stores segments of one model."""

    def __init__(self, loaded: LoadedModel, runner: PrefillRunner, store: SegmentStore) -> None:
        self._loaded = loaded
        self._runner = runner
        self._store = store
        self._receive_pool = ReceivePool()

    async def find(self, span: Span) -> MadeSegment | None:
        """Return a span's segment if the store has it, its life extended. Parts are not looked at.

        Raises:
            MismatchError: Something else is stored under this name.
        """
        found = await asyncio.to_thread(
            find_segment, self._store, span.name, ttl_s=span.ttl_s, owner=span.owner
        )
        return None if found is None else MadeSegment(found)

    async def make(self, span: Span) -> MadeSegment:
        """Compute a span and store what is kept; see ``compute`` and ``store``."""
        return await self.store(span, await self.compute(span))

    async def compute(self, span: Span) -> RunResult:
        """Run the model over a span, on top of what precedes it.

        Raises:
            NotFoundError, CorruptError, MismatchError: A segment before it cannot be used.
            OverloadedError: Too many prompts wait.
            UnavailableError: The store is away.
        """
        past = await asyncio.to_thread(self._open, span)
        return await self._runner.run(span.token_ids, past, span.policy)

    async def store(self, span: Span, result: RunResult) -> MadeSegment:
        """Store a span that was computed.

        Raises:
            UnavailableError, OverloadedError: The store is away, or full.
        """
        encoded, encode_ms = await timed(lambda: encode_as(result.kv, span.name, owner=span.owner))
        segment, store_ms = await timed(lambda: put_encoded(self._store, encoded, ttl_s=span.ttl_s))
        return MadeSegment(
            segment,
            is_computed=True,
            prefill_ms=result.prefill_ms,
            compression_ms=result.compression_ms + encode_ms,
            store_ms=store_ms,
        )

    def fetch(self, segment: session_pb2.Segment) -> chunkkv.CompressedKV:
        """Return a segment's KV, of which every byte was checked, in memory of its own. Blocks.

        Raises:
            NotFoundError, CorruptError: The segment, or a part of it, is missing or damaged.
            MismatchError: It is another model's, or of another format version.
        """
        fetched = fetched_segments(
            self._store,
            [segment],
            fingerprint=self._loaded.fingerprint,
            pool=self._receive_pool,
        )
        with fetched as spans:
            return chunkkv.CompressedKV(spans.kv[0].shape, spans.kv[0].memory.clone())

    def fetch_intact(self, segment: session_pb2.Segment) -> chunkkv.CompressedKV | None:
        """Return what ``fetch`` does; ``None`` if something is missing or damaged. Blocks."""
        try:
            return self.fetch(segment)
        except (NotFoundError, CorruptError) as error:
            _log.warning("segment.unusable", segment_id=segment.segment_id, error=error.message)
            return None

    def _open(self, span: Span) -> chunkkv.KVCache:
        """Return the KV cache that precedes a span. Blocks."""
        missing = [segment for segment in span.before if segment.segment_id not in span.known]
        fetched = fetched_segments(
            self._store,
            missing,
            fingerprint=self._loaded.fingerprint,
            pool=self._receive_pool,
        )
        with fetched as lent, library_errors():
            names = [segment.segment_id for segment in missing]
            kv = {**span.known, **dict(zip(names, lent.kv, strict=True))}
            return chunkkv.KVCache.from_segments(
                self._loaded.model.config,
                [kv[segment.segment_id] for segment in span.before],
                device=self._loaded.device,
            )


async def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Run blocking ``work`` on a thread; return its result and milliseconds."""
    started = time.perf_counter()
    result = await asyncio.to_thread(work)
    return result, (time.perf_counter() - started) * 1000
