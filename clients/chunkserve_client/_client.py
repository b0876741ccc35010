"""The asynchronous client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from chunkserve.v1 import inference_pb2, session_pb2
from chunkserve_client._connection import DEFAULT_ADDRESS, ClientOptions, Connection
from chunkserve_client._generation import Generation
from chunkserve_client._session import (
    Session,
    compress_session,
    delete_session,
    fetch_session,
    fork_session,
    start_generation,
)
from chunkserve_client._transfer import export_session, import_session
from chunkserve_client._types import (
    Compression,
    CompressionResult,
    GenerateOptions,
    Message,
    Model,
    TokenCount,
)
from chunkserve_client._wire import (
    create_session_request,
    model_from_wire,
    refusing,
    session_from_wire,
    set_input,
)


class Client:
    """Talks to a ChunkServe gateway. Belongs to one event loop; connects at the first call.

        async with Client("localhost:50051") as client:
            session = await client.create_session()
            async for text in session.generate("What is in this report? ..."):
                print(text, end="")

    Args:
        address: ``host:port`` of the gateway.
        channel: A channel of the caller's (a test's, or one with interceptors). Used instead of
            an own one, and left open; ``tls`` and ``credentials`` then mean nothing.
        options: See :class:`ClientOptions`.

    Raises:
        ValueError: ``timeout_s`` is not above 0, or ``token`` cannot be a header.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        channel: grpc.aio.Channel | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        unknown = sorted(options.keys() - ClientOptions.__annotations__.keys())
        if unknown:
            raise TypeError(f"Client() got an unexpected option {unknown[0]!r}")
        self._connection = Connection(address, options, channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        session: Session | str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Ask the model; nothing is sent before the answer is iterated.

        Args:
            prompt: What the user says: rendered with the model's chat template. Instead of it one
                of the options ``messages``, ``text`` (no template) or ``token_ids``.
            session: The session that this turn continues, or its id. ``None``: nothing is kept.
            options: See :class:`GenerateOptions`.

        Raises:
            InvalidRequest: A value cannot be sent at all.
            TypeError: Not exactly one input is given.
        """
        session_id = session.session_id if isinstance(session, Session) else session or ""
        return start_generation(self._connection, prompt, session_id, options)

    async def create_session(
        self,
        session_id: str | None = None,
        *,
        model: str | None = None,
        compression: Compression | None = None,
        ttl_s: float | None = None,
    ) -> Session:
        """Create an empty session.

        Args:
            session_id: 1 to 64 characters of ``[a-zA-Z0-9._-]``. ``None``: the server makes one.
            model: ``None``: the server's default.
            compression: Policy of its turns. ``None``: the server's.
            ttl_s: Seconds that it lives after each use. ``None``: the server's default.

        Raises:
            AlreadyExists: There is a session of this id.
            NotFound: There is no such model.
        """
        answer = await self._connection.unary(
            self._connection.sessions.CreateSession,
            create_session_request(session_id, model, compression, ttl_s),
            is_retried=False,  # a second attempt could meet the session that the first one made
        )
        return Session(self._connection, session_from_wire(answer.session))

    async def get_session(self, session_id: str) -> Session:
        """Return a handle on a session.

        Raises:
            SessionNotFound: There is none, or it has expired.
        """
        return Session(self._connection, await fetch_session(self._connection, session_id))

    async def list_sessions(self, *, page_size: int = 0) -> AsyncGenerator[Session]:
        """Yield all sessions, oldest first, without their segments.

        Args:
            page_size: Sessions asked for at a time, 1 to 1000; 0: the server's choice.
        """
        with refusing():
            request = session_pb2.ListSessionsRequest(page_size=page_size)
        while True:
            page = await self._connection.unary(
                self._connection.sessions.ListSessions, request, is_retried=True
            )
            for session in page.sessions:
                yield Session(self._connection, session_from_wire(session))
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Delete a session.

        Raises:
            SessionNotFound: There is none, or it has expired.
            SessionBusy: A turn is running.
        """
        await delete_session(self._connection, session_id)

    async def fork_session(
        self, session_id: str, new_session_id: str | None = None, *, ttl_s: float | None = None
    ) -> Session:
        """Make a session that continues another one from its present state. Copies no KV.

        Args:
            session_id: The session to continue.
            new_session_id: 1 to 64 characters of ``[a-zA-Z0-9._-]``. ``None``: the server makes
                one.
            ttl_s: Seconds that it lives after each use. ``None``: as long as the other one.

        Raises:
            SessionNotFound: There is no session to continue.
            AlreadyExists: There is a session of the new id.
            Overloaded: The quota of sessions is used up.
        """
        return await fork_session(self._connection, session_id, new_session_id, ttl_s)

    async def compress_session(
        self, session_id: str, compression: Compression
    ) -> CompressionResult:
        """Compress a stored session further, without the model. What was dropped is gone.

        Args:
            session_id: The session.
            compression: A budget (``keep_ratio`` or ``max_kept_tokens``), a ``precision``, or
                both; nothing else.

        Raises:
            SessionNotFound: There is none, or it has expired.
            SessionBusy: A turn is running.
            Mismatch: Its segments hold no scores.
        """
        return await compress_session(self._connection, session_id, compression)

    def export_session(
        self, session_id: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[bytes]:
        """Stream a session out, for a backup or for :meth:`import_session` on another cluster.

            with open("chat.session", "wb") as file:
                async for data in client.export_session("chat"):
                    file.write(data)

        Args:
            session_id: The session.
            timeout_s: Deadline of the whole stream; the client's if left out.

        Raises:
            SessionNotFound: There is none, or it has expired.
            NotFound: A part of it has expired.
            SessionBusy: It was changed meanwhile; try again.
        """
        return export_session(self._connection, session_id, timeout_s)

    async def import_session(
        self,
        data: AsyncIterable[bytes] | Iterable[bytes],
        session_id: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Session:
        """Store a session that :meth:`export_session` streamed out; all or nothing.

        Args:
            data: The bytes, cut anywhere: an open file, for one.
            session_id: Its id. ``None``: the exported one.
            timeout_s: Deadline of the whole stream; the client's if left out.

        Raises:
            InvalidRequest: It is no export.
            DataLoss: It is damaged, or was cut off.
            AlreadyExists: There is a session of this id.
            Overloaded: A quota is used up, or the store is full.
        """
        session = await import_session(self._connection, data, session_id, timeout_s)
        return Session(self._connection, session_from_wire(session))

    async def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> TokenCount:
        """Count the tokens of an input as :meth:`generate` would send them to the model."""
        with refusing():
            request = inference_pb2.CountTokensRequest(model=model or "")
            set_input(request, prompt, messages, text, token_ids)
        answer = await self._connection.unary(
            self._connection.inference.CountTokens,
            request,
            timeout_s=timeout_s,
            is_retried=True,
        )
        return TokenCount(answer.num_tokens, answer.model)

    async def list_models(self) -> tuple[Model, ...]:
        """Return the models that can be asked now, by name."""
        answer = await self._connection.unary(
            self._connection.inference.ListModels,
            inference_pb2.ListModelsRequest(),
            is_retried=True,
        )
        return tuple(model_from_wire(model) for model in answer.models)

    async def aclose(self) -> None:
        """End all calls and close the connection. Harmless if it is closed."""
        await self._connection.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
