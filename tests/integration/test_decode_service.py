"""A decode worker over a real gRPC server and a real Valkey, with a tiny random model."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import redis
import torch
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_model import GEOMETRY, MAX_MODEL_LEN, generate, load_tiny

import chunkkv
from chunkserve.v1 import decode_pb2, decode_pb2_grpc, manifest_pb2, session_pb2, types_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import covered_tokens, fetched_segments, store_segment
from services.decode.config import DecodeSettings
from services.decode.memory import aligned
from services.decode.placement import KVMemory, Placement
from services.decode.tail import tail_size_bytes
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
    """The model as transformers has it: prefills, and says what is right."""
    return load_tiny()


@pytest.fixture(scope="module")
def served() -> LoadedModel:
    """The same model, as workers have it: its attention is another."""
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
        num_resumed_tokens: int = 0,
        compression: types_pb2.CompressionPolicy | None = None,
        request_id: str = "",
    ) -> grpc.aio.UnaryStreamCall[Any, Any]:
        request = decode_pb2.DecodeRequest(
            manifest=manifest,
            sampling=sampling,
            num_resumed_tokens=num_resumed_tokens,
            compression=compression,
            request_id=request_id,
            request_digest=b"digest",
        )
        return self.stub.Decode(request, timeout=timeout)

    async def decode(self, *args: Any, num_resumed_tokens: int = 0, **options: Any) -> Answer:
        call = self.call(*args, num_resumed_tokens=num_resumed_tokens, **options)
        return Answer([event async for event in call], num_resumed_tokens)

    async def fails(self, *args: Any, **options: Any) -> ServiceError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.decode(*args, **options)
        return from_rpc_error(caught.value)


class Answer:
    """The events of one stream, whose order is checked."""

    def __init__(
        self, events: Sequence[decode_pb2.DecodeResponse], num_resumed_tokens: int = 0
    ) -> None:
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds == ["started", *["delta"] * (len(events) - 2), "finish"]
        self.started, self.finish = events[0].started, events[-1].finish
        self.token_ids: list[int] = []
        self.logprobs: list[types_pb2.TokenLogprob] = []
        for event in events[1:-1]:
            first_token_index = num_resumed_tokens + len(self.token_ids)
            assert event.delta.first_token_index == first_token_index
            self.token_ids.extend(event.delta.token_ids)
            self.logprobs.extend(event.delta.logprobs)
        self.text = "".join(event.delta.text for event in events[1:-1])


@asynccontextmanager
async def running(
    loaded: LoadedModel, store: Store, worker_id: str = "decode-1", **options: Any
) -> AsyncIterator[Client]:
    settings = DecodeSettings(model="tiny", **{"kv_bytes": 16 << 20, **options})
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
async def client(served: LoadedModel, store: Store) -> AsyncIterator[Client]:
    async with running(served, store) as running_client:
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
        with fetched_segments(
            store, manifest.segments, fingerprint=loaded.fingerprint, pool=ReceivePool()
        ) as fetched:
            past = chunkkv.KVCache.from_segments(loaded.model.config, fetched.kv)
        prefilled = chunkkv.run_prefill(
            loaded.model,
            torch.tensor([manifest.token_ids[covered_tokens(manifest) : -1]]),
            window_size=policy.window_size,
            past=past,
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


def check_kept(worker: DecodeWorker, num_segments: int) -> None:
    """Check that so many segments are in memory, and nothing else."""
    assert worker.memory.num_residents == num_segments
    assert worker.memory.pool.used_bytes == worker.memory.resident_bytes
    assert worker.engine.num_running == 0


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
    assert client.worker.memory.num_active == 0


@pytest.mark.parametrize("policy", [EVERYTHING, None], ids=["prefilled", "pending"])
async def test_the_next_turn_fetches_only_what_was_prefilled_since(client, loaded, store, policy):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, policy)

    second = await client.decode(manifest)

    conversation = PROMPT + first.token_ids + TURN_2
    assert second.token_ids == generate(loaded, conversation, 12)
    new = manifest.segments[2:]
    assert len(new) == (0 if policy is None else 1)
    assert second.started.fetched_bytes == sum(segment.size_bytes for segment in new)
    assert (await committed(store)).num_turns == 2


@pytest.mark.parametrize("policy", [EVERYTHING, HALF, None], ids=["whole", "half", "pending"])
async def test_another_worker_continues_with_the_same_tokens(client, loaded, served, store, policy):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store, HALF)
    await client.decode(manifest)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, policy)
    elsewhere = manifest_pb2.Manifest()
    elsewhere.CopyFrom(manifest)
    elsewhere.session_id = ""

    async with running(served, store, "decode-2") as other:
        fetched = await other.decode(elsewhere)
    held = await client.decode(manifest)

    assert fetched.token_ids == held.token_ids
    assert fetched.started.num_kept_tokens == held.started.num_kept_tokens
    assert fetched.started.num_kept_tokens < covered_tokens(manifest)
    assert fetched.started.fetched_bytes == sum(s.size_bytes for s in manifest.segments)
    assert held.started.fetched_bytes < fetched.started.fetched_bytes


async def test_of_a_session_that_went_on_elsewhere_only_what_is_missing_is_fetched(
    client, loaded, served, store
):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    async with running(served, store, "decode-2") as other:
        second = await other.decode(add_turn(await committed(store), TURN_2, loaded, store, None))
    manifest = add_turn(await committed(store), [7, 8, 9], loaded, store, None)
    assert manifest.last_decode_worker == "decode-2"
    assert len(manifest.segments) == 3

    third = await client.decode(manifest)

    conversation = [*PROMPT, *first.token_ids, *TURN_2, *second.token_ids, 7, 8, 9]
    assert third.token_ids == generate(loaded, conversation, 12)
    assert third.started.fetched_bytes == manifest.segments[2].size_bytes


async def test_a_prefix_that_another_session_brought_is_not_fetched_again(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    used_bytes = client.worker.memory.pool.used_bytes
    twin = add_turn(await new_session(store, loaded, "s-2"), PROMPT, loaded, store)

    second = await client.decode(twin)

    assert second.started.fetched_bytes == 0
    assert second.started.num_kept_tokens == len(PROMPT) - 1
    assert second.token_ids == first.token_ids
    assert client.worker.memory.pool.used_bytes == used_bytes  # equal answers, too, are kept once

    other = add_turn(await new_session(store, loaded, "s-3"), PROMPT, loaded, store)
    other = add_turn(other, TURN_2, loaded, store)
    third = await client.decode(other)
    assert third.started.fetched_bytes == other.segments[1].size_bytes
    assert third.token_ids == generate(loaded, PROMPT + TURN_2, 12)


async def test_finished_turns_are_given_up_where_another_conversation_needs_the_memory(
    loaded, served, store
):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    long = [1 + t % 200 for t in range(180)]
    other = add_turn(await new_session(store, loaded, "s-2"), long, loaded, store)
    kv_bytes = kv_bytes_of(other)
    async with running(served, store, kv_bytes=kv_bytes) as client:
        first = await client.decode(manifest)
        await client.decode(other)
        manifest = add_turn(await committed(store), TURN_2, loaded, store)
        second = await client.decode(manifest)

    assert second.token_ids == generate(loaded, PROMPT + first.token_ids + TURN_2, 12)
    assert second.started.fetched_bytes == sum(s.size_bytes for s in manifest.segments)


def kv_bytes_of(manifest: manifest_pb2.Manifest, *, max_tokens: int = 12) -> int:
    """Return the memory that a worker needs for a turn; all segments are small ones."""
    num_pending = len(manifest.token_ids) - covered_tokens(manifest)
    tail_tokens = num_pending + max_tokens + sum(s.num_kept_tokens for s in manifest.segments)
    segment_bytes = sum(aligned(segment.size_bytes) for segment in manifest.segments)
    return segment_bytes + tail_size_bytes(GEOMETRY, tail_tokens)


class Placements:
    """Notes who gets a worker's memory, in which order, and how many have left."""

    def __init__(self, memory: KVMemory) -> None:
        self.first_segments: list[str] = []
        self.num_left = 0
        self._placed = memory.placed
        memory.placed = self._noted  # type: ignore[method-assign]

    @asynccontextmanager
    async def _noted(
        self, segments: Sequence[session_pb2.Segment], **options: Any
    ) -> AsyncIterator[Placement]:
        try:
            async with self._placed(segments, **options) as placement:
                self.first_segments.append(segments[0].segment_id)
                yield placement
        finally:
            self.num_left += 1


