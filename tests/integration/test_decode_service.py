"""A decode worker over a real gRPC server and a real Valkey, with a tiny random model."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import redis
import torch
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_model import MAX_MODEL_LEN, generate, load_tiny

import chunkkv
from chunkserve.v1 import decode_pb2, decode_pb2_grpc, manifest_pb2, types_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import covered_tokens, store_segment
from services.decode.config import DecodeSettings
from services.decode.kvcache import open_cache
from services.decode.worker import DecodeWorker
from services.models.loader import LoadedModel
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.runtime.status import from_rpc_error
from services.store import Store, open_store
from services.store.embedded import EmbeddedOptions, EmbeddedValkey

DEADLINE_S = 30.0
TTL_S = 300
PROMPT = list(range(10, 50))
TURN_2 = list(range(100, 140))
ENDLESS = types_pb2.SamplingParams(max_tokens=12, ignore_eos=True)
EVERYTHING = chunkkv.CompressionPolicy(keep_ratio=1.0)
HALF = chunkkv.CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_tiny()


class Client:
    """Calls one worker."""

    def __init__(self, worker: DecodeWorker, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self.stub = decode_pb2_grpc.DecodeServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def call(
        self,
        manifest: manifest_pb2.Manifest,
        sampling: types_pb2.SamplingParams = ENDLESS,
        timeout: float = DEADLINE_S,
    ) -> grpc.aio.UnaryStreamCall[Any, Any]:
        request = decode_pb2.DecodeRequest(manifest=manifest, sampling=sampling)
        return self.stub.Decode(request, timeout=timeout)

    async def decode(self, *args: Any, **options: Any) -> Answer:
        return Answer([event async for event in self.call(*args, **options)])

    async def fails(self, *args: Any, **options: Any) -> ServiceError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.decode(*args, **options)
        return from_rpc_error(caught.value)


class Answer:
    """The events of one stream, whose order is checked."""

    def __init__(self, events: Sequence[decode_pb2.DecodeResponse]) -> None:
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["started", *["delta"] * (len(events) - 2), "finish"]
        self.started, self.finish = events[0].started, events[-1].finish
        self.token_ids: list[int] = []
        for event in events[1:-1]:
            assert event.delta.first_token_index == len(self.token_ids)
            self.token_ids.extend(event.delta.token_ids)
        self.text = "".join(event.delta.text for event in events[1:-1])


@asynccontextmanager
async def running(
    loaded: LoadedModel, store: Store, worker_id: str = "decode-1", **options: Any
) -> AsyncIterator[Client]:
    settings = DecodeSettings(model="tiny", **options)
    worker = DecodeWorker(loaded, store, settings, worker_id=worker_id)
    await worker.start()
    try:
        async with (
            asyncio.timeout(DEADLINE_S),
            grpc.aio.insecure_channel(worker.address) as channel,
        ):
            yield Client(worker, channel)
    finally:
        await worker.stop(grace_s=0)


@pytest.fixture
async def client(loaded: LoadedModel, store: Store) -> AsyncIterator[Client]:
    async with running(loaded, store) as running_client:
        yield running_client


@pytest.fixture
def valkey(valkey_url: str) -> Any:
    with redis.Redis.from_url(valkey_url) as plain_client:
        yield plain_client


async def new_session(
    store: Store, loaded: LoadedModel, session_id: str = "s-1"
) -> manifest_pb2.Manifest:
    manifest = manifest_pb2.Manifest(
        tenant="default",
        session_id=session_id,
        version=1,
        model=loaded.name,
        ttl=Duration(seconds=TTL_S),
    )
    body = manifest.SerializeToString()
    await store.create_manifest("default", session_id, body, ttl_s=TTL_S)
    return manifest


def add_turn(
    manifest: manifest_pb2.Manifest,
    token_ids: Sequence[int],
    loaded: LoadedModel,
    store: Store,
    policy: chunkkv.CompressionPolicy | None = EVERYTHING,
) -> manifest_pb2.Manifest:
    """Do what a prefill worker does; without a policy, leave all tokens pending."""
    manifest.token_ids.extend(token_ids)
    manifest.model_fingerprint = loaded.fingerprint
    if policy is not None:
        prefilled = chunkkv.run_prefill(
            loaded.model,
            torch.tensor([manifest.token_ids[covered_tokens(manifest) : -1]]),
            window_size=policy.window_size,
            past=open_cache(store, loaded, manifest, None, pool=ReceivePool()).cache,
            fingerprint=loaded.fingerprint,
        )
        [kv] = chunkkv.compress(prefilled, policy)
        manifest.segments.append(store_segment(store, kv, manifest, ttl_s=TTL_S))
    return manifest


async def committed(store: Store, session_id: str = "s-1") -> manifest_pb2.Manifest:
    stored = await store.get_manifest("default", session_id)
    manifest = manifest_pb2.Manifest.FromString(stored.body)
    assert manifest.version == stored.version
    return manifest


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait, within a deadline, for what servers and threads bring about."""
    async with asyncio.timeout(DEADLINE_S):
        # Servers and threads set no event for tests.
        while not (await met if inspect.isawaitable(met := condition()) else met):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# A turn, from the store to the store.


