"""A conversation that is compressed between its turns: real prefill, decode and compression."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import grpc
import pytest
from tiny_model import load_tiny

from chunkserve.v1 import (
    compression_pb2_grpc,
    inference_pb2,
    prefill_pb2_grpc,
    session_pb2,
    types_pb2,
)
from services.compress.compaction import Compactor
from services.compress.servicer import CompressionServicer
from services.decode.config import DecodeSettings
from services.decode.worker import DecodeWorker
from services.prefill.config import PrefillSettings
from services.prefill.runner import PrefillRunner
from services.prefill.servicer import PrefillServicer
from services.runtime.errors import (
    ConflictError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.runtime.status import from_rpc_error
from services.store import Store
from tests.fakes import FakeCluster
from tests.stored_sessions import WHOLE, read_session, store_session

WAIT_S = 60.0
PROMPT = [1 + i * 7 % 250 for i in range(120)]
TURN_2 = [1 + i * 5 % 250 for i in range(20)]
HALF = types_pb2.CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4)
INT8 = types_pb2.CompressionPolicy(precision=types_pb2.PRECISION_INT8)


@pytest.fixture
async def cluster(store: Store) -> AsyncIterator[FakeCluster]:
    async with FakeCluster(store, lease_ttl_s=30) as running:
        yield running


async def add_compression(cluster: FakeCluster, *, max_concurrent_requests: int = 4) -> None:
    servicer = CompressionServicer(
        Compactor(cluster.store, lease_ttl_s=30), max_concurrent_requests=max_concurrent_requests
    )
    add = partial(compression_pb2_grpc.add_CompressionServiceServicer_to_server, servicer)
    await cluster._start(add, "compression", {"model": "", "fingerprint": ""})


@asynccontextmanager
async def tiny_workers(cluster: FakeCluster) -> AsyncIterator[None]:
    """Run a prefill and a decode worker with a tiny random model."""
    async with AsyncExitStack() as stack:
        loaded = load_tiny()
        runner = PrefillRunner(loaded, prefill_chunk_tokens=64, queue_size=2)
        stack.callback(runner.close)
        settings = PrefillSettings(model="tiny", min_compress_tokens=16)
        prefill = PrefillServicer(loaded, runner, cluster.store, settings, worker_id="prefill-1")
        fields = {"model": "tiny", "fingerprint": loaded.fingerprint}
        add = partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, prefill)
        await cluster._start(add, "prefill", fields | {"worker_id": "prefill-1"})
        decode = DecodeWorker(
            load_tiny(),
            cluster.store,
            DecodeSettings(model="tiny", kv_bytes=16 << 20),
            worker_id="decode-1",
        )
        await decode.start()
        stack.push_async_callback(decode.stop, grace_s=0)
        await cluster.announce("decode", decode.address, worker_id="decode-1", **fields)
        yield


async def turn(cluster: FakeCluster, token_ids: list[int]) -> inference_pb2.PromptInfo:
    """Run a turn of session ``s-1`` to its end; return what is said of its prompt."""
    call = cluster.inference.Generate(
        inference_pb2.GenerateRequest(
            session_id="s-1",
            token_ids=types_pb2.TokenIds(ids=token_ids),
            sampling=types_pb2.SamplingParams(max_tokens=6, ignore_eos=True),
        ),
        timeout=WAIT_S,
    )
    events = [event async for event in call]
    assert events[-1].WhichOneof("event") == "finish"
    return events[0].prompt_info


async def compress(
    cluster: FakeCluster, policy: types_pb2.CompressionPolicy, session_id: str = "s-1"
) -> session_pb2.CompressSessionResponse:
    return await cluster.sessions.CompressSession(
        session_pb2.CompressSessionRequest(session_id=session_id, compression=policy),
        timeout=WAIT_S,
    )


async def fails(cluster: FakeCluster, policy: types_pb2.CompressionPolicy) -> ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await compress(cluster, policy)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("precision", [0, types_pb2.PRECISION_FP8, types_pb2.PRECISION_INT4])
async def test_turns_go_on_after_every_compression(cluster: FakeCluster, precision: int):
    await add_compression(cluster)
    async with tiny_workers(cluster):
        await cluster.create_session(session_id="s-1", model="tiny", compression=HALF)
        await turn(cluster, PROMPT)
        before = (await read_session(cluster.store, "s-1")).segments

        smaller = types_pb2.CompressionPolicy(max_kept_tokens=30, precision=precision)
        done = await compress(cluster, smaller)
        # Long enough to be prefilled behind what was compressed; then a short one.
        await turn(cluster, TURN_2)
        await compress(cluster, INT8)
        await turn(cluster, TURN_2[:3])

        after = await read_session(cluster.store, "s-1")
        assert done.original_bytes == sum(segment.size_bytes for segment in before)
        assert done.session.stored_bytes < done.original_bytes
        assert done.original_kept_tokens == sum(segment.num_kept_tokens for segment in before)
        assert done.session.num_kept_tokens == 30
        assert done.session.segments[0].recompression.original_segment_id == before[0].segment_id
        assert after.num_turns == 3
        assert [s.first_token for s in after.segments] == [
            0,
            *(s.first_token + s.num_tokens for s in after.segments[:-1]),
        ]


async def test_without_a_compression_worker_it_is_unavailable(cluster: FakeCluster):
    await store_session(cluster.store, "s-1")

    error = await fails(cluster, INT8)

    assert isinstance(error, UnavailableError)
    assert error.error_reason == "NO_COMPRESSION_WORKER"


async def test_a_worker_that_is_gone_is_replaced_by_another(
    cluster: FakeCluster, unused_tcp_port: int
):
    await store_session(cluster.store, "s-1")
    await add_compression(cluster)
    for number in range(2):
        await cluster.announce(
            "compression",
            f"127.0.0.1:{unused_tcp_port}",
            worker_id=f"gone-{number}",
            model="",
            fingerprint="",
        )

    done = [await compress(cluster, INT8), await compress(cluster, INT8)]

    assert done[0].session.stored_bytes < done[0].original_bytes
    assert done[1].session.stored_bytes == done[1].original_bytes  # it was done before


async def test_if_all_workers_are_gone_it_is_unavailable(
    cluster: FakeCluster, unused_tcp_port: int
):
    await store_session(cluster.store, "s-1")
    await cluster.announce("compression", f"127.0.0.1:{unused_tcp_port}", model="", fingerprint="")

    assert (await fails(cluster, INT8)).error_reason == "WORKER_UNAVAILABLE"


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({}, "compression"),
        ({"keep_ratio": 1.5}, "compression.keep_ratio"),
        ({"max_kept_tokens": 0}, "compression.max_kept_tokens"),
        ({"precision": 99}, "compression.precision"),
        ({"keep_ratio": 0.5, "chunk_size": 4}, "compression.chunk_size"),
        ({"chunk_size": 4}, "compression"),
    ],
)
async def test_request_that_is_out_of_range_is_refused_before_a_worker_is_asked(
    cluster: FakeCluster, fields: dict[str, float], at_fault: str
):
    error = await fails(cluster, types_pb2.CompressionPolicy(**fields))

    assert isinstance(error, InvalidRequestError)
    assert error.field == at_fault


async def test_errors_of_the_worker_arrive_unchanged(cluster: FakeCluster):
    await add_compression(cluster)

    assert isinstance(await fails(cluster, INT8), NotFoundError)

    await store_session(cluster.store, "s-1", [(9, WHOLE)])
    error = await fails(cluster, types_pb2.CompressionPolicy(max_kept_tokens=3))
    assert isinstance(error, MismatchError)
    assert error.error_reason == "NO_SCORES"

    await cluster.store.acquire_lease("default", "s-1", ttl_s=60)
    assert isinstance(await fails(cluster, INT8), ConflictError)


async def test_more_than_it_takes_at_once_is_refused(cluster: FakeCluster):
    await add_compression(cluster, max_concurrent_requests=0)

    assert isinstance(await fails(cluster, INT8), OverloadedError)


async def test_compression_worker_brings_no_model(cluster: FakeCluster):
    await add_compression(cluster)

    models = await cluster.inference.ListModels(inference_pb2.ListModelsRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.create_session()

    assert list(models.models) == []
    assert from_rpc_error(caught.value).error_reason == "NO_PREFILL_WORKER"


async def test_process_serves_relieves_the_store_and_ends_on_sigterm(store: Store, valkey_url: str):
    await store_session(store, "s-1", [(400, WHOLE)])
    before = await read_session(store, "s-1")
    environment = {
        **os.environ,
        "CHUNKSERVE_REDIS_URL": valkey_url,
        "CHUNKSERVE_LISTEN": "127.0.0.1:0",
        "CHUNKSERVE_PRESSURE_HIGH_BYTES": str(before.segments[0].size_bytes - 1),
        "CHUNKSERVE_PRESSURE_INTERVAL_S": "0.05",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.compress",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WAIT_S):
            seen = ""
            while not ("compression.ready" in seen and "pressure.relieved" in seen):
                line = await process.stdout.readline()
                assert line, seen
                seen += line.decode()
            (worker,) = await store.workers()
            assert worker.role == "compression"
            after = await read_session(store, "s-1")
            assert after.segments[0].recompression.by_pressure
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        assert await store.workers() == ()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_mark_that_ends_above_where_it_begins_stops_the_process():
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.compress",
        env={
            **os.environ,
            "CHUNKSERVE_PRESSURE_HIGH_BYTES": "10",
            "CHUNKSERVE_PRESSURE_LOW_BYTES": "11",
        },
        stderr=asyncio.subprocess.PIPE,
    )

    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)

    assert process.returncode == 1
    assert re.search(r"PRESSURE_LOW_BYTES=11 must be less than", errors.decode())


async def test_prompts_are_stored_in_the_precision_of_the_session(cluster: FakeCluster):
    policy = types_pb2.CompressionPolicy(precision=types_pb2.PRECISION_INT4)
    policy.MergeFrom(HALF)
    async with tiny_workers(cluster):
        await cluster.create_session(session_id="s-1", model="tiny", compression=policy)
        await turn(cluster, PROMPT)
        await turn(cluster, PROMPT[:40])

    segments = (await read_session(cluster.store, "s-1")).segments
    prompts = [segment for segment in segments if segment.kv_bytes]
    assert [segment.num_tokens for segment in prompts] == [119, 40]
    assert all(segment.kv_bytes > 2 * segment.size_bytes for segment in prompts)
