"""The way of a request through the gateway, with fake workers, real gRPC and a real store."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc.aio
import pytest

from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from services.gateway.servicer import AVOID_WORKER_KEY
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.store import Store
from tests.fakes import (
    ANSWER,
    DEFAULT_POLICY,
    KV_BYTES_PER_TOKEN,
    MODEL,
    WAIT_S,
    FakeCluster,
    error_info,
    generate_request,
)


def answer_of(events: list[Any]) -> str:
    return "".join(event.delta.text for event in events)


async def lease_is_free(store: Store, session_id: str) -> bool:
    try:
        token = await store.acquire_lease("default", session_id, ttl_s=5)
    except ConflictError:
        return False
    await store.release_lease("default", session_id, token)
    return True


async def cancel_after_first_token(cluster: FakeCluster, **fields: Any) -> None:
    call = cluster.inference.Generate(generate_request(**fields), timeout=WAIT_S)
    for _ in range(2):
        await call.read()
    call.cancel()


async def all_requests_ended(cluster: FakeCluster) -> None:
    async with asyncio.timeout(WAIT_S):
        await cluster.gateway.wait_idle()


async def test_first_turn_streams_prompt_info_then_tokens_then_finish(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill(worker_id="p-1")
    await cluster.add_decode(worker_id="d-1")
    await cluster.create_session(session_id="s-1")

    events = await cluster.generate("0123456789", session_id="s-1", request_id="r-1")

    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["prompt_info"] + ["delta"] * len(ANSWER) + ["finish"]
    assert answer_of(events) == ANSWER.decode()
    assert events[0].prompt_info == inference_pb2.PromptInfo(
        request_id="r-1",
        num_prompt_tokens=10,
        num_reused_tokens=0,
        num_prefilled_tokens=10,
        num_kept_tokens=5 + 1,  # half of the nine before the last, rounded up, and the last
        full_kv_bytes=10 * KV_BYTES_PER_TOKEN,
        stored_bytes=90,
        fetched_bytes=90,
        tokenize_ms=1,
        prefill_ms=2,
        compression_ms=3,
        store_ms=4,
        fetch_ms=5,
        prefill_worker="p-1",
        decode_worker="d-1",
    )
    assert events[-1].finish.session_version == 2
    assert await lease_is_free(cluster.store, "s-1")


async def test_second_turn_reuses_what_the_first_stored(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    await cluster.generate("0123456789", session_id="s-1")

    events = await cluster.generate("abcd", session_id="s-1")

    info = events[0].prompt_info
    assert info.num_prompt_tokens == 10 + len(ANSWER) + 4
    assert info.num_reused_tokens == 10 + len(ANSWER)
    assert info.num_prefilled_tokens == 4
    assert prefill.requests[1].manifest.version == 2
    session = (await cluster.sessions.GetSession(request_for("s-1"))).session
    assert session.version == 3
    assert session.num_turns == 2
    assert session.num_tokens == 10 + 4 + 2 * len(ANSWER)


def request_for(session_id: str) -> session_pb2.GetSessionRequest:
    return session_pb2.GetSessionRequest(session_id=session_id)


async def test_the_next_turn_may_be_sent_as_soon_as_the_end_was_seen(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    await cluster.create_session(session_id="s-1")

    for version in range(2, 7):
        call: Any = cluster.inference.Generate(generate_request(session_id="s-1"))
        while (event := await call.read()).WhichOneof("event") != "finish":
            pass
        assert event.finish.session_version == version


async def test_a_turn_goes_back_to_the_worker_that_answered_last(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    for _ in range(4):
        await cluster.add_decode()
    await cluster.create_session(session_id="s-1")

    turns = [await cluster.generate(session_id="s-1") for _ in range(6)]

    assert len({events[0].prompt_info.decode_worker for events in turns}) == 1


async def test_an_avoided_worker_is_left_out(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(worker_id="d-1")
    await cluster.add_decode(worker_id="d-2")
    await cluster.create_session(session_id="s-1")
    first = (await cluster.generate(session_id="s-1"))[0].prompt_info.decode_worker

    call: Any = cluster.inference.Generate(
        generate_request(session_id="s-1"), metadata=((AVOID_WORKER_KEY, first),)
    )
    second = (await call.read()).prompt_info.decode_worker

    assert {first, second} == {"d-1", "d-2"}


async def test_an_avoided_worker_is_used_if_it_is_the_only_one(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(worker_id="d-1")

    call: Any = cluster.inference.Generate(
        generate_request(), metadata=((AVOID_WORKER_KEY, "d-1"),)
    )

    assert (await call.read()).prompt_info.decode_worker == "d-1"


async def test_the_request_reaches_the_workers_as_it_was_sent(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    decode = await cluster.add_decode()
    await cluster.create_session(
        session_id="s-1", compression=types_pb2.CompressionPolicy(keep_ratio=0.25)
    )
    chat = types_pb2.ChatInput(messages=[types_pb2.ChatMessage(role="user", content="Hi")])
    sampling = types_pb2.SamplingParams(
        max_tokens=7,
        min_tokens=3,
        temperature=0.5,
        stop=["x"],
        repetition_penalty=1.5,
        logit_bias={4: -1.0},
        logprobs=0,
    )
    asked = types_pb2.CompressionPolicy(max_kept_tokens=9)

    await cluster.generate(
        chat=chat, session_id="s-1", sampling=sampling, compression=asked, request_id="r-9"
    )

    [sent] = prefill.requests
    assert sent.chat == chat
    assert sent.compression == asked
    assert sent.manifest.compression.keep_ratio == 0.25
    assert sent.min_free_tokens == 3
    sampling.seed = decode.requests[0].sampling.seed  # drawn by the gateway
    assert decode.requests[0].sampling == sampling
    assert prefill.request_ids == decode.request_ids == ["r-9"]


async def test_logprobs_reach_the_caller_with_their_tokens(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()

    events = await cluster.generate(sampling=types_pb2.SamplingParams(logprobs=0))

    deltas = [event.delta for event in events if event.HasField("delta")]
    assert deltas
    for delta in deltas:
        assert [each.token_id for each in delta.logprobs] == list(delta.token_ids)
        assert [each.logprob for each in delta.logprobs] == [-0.5]


async def test_the_request_id_of_the_metadata_is_passed_on(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()

    call: Any = cluster.inference.Generate(
        generate_request(token_ids=types_pb2.TokenIds(ids=[1, 2])),
        metadata=(("x-request-id", "from-metadata"),),
    )

    assert (await call.read()).prompt_info.request_id == "from-metadata"
    assert prefill.request_ids == ["from-metadata"]
    assert not prefill.requests[0].HasField("compression")
    assert prefill.requests[0].token_ids.ids == [1, 2]


async def test_a_one_off_request_leaves_nothing(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()

    events = await cluster.generate("a one-off")

    [segment] = decode.requests[0].manifest.segments
    assert answer_of(events) == ANSWER.decode()
    assert events[-1].finish.session_version == 0
    await all_requests_ended(cluster)
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(cluster.store.get_header, segment.segment_id)
    page = await cluster.store.list_sessions("default", page_size=10, page_token="")
    assert list(page.session_ids) == []


async def test_a_cancelled_one_off_request_leaves_nothing(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True

    await cancel_after_first_token(cluster)

    await asyncio.wait_for(decode.after_first_token.cancelled.wait(), WAIT_S)
    await all_requests_ended(cluster)
    [segment] = decode.requests[0].manifest.segments
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(cluster.store.get_header, segment.segment_id)


async def test_a_failed_one_off_request_leaves_nothing(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.error_after_first_token = CorruptError("segment x is damaged")

    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate()

    await all_requests_ended(cluster)
    [segment] = decode.requests[0].manifest.segments
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(cluster.store.get_header, segment.segment_id)


async def test_a_second_turn_at_once_is_aborted(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    await cluster.create_session(session_id="s-1")
    first = asyncio.create_task(cluster.generate(session_id="s-1"))
    await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert error_info(caught.value).reason == "SESSION_BUSY"
    decode.after_first_token.released.set()
    assert answer_of(await first) == ANSWER.decode()


class RenewalCountingStore:
    """A store that counts how often leases were renewed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._renewals = asyncio.Semaphore(0)

    def as_store(self) -> Store:
        return cast(Store, self)

    async def until(self, num_renewals: int) -> None:
        for _ in range(num_renewals):
            await self._renewals.acquire()

    async def renew_lease(self, *args: Any, **options: Any) -> bool:
        is_ours = await self._store.renew_lease(*args, **options)
        self._renewals.release()
        return is_ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_the_lease_is_kept_for_longer_than_its_ttl(store: Store) -> None:
    renewing = RenewalCountingStore(store)
    async with FakeCluster(renewing.as_store(), lease_ttl_s=3) as cluster:
        await cluster.add_prefill()
        decode = await cluster.add_decode()
        decode.after_first_token.is_closed = True
        await cluster.create_session(session_id="s-1")
        turn = asyncio.create_task(cluster.generate(session_id="s-1"))
        await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

        # Renewed every third of its life, it has outlived it once and a third.
        await asyncio.wait_for(renewing.until(4), WAIT_S)

        assert not await lease_is_free(store, "s-1")
        decode.after_first_token.released.set()
        assert answer_of(await turn) == ANSWER.decode()


