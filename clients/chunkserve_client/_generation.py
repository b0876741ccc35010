"""One answer while it streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Self

import grpc

from chunkserve.v1 import inference_pb2
from chunkserve_client._connection import Connection
from chunkserve_client._types import Event, Finish, PromptInfo, Result, TokenDelta, TokenLogprob
from chunkserve_client._wire import event_from_wire
from chunkserve_client.errors import InternalError, cancelled

_Stream = AsyncIterator[inference_pb2.GenerateResponse]


class Generation:
    """An answer: iterate over its text, or over its events, once.

    The request is sent when the iteration begins. Leaving the loop early, or :meth:`aclose`,
    cancels the answer on the server; the session then stays as it was before the turn.

        async with client.generate("Why is the sky blue?") as answer:
            async for text in answer:
                print(text, end="", flush=True)
    """

    def __init__(
        self,
        connection: Connection,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float,
        avoid_worker: str = "",
    ) -> None:
        self._connection = connection
        self._request = request
        self._timeout_s = timeout_s
        self._avoid_worker = avoid_worker
        self._call: (
            grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
            | None
        ) = None
        self._started = False
        self._closed = False
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_info: PromptInfo | None = None
        self._finish: Finish | None = None

    @property
    def request_id(self) -> str:
        """Names the request in the server's logs."""
        return self._request.request_id

    @property
    def prompt_info(self) -> PromptInfo | None:
        """What was done with the prompt; ``None`` before the first event."""
        return self._prompt_info

    @property
    def finish(self) -> Finish | None:
        """How the answer ended; ``None`` until it has."""
        return self._finish

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens so far."""
        return tuple(self._token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each of its tokens so far, if they were asked for; else empty."""
        return tuple(self._logprobs)

    async def __aiter__(self) -> AsyncGenerator[str]:
        """Yield the text as it comes.

        Raises:
            ChunkServeError: The call failed.
        """
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, TokenDelta) and event.text:
                    yield event.text

    async def events(self) -> AsyncGenerator[Event]:
        """Yield one PromptInfo, then TokenDeltas, last one Finish.

        Raises:
            ChunkServeError: The call failed.
            RuntimeError: It was iterated before.
        """
        if self._started:
            raise RuntimeError("an answer can be iterated once; text and token_ids keep it")
        self._started = True
        try:
            first, rest = await self._connection.attempt(
                self._start, timeout_s=self._timeout_s, request_id=self.request_id
            )
            if first is not None and (event := event_from_wire(first)) is not None:
                self._take(event)
                yield event
            async for response in rest:
                event = event_from_wire(response)
                if event is not None:
                    self._take(event)
                    yield event
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
            raise self._connection.mapped(
                caught, timeout_s=self._timeout_s, request_id=self.request_id
            ) from caught
        finally:
            self._cancel()
        if self._finish is None:
            raise InternalError(
                "the answer ended without its last event",
                code=grpc.StatusCode.INTERNAL,
                request_id=self.request_id,
            )

    async def result(self) -> Result:
        """Wait for the whole answer.

        Raises:
            ChunkServeError: The call failed, or was closed before its end.
        """
        if not self._started:
            async for _ in self.events():
                pass
        if self._prompt_info is None or self._finish is None:
            raise cancelled(self.request_id)
        return Result(self.text, self.token_ids, self._prompt_info, self._finish, self.logprobs)

    async def aclose(self) -> None:
        """Cancel the answer unless it has ended. Harmless if it has."""
        self._started = self._closed = True
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _start(
        self, remaining_s: float
    ) -> tuple[inference_pb2.GenerateResponse | None, _Stream]:
        """Send the request and wait for the first event: up to there it may be sent again."""
        if self._closed:
            raise cancelled(self.request_id)
        self._call = self._connection.inference.Generate(
            self._request,
            timeout=remaining_s,
            metadata=self._connection.metadata(self.request_id, self._avoid_worker),
        )
        stream = aiter(self._call)
        return await anext(stream, None), stream

    def _take(self, event: Event) -> None:
        if isinstance(event, TokenDelta):
            self._texts.append(event.text)
            self._token_ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
        elif isinstance(event, PromptInfo):
            self._prompt_info = event
        else:
            self._finish = event

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
