"""A server whose methods do what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc.aio
import pytest

from chunkserve.v1 import inference_pb2, inference_pb2_grpc
from services.runtime.server import GrpcServer, open_channel

SERVICE = "chunkserve.v1.InferenceService"


class Scripted(inference_pb2_grpc.InferenceServiceServicer):
    """Runs the test's functions: ``act`` in every method, ``stream`` in Generate."""

    def __init__(self) -> None:
        self.act: Callable[[Any], Awaitable[None]] = self._do_nothing
        self.num_events = 2
        self.closed = asyncio.Event()
        self.closed_in: asyncio.Task[Any] | None = None
        self.handled_in: asyncio.Task[Any] | None = None

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.handled_in = asyncio.current_task()
        try:
            for _ in range(self.num_events):
                yield inference_pb2.GenerateResponse()
            await self.act(context)
        finally:
            self.closed_in = asyncio.current_task()
            self.closed.set()

    async def CountTokens(
        self,
        request: inference_pb2.CountTokensRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.CountTokensResponse:
        await self.act(context)
        return inference_pb2.CountTokensResponse(num_tokens=len(request.text))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        await self.act(context)
        return inference_pb2.ListModelsResponse()

    async def _do_nothing(self, context: Any) -> None:
        return


@pytest.fixture
def scripted() -> Scripted:
    """The servicer of ``server``."""
    return Scripted()


@pytest.fixture
async def server(scripted: Scripted) -> AsyncIterator[GrpcServer]:
    """A server with ``scripted`` on it, not started."""
    add = partial(inference_pb2_grpc.add_InferenceServiceServicer_to_server, scripted)
    made = GrpcServer("127.0.0.1:0", [add], [SERVICE])
    yield made
    await made.stop(0)


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to ``server``, which it starts."""
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceServiceAsyncStub:
    """A stub of ``scripted``."""
    return inference_pb2_grpc.InferenceServiceStub(channel)
