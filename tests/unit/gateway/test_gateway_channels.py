"""Connections to workers are shared, and closed when the worker is gone."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc.aio
import pytest

from chunkserve.v1 import prefill_pb2, prefill_pb2_grpc
from services.gateway import channels as channels_module
from services.gateway.channels import WorkerChannels
from services.runtime.server import GrpcServer
from tests.fakes import worker_info


class PeerPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Notes from which connection each call comes."""

    def __init__(self, channels: WorkerChannels) -> None:
        self.channels = channels
        self.address = ""
        self.peers: list[str] = []
        self.num_calls: list[int] = []
        self.prunes = False

    async def Prefill(self, request: Any, context: Any) -> prefill_pb2.PrefillResponse:
        raise NotImplementedError

    async def Tokenize(
        self, request: prefill_pb2.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.TokenizeResponse:
        self.peers.append(context.peer())
        self.num_calls.append(self.channels.num_calls(self.address))
        if self.prunes:
            await self.channels.prune([])
        return prefill_pb2.TokenizeResponse(token_ids=[1])


async def test_a_channel_is_shared_until_its_worker_is_gone_and_idle() -> None:
    channels = WorkerChannels()
    servicer = PeerPrefill(channels)
    add = partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer)
    server = GrpcServer("127.0.0.1:0", [add], [])
    servicer.address = f"127.0.0.1:{await server.start()}"
    worker = worker_info(role="prefill", address=servicer.address)

    async def call() -> None:
        await channels.tokenize(worker, prefill_pb2.TokenizeRequest(text="a"), timeout_s=10)

    await call()
    await channels.prune([servicer.address])
    await call()
    servicer.prunes = True  # while a call runs, its channel stays
    await call()
    servicer.prunes = False
    await channels.prune([])
    await call()
    await channels.close()
    await server.stop(0)

    first, second, third, fourth = servicer.peers
    assert first == second == third != fourth
    assert servicer.num_calls == [1, 1, 1, 1]
    assert channels.num_calls(servicer.address) == 0


class SlowChannel:
    """A channel that takes its time to close."""

    def __init__(self) -> None:
        self.is_closing = asyncio.Event()
        self.may_close = asyncio.Event()

    async def close(self) -> None:
        assert not self.is_closing.is_set(), "closed twice"
        self.is_closing.set()
        await self.may_close.wait()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, SlowChannel]:
    """The channels that are opened, by address."""
    opened: dict[str, SlowChannel] = {}

    def open_channel(address: str) -> SlowChannel:
        return opened.setdefault(address, SlowChannel())

    monkeypatch.setattr(channels_module, "open_channel", open_channel)
    return opened


async def test_a_call_that_begins_while_another_channel_closes_keeps_its_own(
    opened: dict[str, SlowChannel],
) -> None:
    channels = WorkerChannels()
    for address in ("a", "b"):
        with channels._use(address):
            pass
    pruning = asyncio.create_task(channels.prune([]))
    await opened["a"].is_closing.wait()

    with channels._use("b"):
        opened["a"].may_close.set()
        await pruning

    assert not opened["b"].is_closing.is_set()


async def test_two_turns_that_prune_at_once_close_each_channel_once(
    opened: dict[str, SlowChannel],
) -> None:
    channels = WorkerChannels()
    for address in ("a", "b"):
        with channels._use(address):
            pass
    opened["b"].may_close.set()
    pruning = asyncio.create_task(channels.prune([]))
    await opened["a"].is_closing.wait()

    await channels.prune([])
    opened["a"].may_close.set()
    await pruning

    assert opened["b"].is_closing.is_set()
