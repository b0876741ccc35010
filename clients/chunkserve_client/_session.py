"""A handle on one stored conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Unpack

from chunkserve.v1 import session_pb2
from chunkserve_client._connection import Connection, checked_timeout, new_request_id
from chunkserve_client._generation import Generation
from chunkserve_client._transfer import export_session
from chunkserve_client._types import Compression, CompressionResult, GenerateOptions, SessionInfo
from chunkserve_client._wire import (
    compress_session_request,
    compression_result_from_wire,
    fork_session_request,
    generate_request,
    refusing,
    session_from_wire,
)


class Session:
    """A session on the server. Made by ``Client.create_session`` and ``Client.get_session``."""

    def __init__(self, connection: Connection, info: SessionInfo) -> None:
        self._connection = connection
        self._info = info

    def __repr__(self) -> str:
        return f"Session({self.session_id!r})"

    @property
    def session_id(self) -> str:
        """Its id."""
        return self._info.session_id

    @property
    def info(self) -> SessionInfo:
        """The session as the server last told; :meth:`refresh` asks again."""
        return self._info

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Ask the next question of the conversation. See :meth:`Client.generate`."""
        return start_generation(self._connection, prompt, self.session_id, options)

    async def refresh(self) -> SessionInfo:
        """Ask the server for the session as it is now.

        Raises:
            SessionNotFound: It was deleted, or has expired.
        """
        self._info = await fetch_session(self._connection, self.session_id)
        return self._info

    async def fork(
        self, new_session_id: str | None = None, *, ttl_s: float | None = None
    ) -> Session:
        """Make a session that continues this one. See :meth:`Client.fork_session`."""
        return await fork_session(self._connection, self.session_id, new_session_id, ttl_s)

    async def compress(self, compression: Compression) -> CompressionResult:
        """Compress what is stored further. See :meth:`Client.compress_session`."""
        result = await compress_session(self._connection, self.session_id, compression)
        self._info = result.info
        return result

    def export(self, *, timeout_s: float | None = None) -> AsyncGenerator[bytes]:
        """Stream the session out. See :meth:`Client.export_session`."""
        return export_session(self._connection, self.session_id, timeout_s)

    async def delete(self) -> None:
        """Delete the session.

        Raises:
            SessionNotFound: It was deleted, or has expired.
            SessionBusy: A turn is running.
        """
        await delete_session(self._connection, self.session_id)


def start_generation(
    connection: Connection, prompt: str | None, session_id: str, options: GenerateOptions
) -> Generation:
    """Build an answer that is sent when it is iterated."""
    timeout_s = options.get("timeout_s")
    request_id = options.get("request_id") or new_request_id()
    return Generation(
        connection,
        generate_request(prompt, session_id, request_id, options),
        timeout_s=connection.timeout_s if timeout_s is None else checked_timeout(timeout_s),
        avoid_worker=options.get("avoid_worker") or "",
    )


async def fetch_session(connection: Connection, session_id: str) -> SessionInfo:
    """Ask for a session."""
    with refusing():
        request = session_pb2.GetSessionRequest(session_id=session_id)
    answer = await connection.unary(connection.sessions.GetSession, request, is_retried=True)
    return session_from_wire(answer.session)


async def fork_session(
    connection: Connection, session_id: str, new_session_id: str | None, ttl_s: float | None
) -> Session:
    """Fork a session. Not retried: a second attempt could meet what the first one made."""
    answer = await connection.unary(
        connection.sessions.ForkSession,
        fork_session_request(session_id, new_session_id, ttl_s),
        is_retried=False,
    )
    return Session(connection, session_from_wire(answer.session))


async def compress_session(
    connection: Connection, session_id: str, compression: Compression
) -> CompressionResult:
    """Compress a session. Not retried: a second attempt would keep a fraction of a fraction."""
    answer = await connection.unary(
        connection.sessions.CompressSession,
        compress_session_request(session_id, compression),
        is_retried=False,
    )
    return compression_result_from_wire(answer)


async def delete_session(connection: Connection, session_id: str) -> None:
    """Delete a session. Not retried: a second attempt would not find it."""
    with refusing():
        request = session_pb2.DeleteSessionRequest(session_id=session_id)
    await connection.unary(connection.sessions.DeleteSession, request, is_retried=False)
