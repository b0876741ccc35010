"""The prefill worker over gRPC, with a tiny model and a real store."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import redis
import torch
from tiny_model import MAX_MODEL_LEN, byte_tokenizer, load_tiny, tiny_llama

import chunkkv
from chunkserve.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from services.compress import policy as policies
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments, segment_id, store_segment
from services.prefill import runner as prefill_runner
from services.prefill import segments as prefill_segments
from services.prefill.runner import PrefillRunner
from services.runtime.errors import OverloadedError
from services.runtime.server import open_channel
from services.store import Store, keys
from tests.integration.prefill_worker import refused, request, serving, session
from tests.ragged_spans import ragged_span, random_rows

IDS = [1 + i * 7 % 250 for i in range(60)]


@pytest.fixture
async def stub(store: Store) -> AsyncIterator[prefill_pb2_grpc.PrefillServiceStub]:
    async with serving(store) as opened:
        yield opened


async def test_a_long_prompt_becomes_a_segment_of_all_but_its_last_token(stub):
    answer = await stub.Prefill(request(session(), IDS))

    [segment] = answer.manifest.segments
    assert (segment.first_token, segment.num_tokens) == (0, 59)
    assert segment.num_kept_tokens == 29
    assert list(answer.manifest.token_ids) == IDS
    assert answer.num_prefilled_tokens == 59
    assert answer.manifest.version == 1
    assert answer.manifest.model_fingerprint == load_tiny().fingerprint


async def test_a_segment_says_what_policy_it_was_compressed_by(stub):
    first = await stub.Prefill(request(session(), IDS))
    asked = types_pb2.CompressionPolicy(max_kept_tokens=20, max_kv_tokens=40)
    second = await stub.Prefill(request(first.manifest, IDS, compression=asked))

    policies = [segment.compression for segment in second.manifest.segments]
    assert policies[0].keep_ratio == 0.5
    assert (policies[1].max_kept_tokens, policies[1].chunk_size) == (20, 4)
    # A bound on the answer's KV says nothing about how the prompt was compressed.
    assert not policies[1].HasField("max_kv_tokens")


async def test_a_segments_name_is_that_of_the_policy_that_its_entry_gives_back(store):
    # As a double, this is nearer to another fraction than as a float.
    async with serving(store, keep_ratio=0.763774618976614) as stub:
        manifest = session()
        manifest.ClearField("compression")
        answer = await stub.Prefill(request(manifest, IDS))

    [segment] = answer.manifest.segments
    manifest.token_ids.extend(IDS)
    recorded = policies.from_wire(segment.compression, chunkkv.CompressionPolicy())
    assert segment.segment_id == segment_id(
        manifest,
        num_tokens=59,
        policy=recorded.canonical(),
        fingerprint=answer.manifest.model_fingerprint,
    )


async def test_a_short_prompt_is_left_pending(stub):
    answer = await stub.Prefill(request(session(), IDS[:16]))

    assert not answer.manifest.segments
    assert list(answer.manifest.token_ids) == IDS[:16]
    assert answer.num_prefilled_tokens == 0


async def test_an_equal_prefix_is_found_and_not_computed(stub):
    first = await stub.Prefill(request(session(), IDS))
    other = session()
    other.session_id = "other"

    second = await stub.Prefill(request(other, IDS))

    assert second.manifest.segments == first.manifest.segments
    assert second.num_prefilled_tokens == 0


async def test_an_equal_prefix_with_a_damaged_header_is_computed_again_and_replaced(
    stub, valkey_url
):
    first = await stub.Prefill(request(session(), IDS))
    with redis.Redis.from_url(valkey_url) as client:
        [header] = client.scan_iter("*:header")
        client.setrange(header, 30, b"\xff\x00\xff")
    other = session()
    other.session_id = "other"

    second = await stub.Prefill(request(other, IDS))
    third = await stub.Prefill(request(first.manifest, IDS))

    assert second.num_prefilled_tokens == 59
    assert third.manifest.segments[0] == second.manifest.segments[0] == first.manifest.segments[0]


async def test_an_equal_prefix_that_expires_while_it_is_looked_for_is_computed_again(
    store, valkey_url
):
    class Expiring:
        """The store, with headers that expire as soon as they were asked for."""

        def has_segment(self, *args: Any, **kwargs: Any) -> bool:
            found = store.has_segment(*args, **kwargs)
            [segment_id] = args
            with redis.Redis.from_url(valkey_url) as client:
                client.delete(keys.segment_header(segment_id))
            return found

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

    async with serving(Expiring()) as stub:
        first = await stub.Prefill(request(session(), IDS))

        second = await stub.Prefill(request(session(), IDS))

    assert second.num_prefilled_tokens == 59
    assert second.manifest.segments == first.manifest.segments


async def test_encoding_is_time_of_compression_and_not_of_the_store(store, monkeypatch):
    now_s = 0.0

    class Clock:
        """Stands for the module ``time``: only encoding and storing take any."""

        @staticmethod
        def perf_counter() -> float:
            return now_s

    def encode(*args: object, **kwargs: object) -> chunkkv.EncodedKV:
        nonlocal now_s
        now_s += 1
        return encode_for_real(*args, **kwargs)

    class SlowStore:
        """The store, with a clock that shows what it takes."""

        def put_segment(self, *args: object, **kwargs: object) -> None:
            nonlocal now_s
            now_s += 4
            store.put_segment(*args, **kwargs)

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

    encode_for_real = chunkkv.encode
    monkeypatch.setattr(chunkkv, "encode", encode)
    monkeypatch.setattr(prefill_segments, "time", Clock)
    monkeypatch.setattr(prefill_runner, "time", Clock)
    async with serving(SlowStore()) as stub:
        answer = await stub.Prefill(request(session(), IDS))

    assert answer.compression_ms == 1000
    assert answer.store_ms == 4000


async def test_one_off_requests_share_nothing(stub):
    one_off = session()
    one_off.session_id = ""

    answers = [await stub.Prefill(request(one_off, IDS)) for _ in range(2)]

    assert answers[0].manifest.segments != answers[1].manifest.segments
    assert [answer.num_prefilled_tokens for answer in answers] == [59, 59]


async def test_a_later_turn_computes_its_own_tokens_on_top_of_the_stored_ones(stub):
    first = await stub.Prefill(request(session(), IDS))

    second = await stub.Prefill(request(first.manifest, IDS[:30]))

    assert second.num_prefilled_tokens == 30  # the token that was pending, and 29 new ones
    assert [s.first_token for s in second.manifest.segments] == [0, 59]
    assert len(second.manifest.token_ids) == 90


async def test_a_chunk_larger_than_the_prompt_is_refused_if_the_request_says_so(stub):
    asked = types_pb2.CompressionPolicy(chunk_size=61)

    error = await refused(stub.Prefill(request(session(), IDS, compression=asked)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "chunk_size is 61, but the prompt has 60 tokens; send 1 to 60" in error.details()


async def test_a_chunk_larger_than_the_prompt_is_fine_if_the_session_says_so(stub):
    manifest = session()
    manifest.compression.chunk_size = 61

    answer = await stub.Prefill(request(manifest, IDS))

    assert answer.manifest.segments[0].num_kept_tokens == 29


@pytest.mark.parametrize("min_free_tokens", [0, 20])
async def test_a_prompt_that_leaves_no_room_is_refused(stub, min_free_tokens):
    room = max(min_free_tokens, 1)
    ids = [1] * (MAX_MODEL_LEN - room + 1)

    error = await refused(stub.Prefill(request(session(), ids, min_free_tokens=min_free_tokens)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"send at most {MAX_MODEL_LEN - room}" in error.details()


async def test_a_session_of_another_model_is_refused(stub):
    error = await refused(stub.Prefill(request(session(model_fingerprint="other"), IDS)))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "start a new session" in error.details()


async def test_a_prefix_that_is_gone_is_not_found(stub, store):
    first = await stub.Prefill(request(session(), IDS))
    store.delete_segments([first.manifest.segments[0].segment_id])

    error = await refused(stub.Prefill(request(first.manifest, IDS)))

    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_damaged_prefix_is_refused_as_data_loss(stub, valkey_url):
    first = await stub.Prefill(request(session(), IDS))
    with redis.Redis.from_url(valkey_url) as client:
        [part] = client.scan_iter("*:0")
        client.setrange(part, 100, b"\xff\x00\xff")

    error = await refused(stub.Prefill(request(first.manifest, IDS)))

    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "stored KV is damaged" in error.details()


async def test_stored_segments_are_what_the_library_computes(stub, store):
    loaded = load_tiny()
    policy = chunkkv.preset("fast", keep_ratio=0.5, chunk_size=4, window_size=4)
    turn = IDS[:30]

    first = await stub.Prefill(request(session(), IDS))
    second = await stub.Prefill(request(first.manifest, turn))

    expected = chunkkv.prefill(loaded.model, torch.tensor([IDS[:-1]]), policy)
    past = chunkkv.KVCache.from_segments(loaded.model.config, expected)
    new_ids = torch.tensor([[IDS[-1], *turn[:-1]]])
    expected += chunkkv.compress(
        chunkkv.run_prefill(loaded.model, new_ids, window_size=4, past=past), policy
    )
    lent = fetched_segments(
        store, second.manifest.segments, fingerprint=loaded.fingerprint, pool=ReceivePool()
    )
    with lent as fetched:
        for kv, own in zip(fetched.kv, expected, strict=True):
            assert kv.shape == own.shape
            for layer, own_layer in zip(kv.layers, own.layers, strict=True):
                assert torch.equal(layer.positions, own_layer.positions)
                torch.testing.assert_close(layer.keys, own_layer.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(layer.values, own_layer.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scorer", ["window", "reconstruction", "key_diff"])
async def test_a_turn_goes_on_from_a_segment_whose_heads_keep_different_numbers(
    stub, store, scorer
):
    loaded = load_tiny()
    whole = chunkkv.CompressionPolicy(keep_ratio=1.0, scope="head", window_size=4)
    [prefix] = chunkkv.prefill(loaded.model, torch.tensor([IDS[:-1]]), whole)
    ragged = ragged_span(prefix, random_rows([[0, 40], [17, 3]], 59))
    manifest = session(model_fingerprint=loaded.fingerprint, token_ids=IDS)
    manifest.segments.append(store_segment(store, ragged, manifest, ttl_s=60))
    policy = policies.from_wire(manifest.compression, chunkkv.CompressionPolicy())
    policy = dataclasses.replace(policy, scorer=scorer)

    second = await stub.Prefill(request(manifest, IDS[:30], compression=policies.to_wire(policy)))
    third = await stub.Prefill(request(second.manifest, IDS[30:]))

    assert second.manifest.segments[0].num_kept_tokens == 15
    assert second.num_prefilled_tokens == third.num_prefilled_tokens == 30
    past = chunkkv.KVCache.from_segments(loaded.model.config, [ragged])
    new_ids = torch.tensor([[IDS[-1], *IDS[:29]]])
    prefilled = chunkkv.run_prefill(loaded.model, new_ids, window_size=4, past=past)
    if scorer == "reconstruction":
        prefilled = chunkkv.reconstruct(loaded.model, prefilled, new_ids)
    [expected] = chunkkv.compress(prefilled, policy)
    lent = fetched_segments(
        store, third.manifest.segments, fingerprint=loaded.fingerprint, pool=ReceivePool()
    )
    with lent as fetched:
        assert torch.equal(fetched.kv[0].memory, ragged.memory)
        for layer, own_layer in zip(fetched.kv[1].layers, expected.layers, strict=True):
            assert torch.equal(layer.positions, own_layer.positions)
            torch.testing.assert_close(layer.keys, own_layer.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, own_layer.values, atol=1e-4, rtol=1e-4)


async def test_pending_tokens_of_a_short_turn_are_compressed_with_the_next_long_one(stub):
    short = await stub.Prefill(request(session(), IDS[:10]))

    long = await stub.Prefill(request(short.manifest, IDS[10:40]))

    [segment] = long.manifest.segments
    assert (segment.first_token, segment.num_tokens) == (0, 39)
    assert (long.num_new_tokens, long.num_prefilled_tokens) == (30, 39)


@pytest.mark.parametrize(
    "field", ["chunk_size", "window_size", "sink_tokens", "reuse_interval", "max_kept_tokens"]
)
async def test_a_huge_number_in_a_policy_costs_nothing(stub, field):
    manifest = session()
    setattr(manifest.compression, field, 2**31 - 1)

    answer = await stub.Prefill(request(manifest, IDS))

    assert answer.manifest.segments[0].num_kept_tokens == (59 if field.startswith("max") else 29)


async def test_a_bad_policy_is_refused(stub):
    asked = types_pb2.CompressionPolicy(keep_ratio=1.5)

    error = await refused(stub.Prefill(request(session(), IDS, compression=asked)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "keep_ratio is 1.5" in error.details()


async def test_a_full_queue_is_a_status_and_a_cancelled_call_makes_room(store):
    held = HeldRunner(queue_size=0)
    async with asyncio.timeout(60), serving(store, held.runner) as stub:
        call = stub.Prefill(request(session(), [7, *IDS]))
        await asyncio.to_thread(held.arrived.wait, 30)

        error = await refused(stub.Prefill(request(session(), IDS)))
        call.cancel()
        held.go.set()
        answer = await until_taken(stub, request(session(), IDS))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "running or waiting" in error.details()
    assert answer.num_prefilled_tokens == len(IDS) - 1


async def until_taken(
    stub: prefill_pb2_grpc.PrefillServiceStub, message: prefill_pb2.PrefillRequest
) -> prefill_pb2.PrefillResponse:
    """Send a request until the queue has room for it."""
    while True:
        try:
            return await stub.Prefill(message)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise


async def test_tokenize_computes_nothing(stub):
    answer = await stub.Tokenize(prefill_pb2.TokenizeRequest(text="abc"))

    assert byte_tokenizer().decode(list(answer.token_ids)) == "abc"


class HeldRunner:
    """A runner whose model stops before every forward pass until it is let go."""

    def __init__(self, *, queue_size: int) -> None:
        self.loaded = load_tiny()
        self.passes = 0
        self.arrived = threading.Event()
        self.go = threading.Event()
        self.runner = PrefillRunner(self.loaded, prefill_chunk_tokens=8, queue_size=queue_size)
        self.loaded.model.base_model.register_forward_pre_hook(self._hold)

    def _hold(self, module: object, arguments: object) -> None:
        self.passes += 1
        self.arrived.set()
        assert self.go.wait(30)

    def start(self) -> asyncio.Task[object]:
        cache = chunkkv.KVCache(self.loaded.model.config)
        policy = chunkkv.CompressionPolicy(window_size=4)
        return asyncio.create_task(self.runner.run(IDS, cache, policy))


async def test_a_cancelled_prompt_ends_before_its_next_pass_and_frees_its_place():
    held = HeldRunner(queue_size=0)
    task = held.start()
    await asyncio.to_thread(held.arrived.wait, 30)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.go.set()
    async with asyncio.timeout(30):
        while held.runner.num_active:  # noqa: ASYNC110  # a thread ends it
            await asyncio.sleep(0.01)

    assert held.passes == 1
    held.runner.close()


async def test_a_full_queue_refuses_and_says_when_to_come_again():
    held = HeldRunner(queue_size=1)
    running, waiting = held.start(), held.start()
    await asyncio.to_thread(held.arrived.wait, 30)

    with pytest.raises(OverloadedError, match="2 prompts are running or waiting") as caught:
        await held.start()

    assert caught.value.retry_after_s == 1.0
    held.go.set()
    results = await asyncio.gather(running, waiting)
    assert torch.equal(results[0].kv.memory, results[1].kv.memory)
    held.runner.close()


@pytest.mark.slow
async def test_a_worker_that_is_stopped_withdraws_and_ends_with_0(tmp_path, valkey_url, store):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.prefill"),
        env={
            **os.environ,
            "CHUNKSERVE_MODEL": str(tmp_path / "tiny"),
            "CHUNKSERVE_REDIS_URL": valkey_url,
            "CHUNKSERVE_LISTEN": "127.0.0.1:0",
        },
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        while not (workers := await store.workers()):  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.05)
    async with open_channel(workers[0].address) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        answer = await stub.Prefill(request(session(), [*IDS, *IDS, *IDS]))

    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        out, _ = await process.communicate()

    assert answer.worker_id == workers[0].worker_id
    assert len(answer.manifest.segments) == 1
    assert process.returncode == 0
    assert b"server.stopped" in out
    assert await store.workers() == ()
