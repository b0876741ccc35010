"""A server's health, limits and end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chunkserve.v1 import inference_pb2
from services.runtime.server import (
    MAX_MESSAGE_BYTES,
    GrpcServer,
    open_channel,
    serve_until_stopped,
)
from tests.fakes import WAIT_S

SERVICE = "chunkserve.v1.InferenceService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def check(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


async def test_health_follows_set_serving(server: GrpcServer, channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(check(SERVICE))
    seen = [(await watch.read()).status]

    await server.set_serving(False)
    seen.append((await watch.read()).status)
    assert (await health.Check(check(""))).status == NOT_SERVING
    await server.set_serving(True)
    seen.append((await watch.read()).status)

    assert seen == [SERVING, NOT_SERVING, SERVING]
    assert (await health.Check(check(SERVICE))).status == SERVING


async def test_an_unknown_service_is_not_found_and_a_watch_says_so(
    channel: grpc.aio.Channel,
) -> None:
    health = health_pb2_grpc.HealthStub(channel)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(check("none"))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await health.Watch(check("none")).read()).status == UNKNOWN


async def test_a_drain_ends_watches_for_good(server: GrpcServer, channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    watches = [health.Watch(check(name)) for name in ("", SERVICE, "none")]
    for watch in watches:
        await watch.read()

    await server.drain()
    await server.set_serving(True)

    for watch in watches[:2]:
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
    assert await watches[2].read() is grpc.aio.EOF
    assert (await health.Check(check(""))).status == NOT_SERVING
    assert (await health.Watch(check("")).read()).status == NOT_SERVING


async def test_a_stop_waits_for_running_calls_only(
    server: GrpcServer, channel: grpc.aio.Channel, stub: Any, scripted: Any
) -> None:
    is_running, may_end = asyncio.Event(), asyncio.Event()

    async def act(context: Any) -> None:
        is_running.set()
        await may_end.wait()

    scripted.act = act
    watch = health_pb2_grpc.HealthStub(channel).Watch(check(""))
    await watch.read()
    call = asyncio.create_task(as_awaited(stub.CountTokens(inference_pb2.CountTokensRequest())))
    await is_running.wait()

    stop = asyncio.create_task(server.stop(600))
    assert (await watch.read()).status == NOT_SERVING
    may_end.set()

    assert (await call).num_tokens == 0
    await asyncio.wait_for(stop, WAIT_S)


async def as_awaited(call: Any) -> Any:
    return await call


async def test_a_stop_before_the_start_is_harmless() -> None:
    await GrpcServer("127.0.0.1:0", [], []).stop(1)


async def test_a_taken_address_ends_the_process_with_a_message(
    server: GrpcServer, channel: grpc.aio.Channel
) -> None:
    first = GrpcServer("127.0.0.1:0", [], [])
    port = await first.start()

    with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1:{port}"):
        await GrpcServer(f"127.0.0.1:{port}", [], []).start()

    await first.stop(0)


async def test_messages_of_up_to_64_mib_pass_both_ways(stub: Any) -> None:
    text = "x" * (MAX_MESSAGE_BYTES - 1024)

    response = await stub.CountTokens(inference_pb2.CountTokensRequest(text=text))

    assert response.num_tokens == len(text)


async def test_a_channel_to_nobody_fails_at_once() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        call: Any = channel.unary_unary("/a/b")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call(b""), WAIT_S)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_then_stops_then_closes(
    server: GrpcServer, channel: grpc.aio.Channel, number: signal.Signals
) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    steps = []

    async def on_drain() -> None:
        steps.append(("drain", (await health.Check(check(""))).status))

    async def on_stop() -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(check(""))
        steps.append(("stop", None))

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    task = asyncio.create_task(
        serve_until_stopped(server, on_stop=on_stop, on_drain=on_drain, grace_s=1)
    )
    await asyncio.sleep(0)  # the handlers are set once the task has run
    os.kill(os.getpid(), number)
    await asyncio.wait_for(task, WAIT_S)
    after = {each: signal.getsignal(each) for each in before}
    for each, handler in before.items():
        signal.signal(each, handler)

    assert steps == [("drain", NOT_SERVING), ("stop", None)]
    assert set(after.values()) == {signal.SIG_DFL}


async def test_a_failing_drain_does_not_keep_the_server_up(
    server: GrpcServer, channel: grpc.aio.Channel
) -> None:
    is_closed = asyncio.Event()

    async def on_drain() -> None:
        raise RuntimeError("cannot withdraw")

    async def on_stop() -> None:
        is_closed.set()

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    task = asyncio.create_task(serve_until_stopped(server, on_stop=on_stop, on_drain=on_drain))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RuntimeError, match="cannot withdraw"):
        await asyncio.wait_for(task, WAIT_S)
    for each, handler in before.items():
        signal.signal(each, handler)

    assert is_closed.is_set()
