"""Sessions are made smaller as asked for, all or nothing, and say what was done to them."""

from __future__ import annotations

import dataclasses

import pytest
import redis
import torch
from hypothesis import given
from hypothesis import strategies as st

import chunkkv
from chunkserve.v1 import session_pb2, types_pb2
from services.compress.compaction import Compactor, Target, recompressed_id, spread
from services.compress.servicer import target_of
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
)
from services.store import Store, keys
from tests.stored_sessions import HALF, WHOLE, open_spans, read_session, store_session

SPANS = [(80, HALF.canonical()), (7, WHOLE), (160, HALF.canonical())]


@pytest.fixture
def compactor(store: Store) -> Compactor:
    return Compactor(store, lease_ttl_s=30)


def kept(segments: list[session_pb2.Segment]) -> list[int]:
    return [segment.num_kept_tokens for segment in segments]


@given(own=st.lists(st.integers(1, 300), min_size=1, max_size=12), budget=st.integers(0, 4000))
def test_budget_is_spread_exactly_and_in_proportion(own: list[int], budget: int):
    budget += len(own)

    shares = spread(own, budget)

    assert sum(shares) == min(budget, sum(own))
    assert all(1 <= share <= most for share, most in zip(shares, own, strict=True))
    if budget < sum(own) and sum(own) > len(own):
        for share, most in zip(shares, own, strict=True):
            exact = 1 + (most - 1) * (budget - len(own)) / (sum(own) - len(own))
            assert abs(share - exact) < 1


async def test_budget_is_exact_and_whole_segments_keep_all(store: Store, compactor: Compactor):
    before = await store_session(store, "s-1", SPANS)
    originals = open_spans(store, before.segments)

    done = await compactor.compact("default", "s-1", Target(max_kept_tokens=57))

    after = await read_session(store, "s-1")
    assert kept(before.segments) == [40, 7, 80]
    assert kept(after.segments) == [17, 7, 33]
    assert list(after.segments) == list(done.after)
    assert after.segments[1] == before.segments[1]
    assert (after.version, done.version) == (2, 2)
    assert (after.token_ids, after.update_time) == (before.token_ids, before.update_time)
    small, whole, large = open_spans(store, after.segments)
    assert torch.equal(small.memory, chunkkv.recompress(originals[0], max_kept_tokens=17).memory)
    assert torch.equal(large.memory, chunkkv.recompress(originals[2], max_kept_tokens=33).memory)
    assert torch.equal(whole.memory, originals[1].memory)


async def test_lists_that_compete_keep_the_budget_on_the_average(
    store: Store, compactor: Compactor
):
    competing = dataclasses.replace(HALF, unit="token", spread="adaptive").canonical()
    before = await store_session(store, "s-1", [(80, competing), (7, WHOLE), (160, competing)])
    originals = open_spans(store, before.segments)

    await compactor.compact("default", "s-1", Target(max_kept_tokens=57))
    first = await read_session(store, "s-1")
    ragged = open_spans(store, first.segments)
    await compactor.compact("default", "s-1", Target(shrink=0.7, floor_ratio=0.05))

    assert kept(first.segments) == [17, 7, 33]
    assert torch.equal(
        ragged[2].memory, chunkkv.recompress(originals[2], max_kept_tokens=33).memory
    )
    assert len({layer.lengths for layer in ragged[2].layers}) == 2, "layers kept different numbers"
    assert kept((await read_session(store, "s-1")).segments) == [11, 7, 23]


async def test_ratio_is_of_the_sessions_tokens(store: Store, compactor: Compactor):
    await store_session(store, "s-1", SPANS)

    done = await compactor.compact("default", "s-1", Target(keep_ratio=0.2))

    assert sum(kept(list(done.after))) == int(0.2 * 247)


async def test_precision_changes_every_segment_and_is_written_down(
    store: Store, compactor: Compactor
):
    before = await store_session(store, "s-1", SPANS)
    originals = open_spans(store, before.segments)

    await compactor.compact("default", "s-1", Target(precision="int8"))

    after = await read_session(store, "s-1")
    for old, kv, new in zip(before.segments, originals, after.segments, strict=True):
        assert new.size_bytes < old.size_bytes
        assert new.kv_bytes == kv.size_bytes
        done = new.recompression
        assert done.precision == types_pb2.PRECISION_INT8
        assert done.original_segment_id == old.segment_id
        assert (done.original_bytes, done.original_kept_tokens) == (
            old.size_bytes,
            old.num_kept_tokens,
        )
        assert (done.max_kept_tokens, done.by_pressure) == (0, False)
        assert done.HasField("time")
    assert all(kv.shape.precision == "int8" for kv in open_spans(store, after.segments))


async def test_originals_stay_the_first_ones(store: Store, compactor: Compactor):
    first = (await store_session(store, "s-1")).segments[0]

    await compactor.compact("default", "s-1", Target(precision="int8"))
    await compactor.compact("default", "s-1", Target(max_kept_tokens=20), by_pressure=True)
    await compactor.compact("default", "s-1", Target(precision="int4"))

    done = (await read_session(store, "s-1")).segments[0].recompression
    assert done.original_segment_id == first.segment_id
    assert (done.original_bytes, done.original_kept_tokens) == (first.size_bytes, 40)
    assert (done.max_kept_tokens, done.precision) == (20, types_pb2.PRECISION_INT4)


