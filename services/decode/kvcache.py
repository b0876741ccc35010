"""Puts a conversation's KV cache in place: from memory, from the store, or from both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import chunkkv
from chunkserve.v1 import manifest_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments, library_errors
from services.models.loader import LoadedModel
from services.store.base import SegmentStore

# Room for pending and generated tokens that is made at once. A longer answer grows the cache.
_RESERVED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class OpenedCache:
    """A cache that holds the KV of all segments of a manifest.

    Attributes:
        cache: The cache.
        fetched_bytes: Bytes that came from the store.
        fetch_ms: Milliseconds to fetch and check them.
    """

    cache: chunkkv.KVCache
    fetched_bytes: int
    fetch_ms: float


def open_cache(
    store: SegmentStore,
    loaded: LoadedModel,
    manifest: manifest_pb2.Manifest,
    resident: chunkkv.KVCache | None,
    *,
    pool: ReceivePool,
) -> OpenedCache:
    """Fetch the segments that are not in memory. Blocks: call it from a thread.

    Args:
        store: Where the segments are.
        loaded: The model that computed them.
        manifest: Names the segments.
        resident: Cache of its first segments, if it is in memory; extended.
        pool: Memory to receive into.

    Raises:
        NotFoundError: A segment is not in the store any more.
        CorruptError: A segment is damaged.
        MismatchError: A segment is another model's, or does not follow the one before.
    """
    num_held = 0 if resident is None else resident.get_seq_length()
    missing = [segment for segment in manifest.segments if segment.first_token >= num_held]
    with (
        fetched_segments(store, missing, fingerprint=loaded.fingerprint, pool=pool) as fetched,
        torch.inference_mode(),
        library_errors(),
    ):
        if resident is None:
            cache = chunkkv.KVCache.from_segments(
                loaded.model.config,
                fetched.kv,
                extra_tokens=_RESERVED_TOKENS,
                device=loaded.device,
            )
        else:
            cache = resident
            for span in fetched.kv:
                cache.append_segment(span.to(loaded.device))
        return OpenedCache(cache, fetched.size_bytes, fetched.fetch_ms)