@pytest.mark.parametrize("policy", [EVERYTHING, None], ids=["prefilled", "pending"])
async def test_a_turn_is_answered_like_generate_and_committed(client, loaded, store, policy):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store, policy)

    answer = await client.decode(manifest)

    assert answer.token_ids == generate(loaded, PROMPT, 12)
    assert answer.text == loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.started.worker_id == "decode-1"
    assert answer.started.num_kept_tokens == (0 if policy is None else len(PROMPT) - 1)
    assert (answer.started.fetched_bytes > 0) == (policy is not None)
    finish = answer.finish
    assert finish.reason == types_pb2.FINISH_REASON_LENGTH
    assert finish.num_generated_tokens == 12
    assert finish.num_total_tokens == len(PROMPT) + 12
    assert finish.session_version == 2
    assert finish.first_token_ms > 0
    assert finish.decode_ms > 0
    assert finish.commit_ms > 0

    after = await committed(store)
    assert after.version == 2
    assert list(after.token_ids) == PROMPT + answer.token_ids
    assert covered_tokens(after) == len(after.token_ids) - 1
    assert after.num_turns == 1
    assert after.last_decode_worker == "decode-1"
    assert after.model_fingerprint == loaded.fingerprint
    assert after.HasField("update_time")
    assert client.worker.engine.num_active == 0


@pytest.mark.parametrize("policy", [EVERYTHING, None], ids=["prefilled", "pending"])
async def test_the_next_turn_fetches_nothing_that_the_worker_holds(client, loaded, store, policy):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, policy)

    second = await client.decode(manifest)

    conversation = PROMPT + first.token_ids + TURN_2
    assert second.token_ids == generate(loaded, conversation, 12)
    new = manifest.segments[2:]
    assert second.started.fetched_bytes == sum(segment.size_bytes for segment in new)
    assert (await committed(store)).num_turns == 2


@pytest.mark.parametrize("policy", [EVERYTHING, HALF, None], ids=["whole", "half", "pending"])
async def test_another_worker_continues_with_the_same_tokens(client, loaded, store, policy):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store, HALF)
    await client.decode(manifest)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, policy)
    elsewhere = manifest_pb2.Manifest()
    elsewhere.CopyFrom(manifest)
    elsewhere.session_id = ""

    async with running(loaded, store, "decode-2") as other:
        fetched = await other.decode(elsewhere)
    held = await client.decode(manifest)

    assert fetched.token_ids == held.token_ids
    assert fetched.started.num_kept_tokens == held.started.num_kept_tokens
    assert fetched.started.num_kept_tokens < covered_tokens(manifest)
    assert fetched.started.fetched_bytes == sum(s.size_bytes for s in manifest.segments)
    assert held.started.fetched_bytes < fetched.started.fetched_bytes