async def test_a_cancelled_turn_frees_the_session_and_leaves_it_as_it_was(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    created = await cluster.create_session(session_id="s-1")

    await cancel_after_first_token(cluster, session_id="s-1")

    await asyncio.wait_for(decode.after_first_token.cancelled.wait(), WAIT_S)
    await all_requests_ended(cluster)
    assert await lease_is_free(cluster.store, "s-1")
    session = (await cluster.sessions.GetSession(request_for("s-1"))).session
    assert session.version == created.version
    assert session.num_tokens == 0


async def test_a_cancel_reaches_a_running_prefill(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    prefill.gate.is_closed = True
    call: Any = cluster.inference.Generate(generate_request(), timeout=WAIT_S)
    reading = asyncio.create_task(call.read())
    await asyncio.wait_for(prefill.gate.reached.wait(), WAIT_S)

    call.cancel()

    await asyncio.wait_for(prefill.gate.cancelled.wait(), WAIT_S)
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize(
    "error",
    [
        CorruptError("segment x is damaged", resource=("segment", "x")),
        UnavailableError("the store is away", reason="STORE_UNAVAILABLE", retry_after_s=1),
        RuntimeError("secret"),
    ],
    ids=["corrupt", "store_away", "bug"],
)
async def test_an_error_of_the_decode_worker_passes_on_and_frees_the_session(
    cluster: FakeCluster, error: Exception
) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.error_after_first_token = error
    await cluster.create_session(session_id="s-1")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(session_id="s-1")

    info = error_info(caught.value)
    if isinstance(error, ServiceError):
        assert caught.value.details() == str(error)
        assert info.reason == error.error_reason
    else:
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(caught.value.details())
    assert await lease_is_free(cluster.store, "s-1")


async def test_an_error_of_the_prefill_worker_passes_on(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    prefill.error = UnavailableError("the store is away", reason="STORE_UNAVAILABLE")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "STORE_UNAVAILABLE"
    assert len(prefill.requests) == 1


async def test_a_dead_prefill_worker_is_replaced_by_another(
    cluster: FakeCluster, unused_port: int
) -> None:
    dead = f"127.0.0.1:{unused_port}"
    await cluster.announce("prefill", dead, worker_id="p-dead")
    await cluster.add_prefill(worker_id="p-1", num_active=3)
    await cluster.add_decode()

    events = await cluster.generate()

    assert events[0].prompt_info.prefill_worker == "p-1"


async def test_the_only_prefill_worker_is_dead(cluster: FakeCluster, unused_port: int) -> None:
    await cluster.announce("prefill", f"127.0.0.1:{unused_port}")
    await cluster.add_decode()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "WORKER_UNAVAILABLE"


async def test_a_decode_worker_that_is_dead_is_replaced_by_another(
    cluster: FakeCluster, unused_port: int
) -> None:
    await cluster.add_prefill()
    await cluster.announce("decode", f"127.0.0.1:{unused_port}", worker_id="d-dead")
    await cluster.add_decode(worker_id="d-1", num_active=3)

    events = await cluster.generate()

    assert events[0].prompt_info.decode_worker == "d-1"
    assert answer_of(events) == ANSWER.decode()


async def test_a_decode_worker_that_is_full_is_replaced_by_another(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    full = await cluster.add_decode(worker_id="d-full")
    full.error = OverloadedError("no free slot")
    await cluster.add_decode(worker_id="d-1", num_active=3)

    events = await cluster.generate()

    assert events[0].prompt_info.decode_worker == "d-1"


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_full_workers_are_resource_exhausted(
    cluster: FakeCluster, role: str, num_workers: int
) -> None:
    prefills = [await cluster.add_prefill() for _ in range(num_workers)]
    decodes = [await cluster.add_decode() for _ in range(num_workers)]
    full: list[Any] = [*(prefills if role == "prefill" else decodes)]
    for worker in full:
        worker.error = OverloadedError("the queue is full", retry_after_s=1)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "the queue is full"


async def test_a_full_store_is_not_tried_by_another_worker(cluster: FakeCluster) -> None:
    workers = [await cluster.add_prefill() for _ in range(2)]
    await cluster.add_decode()
    for worker in workers:
        worker.error = OverloadedError("the store is full", reason="STORE_FULL")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert sum(len(worker.requests) for worker in workers) == 1


async def test_a_prefill_worker_that_is_full_is_replaced_by_another(
    cluster: FakeCluster,
) -> None:
    full = await cluster.add_prefill(worker_id="p-full")
    full.error = OverloadedError("the queue is full")
    await cluster.add_prefill(worker_id="p-1", num_active=3)
    await cluster.add_decode()

    events = await cluster.generate()

    assert events[0].prompt_info.prefill_worker == "p-1"


async def test_an_answer_that_the_worker_cuts_off_is_unavailable(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.ends_early = True

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(decode.requests) == 1


async def test_a_decode_worker_that_dies_after_the_first_token_is_unavailable(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    await cluster.create_session(session_id="s-1")
    call: Any = cluster.inference.Generate(generate_request(session_id="s-1"), timeout=WAIT_S)
    for _ in range(2):
        await call.read()

    await cluster.servers[-1].stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "WORKER_UNAVAILABLE"
    assert await lease_is_free(cluster.store, "s-1")


async def test_the_callers_deadline_ends_a_hanging_prefill(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    prefill.gate.is_closed = True
    await cluster.create_session(session_id="s-1")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.inference.Generate(generate_request(session_id="s-1"), timeout=2).read()

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(prefill.gate.cancelled.wait(), WAIT_S)
    assert 0 < (prefill.remaining_s[0] or 0) < 3  # gRPC rounds a deadline up on the wire
    await all_requests_ended(cluster)
    assert await lease_is_free(cluster.store, "s-1")


@pytest.mark.parametrize("hangs", ["prefill", "decode"])
async def test_a_call_without_a_deadline_gets_the_servers(store: Store, hangs: str) -> None:
    async with FakeCluster(store, default_deadline_s=2) as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        gate = prefill.gate if hangs == "prefill" else decode.after_first_token
        gate.is_closed = True

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in cluster.inference.Generate(generate_request()):
                pass

        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error_info(caught.value).reason == "DEADLINE_EXCEEDED"
        assert "send a later deadline" in str(caught.value.details())
        await asyncio.wait_for(gate.cancelled.wait(), WAIT_S)


async def test_more_requests_than_the_limit_are_refused(store: Store) -> None:
    async with FakeCluster(store, max_concurrent_requests=1) as cluster:
        prefill = await cluster.add_prefill()
        await cluster.add_decode()
        prefill.gate.is_closed = True
        first = asyncio.create_task(cluster.generate())
        await asyncio.wait_for(prefill.gate.reached.wait(), WAIT_S)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate()

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_info(caught.value).reason == "TOO_MANY_REQUESTS"
        prefill.gate.released.set()
        assert answer_of(await first) == ANSWER.decode()


async def test_tokens_are_counted_by_a_prefill_worker(
    cluster: FakeCluster, unused_port: int
) -> None:
    await cluster.announce("prefill", f"127.0.0.1:{unused_port}")
    await cluster.add_prefill(num_active=3)

    response = await cluster.inference.CountTokens(inference_pb2.CountTokensRequest(text="12345"))

    assert response == inference_pb2.CountTokensResponse(num_tokens=5, model=MODEL)


async def test_models_with_both_kinds_of_workers_are_listed(cluster: FakeCluster) -> None:
    await cluster.announce("prefill", "127.0.0.1:1")
    await cluster.announce("decode", "127.0.0.1:2")
    await cluster.announce("decode", "127.0.0.1:3", max_model_len=4096)
    await cluster.announce("prefill", "127.0.0.1:4", model="prefill-only")

    response = await cluster.inference.ListModels(inference_pb2.ListModelsRequest())

    assert list(response.models) == [
        inference_pb2.Model(
            name=MODEL,
            max_model_len=4096,
            fingerprint="fake-fingerprint",
            num_prefill_workers=1,
            num_decode_workers=2,
            default_compression=DEFAULT_POLICY,
        )
    ]
