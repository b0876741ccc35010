"""Sessions of real segments, without a model: random keys and values, with scores."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from google.protobuf.duration_pb2 import Duration

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import covered_tokens, fetched_segments, store_segment
from services.store import Store

FINGERPRINT = "model-a"
WHOLE = "whole"
HALF = chunkkv.CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4)
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 2, 16, 2


def span(
    num_tokens: int,
    *,
    first_token: int = 0,
    policy: str = HALF.canonical(),
    seed: int = 0,
    fingerprint: str = FINGERPRINT,
) -> chunkkv.CompressedKV:
    """Return a span that keeps every second token; all, without scores, if its policy is whole."""
    is_whole = policy == WHOLE
    places = torch.arange(0, num_tokens, 1 if is_whole else 2)
    kept = len(places)
    made = chunkkv.CompressedKV.empty(
        chunkkv.SpanShape(
            fingerprint=fingerprint,
            policy=policy,
            first_token=first_token,
            num_tokens=num_tokens,
            dtype="float32",
            layers=tuple(
                chunkkv.LayerShape((kept,) * NUM_HEADS, HEAD_DIM, HEAD_DIM, index_list=layer)
                for layer in range(NUM_LAYERS)
            ),
            index_lengths=(kept,) * NUM_LAYERS,
            has_scores=not is_whole,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers:
        layer.keys.copy_(torch.randn(layer.keys.shape, generator=generator))
        layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
        layer.positions.copy_(places + first_token)
        if layer.scores is not None:
            layer.scores.copy_(torch.rand(kept, generator=generator))
    return made


async def store_session(
    store: Store,
    session_id: str,
    spans: Sequence[tuple[int, str]] = ((80, HALF.canonical()),),
    *,
    tenant: str = "default",
    seed: int = 0,
    updated_s: float | None = None,
    ttl_s: int = 300,
) -> manifest_pb2.Manifest:
    """Store a session with segments of these numbers of tokens and policies; return its manifest.

    Sessions of one tenant with equal seeds and spans share their segments.
    """
    manifest = manifest_pb2.Manifest(
        tenant=tenant,
        session_id=session_id,
        version=1,
        model="fake-model",
        model_fingerprint=FINGERPRINT,
        token_ids=range(seed * 10_000, seed * 10_000 + sum(length for length, _ in spans) + 1),
        ttl=Duration(seconds=ttl_s),
    )
    manifest.update_time.FromNanoseconds(int((updated_s or time.time()) * 1e9))
    for num_tokens, policy in spans:
        kv = span(num_tokens, first_token=covered_tokens(manifest), policy=policy, seed=seed)
        manifest.segments.append(store_segment(store, kv, manifest, ttl_s=ttl_s))
    await store.create_manifest(tenant, session_id, manifest.SerializeToString(), ttl_s=ttl_s)
    return manifest


async def read_session(
    store: Store, session_id: str, *, tenant: str = "default"
) -> manifest_pb2.Manifest:
    """Return a session's manifest, with the version that is stored."""
    stored = await store.get_manifest(tenant, session_id)
    manifest = manifest_pb2.Manifest.FromString(stored.body)
    assert manifest.version == stored.version
    return manifest


def open_spans(store: Store, segments: Sequence[session_pb2.Segment]) -> list[chunkkv.CompressedKV]:
    """Fetch and verify segments."""
    with fetched_segments(store, segments, fingerprint=FINGERPRINT, pool=ReceivePool()) as fetched:
        return [chunkkv.CompressedKV(kv.shape, kv.memory.clone()) for kv in fetched.kv]
