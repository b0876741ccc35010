"""Sessions as bytes: what an export is in a file, and how it travels.

A file is a mark, then each piece as its length (32 bits, little-endian) and its message. The bytes
may be cut anywhere, as reading a file does.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from chunkserve.v1 import session_pb2
from chunkserve_client._connection import Connection, checked_timeout, new_request_id
from chunkserve_client._wire import refusing
from chunkserve_client.errors import invalid_request

_MARK: Final = b"ChunkServe session 1\n"
_LENGTH: Final = struct.Struct("<I")
# The largest message that a gateway takes.
_MAX_PIECE_BYTES: Final = 64 << 20


async def export_session(
    connection: Connection, session_id: str, timeout_s: float | None
) -> AsyncGenerator[bytes]:
    """Yield the bytes of an export, piece by piece."""
    with refusing():
        request = session_pb2.ExportSessionRequest(session_id=session_id)
    request_id = new_request_id()
    timeout_s = connection.timeout_s if timeout_s is None else checked_timeout(timeout_s)
    call = connection.sessions.ExportSession(
        request, timeout=timeout_s, metadata=connection.metadata(request_id)
    )
    mark = _MARK
    try:
        async for response in call:
            piece = response.piece.SerializeToString()
            yield mark + _LENGTH.pack(len(piece)) + piece
            mark = b""
    except (grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
        raise connection.mapped(caught, timeout_s=timeout_s, request_id=request_id) from caught
    finally:
        call.cancel()  # harmless after its end


async def import_session(
    connection: Connection,
    data: AsyncIterable[bytes] | Iterable[bytes],
    session_id: str | None,
    timeout_s: float | None,
) -> session_pb2.Session:
    """Send the bytes of an export, and return the session that they became.

    Not tried again: ``data`` can be read once.
    """
    request_id = new_request_id()

    async def send(remaining_s: float) -> session_pb2.Session:
        call = connection.sessions.ImportSession(
            timeout=remaining_s, metadata=connection.metadata(request_id)
        )
        try:
            async for piece in _pieces(data):
                with refusing():
                    request = session_pb2.ImportSessionRequest(
                        piece=piece, new_session_id=session_id or ""
                    )
                await call.write(request)
            await call.done_writing()
        except asyncio.InvalidStateError:
            pass  # the server has ended the call, and the next line says why
        except grpc.aio.AioRpcError:
            raise
        except BaseException:
            call.cancel()
            raise
        return (await call).session

    return await connection.attempt(
        send,
        timeout_s=connection.timeout_s if timeout_s is None else checked_timeout(timeout_s),
        request_id=request_id,
        max_retries=0,
    )


async def _pieces(
    data: AsyncIterable[bytes] | Iterable[bytes],
) -> AsyncGenerator[session_pb2.SessionPiece]:
    """Yield the pieces of an export.

    Raises:
        InvalidRequest: It is none, or was cut off.
    """
    buffer = bytearray()
    has_mark = False
    async for chunk in _chunks(data):
        buffer += chunk
        if not has_mark and len(buffer) >= len(_MARK):
            has_mark = buffer.startswith(_MARK)
            if not has_mark:
                break
            del buffer[: len(_MARK)]
        while has_mark and (piece := _take_piece(buffer)) is not None:
            yield piece
    if not has_mark:
        raise invalid_request("this is no exported session: it begins otherwise")
    if buffer:
        raise invalid_request(f"the export was cut off: {len(buffer)} bytes are left at its end")


async def _chunks(data: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncGenerator[bytes]:
    if isinstance(data, AsyncIterable):
        async for chunk in data:
            yield chunk
    else:
        for chunk in data:
            yield chunk


def _take_piece(buffer: bytearray) -> session_pb2.SessionPiece | None:
    """Remove the first piece from ``buffer`` and return it; ``None`` if it is not all there."""
    if len(buffer) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(buffer)
    if length > _MAX_PIECE_BYTES:
        raise invalid_request(f"the export is damaged: a piece of {length} bytes")
    end = _LENGTH.size + length
    if len(buffer) < end:
        return None
    try:
        piece = session_pb2.SessionPiece.FromString(bytes(buffer[_LENGTH.size : end]))
    except DecodeError as error:
        raise invalid_request(f"the export is damaged: {error}") from error
    del buffer[:end]
    return piece
