"""Large values over a redis-py connection without copying them.

redis-py collects a value before it sends it and builds new bytes of what it receives; for values
of 1 MiB, most of the time goes into fresh memory. Here a value is sent from where it lies and
received to where it is wanted. Both functions keep a few commands in flight, and both leave the
connection unusable unless they run to their end: the caller then disconnects it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from redis.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

IN_FLIGHT: Final = 4

_SCRATCH_BYTES: Final = 512

_parse_error: Callable[[str], Exception] = DefaultParser.parse_error


class Connection(Protocol):
    """What is used of a redis-py connection."""

    # redis-py has no public way to the socket, and none to receive into given memory.
    _sock: socket.socket | None

    def send_packed_command(self, command: Sequence[bytes | memoryview]) -> None:
        """Send bytes as they are."""

    def read_response(self) -> Any:
        """Return the next reply; raise it if it is an error."""

    def disconnect(self) -> None:
        """Close the socket. The next use connects again."""


class ValueMissingError(Exception):
    """There is no value of this key."""


class ValueSizeError(Exception):
    """A value has another size than expected."""


def send_values(
    connection: Connection,
    keys: Sequence[str],
    values: Sequence[memoryview],
    *,
    ttl_ms: int,
) -> None:
    """SET every key, with a TTL.

    Raises:
        ResponseError: The server refused one, for example because its memory is full.
    """
    num_unanswered = 0
    for key, value in zip(keys, values, strict=True):
        connection.send_packed_command(_set_command(key, value, ttl_ms))
        num_unanswered += 1
        if num_unanswered == IN_FLIGHT:
            _expect_ok(connection)
            num_unanswered -= 1
    for _ in range(num_unanswered):
        _expect_ok(connection)


def receive_values(
    connection: Connection, keys: Sequence[str], sizes: Sequence[int], out: memoryview
) -> Iterator[memoryview]:
    """GET every key into ``out``, one after another; yield each value's view as it arrives.

    Args:
        connection: Connected, with no answer outstanding.
        keys: What to get.
        sizes: Bytes of each value.
        out: Writable bytes, at least ``sum(sizes)`` long.

    Raises:
        ValueMissingError: A key does not exist.
        ValueSizeError: A value has another size.
        ResponseError: The server refused.
    """
    commands = [_get_command(key) for key in keys]
    reader = _ReplyReader(_socket(connection))
    connection.send_packed_command(commands[:IN_FLIGHT])
    start = 0
    for index, size in enumerate(sizes):
        found = reader.read_bulk_length()
        if found is None:
            raise ValueMissingError(keys[index])
        if found != size:
            raise ValueSizeError(f"part {index} has {found} bytes; {size} were expected")
        view = out[start : start + size]
        reader.read_bulk(view)
        if index + IN_FLIGHT < len(commands):
            connection.send_packed_command([commands[index + IN_FLIGHT]])
        start += size
        yield view


class _ReplyReader:
    """Reads RESP bulk strings from a socket, their bodies straight into the caller's memory."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Takes the lines between two bodies, and the first bytes of a body that come with them.
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._start = 0
        self._end = 0

    def read_bulk_length(self) -> int | None:
        """Read up to the body and return its length; ``None`` if there is no value."""
        line = self._read_line()
        if line[:1] == b"$" and line[1:].isdigit():
            return int(line[1:])
        if line in (b"$-1", b"_"):  # RESP 2, RESP 3
            return None
        if line[:1] == b"-":
            raise _parse_error(line[1:].decode("utf-8", "replace"))
        raise InvalidResponse(f"reply begins with {line[:32]!r}; a bulk string was expected")

    def read_bulk(self, out: memoryview) -> None:
        """Fill ``out`` with the body."""
        num_early = min(self._end - self._start, len(out))
        out[:num_early] = self._scratch[self._start : self._start + num_early]
        self._start += num_early
        while num_early < len(out):
            num_early += self._receive(out[num_early:])
        if end := self._read_line():
            raise InvalidResponse(f"bulk string is followed by {end[:32]!r}")

    def _read_line(self) -> bytes:
        while True:
            line, separator, _ = self._scratch[self._start : self._end].tobytes().partition(b"\r\n")
            if separator:
                self._start += len(line) + 2
                return line
            self._refill()

    def _refill(self) -> None:
        pending = self._scratch[self._start : self._end].tobytes()
        if len(pending) == len(self._scratch):
            raise InvalidResponse(f"reply begins with a line of more than {len(pending)} bytes")
        self._scratch[: len(pending)] = pending
        self._start, self._end = 0, len(pending)
        self._end += self._receive(self._scratch[self._end :])

    def _receive(self, out: memoryview) -> int:
        num_received = self._sock.recv_into(out)
        if num_received == 0:
            raise RedisConnectionError("connection closed by server")
        return num_received


def _expect_ok(connection: Connection) -> None:
    reply = connection.read_response()
    if reply != b"OK":
        raise InvalidResponse(f"SET answered {reply!r}")


def _set_command(key: str, value: memoryview, ttl_ms: int) -> list[bytes | memoryview]:
    ttl = str(ttl_ms)
    head = f"*5\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n${len(value)}\r\n"
    tail = f"\r\n$2\r\nPX\r\n${len(ttl)}\r\n{ttl}\r\n"
    return [head.encode("ascii"), value, tail.encode("ascii")]


def _get_command(key: str) -> bytes:
    return f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode("ascii")


def _socket(connection: Connection) -> socket.socket:
    if connection._sock is None:
        raise RedisConnectionError("connection closed")
    return connection._sock
