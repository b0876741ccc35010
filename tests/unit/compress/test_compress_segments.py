"""Segments under their content address, in a real store."""

from __future__ import annotations

import pytest
import redis
import torch

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import (
    covered_tokens,
    fetched_segments,
    find_segment,
    segment_id,
    store_segment,
)
from services.runtime.errors import CorruptError, MismatchError, NotFoundError

NUM_TOKENS = 6


def span(*, first_token: int = 0, fingerprint: str = "model") -> chunkkv.CompressedKV:
    layer = chunkkv.LayerShape((NUM_TOKENS, NUM_TOKENS), 8, 8, index_list=0)
    made = chunkkv.CompressedKV.empty(
        chunkkv.SpanShape(
            fingerprint=fingerprint,
            policy="test",
            first_token=first_token,
            num_tokens=NUM_TOKENS,
            dtype="float32",
            layers=(layer, layer),
            index_lengths=(NUM_TOKENS,),
            has_scores=True,
        )
    )
    made.memory.copy_(torch.randint(0, 256, made.memory.shape, dtype=torch.uint8))
    return made


def manifest(**fields: object) -> manifest_pb2.Manifest:
    own = {"tenant": "t", "session_id": "s", "token_ids": range(20)}
    return manifest_pb2.Manifest(**{**own, **fields})


def name_of(owner: manifest_pb2.Manifest, **fields: object) -> str:
    own = {"num_tokens": 5, "policy": "p", "fingerprint": "f"}
    return segment_id(owner, **{**own, **fields})


PARENT = session_pb2.Segment(segment_id="parent", first_token=0, num_tokens=4)


@pytest.mark.parametrize(
    ("owner", "fields"),
    [
        (manifest(tenant="other"), {}),
        (manifest(token_ids=[9, *range(1, 20)]), {}),
        (manifest(segments=[PARENT]), {}),
        (manifest(), {"num_tokens": 6}),
        (manifest(), {"policy": "q"}),
        (manifest(), {"fingerprint": "g"}),
    ],
    ids=["tenant", "tokens", "parent", "length", "policy", "model"],
)
def test_whatever_makes_another_cache_makes_another_name(owner, fields):
    assert name_of(owner, **fields) != name_of(manifest())


def test_equal_prefixes_of_other_sessions_have_equal_names():
    assert name_of(manifest(session_id="other", version=7)) == name_of(manifest())


def test_segments_of_one_off_requests_are_nobody_elses():
    one_off = manifest(session_id="")

    assert name_of(one_off) != name_of(one_off)


def test_a_name_needs_all_tokens():
    with pytest.raises(ValueError, match="20 of the span's 21 tokens"):
        name_of(manifest(), num_tokens=21)


def test_what_was_stored_is_found_and_comes_back(store):
    kv, owner, pool = span(), manifest(), ReceivePool()

    segment = store_segment(store, kv, owner, ttl_s=60)
    owner.segments.append(segment)

    assert covered_tokens(owner) == NUM_TOKENS
    assert find_segment(store, segment.segment_id, ttl_s=60) == segment
    assert find_segment(store, "0" * 32, ttl_s=60) is None
    with fetched_segments(store, [segment], fingerprint="model", pool=pool) as fetched:
        assert torch.equal(fetched.kv[0].memory, kv.memory)
        assert fetched.size_bytes == segment.size_bytes
        assert segment.num_kept_tokens == NUM_TOKENS


def test_several_segments_come_in_order_in_one_piece_of_memory(store):
    owner, spans = manifest(), []
    for first_token in (0, NUM_TOKENS):
        spans.append(span(first_token=first_token))
        owner.segments.append(store_segment(store, spans[-1], owner, ttl_s=60))

    with fetched_segments(
        store, owner.segments, fingerprint="model", pool=ReceivePool()
    ) as fetched:
        assert [kv.first_token for kv in fetched.kv] == [0, NUM_TOKENS]
        assert all(torch.equal(a.memory, b.memory) for a, b in zip(fetched.kv, spans, strict=True))


def fetch(store, segment, fingerprint="model"):
    with fetched_segments(store, [segment], fingerprint=fingerprint, pool=ReceivePool()):
        pass


def test_damage_is_refused_and_the_memory_given_back(store, valkey_url):
    segment = store_segment(store, span(), manifest(), ttl_s=60)
    with redis.Redis.from_url(valkey_url) as client:
        for key in client.scan_iter(f"*{segment.segment_id}*"):
            data = bytearray(client.get(key))
            data[-1] ^= 1
            client.set(key, bytes(data), keepttl=True)

    with pytest.raises(CorruptError, match="damaged"):
        fetch(store, segment)


def test_a_segment_that_is_gone_is_not_found(store):
    segment = store_segment(store, span(), manifest(), ttl_s=60)
    store.delete_segments([segment.segment_id])

    with pytest.raises(NotFoundError):
        fetch(store, segment)


def test_a_segment_of_another_model_is_refused(store):
    segment = store_segment(store, span(), manifest(), ttl_s=60)

    with pytest.raises(MismatchError, match="made by model model, not by other"):
        fetch(store, segment, fingerprint="other")


def test_a_segment_under_another_name_is_refused(store):
    encoded = chunkkv.encode(span(), identity="its own name")
    store.put_segment("another name", encoded.header, encoded.parts, ttl_s=60)

    with pytest.raises(MismatchError, match="another name"):
        fetch(store, session_pb2.Segment(segment_id="another name"))
