"""Puts a conversation's KV in place: found in memory, or fetched straight into it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import chunkkv
from chunkserve.v1 import manifest_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import library_errors, receive_segment
from services.decode.geometry import KVGeometry
from services.decode.memory import Block, KVPool
from services.decode.placement import KVMemory, Placement
from services.decode.sequence_kv import SequenceKV
from services.store.base import SegmentStore


@dataclass(frozen=True, slots=True)
class OpenedKV:
    """KV of all segments of a manifest.

    Attributes:
        kv: The KV.
        fetched_bytes: Bytes that came from the store.
        fetch_ms: Milliseconds to fetch, check and place them.
    """

    kv: SequenceKV
    fetched_bytes: int
    fetch_ms: float


class KVFetcher:
    """Brings segments from the store into a worker's memory.

    Args:
        store: Where segments are.
        memory: Where they go.
        geometry: Of the model.
        fingerprint: Of the model.
    """

    def __init__(
        self, store: SegmentStore, memory: KVMemory, geometry: KVGeometry, *, fingerprint: str
    ) -> None:
        self._store = store
        self._memory = memory
        self._geometry = geometry
        self._fingerprint = fingerprint
        # For devices that no socket can write to, and segments that are not stored native.
        self._staging = ReceivePool()

    async def open(self, manifest: manifest_pb2.Manifest, placement: Placement) -> OpenedKV:
        """Fetch what the placement misses, and return the conversation's KV.

        Raises:
            NotFoundError: A segment is not in the store any more.
            CorruptError: A segment is damaged.
            MismatchError: A segment is another model's, or does not follow the one before.
        """
        started = time.perf_counter()
        kv, fetched = await placement.in_thread(self._fetch, manifest, placement)
        if manifest.session_id:  # a one-off request's segments are nobody else's
            for segment, block in placement.missing:
                self._memory.publish(placement, segment, block, fetched[segment.segment_id])
        return OpenedKV(
            kv=kv,
            fetched_bytes=sum(segment.size_bytes for segment, _ in placement.missing),
            fetch_ms=(time.perf_counter() - started) * 1000,
        )

    def _fetch(
        self, manifest: manifest_pb2.Manifest, placement: Placement
    ) -> tuple[SequenceKV, dict[str, chunkkv.CompressedKV]]:
        """Return the conversation's KV, and the spans that were missing, by segment. Blocks."""
        fetched = {
            segment.segment_id: self._receive(segment.segment_id, block)
            for segment, block in placement.missing
        }
        return self._assemble(manifest, placement, placement.spans | fetched), fetched

    def _receive(self, segment_id: str, block: Block) -> chunkkv.CompressedKV:
        pool: KVPool = self._memory.pool
        memory = pool.view(block, block.size_bytes)
        if memory.device.type == "cpu":
            return self._receive_into(segment_id, memory.numpy().data)
        with self._staging.lend(block.size_bytes) as staged:
            span = self._receive_into(segment_id, staged)
            placed = memory[: span.size_bytes]
            placed.copy_(span.memory)
            return chunkkv.CompressedKV(span.shape, placed)

    def _receive_into(self, segment_id: str, memory: memoryview) -> chunkkv.CompressedKV:
        return receive_segment(
            self._store,
            segment_id,
            memory,
            fingerprint=self._fingerprint,
            staging=self._staging,
        )

    def _assemble(
        self,
        manifest: manifest_pb2.Manifest,
        placement: Placement,
        spans: dict[str, chunkkv.CompressedKV],
    ) -> SequenceKV:
        with torch.inference_mode(), library_errors():
            return SequenceKV(
                self._geometry,
                [spans[segment.segment_id] for segment in manifest.segments],
                self._memory.pool.view(placement.tail, placement.tail.size_bytes),
                capacity=placement.tail_tokens,
                limit=placement.limit,
            )