async def test_more_sessions_than_the_memory_holds_are_served_in_order_of_arrival(
    loaded, served, store
):
    prompts = [[t, *PROMPT] for t in range(60, 92)]
    manifests = [
        add_turn(await new_session(store, loaded, f"s-{i}"), prompt, loaded, store)
        for i, prompt in enumerate(prompts)
    ]
    held = HeldModel(served.model)
    kv_bytes = 8 * kv_bytes_of(manifests[0])
    async with running(dataclasses.replace(served, model=held), store, kv_bytes=kv_bytes) as client:
        memory = client.worker.memory
        placements = Placements(memory)
        held.go.clear()
        calls = []
        for number, manifest in enumerate(manifests, 1):
            calls.append(asyncio.create_task(client.decode(manifest)))
            await until(lambda number=number: memory.num_active == number)
        assert len(placements.first_segments) == 8

        held.go.set()
        answers = await asyncio.gather(*calls)

        assert [answer.token_ids for answer in answers] == [
            generate(loaded, prompt, 12) for prompt in prompts
        ]
        assert placements.first_segments == [m.segments[0].segment_id for m in manifests]
        assert memory.pool.peak_bytes <= memory.pool.size_bytes <= kv_bytes
        assert memory.num_active == 0
        assert 0 < memory.resident_bytes == memory.pool.used_bytes


