"""The gateway as a process: starts without a store, reflects, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chunkserve.v1 import inference_pb2_grpc, session_pb2, session_pb2_grpc
from services.gateway.app import SERVICE_NAMES
from services.runtime.server import open_channel
from services.store import Store
from tests.fakes import WAIT_S, FakeCluster, error_info, generate_request, read_rest

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class GatewayProcess:
    """A gateway process and the events that it has logged."""

    process: asyncio.subprocess.Process
    events: list[dict[str, Any]] = field(default_factory=list)

    async def wait_for_event(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := await self.process.stdout.readline():
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == name:
                    return self.events[-1]
        raise AssertionError(f"no {name} in {self.events}")

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), WAIT_S)


@asynccontextmanager
async def gateway_process(**variables: str) -> AsyncIterator[GatewayProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        env={**os.environ, "CHUNKSERVE_LISTEN": "127.0.0.1:0", **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield GatewayProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_health_and_reflection_tell_what_is_served(cluster: FakeCluster) -> None:
    health = health_pb2_grpc.HealthStub(cluster.channel)
    reflect = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)

    statuses = [
        (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
        for name in ("", *SERVICE_NAMES)
    ]
    call = reflect.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    listed = await call.read()

    assert statuses == [SERVING] * 3
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= names


async def test_a_watch_sees_the_stop_and_does_not_hold_it_up(store: Store) -> None:
    async with FakeCluster(store) as cluster:
        health = health_pb2_grpc.HealthStub(cluster.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAMES[0]))
        assert (await watch.read()).status == SERVING

        stop = asyncio.create_task(cluster.gateway.stop(600))

        assert (await watch.read()).status == NOT_SERVING
        await asyncio.wait_for(stop, WAIT_S)


async def test_a_running_request_is_finished_before_the_stop(store: Store) -> None:
    async with FakeCluster(store) as cluster:
        await cluster.add_prefill()
        decode = await cluster.add_decode()
        decode.after_first_token.is_closed = True
        turn = asyncio.create_task(cluster.generate())
        await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

        stop = asyncio.create_task(cluster.gateway.stop(600))
        decode.after_first_token.released.set()

        assert (await turn)[-1].WhichOneof("event") == "finish"
        await asyncio.wait_for(stop, WAIT_S)


async def test_a_request_past_the_grace_period_is_cancelled_and_cleaned_up(store: Store) -> None:
    async with FakeCluster(store) as cluster:
        await cluster.add_prefill()
        decode = await cluster.add_decode()
        decode.after_first_token.is_closed = True
        await cluster.create_session(session_id="s-1")
        turn = asyncio.create_task(cluster.generate(session_id="s-1"))
        await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

        await asyncio.wait_for(cluster.gateway.stop(0.1), WAIT_S)

        with pytest.raises(grpc.aio.AioRpcError):
            await turn
        await store.acquire_lease("default", "s-1", ttl_s=5)


async def test_the_process_starts_without_a_store_and_says_so(unused_port: int) -> None:
    url = f"redis://127.0.0.1:{unused_port}/0"
    async with gateway_process(CHUNKSERVE_REDIS_URL=url) as gateway:
        port = (await gateway.wait_for_event("gateway.started"))["port"]
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session_pb2_grpc.SessionServiceStub(channel).GetSession(
                    session_pb2.GetSessionRequest(session_id="s-1")
                )

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_info(caught.value).reason == "STORE_UNAVAILABLE"


async def test_sigterm_lets_a_turn_finish_and_ends_the_process(
    cluster: FakeCluster, valkey_url: str
) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    await cluster.create_session(session_id="s-1")
    async with gateway_process(CHUNKSERVE_REDIS_URL=valkey_url) as gateway:
        port = (await gateway.wait_for_event("gateway.started"))["port"]
        async with open_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                generate_request("the secret prompt", session_id="s-1", request_id="r-1")
            )
            for _ in range(2):
                await call.read()
            assert (await watch.read()).status == SERVING

            gateway.process.send_signal(signal.SIGTERM)

            assert (await watch.read()).status == NOT_SERVING
            decode.after_first_token.released.set()
            events = [event.WhichOneof("event") for event in await read_rest(call)]
        stopped = await gateway.wait_for_event("server.stopped")
        assert await gateway.exit_code() == 0

    assert events[-1] == "finish"
    assert stopped["event"] == "server.stopped"
    [line] = [event for event in gateway.events if event["event"] == "generate.done"]
    assert line["request_id"] == "r-1"
    assert line["session_id"] == "s-1"
    assert line["code"] == "OK"
    assert line["num_prompt_tokens"] == len("the secret prompt")
    assert 0 < line["first_token_ms"] <= line["duration_ms"]
    assert "secret" not in json.dumps(gateway.events)
    await cluster.store.acquire_lease("default", "s-1", ttl_s=5)


async def test_a_second_signal_ends_the_process_at_once(
    cluster: FakeCluster, valkey_url: str
) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    async with gateway_process(
        CHUNKSERVE_REDIS_URL=valkey_url, CHUNKSERVE_STOP_GRACE_S="600"
    ) as gateway:
        port = (await gateway.wait_for_event("gateway.started"))["port"]
        async with open_channel(f"127.0.0.1:{port}") as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(generate_request())
            await call.read()
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.wait_for_event("server.draining")

            gateway.process.send_signal(signal.SIGTERM)

            assert await gateway.exit_code() == -signal.SIGTERM
            with pytest.raises(grpc.aio.AioRpcError):
                await read_rest(call)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CHUNKSERVE_LEASE_TTL_S": "soon"}, "CHUNKSERVE_LEASE_TTL_S='soon'"),
        ({"CHUNKSERVE_REDIS_URL": "http://x"}, "CHUNKSERVE_REDIS_URL"),
        ({"CHUNKSERVE_LISTEN": "nonsense"}, "cannot listen on nonsense"),
    ],
    ids=["malformed", "store_url", "listen"],
)
async def test_a_wrong_setting_ends_the_process_and_names_it(
    variables: dict[str, str], message: str
) -> None:
    async with gateway_process(**variables) as gateway:
        _, stderr = await asyncio.wait_for(gateway.process.communicate(), 30)

    assert gateway.process.returncode == 1
    assert message in stderr.decode()
    assert "Traceback" not in stderr.decode()


async def test_a_taken_port_ends_the_process_and_names_it(cluster: FakeCluster) -> None:
    address = f"127.0.0.1:{cluster.port}"
    async with gateway_process(CHUNKSERVE_LISTEN=address) as gateway:
        _, stderr = await asyncio.wait_for(gateway.process.communicate(), 30)

    assert gateway.process.returncode == 1
    assert f"cannot listen on {address}" in stderr.decode()


async def test_the_gateway_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'chunkkv'}"
    code = f"import sys, services.gateway.app; print({heavy} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )

    stdout, _ = await asyncio.wait_for(process.communicate(), 30)

    assert stdout.decode().strip() == "set()"
