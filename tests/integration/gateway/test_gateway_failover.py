"""Turns whose workers, KV or store fail on the way: the caller's stream goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from chunkserve.v1 import session_pb2, types_pb2
from services.runtime.errors import CorruptError, NotFoundError, UnavailableError
from services.store import Store
from tests.fakes import (
    ANSWER,
    WAIT_S,
    FakeCluster,
    FakeDecode,
    Gate,
    error_info,
    generate_request,
    read_rest,
)

STOPPED = UnavailableError("this worker has stopped", reason="WORKER_STOPPED")
LOST = [
    NotFoundError("segment x is gone", reason="SEGMENT_NOT_FOUND", resource=("segment", "x")),
    CorruptError("segment x is damaged", resource=("segment", "x")),
]
STORE_AWAY = UnavailableError("the store is away", reason="STORE_UNAVAILABLE", retry_after_s=1)


def get(session_id: str) -> session_pb2.GetSessionRequest:
    return session_pb2.GetSessionRequest(session_id=session_id)


def kinds(events: list[Any]) -> list[str]:
    return [event.WhichOneof("event") for event in events]


def token_ids(events: list[Any]) -> list[int]:
    return [token_id for event in events for token_id in event.delta.token_ids]


async def generate_until_it_stops(
    cluster: FakeCluster, worker: FakeDecode, **fields: Any
) -> list[Any]:
    """Return all events of a call whose worker stops when its first token has arrived."""
    worker.error_after_first_token = STOPPED
    worker.after_first_token = Gate()
    worker.after_first_token.is_closed = True
    call: Any = cluster.inference.Generate(generate_request(**fields), timeout=WAIT_S)
    events = [await call.read() for _ in range(2)]
    worker.after_first_token.released.set()
    return [*events, *await read_rest(call)]


async def two_decode_workers(cluster: FakeCluster) -> tuple[FakeDecode, FakeDecode]:
    """Return the one that is asked first, and the other."""
    first = await cluster.add_decode(worker_id="d-first")
    return first, await cluster.add_decode(worker_id="d-other", num_active=3)


@pytest.mark.parametrize("session_id", ["s-1", ""], ids=["session", "one_off"])
async def test_an_answer_goes_on_at_another_worker(cluster: FakeCluster, session_id: str) -> None:
    await cluster.add_prefill()
    first, other = await two_decode_workers(cluster)
    await cluster.create_session(session_id="s-1")

    events = await generate_until_it_stops(cluster, first, session_id=session_id)

    assert kinds(events) == ["prompt_info", *["delta"] * len(ANSWER), "finish"]
    assert token_ids(events) == list(ANSWER)
    assert events[-1].finish.num_generated_tokens == len(ANSWER)
    [before], [after] = first.requests, other.requests
    assert after.num_resumed_tokens == 1
    assert list(after.manifest.token_ids) == [*before.manifest.token_ids, ANSWER[0]]


async def test_an_answer_that_was_committed_before_the_worker_died_is_not_run_twice(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill()
    first, _ = await two_decode_workers(cluster)
    first.error_after_commit = STOPPED
    await cluster.create_session(session_id="s-1")

    events = await cluster.generate(session_id="s-1")

    assert token_ids(events) == list(ANSWER)
    assert "".join(event.delta.text for event in events) == ANSWER.decode()
    assert events[-1].finish.session_version == 2
    session = (await cluster.sessions.GetSession(get("s-1"))).session
    assert (session.version, session.num_turns) == (2, 1)


async def test_a_turn_that_failed_leaves_no_segment(cluster: FakeCluster, store: Store) -> None:
    prefill = await cluster.add_prefill()
    only = await cluster.add_decode()
    only.error_after_first_token = STOPPED
    await cluster.create_session(session_id="s-1")

    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate(session_id="s-1")

    [segment] = only.requests[0].manifest.segments
    assert prefill.requests
    assert not store.has_segment(segment.segment_id, ttl_s=1)


async def test_all_workers_of_an_answer_use_one_seed(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    first, other = await two_decode_workers(cluster)

    await generate_until_it_stops(cluster, first)
    await generate_until_it_stops(cluster, first, sampling=types_pb2.SamplingParams(seed=7))

    seeds = [[request.sampling.seed for request in worker.requests] for worker in (first, other)]
    assert seeds[0] == seeds[1]
    assert seeds[0][1] == 7


async def test_an_answer_that_has_begun_waits_for_a_worker(store: Store) -> None:
    async with FakeCluster(store, failover_wait_s=60) as cluster:
        await cluster.add_prefill()
        only = await cluster.add_decode()
        answer = asyncio.create_task(generate_until_it_stops(cluster, only))
        await only.stopped.wait()
        late = await cluster.add_decode()

        assert token_ids(await answer) == list(ANSWER)
        assert late.requests[0].num_resumed_tokens == 1


async def test_without_another_worker_the_error_stands(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    only = await cluster.add_decode()
    only.error_after_first_token = STOPPED

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert error_info(caught.value).reason == "WORKER_STOPPED"


@pytest.mark.parametrize("error", LOST, ids=["missing", "damaged"])
@pytest.mark.parametrize("finder", ["prefill", "decode_start", "decode_commit"])
async def test_lost_kv_is_computed_again_once(
    cluster: FakeCluster, error: Exception, finder: str
) -> None:
    prefill = await cluster.add_prefill()
    decode = await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    await cluster.generate("The first turn", session_id="s-1")
    if finder == "prefill":
        prefill.error = error
    elif finder == "decode_start":
        decode.errors.append(error)
    else:
        decode.errors_at_end.append(error)

    events = await cluster.generate("The second turn", session_id="s-1")

    assert token_ids(events) == list(ANSWER)
    assert kinds(events)[0] == "prompt_info"
    assert kinds(events)[-1] == "finish"
    [rebuild] = prefill.rebuild_requests
    assert rebuild.manifest.session_id == "s-1"
    info = events[0].prompt_info
    # An answer that was on its way when the loss was found has told its beginning before.
    assert info.rebuilt == (finder != "decode_commit")
    assert (info.num_rebuilt_tokens > 0) == info.rebuilt
    assert info.num_reused_tokens + info.num_prefilled_tokens == info.num_prompt_tokens


async def test_what_prefill_computed_again_by_itself_is_told(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    prefill.num_rebuilt_tokens = 3

    info = (await cluster.generate("Hello"))[0].prompt_info

    assert (info.rebuilt, info.num_rebuilt_tokens) == (True, 3)
    assert info.num_reused_tokens + info.num_prefilled_tokens == info.num_prompt_tokens == 5


async def test_lost_kv_that_stays_lost_is_an_error(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    decode = await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    decode.error = LOST[0]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(caught.value).reason == "SEGMENT_NOT_FOUND"
    assert len(prefill.rebuild_requests) == 1


async def test_a_one_off_request_needs_no_store(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    decode = await cluster.add_decode()
    prefill.prefill_error = STORE_AWAY

    events = await cluster.generate("Hello")

    assert token_ids(events) == list(ANSWER)
    info = events[0].prompt_info
    assert (info.num_prompt_tokens, info.num_prefilled_tokens, info.num_kept_tokens) == (5, 5, 5)
    assert info.stored_bytes == 0
    assert list(decode.requests[0].manifest.token_ids) == list(b"Hello")


async def test_a_session_needs_the_store(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    prefill.prefill_error = STORE_AWAY

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "STORE_UNAVAILABLE"