async def test_a_session_that_went_on_elsewhere_is_fetched_anew(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    async with running(loaded, store, "decode-2") as other:
        second = await other.decode(add_turn(await committed(store), TURN_2, loaded, store, None))
    manifest = add_turn(await committed(store), [7, 8, 9], loaded, store, None)
    assert manifest.last_decode_worker == "decode-2"

    third = await client.decode(manifest)

    conversation = [*PROMPT, *first.token_ids, *TURN_2, *second.token_ids, 7, 8, 9]
    assert third.token_ids == generate(loaded, conversation, 12)
    assert third.started.fetched_bytes == sum(s.size_bytes for s in manifest.segments)


async def test_without_memory_for_sessions_every_turn_is_fetched(loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(loaded, store, resident_bytes=0) as client:
        first = await client.decode(manifest)
        manifest = add_turn(await committed(store), TURN_2, loaded, store)
        second = await client.decode(manifest)

    assert second.token_ids == generate(loaded, PROMPT + first.token_ids + TURN_2, 12)
    assert second.started.fetched_bytes == sum(s.size_bytes for s in manifest.segments)


async def test_nothing_is_kept_of_a_one_off_request(client, loaded, store, valkey):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    keys_before = set(valkey.scan_iter())

    answer = await client.decode(manifest)

    assert answer.token_ids == generate(loaded, PROMPT, 12)
    assert answer.finish.session_version == 0
    assert answer.finish.num_total_tokens == len(PROMPT) + 12
    assert {key for key in valkey.scan_iter() if b"worker" not in key} <= keys_before
    assert len(client.worker.resident) == 0


# How an answer ends.


async def test_a_drawn_seed_repeats_the_answer(client, loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    hot = types_pb2.SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.5)

    first, other = await client.decode(manifest, hot), await client.decode(manifest, hot)
    hot.seed = first.finish.seed
    again = await client.decode(manifest, hot)

    assert first.finish.seed != other.finish.seed
    assert first.token_ids != other.token_ids
    assert again.token_ids == first.token_ids
    assert again.finish.seed == first.finish.seed


async def test_a_full_context_ends_the_answer(client, loaded, store):
    prompt = [1 + i % 200 for i in range(MAX_MODEL_LEN - 5)]
    manifest = add_turn(await new_session(store, loaded), prompt, loaded, store)

    answer = await client.decode(
        manifest, types_pb2.SamplingParams(max_tokens=100, ignore_eos=True)
    )

    assert answer.finish.reason == types_pb2.FINISH_REASON_LENGTH
    assert answer.finish.num_total_tokens == MAX_MODEL_LEN
    full = await client.fails(await committed(store))
    assert isinstance(full, InvalidRequestError)
    assert full.error_reason == "CONTEXT_FULL"


async def test_without_max_tokens_the_workers_limit_applies(loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(loaded, store, max_output_tokens=7) as client:
        answer = await client.decode(manifest, types_pb2.SamplingParams(ignore_eos=True))
        longer = await client.decode(manifest, ENDLESS)

    assert answer.finish.num_generated_tokens == 7
    assert answer.finish.reason == types_pb2.FINISH_REASON_LENGTH
    assert longer.finish.num_generated_tokens == 12


async def test_an_ending_token_is_part_of_the_conversation(client, loaded, store):
    expected = generate(loaded, PROMPT, 5)
    sampling = types_pb2.SamplingParams(stop_token_ids=[expected[-1]], ignore_eos=True)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)

    answer = await client.decode(manifest, sampling)

    length = expected.index(expected[-1]) + 1
    assert answer.finish.reason == types_pb2.FINISH_REASON_EOS
    assert answer.token_ids == expected[:length]
    assert list((await committed(store)).token_ids) == PROMPT + expected[:length]


async def test_a_stop_string_ends_the_text_and_its_tokens_stay(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    one_off = manifest_pb2.Manifest(tenant="default", token_ids=PROMPT)
    text = (await client.decode(one_off)).text
    stop = next(c for c in text if c != chr(0xFFFD))

    answer = await client.decode(
        manifest, types_pb2.SamplingParams(max_tokens=12, ignore_eos=True, stop=[stop])
    )

    assert answer.text == text[: text.index(stop)]
    assert answer.finish.reason == types_pb2.FINISH_REASON_STOP
    assert answer.finish.matched_stop == stop
    assert list((await committed(store)).token_ids) == PROMPT + answer.token_ids


# What can go wrong. After each, the session is as it was.


async def test_a_session_of_another_model_is_refused(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    manifest.model_fingerprint = "0" * 32

    error = await client.fails(manifest)

    assert isinstance(error, MismatchError)
    assert loaded.fingerprint in error.message


async def test_a_segment_of_another_model_is_refused(client, store):
    other = load_tiny(seed=1)
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, other, store)
    manifest.model_fingerprint = ""

    assert isinstance(await client.fails(manifest), MismatchError)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.token_ids.pop(), "manifest.token_ids"),
        (lambda m: m.ClearField("token_ids"), "manifest.token_ids"),
        (lambda m: m.token_ids.append(257), "manifest.token_ids"),
        (lambda m: m.token_ids.append(-1), "manifest.token_ids"),
    ],
    ids=["nothing_pending", "no_tokens", "unknown_token", "negative_token"],
)
async def test_tokens_that_cannot_be_decoded_are_refused(client, loaded, store, change, field):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    change(manifest)

    error = await client.fails(manifest)

    assert isinstance(error, InvalidRequestError)
    assert error.field == field


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"stop_token_ids": [257]}, "sampling.stop_token_ids"),
    ],
)
async def test_sampling_out_of_range_is_refused(client, loaded, store, sampling, field):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)

    error = await client.fails(manifest, types_pb2.SamplingParams(**sampling))

    assert isinstance(error, InvalidRequestError)
    assert error.field == field


