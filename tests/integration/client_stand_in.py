"""A gateway that the client's tests can script: real gRPC, real error details, no model.

It serves in a thread of its own, so that synchronous clients and other processes can call it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import grpc.aio

from chunkserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)
from services.runtime.errors import CorruptError, NotFoundError, ServiceError
from services.runtime.interceptors import ErrorInterceptor

WAIT_S = 30.0


@dataclass(frozen=True)
class Call:
    """A call as it arrived."""

    method: str
    request: Any
    metadata: dict[str, Any]
    time_remaining_s: float


@dataclass(frozen=True)
class Status:
    """A status without details, as proxies and gRPC itself send them."""

    code: grpc.StatusCode
    text: str
    trailing_metadata: tuple[tuple[str, bytes], ...] = ()


class StandIn(inference_pb2_grpc.InferenceServiceServicer, session_pb2_grpc.SessionServiceServicer):
    """Answers every question with ``answer``.

    Attributes:
        address: Where it listens.
        answer: Text of each delta; token ids count from 100.
        failures: What the next calls fail with, one each, before they do anything.
        fail_at: ``(index, failure)``: the answer fails before its delta of this index.
        hang_at: The answer waits before its delta of this index until the call is over.
        is_cut: The stream ends without Finish.
        calls: What arrived.
        arrived: Set when something has.
        hanging: Set when an answer waits.
        cancelled: Set when an answer ended early.
        sessions: By id, in the order of creation.
        imported: The pieces of the last import.
    """

    def __init__(self) -> None:
        self.address = ""
        self.answer = ["Par", "is", "", " is big."]
        self.failures: deque[ServiceError | Status] = deque()
        self.fail_at: tuple[int, ServiceError | Status] | None = None
        self.hang_at: int | None = None
        self.is_cut = False
        self.calls: list[Call] = []
        self.arrived = threading.Event()
        self.hanging = threading.Event()
        self.cancelled = threading.Event()
        self.sessions: dict[str, session_pb2.Session] = {}
        self.imported: list[session_pb2.SessionPiece] = []

    @classmethod
    @contextlib.contextmanager
    def serve(cls, address: str = "127.0.0.1:0") -> Iterator[Self]:
        """Serve on this machine, on a free port if none is named."""
        gateway = cls()
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(target=lambda: asyncio.run(gateway._serve(address, ready)))
        thread.start()
        loop, stop = ready.result(timeout=WAIT_S)
        try:
            yield gateway
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    async def _serve(
        self, address: str, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    ) -> None:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, server)
        self.address = f"127.0.0.1:{server.add_insecure_port(address)}"
        await server.start()
        stop = asyncio.Event()
        ready.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
        await server.stop(0)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        await self._arrive("Generate", request, context)
        has_ended = False
        try:
            yield inference_pb2.GenerateResponse(prompt_info=self._prompt_info(request))
            for i, text in enumerate(self.answer):
                if self.fail_at is not None and self.fail_at[0] == i:
                    await _fail(self.fail_at[1], context)
                if self.hang_at == i:
                    self.hanging.set()
                    await asyncio.Event().wait()
                yield inference_pb2.GenerateResponse(
                    delta=types_pb2.TokenDelta(
                        text=text,
                        token_ids=[100 + i],
                        first_token_index=i,
                        logprobs=_logprobs(100 + i, request.sampling),
                    )
                )
            if not self.is_cut:
                self._commit(request)
                yield inference_pb2.GenerateResponse(finish=self._finish(request))
            has_ended = True
        finally:
            if not has_ended:
                self.cancelled.set()

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Any
    ) -> inference_pb2.CountTokensResponse:
        await self._arrive("CountTokens", request, context)
        words = request.text.split() or request.chat.messages[0].content.split()
        return inference_pb2.CountTokensResponse(num_tokens=len(words), model="tiny")

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        await self._arrive("ListModels", request, context)
        model = inference_pb2.Model(
            name="tiny",
            max_model_len=8192,
            fingerprint="f00d",
            num_prefill_workers=1,
            num_decode_workers=2,
            default_compression=types_pb2.CompressionPolicy(keep_ratio=0.1, chunk_size=10),
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def CreateSession(
        self, request: session_pb2.CreateSessionRequest, context: Any
    ) -> session_pb2.CreateSessionResponse:
        await self._arrive("CreateSession", request, context)
        session = session_pb2.Session(
            session_id=request.session_id or f"s-{len(self.sessions)}",
            model=request.model or "tiny",
            version=1,
            ttl=request.ttl,
        )
        if request.HasField("compression"):
            session.compression.CopyFrom(request.compression)
        session.create_time.FromJsonString("2026-01-02T03:04:05Z")
        session.update_time.FromJsonString("2026-01-02T03:04:06Z")
        session.expire_time.FromJsonString("2126-01-02T03:04:05Z")
        self.sessions[session.session_id] = session
        return session_pb2.CreateSessionResponse(session=session)

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: Any
    ) -> session_pb2.GetSessionResponse:
        await self._arrive("GetSession", request, context)
        return session_pb2.GetSessionResponse(session=self._session(request.session_id))

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: Any
    ) -> session_pb2.ListSessionsResponse:
        await self._arrive("ListSessions", request, context)
        start = int(request.page_token or 0)
        end = start + (request.page_size or 2)
        return session_pb2.ListSessionsResponse(
            sessions=list(self.sessions.values())[start:end],
            next_page_token=str(end) if end < len(self.sessions) else "",
        )

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, context: Any
    ) -> session_pb2.DeleteSessionResponse:
        await self._arrive("DeleteSession", request, context)
        del self.sessions[self._session(request.session_id).session_id]
        return session_pb2.DeleteSessionResponse()

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: Any
    ) -> session_pb2.ForkSessionResponse:
        await self._arrive("ForkSession", request, context)
        fork = session_pb2.Session()
        fork.CopyFrom(self._session(request.session_id))
        fork.session_id = request.new_session_id or f"s-{len(self.sessions)}"
        if request.HasField("ttl"):
            fork.ttl.CopyFrom(request.ttl)
        self.sessions[fork.session_id] = fork
        return session_pb2.ForkSessionResponse(session=fork)

    async def CompressSession(
        self, request: session_pb2.CompressSessionRequest, context: Any
    ) -> session_pb2.CompressSessionResponse:
        await self._arrive("CompressSession", request, context)
        session = self._session(request.session_id)
        before = session_pb2.CompressSessionResponse(
            original_bytes=session.stored_bytes, original_kept_tokens=session.num_kept_tokens
        )
        session.stored_bytes //= 2
        session.num_kept_tokens //= 2
        before.session.CopyFrom(session)
        return before

    async def ExportSession(
        self, request: session_pb2.ExportSessionRequest, context: Any
    ) -> AsyncIterator[session_pb2.ExportSessionResponse]:
        await self._arrive("ExportSession", request, context)
        for i, piece in enumerate(exported(self._session(request.session_id))):
            if self.fail_at is not None and self.fail_at[0] == i:
                await _fail(self.fail_at[1], context)
            if self.hang_at == i:
                await asyncio.Event().wait()
            yield session_pb2.ExportSessionResponse(piece=piece)

    async def ImportSession(
        self, request: AsyncIterator[session_pb2.ImportSessionRequest], context: Any
    ) -> session_pb2.ImportSessionResponse:
        await self._arrive("ImportSession", None, context)
        session, pieces = session_pb2.Session(), []
        try:
            async for message in request:
                if self.fail_at is not None and self.fail_at[0] == len(pieces):
                    await _fail(self.fail_at[1], context)
                if not pieces:
                    session.ParseFromString(message.piece.manifest)
                    session.session_id = message.new_session_id or session.session_id
                pieces.append(message.piece)
        finally:
            # To a cancelled call's handler, gRPC may also just end the stream.
            if not pieces or pieces[-1].WhichOneof("piece") != "end":
                self.cancelled.set()
        if self.cancelled.is_set():
            raise CorruptError("the export was cut off")
        self.imported = pieces
        self.sessions[session.session_id] = session
        return session_pb2.ImportSessionResponse(session=session)

    async def _arrive(self, method: str, request: Any, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self.calls.append(Call(method, request, metadata, context.time_remaining()))
        self.arrived.set()
        if self.failures:
            await _fail(self.failures.popleft(), context)
        if method == "Generate" and request.session_id:
            self._session(request.session_id)

    def _session(self, session_id: str) -> session_pb2.Session:
        if session_id not in self.sessions:
            raise NotFoundError(
                f"there is no session {session_id!r}",
                reason="SESSION_NOT_FOUND",
                resource=("session", session_id),
            )
        return self.sessions[session_id]

    def _commit(self, request: inference_pb2.GenerateRequest) -> None:
        if request.session_id:
            session = self.sessions[request.session_id]
            session.version += 1
            session.num_turns += 1
            session.num_tokens += 1004
            session.num_kept_tokens += 104
            session.stored_bytes += 3 << 20
            session.segments.add(
                segment_id=f"seg-{session.num_turns}",
                first_token=session.num_tokens - 1004,
                num_tokens=1004,
                num_kept_tokens=104,
                size_bytes=3 << 20,
            )

    def _prompt_info(self, request: inference_pb2.GenerateRequest) -> inference_pb2.PromptInfo:
        return inference_pb2.PromptInfo(
            request_id=request.request_id,
            num_prompt_tokens=1000,
            num_prefilled_tokens=1000,
            num_kept_tokens=100,
            full_kv_bytes=30 << 20,
            stored_bytes=3 << 20,
            fetched_bytes=3 << 20,
            prefill_ms=123.0,
            prefill_worker="p-1",
            decode_worker="d-1",
        )

    def _finish(self, request: inference_pb2.GenerateRequest) -> types_pb2.Finish:
        return types_pb2.Finish(
            reason=types_pb2.FINISH_REASON_STOP,
            matched_stop="!",
            num_generated_tokens=len(self.answer),
            num_total_tokens=1000 + len(self.answer),
            seed=request.sampling.seed or 7,
            session_version=2 if request.session_id else 0,
            first_token_ms=10.0,
            decode_ms=30.0,
            commit_ms=1.0,
        )


def exported(session: session_pb2.Session) -> list[session_pb2.SessionPiece]:
    """Return an export whose manifest is the session as it is shown."""
    return [
        session_pb2.SessionPiece(manifest=session.SerializeToString()),
        session_pb2.SessionPiece(segment_header=b"header"),
        session_pb2.SessionPiece(segment_part=bytes(1 << 20)),
        session_pb2.SessionPiece(end=session_pb2.SessionEnd(num_pieces=3, sha256=b"digest")),
    ]


def _logprobs(token_id: int, sampling: types_pb2.SamplingParams) -> list[types_pb2.TokenLogprob]:
    """Return what was asked for: the token itself is the likeliest, and the others follow."""
    if not sampling.HasField("logprobs"):
        return []
    top = [
        types_pb2.TopLogprob(token_id=token_id + i, logprob=-0.5 - i)
        for i in range(sampling.logprobs)
    ]
    return [types_pb2.TokenLogprob(token_id=token_id, logprob=-0.5, top_logprobs=top)]


async def _fail(failure: ServiceError | Status, context: Any) -> None:
    if isinstance(failure, ServiceError):
        raise failure
    await context.abort(failure.code, failure.text, failure.trailing_metadata)
