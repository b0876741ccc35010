"""Connections to workers, and calls over them.

One channel per address, shared by all calls, closed once the worker is gone and nothing runs on
it. Errors come out as service errors, the worker's own unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc.aio

from chunkserve.v1 import (
    compression_pb2,
    compression_pb2_grpc,
    decode_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
)
from services.gateway.feeds import Event, TokenFeed
from services.runtime.interceptors import request_id_metadata
from services.runtime.server import open_channel
from services.runtime.status import from_rpc_error
from services.store.base import WorkerInfo

_Response = TypeVar("_Response")


class WorkerChannels:
    """Calls workers."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._feeds: dict[str, TokenFeed] = {}
        self._num_calls: Counter[str] = Counter()

    def num_calls(self, address: str) -> int:
        """Return how many calls run at this address."""
        return self._num_calls[address]

    async def prefill(
        self, worker: WorkerInfo, request: prefill_pb2.PrefillRequest, *, timeout_s: float
    ) -> prefill_pb2.PrefillResponse:
        """Call ``Prefill``; raises what the worker raised, or ``UnavailableError``."""
        with self._use(worker.address) as channel:
            return await _answer(
                prefill_pb2_grpc.PrefillServiceStub(channel).Prefill, request, timeout_s
            )

    async def rebuild(
        self, worker: WorkerInfo, request: prefill_pb2.RebuildRequest, *, timeout_s: float
    ) -> prefill_pb2.RebuildResponse:
        """Call ``Rebuild``; raises what the worker raised, or ``UnavailableError``."""
        with self._use(worker.address) as channel:
            return await _answer(
                prefill_pb2_grpc.PrefillServiceStub(channel).Rebuild, request, timeout_s
            )

    async def tokenize(
        self, worker: WorkerInfo, request: prefill_pb2.TokenizeRequest, *, timeout_s: float
    ) -> prefill_pb2.TokenizeResponse:
        """Call ``Tokenize``; raises what the worker raised, or ``UnavailableError``."""
        with self._use(worker.address) as channel:
            return await _answer(
                prefill_pb2_grpc.PrefillServiceStub(channel).Tokenize, request, timeout_s
            )

    async def compress(
        self,
        worker: WorkerInfo,
        request: compression_pb2.CompressRequest,
        *,
        timeout_s: float,
    ) -> compression_pb2.CompressResponse:
        """Call ``Compress``; raises what the worker raised, or ``UnavailableError``."""
        with self._use(worker.address) as channel:
            return await _answer(
                compression_pb2_grpc.CompressionServiceStub(channel).Compress, request, timeout_s
            )

    @asynccontextmanager
    async def decode(
        self, worker: WorkerInfo, request: decode_pb2.DecodeRequest, *, timeout_s: float
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Call ``Decode`` and have its events in the block, whose end cancels the call."""
        with self._use(worker.address) as channel:
            if worker.address not in self._feeds:
                self._feeds[worker.address] = TokenFeed(channel)
            feed = self._feeds[worker.address]
            async with feed.decode(request, timeout_s=timeout_s) as events:
                yield events

    async def prune(self, living: Collection[str]) -> None:
        """Close channels to addresses that are not among ``living`` and have no call."""
        for address in list(self._channels):
            # Looked at only now: while the one before closed, a call may have begun on this one,
            # or another turn have closed it.
            is_open = address in self._channels
            if is_open and address not in living and not self._num_calls[address]:
                await self._close(address)

    async def close(self) -> None:
        """Close all channels; calls on them are cancelled."""
        for address in list(self._channels):
            await self._close(address)

    async def _close(self, address: str) -> None:
        channel, feed = self._channels.pop(address), self._feeds.pop(address, None)
        if feed is not None:
            await feed.close()
        await channel.close()

    @contextmanager
    def _use(self, address: str) -> Iterator[grpc.aio.Channel]:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        self._num_calls[address] += 1
        try:
            yield self._channels[address]
        finally:
            self._num_calls[address] -= 1
            if not self._num_calls[address]:
                del self._num_calls[address]


async def _answer(
    method: grpc.aio.UnaryUnaryMultiCallable[Any, _Response], request: Any, timeout_s: float
) -> _Response:
    try:
        return await method(request, timeout=timeout_s, metadata=request_id_metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