async def test_a_missing_segment_is_not_found(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    store.delete_segments([manifest.segments[0].segment_id])

    error = await client.fails(manifest)

    assert isinstance(error, NotFoundError)
    assert error.error_reason == "SEGMENT_NOT_FOUND"
    assert (await committed(store)).version == 1
    assert client.worker.engine.num_active == 0


async def test_a_flipped_bit_is_data_loss(client, loaded, store, valkey):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    parts = [key for key in valkey.scan_iter() if valkey.type(key) == b"string"]
    largest = max(parts, key=valkey.strlen)
    [byte] = valkey.getrange(largest, 1000, 1000)
    valkey.setrange(largest, 1000, bytes([byte ^ 1]))

    error = await client.fails(manifest)

    assert isinstance(error, CorruptError)
    assert (await committed(store)).version == 1


async def test_segments_with_a_gap_are_refused(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    await client.decode(manifest)
    manifest = add_turn(await committed(store), TURN_2, loaded, store)
    del manifest.segments[1]

    assert isinstance(await client.fails(manifest), MismatchError)


class HeldModel:
    """The model, whose forward passes wait until it is let go."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config, self.device = model.config, model.device
        self.go = threading.Event()

    def __call__(self, **inputs: Any) -> Any:
        assert self.go.wait(DEADLINE_S)
        return self._model(**inputs)


async def test_a_turn_that_lost_the_race_is_not_committed(loaded, store):
    held = HeldModel(loaded.model)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(dataclasses.replace(loaded, model=held), store) as client:
        call = client.call(manifest)
        await anext(aiter(call))
        await store.commit_manifest(
            "default",
            "s-1",
            manifest_pb2.Manifest(version=2).SerializeToString(),
            expected_version=1,
            ttl_s=TTL_S,
            segment_ids=[],
        )

        held.go.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass

        assert isinstance(from_rpc_error(caught.value), ConflictError)
        assert (await committed(store)).num_turns == 0
        assert len(client.worker.resident) == 0


async def test_a_session_deleted_meanwhile_is_not_found(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    await store.delete_manifest("default", "s-1")

    assert isinstance(await client.fails(manifest), NotFoundError)
    assert len(client.worker.resident) == 0


async def test_a_store_that_is_away_is_unavailable(loaded):
    server = EmbeddedValkey(EmbeddedOptions())
    server.start()
    store = open_store(server.url)
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(loaded, store) as client:
        server.stop()
        error = await client.fails(manifest)
    await store.close()

    assert isinstance(error, UnavailableError)


# Cancelling.


async def start_second_turn(client: Client, loaded: LoadedModel, store: Store) -> list[int]:
    """Answer a first turn, then cancel the second in the middle; return the conversation."""
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    assert len(client.worker.resident) == 1
    manifest = add_turn(await committed(store), TURN_2, loaded, store, None)
    long = types_pb2.SamplingParams(max_tokens=150, ignore_eos=True)
    call = client.call(manifest, long)
    events = aiter(call)
    assert (await anext(events)).WhichOneof("event") == "started"
    assert (await anext(events)).WhichOneof("event") == "delta"

    call.cancel()
    await until(lambda: client.worker.engine.num_active == 0)
    return PROMPT + first.token_ids


async def test_a_cancelled_turn_leaves_the_session_as_it_was(client, loaded, store):
    conversation = await start_second_turn(client, loaded, store)

    after = await committed(store)
    assert after.version == 2
    assert list(after.token_ids) == conversation
    assert len(client.worker.resident) == 0

    again = await client.decode(add_turn(after, TURN_2, loaded, store, None))
    assert again.token_ids == generate(loaded, conversation + TURN_2, 12)
    assert (await committed(store)).version == 3


async def test_a_passed_deadline_commits_nothing(loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(loaded, store, num_slots=1) as client, client.worker.engine.slot():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.decode(manifest, timeout=0.2)
        await until(lambda: client.worker.engine.num_active == 1)

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await committed(store)).version == 1


async def test_more_requests_than_places_are_refused(loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with (
        running(loaded, store, num_slots=1, queue_size=0) as client,
        client.worker.engine.slot(),
    ):
        error = await client.fails(manifest)

    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 1.0


# The worker itself.


class BreakableModel:
    """The model, until it is told to raise."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config, self.device = model.config, model.device
        self.error: BaseException | None = None

    def __call__(self, **inputs: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self._model(**inputs)


async def test_an_unexpected_error_is_internal_and_tells_nothing(loaded, store):
    model = BreakableModel(loaded.model)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(dataclasses.replace(loaded, model=model), store) as client:
        model.error = RuntimeError("secret detail")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.decode(manifest)
        model.error = None
        answer = await client.decode(manifest)

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert answer.token_ids == generate(loaded, PROMPT, 12)


async def test_a_failed_engine_turns_health_and_leaves_the_registry(loaded, store):
    model = BreakableModel(loaded.model)
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(dataclasses.replace(loaded, model=model), store) as client:
        await until_announced(store, 1)
        client.worker.check_health()
        watch = client.health.Watch(health_pb2.HealthCheckRequest())
        assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVING

        model.error = SystemExit("the thread is gone")
        error = await client.fails(manifest)
        assert isinstance(error, UnavailableError)
        assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await until_announced(store, 0)
        with pytest.raises(UnavailableError):
            client.worker.check_health()
        assert isinstance(await client.fails(manifest), UnavailableError)


async def test_a_dead_heartbeat_is_unhealthy(loaded, store):
    broken = BrokenRegistry()
    async with running(loaded, broken) as client:
        await until(lambda: broken.was_asked)
        await until(lambda: is_unhealthy(client.worker))


class BrokenRegistry:
    """A store whose registry fails in a way that nobody foresaw."""

    was_asked = False

    async def announce(self, worker: Any, *, ttl_s: float) -> None:
        self.was_asked = True
        raise ValueError("bug")

    async def withdraw(self, worker: Any) -> None:
        pass


def is_unhealthy(worker: DecodeWorker) -> bool:
    try:
        worker.check_health()
    except UnavailableError:
        return True
    return False


async def test_a_worker_announces_its_load_until_it_stops(loaded, store):
    async with running(loaded, store, num_slots=3, heartbeat_s=0.05) as client:
        await until_announced(store, 1)
        [info] = await store.workers()
        assert (info.role, info.model, info.fingerprint) == ("decode", "tiny", loaded.fingerprint)
        assert (info.worker_id, info.address) == ("decode-1", client.worker.address)
        assert (info.num_slots, info.num_active) == (3, 0)
        assert info.max_model_len == MAX_MODEL_LEN
        async with client.worker.engine.slot():
            await until(lambda: announced_load(store, 1))

    assert await store.workers() == ()


async def until_announced(store: Store, number: int) -> None:
    async def as_many_announced() -> bool:
        return len(await store.workers()) == number

    await until(as_many_announced)


async def announced_load(store: Store, num_active: int) -> bool:
    [info] = await store.workers()
    return info.num_active == num_active
