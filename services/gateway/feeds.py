"""Tokens from a decode worker: one feed for all calls that this gateway has running there.

A worker sends tokens of several calls in one message. Here it is taken apart again: each call has
an inbox, and a call whose reader falls behind is paused at the worker.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, TypeAlias

import grpc.aio

from chunkserve.v1 import decode_pb2, decode_pb2_grpc, types_pb2
from services.runtime.errors import ServiceError, UnavailableError
from services.runtime.interceptors import request_id_metadata
from services.runtime.status import WORKER_UNAVAILABLE, from_rpc_error
from services.runtime.tasks import end_task

# Deltas in an inbox at which its call is paused, and at which it goes on.
_MANY: Final = 32
_FEW: Final = 8

# What comes of a call: one DecodeStarted, then TokenDeltas, last one Finish.
Event: TypeAlias = decode_pb2.DecodeStarted | types_pb2.TokenDelta | types_pb2.Finish

_OPEN_TIMEOUT_S: Final = 5.0
_HOLD_TIMEOUT_S: Final = 5.0


class TokenFeed:
    """Decode calls to one worker, and the feed that their tokens come by.

    The feed opens with the first call, and anew with the first one after it has ended.

    Args:
        channel: To the worker.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = decode_pb2_grpc.DecodeServiceStub(channel)
        self._keys = itertools.count(1)
        self._inboxes: dict[int, _Inbox] = {}
        self._id = ""
        self._reader: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def decode(
        self, request: decode_pb2.DecodeRequest, *, timeout_s: float
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Call ``Decode`` and have its events in the block, whose end cancels the call.

        Events come by no generator around another one: every layer costs each token.

        Raises:
            ServiceError: What the worker raised, or ``UnavailableError``; also from the events.
        """
        await self._open()
        key = next(self._keys)
        request.feed_id, request.feed_key = self._id, key
        inbox = self._inboxes[key] = _Inbox()
        call = self._stub.Decode(request, timeout=timeout_s, metadata=request_id_metadata())
        reader = asyncio.create_task(_read_into(inbox, call))
        hold = _Hold(self._stub, request.feed_id, key, on_failed=inbox.fail)
        try:
            async with aclosing(inbox.events(request.num_resumed_tokens, hold)) as events:
                yield events
        finally:
            del self._inboxes[key]
            call.cancel()
            await end_task(reader)
            await hold.end()

    async def close(self) -> None:
        """End the feed; calls that run fail."""
        if self._reader is not None:
            await end_task(self._reader)

    async def _open(self) -> None:
        async with self._opening:
            if self._reader is not None and not self._reader.done():
                return
            self._id = uuid.uuid4().hex
            call = self._stub.FeedTokens(decode_pb2.FeedTokensRequest(feed_id=self._id))
            messages = aiter(call)
            try:
                async with asyncio.timeout(_OPEN_TIMEOUT_S):
                    await anext(messages)
            except BaseException as error:
                call.cancel()
                match error:
                    case TimeoutError():
                        raise _gone(f"did not open a feed in {_OPEN_TIMEOUT_S:g} s") from None
                    case StopAsyncIteration():
                        raise _gone("is stopping") from None
                    case grpc.aio.AioRpcError():
                        raise from_rpc_error(error) from error
                raise
            self._reader = asyncio.create_task(self._read(call, messages))

    async def _read(
        self, call: Any, messages: AsyncIterator[decode_pb2.FeedTokensResponse]
    ) -> None:
        """Take messages apart until the feed ends; then calls that still run cannot go on."""
        error: ServiceError = _gone("ended the feed of its tokens")
        try:
            async for message in messages:
                for fed in message.tokens:
                    inbox = self._inboxes.get(fed.feed_key)
                    if inbox is not None:
                        inbox.put(fed.delta)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        finally:
            call.cancel()
            for inbox in self._inboxes.values():
                inbox.fail(error)


async def _read_into(inbox: _Inbox, call: Any) -> None:
    try:
        async for event in call:
            inbox.take(event)
    except grpc.aio.AioRpcError as error:
        inbox.fail(from_rpc_error(error))
    else:
        inbox.end()


class _Inbox:
    """What has come for one call: its tokens by the feed, all else by its own stream."""

    def __init__(self) -> None:
        self._deltas: deque[types_pb2.TokenDelta] = deque()
        self._started: decode_pb2.DecodeStarted | None = None
        self._finish: types_pb2.Finish | None = None
        self._has_ended = False
        self._error: ServiceError | None = None
        self._changed = asyncio.Event()

    def put(self, delta: types_pb2.TokenDelta) -> None:
        """Take tokens."""
        self._deltas.append(delta)
        self._changed.set()

    def take(self, event: decode_pb2.DecodeResponse) -> None:
        """Take an event of the call itself."""
        if event.HasField("started"):
            self._started = event.started
        elif event.HasField("finish"):
            self._finish = event.finish
        self._changed.set()

    def end(self) -> None:
        """The call has ended well."""
        self._has_ended = True
        self._changed.set()

    def fail(self, error: ServiceError) -> None:
        """The call, or the feed, has ended early; the first reason counts."""
        self._error = self._error or error
        self._changed.set()

    async def events(self, num_tokens: int, hold: _Hold) -> AsyncGenerator[Event, None]:
        """Yield the events in their order: started, the deltas, and finish behind the last one.

        Args:
            num_tokens: Tokens of the answer that came by another call.
            hold: Told how much waits.
        """
        has_started = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._started is not None and not has_started:
                has_started = True
                yield self._started
            while self._deltas and has_started:
                hold.observe(len(self._deltas))
                delta = self._deltas.popleft()
                num_tokens += len(delta.token_ids)
                yield delta
            hold.observe(0)
            if self._finish is not None:
                if num_tokens >= self._finish.num_generated_tokens:
                    yield self._finish
                    return
            elif self._error is not None:
                raise self._error
            elif self._has_ended:
                return
            if self._finish is not None and self._error is not None:
                raise self._error  # the tokens before it will not come any more


class _Hold:
    """Pauses a call at the worker while its reader is behind."""

    def __init__(
        self,
        stub: Any,
        feed_id: str,
        key: int,
        *,
        on_failed: Callable[[ServiceError], None],
    ) -> None:
        self._on_failed = on_failed
        self._stub = stub
        self._feed_id = feed_id
        self._key = key
        self._is_wanted = False
        self._telling: asyncio.Task[None] | None = None

    def observe(self, num_waiting: int) -> None:
        """Pause with many deltas waiting, go on with few."""
        is_wanted = num_waiting > (_FEW if self._is_wanted else _MANY)
        if is_wanted != self._is_wanted:
            self._is_wanted = is_wanted
            if self._telling is None or self._telling.done():
                self._telling = asyncio.create_task(self._tell())

    async def end(self) -> None:
        """Tell nothing more."""
        if self._telling is not None:
            await end_task(self._telling)

    async def _tell(self) -> None:
        """Tell the worker until it knows what is wanted now."""
        told: bool | None = None
        while told != self._is_wanted:
            told = self._is_wanted
            request = decode_pb2.HoldTokensRequest(
                feed_id=self._feed_id, feed_key=self._key, is_held=told
            )
            try:
                await self._stub.HoldTokens(request, timeout=_HOLD_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                # Else a call that was paused would stay so.
                self._on_failed(_hold_error(error))
                return


def _hold_error(error: grpc.aio.AioRpcError) -> ServiceError:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        # Ours, and not the caller's, who has time left for another worker.
        return _gone(f"did not answer in {_HOLD_TIMEOUT_S:g} s")
    return from_rpc_error(error)


def _gone(what: str) -> UnavailableError:
    return UnavailableError(
        f"a decode worker {what}; try again", reason=WORKER_UNAVAILABLE, retry_after_s=1.0
    )