async def test_a_conversation_larger_than_the_memory_is_refused(loaded, served, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(served, store, kv_bytes=kv_bytes_of(manifest) - 64) as client:
        error = await client.fails(manifest)
        shorter = types_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
        answer = await client.decode(manifest, shorter)

    assert isinstance(error, InvalidRequestError)
    assert error.error_reason == "KV_TOO_LARGE"
    assert answer.token_ids == generate(loaded, PROMPT, 8)


async def test_a_bfloat16_model_answers_and_goes_on_elsewhere(store):
    plain, own = load_tiny(dtype=torch.bfloat16), load_tiny(dtype=torch.bfloat16)
    manifest = add_turn(await new_session(store, plain), PROMPT, plain, store)
    async with running(own, store) as client, running(own, store, "decode-2") as other:
        first = await client.decode(manifest)
        manifest = add_turn(await committed(store), TURN_2, plain, store)
        elsewhere = manifest_pb2.Manifest()
        elsewhere.CopyFrom(manifest)
        elsewhere.session_id = ""
        fetched = await other.decode(elsewhere)
        held = await client.decode(manifest)

    # Sums in another order are rounded to other numbers, so two near ties may fall either way.
    with torch.inference_mode():
        logits = plain.model(torch.tensor([PROMPT + first.token_ids])).logits[0].float()
    for row, token_id in zip(logits[len(PROMPT) - 1 :], first.token_ids, strict=False):
        assert row[token_id] >= row.max() - 0.25
    assert fetched.token_ids == held.token_ids
    assert 0 < held.started.fetched_bytes < fetched.started.fetched_bytes
    after = await committed(store)
    assert list(after.token_ids) == [*PROMPT, *first.token_ids, *TURN_2, *held.token_ids]


# A long answer whose KV is bounded.

LONG = types_pb2.SamplingParams(max_tokens=120, ignore_eos=True)


def bound(max_kv_tokens: int) -> types_pb2.CompressionPolicy:
    policy = types_pb2.CompressionPolicy(max_kv_tokens=max_kv_tokens, chunk_size=4, window_size=8)
    policy.scope = types_pb2.SCOPE_HEAD
    return policy


async def test_a_bounded_answer_is_stored_as_it_was_kept_and_goes_on(client, loaded, served, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)

    answer = await client.decode(manifest, LONG, compression=bound(39 + 40))

    after = await committed(store)
    stored = after.segments[-1]
    assert len(answer.token_ids) == 120
    assert stored.num_tokens == 120  # the prompt's last token is among them, the answer's is not
    assert 40 - 8 <= stored.num_kept_tokens <= 40
    assert client.worker.memory.pool.peak_bytes < kv_bytes_of(manifest, max_tokens=120)
    turn = add_turn(after, TURN_2, loaded, store)  # prefilled on top of what was kept
    elsewhere = manifest_pb2.Manifest()
    elsewhere.CopyFrom(turn)
    elsewhere.session_id = ""
    held = await client.decode(turn)
    async with running(served, store, "decode-2") as other:
        assert (await other.decode(elsewhere)).token_ids == held.token_ids


async def test_an_answer_within_its_bound_is_that_without_one(client, loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)

    answer = await client.decode(manifest, compression=bound(60))

    assert answer.token_ids == generate(loaded, PROMPT, 12)


async def test_a_bound_below_what_the_conversation_keeps_is_refused(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)

    error = await client.fails(manifest, compression=bound(50))

    assert isinstance(error, InvalidRequestError)
    assert error.field == "compression.max_kv_tokens"
    assert "send at least 55" in error.message
    assert (await committed(store)).version == 1


async def test_nothing_is_kept_of_a_one_off_request(client, loaded, store, valkey):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    keys_before = set(valkey.scan_iter())

    answer = await client.decode(manifest)

    assert answer.token_ids == generate(loaded, PROMPT, 12)
    assert answer.finish.session_version == 0
    assert answer.finish.num_total_tokens == len(PROMPT) + 12
    assert {key for key in valkey.scan_iter() if b"worker" not in key} <= keys_before
    assert client.worker.memory.num_residents == 0
    assert client.worker.memory.pool.used_bytes == 0


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


async def test_without_max_tokens_the_workers_limit_applies(loaded, served, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(served, store, max_output_tokens=7) as client:
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


async def test_penalties_reach_back_into_the_stored_conversation(client, loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    unwanted = types_pb2.SamplingParams(
        max_tokens=30, ignore_eos=True, repetition_penalty=10, logprobs=1
    )

    answer = await client.decode(manifest, unwanted)

    output = loaded.model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=10.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer.token_ids == output[0, len(PROMPT) :].tolist()
    assert answer.token_ids != generate(loaded, PROMPT, 30)


async def test_logprobs_are_those_of_the_models_own_logits(client, loaded, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    hot = types_pb2.SamplingParams(
        max_tokens=12, ignore_eos=True, temperature=1.5, presence_penalty=2, logprobs=3
    )

    answer = await client.decode(manifest, hot)

    with torch.inference_mode():
        logits = loaded.model(torch.tensor([PROMPT + answer.token_ids])).logits[0]
    expected = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert [each.token_id for each in answer.logprobs] == answer.token_ids
    for logprob, row in zip(answer.logprobs, expected, strict=True):
        best = row.topk(3)
        assert logprob.logprob == pytest.approx(float(row[logprob.token_id]), abs=1e-4)
        assert [top.token_id for top in logprob.top_logprobs] == best.indices.tolist()
        tops = [top.logprob for top in logprob.top_logprobs]
        assert tops == pytest.approx(best.values.tolist(), abs=1e-4)


# An answer that another worker began.

RESUMABLE = types_pb2.SamplingParams(
    max_tokens=12,
    min_tokens=12,
    temperature=1.2,
    seed=5,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    logprobs=1,
)


async def turn_result(store: Store, request_id: str) -> manifest_pb2.TurnResult:
    body = await store.get_turn_result("default", "s-1", request_id)
    assert body is not None
    return manifest_pb2.TurnResult.FromString(body)


async def test_the_result_of_a_turn_is_stored_with_its_commit(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    sampling = types_pb2.SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)

    answer = await client.decode(manifest, sampling, request_id="r-1")

    result = await turn_result(store, "r-1")
    assert (result.request_digest, result.num_prompt_tokens) == (b"digest", len(PROMPT))
    assert list(result.answer.token_ids) == answer.token_ids
    assert result.answer.text == answer.text
    assert list(result.answer.logprobs) == answer.logprobs
    answer.finish.ClearField("commit_ms")
    assert result.finish == answer.finish


async def test_the_result_of_a_resumed_answer_has_all_its_tokens(client, loaded, store):
    prompt = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    token_ids = generate(loaded, PROMPT, 12)
    prompt.token_ids.extend(token_ids[:7])

    await client.decode(prompt, num_resumed_tokens=7, request_id="r-1")

    result = await turn_result(store, "r-1")
    assert list(result.answer.token_ids) == token_ids
    assert result.answer.text == loaded.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert result.num_prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("num_resumed", [1, 7, 11, 12])
async def test_a_resumed_answer_goes_on_and_is_committed_once(client, loaded, store, num_resumed):
    one_off = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    whole = await client.decode(one_off, RESUMABLE)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    manifest.token_ids.extend(whole.token_ids[:num_resumed])

    rest = await client.decode(manifest, RESUMABLE, num_resumed_tokens=num_resumed)

    assert rest.token_ids == whole.token_ids[num_resumed:]
    assert whole.text.endswith(rest.text)
    assert rest.finish.reason == whole.finish.reason
    assert rest.finish.num_generated_tokens == whole.finish.num_generated_tokens
    assert rest.finish.num_total_tokens == whole.finish.num_total_tokens
    assert rest.finish.first_token_ms >= 0
    assert rest.finish.decode_ms >= 0
    after = await committed(store)
    assert list(after.token_ids) == PROMPT + whole.token_ids
    assert covered_tokens(after) == len(PROMPT) + 11
    assert after.num_turns == 1


async def test_a_resumed_answer_is_the_beginning_of_the_next_turn(client, loaded, served, store):
    answer = generate(loaded, PROMPT, 12)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    manifest.token_ids.extend(answer[:5])
    async with running(served, store, "decode-2") as other:
        rest = await other.decode(manifest, num_resumed_tokens=5)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, None)
    assert covered_tokens(manifest) == len(PROMPT) + 11

    second = await client.decode(manifest)

    assert rest.token_ids == answer[5:]
    assert second.token_ids == generate(loaded, PROMPT + answer + TURN_2, 12)


async def test_an_answer_that_fills_the_context_is_resumed_to_its_end(client, loaded, store):
    prompt = [1 + i % 200 for i in range(MAX_MODEL_LEN - 5)]
    endless = types_pb2.SamplingParams(ignore_eos=True)
    one_off = add_turn(manifest_pb2.Manifest(tenant="default"), prompt, loaded, store)
    whole = await client.decode(one_off, endless)

    for num_resumed in (4, 5):
        manifest = add_turn(manifest_pb2.Manifest(tenant="default"), prompt, loaded, store)
        manifest.token_ids.extend(whole.token_ids[:num_resumed])
        rest = await client.decode(manifest, endless, num_resumed_tokens=num_resumed)
        assert rest.token_ids == whole.token_ids[num_resumed:]
        assert rest.finish.reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("num_resumed", "sampling", "message"),
    [
        (-1, ENDLESS, "is -1 and 4 tokens are pending; send 0 or more"),
        (4, ENDLESS, "at least one pending token before them"),
        (3, types_pb2.SamplingParams(max_tokens=2), "at most 2 tokens"),
        (3, types_pb2.SamplingParams(stop_token_ids=[61]), "the answer ended with token 1"),
    ],
    ids=["negative", "nothing_before", "over_max_tokens", "behind_the_end"],
)
async def test_resumed_tokens_that_cannot_be_are_refused(
    client, loaded, store, num_resumed, sampling, message
):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    manifest.token_ids.extend([61, 62, 63])

    error = await client.fails(manifest, sampling, num_resumed_tokens=num_resumed)

    assert isinstance(error, InvalidRequestError)
    assert error.field == "num_resumed_tokens"
    assert message in str(error)
    assert (await committed(store)).version == 1
    assert client.worker.memory.num_active == 0


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
        ({"logit_bias": {257: 1}}, "sampling.logit_bias"),
        ({"logit_bias": {-1: 1}}, "sampling.logit_bias"),
        ({"logprobs": 21}, "sampling.logprobs"),
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
    assert client.worker.memory.num_active == 0


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
    """The model, whose forward passes wait while it may not go."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        assert self.go.wait(DEADLINE_S)
        return self._model(**inputs)


async def test_a_turn_that_lost_the_race_is_not_committed(loaded, served, store):
    held = HeldModel(served.model)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(dataclasses.replace(served, model=held), store) as client:
        held.go.clear()
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
        check_kept(client.worker, 1)  # the segment that was fetched


async def test_a_session_deleted_meanwhile_is_not_found(client, loaded, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    await store.delete_manifest("default", "s-1")

    assert isinstance(await client.fails(manifest), NotFoundError)
    check_kept(client.worker, 0)  # what the turn had reserved went with the session


async def test_a_store_that_is_away_is_unavailable(loaded, served):
    server = EmbeddedValkey(EmbeddedOptions())
    server.start()
    store = open_store(server.url)
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(served, store) as client:
        server.stop()
        error = await client.fails(manifest)
    await store.close()

    assert isinstance(error, UnavailableError)


# Cancelling.


async def start_second_turn(client: Client, loaded: LoadedModel, store: Store) -> list[int]:
    """Answer a first turn, then cancel the second in the middle; return the conversation."""
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    first = await client.decode(manifest)
    check_kept(client.worker, 2)
    manifest = add_turn(await committed(store), TURN_2, loaded, store, None)
    long = types_pb2.SamplingParams(max_tokens=150, ignore_eos=True)
    call = client.call(manifest, long)
    events = aiter(call)
    assert (await anext(events)).WhichOneof("event") == "started"
    assert (await anext(events)).WhichOneof("event") == "delta"

    call.cancel()
    await until(lambda: client.worker.memory.num_active == 0)
    return PROMPT + first.token_ids


async def test_a_cancelled_turn_leaves_the_session_as_it_was(client, loaded, store):
    conversation = await start_second_turn(client, loaded, store)

    after = await committed(store)
    assert after.version == 2
    assert list(after.token_ids) == conversation
    check_kept(client.worker, 2)

    again = await client.decode(add_turn(after, TURN_2, loaded, store, None))
    assert again.token_ids == generate(loaded, conversation + TURN_2, 12)
    assert (await committed(store)).version == 3


class HeldStore:
    """The store, whose segments come when it may go."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.was_asked, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def fetch_parts(self, *args: Any) -> Generator[memoryview]:
        self.was_asked.set()
        assert self.go.wait(DEADLINE_S)
        return self._store.fetch_parts(*args)


async def test_a_turn_cancelled_while_it_is_fetched_keeps_its_memory_until_the_fetch_ends(
    loaded, served, store
):
    held = HeldStore(store)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(served, held, num_slots=1) as client:
        memory = client.worker.memory
        placements = Placements(memory)
        call = client.call(manifest)
        await until(held.was_asked.is_set)
        used_bytes = memory.pool.used_bytes

        call.cancel()
        await until(lambda: placements.num_left == 1)

        assert memory.pool.used_bytes == used_bytes > 0
        assert memory.num_active == 1
        held.go.set()
        await until(lambda: memory.num_active == 0)
        check_kept(client.worker, 0)
        assert (await client.decode(manifest)).token_ids == generate(loaded, PROMPT, 12)


async def test_a_passed_deadline_commits_nothing(loaded, served, store):
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with (
        running(served, store, num_slots=1) as client,
        client.worker.memory.placed([], new_tokens=1),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.decode(manifest, timeout=0.2)
        await until(lambda: client.worker.memory.num_active == 1)

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await committed(store)).version == 1


async def test_more_requests_than_places_are_refused(loaded, served, store):
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with (
        running(served, store, num_slots=1, queue_size=0) as client,
        client.worker.memory.placed([], new_tokens=1),
    ):
        error = await client.fails(manifest)

    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 1.0


# The worker itself.


class BreakableModel:
    """The model, until it is told to raise."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self._model(**inputs)


async def test_an_unexpected_error_is_internal_and_tells_nothing(loaded, served, store):
    model = BreakableModel(served.model)
    manifest = add_turn(await new_session(store, loaded), PROMPT, loaded, store)
    async with running(dataclasses.replace(served, model=model), store) as client:
        model.error = RuntimeError("secret detail")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.decode(manifest)
        model.error = None
        answer = await client.decode(manifest)

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert answer.token_ids == generate(loaded, PROMPT, 12)


async def test_a_failed_engine_turns_health_and_leaves_the_registry(loaded, served, store):
    model = BreakableModel(served.model)
    manifest = add_turn(manifest_pb2.Manifest(tenant="default"), PROMPT, loaded, store)
    async with running(dataclasses.replace(served, model=model), store) as client:
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


async def test_a_dead_heartbeat_is_unhealthy(served):
    broken = BrokenRegistry()
    async with running(served, broken) as client:
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


async def test_a_worker_announces_its_load_until_it_stops(loaded, served, store):
    async with running(served, store, num_slots=3, heartbeat_s=0.05) as client:
        await until_announced(store, 1)
        [info] = await store.workers()
        assert (info.role, info.model, info.fingerprint) == ("decode", "tiny", loaded.fingerprint)
        assert (info.worker_id, info.address) == ("decode-1", client.worker.address)
        assert (info.num_slots, info.num_active) == (3, 0)
        assert info.max_model_len == MAX_MODEL_LEN
        async with client.worker.memory.placed([], new_tokens=1):
            await until(lambda: announced_load(store, 1))

    assert await store.workers() == ()


async def until_announced(store: Store, number: int) -> None:
    async def as_many_announced() -> bool:
        return len(await store.workers()) == number

    await until(as_many_announced)


async def announced_load(store: Store, num_active: int) -> bool:
    [info] = await store.workers()
    return info.num_active == num_active
