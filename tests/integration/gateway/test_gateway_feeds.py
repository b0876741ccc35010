"""Tokens come by a worker's feed: slow readers, and feeds that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc.aio
import pytest

from chunkserve.v1 import decode_pb2, decode_pb2_grpc, types_pb2
from services.decode.feeds import TokenFeed, TokenFeeds
from services.gateway import feeds
from services.gateway.channels import WorkerChannels
from services.runtime.errors import UnavailableError
from services.runtime.interceptors import ServicerContext
from services.runtime.server import GrpcServer
from services.runtime.tasks import end_task
from tests.fakes import WAIT_S, FakeCluster, error_info, generate_request, read_rest, worker_info

NUM_TOKENS = 400
TEXT = "x" * 8192  # so that what a gateway may send ahead of a reader is soon used up


class PacedDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Sends a token whenever it is not held, and notes how often it was."""

    def __init__(self) -> None:
        self.feeds = TokenFeeds()
        self.num_feeds = 0
        self.end_feed = asyncio.Event()
        self.num_sent = 0
        self.holds: list[bool] = []
        self.is_held = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.sends_finish_first = False
        self.pauses_at = -1
        self.answers_holds = True

    async def FeedTokens(  # type: ignore[override]  # writes to the context
        self, request: decode_pb2.FeedTokensRequest, context: ServicerContext
    ) -> None:
        self.num_feeds += 1
        with self.feeds.open(request.feed_id) as feed:
            sending = asyncio.create_task(self._send(feed, context))
            ending = asyncio.create_task(self.end_feed.wait())
            await asyncio.wait([sending, ending], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(end_task(sending), end_task(ending))

    async def _send(self, feed: TokenFeed, context: ServicerContext) -> None:
        async for message in feed.messages():
            await context.write(message)

    async def HoldTokens(
        self, request: decode_pb2.HoldTokensRequest, context: ServicerContext
    ) -> decode_pb2.HoldTokensResponse:
        self.holds.append(request.is_held)
        if request.is_held:
            self.may_go_on.clear()
            self.is_held.set()
        if not self.answers_holds:
            await asyncio.Event().wait()
        if not request.is_held:
            self.may_go_on.set()
        return decode_pb2.HoldTokensResponse()

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        feed = self.feeds.get(request.feed_id)
        finish = decode_pb2.DecodeResponse(finish=types_pb2.Finish(num_generated_tokens=NUM_TOKENS))
        yield decode_pb2.DecodeResponse(started=decode_pb2.DecodeStarted(worker_id="d"))
        if self.sends_finish_first:
            yield finish
        for index in range(NUM_TOKENS):
            if index == self.pauses_at:
                await self.is_held.wait()  # faster than any engine, it would be done before
            await self.may_go_on.wait()
            delta = types_pb2.TokenDelta(text=TEXT, token_ids=[index], first_token_index=index)
            wake_up = feed.put(request.feed_key, delta)
            wake_up()
            self.num_sent += 1
            await asyncio.sleep(0)
        if not self.sends_finish_first:
            yield finish


async def start(cluster: FakeCluster) -> PacedDecode:
    await cluster.add_prefill()
    paced = PacedDecode()
    add = partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, paced)
    await cluster._start(add, "decode", {"worker_id": "d"})
    return paced


async def test_a_slow_reader_pauses_its_call_and_loses_nothing(cluster: FakeCluster) -> None:
    paced = await start(cluster)
    paced.pauses_at = NUM_TOKENS - 50
    call: Any = cluster.inference.Generate(generate_request(), timeout=WAIT_S)
    first = await call.read()

    await asyncio.wait_for(paced.is_held.wait(), WAIT_S)
    num_sent = paced.num_sent
    events = [first, *await read_rest(call)]

    assert num_sent < NUM_TOKENS
    assert [i for event in events for i in event.delta.token_ids] == list(range(NUM_TOKENS))
    assert events[-1].WhichOneof("event") == "finish"
    assert paced.holds[:2] == [True, False]


async def test_a_worker_that_does_not_answer_a_pause_is_unavailable(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_HOLD_TIMEOUT_S", 0.05)
    paced = await start(cluster)
    paced.pauses_at = NUM_TOKENS - 50
    paced.answers_holds = False
    call: Any = cluster.inference.Generate(generate_request(), timeout=WAIT_S)
    await call.read()

    await asyncio.wait_for(paced.is_held.wait(), WAIT_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest(call)

    assert error_info(caught.value).reason == "WORKER_UNAVAILABLE"


async def test_the_end_waits_for_the_tokens(cluster: FakeCluster) -> None:
    paced = await start(cluster)
    paced.sends_finish_first = True

    events = await cluster.generate()

    assert [i for event in events for i in event.delta.token_ids] == list(range(NUM_TOKENS))
    assert events[-1].WhichOneof("event") == "finish"


async def test_a_feed_that_ends_fails_its_calls_and_opens_anew(cluster: FakeCluster) -> None:
    paced = await start(cluster)
    paced.may_go_on.clear()
    call: Any = cluster.inference.Generate(generate_request(), timeout=WAIT_S)
    await call.read()

    paced.end_feed.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest(call)
    paced.end_feed.clear()
    paced.may_go_on.set()

    assert error_info(caught.value).reason == "WORKER_UNAVAILABLE"
    assert (await cluster.generate())[-1].WhichOneof("event") == "finish"
    assert paced.num_feeds == 2


async def test_a_worker_that_opens_no_feed_is_unavailable() -> None:
    stopping = PacedDecode()
    stopping.feeds.drain()
    add = partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, stopping)
    server = GrpcServer("127.0.0.1:0", [add], [])
    channels = WorkerChannels()
    worker = worker_info(address=f"127.0.0.1:{await server.start()}")
    try:
        with pytest.raises(UnavailableError) as caught:
            async with channels.decode(worker, decode_pb2.DecodeRequest(), timeout_s=WAIT_S):
                pass
        assert caught.value.error_reason == "WORKER_STOPPED"
    finally:
        await channels.close()
        await server.stop(0)