@pytest.mark.parametrize(
    "target",
    [
        Target(max_kept_tokens=40),
        Target(keep_ratio=1.0),
        Target(precision="native"),
        Target(precision="fp8"),
        Target(shrink=0.7, floor_ratio=0.5),
    ],
)
async def test_nothing_is_committed_if_nothing_is_left_to_do(
    store: Store, compactor: Compactor, target: Target
):
    await store_session(store, "s-1")
    await compactor.compact("default", "s-1", Target(precision="int8"))
    before = await read_session(store, "s-1")

    done = await compactor.compact("default", "s-1", target)

    assert done.after == done.before
    assert await read_session(store, "s-1") == before


async def test_shrinking_ends_at_the_floor(store: Store, compactor: Compactor):
    await store_session(store, "s-1", SPANS)
    target = Target(shrink=0.7, floor_ratio=0.1)

    steps = []
    while True:
        done = await compactor.compact("default", "s-1", target, by_pressure=True)
        if done.after == done.before:
            break
        steps.append(kept(list(done.after)))

    assert steps[0] == [28, 7, 56]
    assert steps[-1] == [8, 7, 16]


async def test_segment_that_gains_nothing_stays_as_it_is(store: Store, compactor: Compactor):
    # One token a head: padding and scales take what the codes save.
    before = await store_session(store, "s-1", [(1, WHOLE)])

    done = await compactor.compact("default", "s-1", Target(precision="int8"))

    assert list(done.after) == list(before.segments)


async def test_sessions_that_share_a_segment_share_what_becomes_of_it(
    store: Store, compactor: Compactor
):
    one, other = await store_session(store, "s-1"), await store_session(store, "s-2")
    assert one.segments[0] == other.segments[0]

    for session_id in ("s-1", "s-2"):
        await compactor.compact("default", session_id, Target(max_kept_tokens=9))

    names = {
        (await read_session(store, session_id)).segments[0].segment_id
        for session_id in ("s-1", "s-2")
    }
    assert names == {recompressed_id(one.segments[0].segment_id, max_kept_tokens=9, precision=None)}


@pytest.mark.parametrize(("spans", "budget"), [([(9, WHOLE)], 8), (SPANS, 8)])
async def test_budget_that_segments_without_scores_exceed_is_refused(
    store: Store, compactor: Compactor, spans: list[tuple[int, str]], budget: int
):
    before = await store_session(store, "s-1", spans)

    with pytest.raises(MismatchError) as caught:
        await compactor.compact("default", "s-1", Target(max_kept_tokens=budget))

    assert caught.value.error_reason == "NO_SCORES"
    assert await read_session(store, "s-1") == before


async def test_empty_session_has_nothing_to_give(store: Store, compactor: Compactor):
    await store_session(store, "s-1", [])

    done = await compactor.compact("default", "s-1", Target(keep_ratio=0.1, precision="int4"))

    assert (done.version, list(done.after)) == (1, [])


async def test_unknown_session_is_not_found(compactor: Compactor):
    with pytest.raises(NotFoundError):
        await compactor.compact("default", "s-1", Target(precision="int8"))


async def test_session_in_use_is_left_alone(store: Store, compactor: Compactor):
    before = await store_session(store, "s-1")
    await store.acquire_lease("default", "s-1", ttl_s=60)

    with pytest.raises(ConflictError):
        await compactor.compact("default", "s-1", Target(precision="int8"))

    assert await read_session(store, "s-1") == before


async def test_lease_is_given_back(store: Store, compactor: Compactor):
    await store_session(store, "s-1")

    await compactor.compact("default", "s-1", Target(precision="int8"))

    await store.acquire_lease("default", "s-1", ttl_s=60)


async def test_expired_or_damaged_segment_leaves_the_session_as_it_was(
    store: Store, compactor: Compactor, valkey_url: str
):
    before = await store_session(store, "s-1", SPANS)
    name = before.segments[2].segment_id
    with redis.Redis.from_url(valkey_url) as client:
        value = client.get(keys.segment_header(name))
        client.setrange(keys.segment_parts(name, value)[0], 300, b"\xff\xfe\xfd")
    with pytest.raises(CorruptError):
        await compactor.compact("default", "s-1", Target(max_kept_tokens=50))
    store.delete_segments([name])
    with pytest.raises(NotFoundError):
        await compactor.compact("default", "s-1", Target(max_kept_tokens=50))

    assert await read_session(store, "s-1") == before


async def test_life_is_neither_longer_nor_shorter(store: Store, compactor: Compactor):
    await store_session(store, "s-1", ttl_s=300)
    before = (await store.get_manifest("default", "s-1")).expires_in_s

    await compactor.compact("default", "s-1", Target(precision="int8"))

    after = await store.get_manifest("default", "s-1")
    assert after.expires_in_s <= before <= 300


def test_request_becomes_a_target():
    both = types_pb2.CompressionPolicy(max_kept_tokens=9, precision=types_pb2.PRECISION_INT4)

    assert target_of(both) == Target(max_kept_tokens=9, precision="int4")
    assert target_of(types_pb2.CompressionPolicy(keep_ratio=0.5)) == Target(keep_ratio=0.5)


@pytest.mark.parametrize("fields", [{}, {"precision": 77}, {"chunk_size": 4}])
def test_request_for_nothing_or_for_something_unknown_is_refused(fields: dict[str, int]):
    with pytest.raises(InvalidRequestError):
        target_of(types_pb2.CompressionPolicy(**fields))
