"""RESP by hand: however the bytes arrive, values land where they belong, or an error says why."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, MovedError, OutOfMemoryError, ResponseError

from services.store import wire


class FakeConnection:
    """A redis-py connection whose server says what the test says."""

    def __init__(self, replies: Sequence[Any] = ()) -> None:
        self._sock: socket.socket | None
        self.client, self.server = socket.socketpair()
        self.client.settimeout(5)
        self._sock = self.client
        self._replies: Iterator[Any] = iter(replies)
        self.num_unread = 0
        self.most_unread = 0
        self.sent = b""

    def __enter__(self) -> FakeConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def send_packed_command(self, command: Sequence[bytes | memoryview]) -> None:
        self.sent += b"".join(command)
        self.num_unread += 1
        self.most_unread = max(self.most_unread, self.num_unread)

    def read_response(self) -> Any:
        self.num_unread -= 1
        reply = next(self._replies)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def disconnect(self) -> None:
        self._sock = None


def receive(stream: bytes, sizes: Sequence[int], *, cuts: Sequence[int] = ()) -> list[bytes]:
    """Receive values from a server that sends ``stream`` in pieces and then hangs up."""
    with FakeConnection() as connection:
        sender = threading.Thread(target=_send, args=(connection.server, stream, cuts))
        sender.start()
        out = memoryview(bytearray(sum(sizes)))
        names = [str(i) for i in range(len(sizes))]
        try:
            return [bytes(v) for v in wire.receive_values(connection, names, sizes, out)]
        finally:
            connection.client.close()
            sender.join()


def _send(server: socket.socket, stream: bytes, cuts: Sequence[int]) -> None:
    edges = [0, *sorted(cuts), len(stream)]
    try:
        for start, end in itertools.pairwise(edges):
            server.sendall(stream[start:end])
        server.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the reader gave up, as it should


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), values=st.lists(st.binary(max_size=1200), max_size=8))
def test_values_arrive_however_the_stream_is_cut(data: st.DataObject, values: list[bytes]):
    stream = b"".join(map(bulk, values))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))

    assert receive(stream, [len(value) for value in values], cuts=cuts) == values


def test_values_that_look_like_replies_are_values():
    values = [b"\r\n", b"$-1\r\n", b"-ERR no\r\n", b"$5\r\nabc"]

    assert receive(b"".join(map(bulk, values)), [len(value) for value in values]) == values


def test_a_stream_cut_at_any_byte_is_an_error():
    stream = bulk(b"abc") + bulk(b"defg")

    for end in range(len(stream)):
        with pytest.raises(RedisConnectionError, match="closed by server"):
            receive(stream[:end], [3, 4])


@pytest.mark.parametrize("missing", [b"$-1\r\n", b"_\r\n"], ids=["resp2", "resp3"])
def test_a_missing_value_is_told_apart(missing: bytes):
    with pytest.raises(wire.ValueMissingError, match="1"):
        receive(bulk(b"abc") + missing, [3, 3])


@pytest.mark.parametrize("value", [b"", b"ab", b"abcd"])
def test_a_value_of_another_size_is_told_apart(value: bytes):
    with pytest.raises(wire.ValueSizeError, match=f"part 0 has {len(value)} bytes; 3 were"):
        receive(bulk(value), [3])


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"-OOM command not allowed\r\n", OutOfMemoryError),
        (b"-MOVED 1 127.0.0.1:7000\r\n", MovedError),
        (b"-WRONGTYPE \xff\r\n", ResponseError),
    ],
)
def test_an_error_reply_is_the_error_that_redis_py_makes_of_it(
    reply: bytes, error: type[Exception]
):
    with pytest.raises(error):
        receive(reply, [3])


@pytest.mark.parametrize(
    "stream",
    [
        b":1\r\n",
        b"$\r\n",
        b"$-2\r\n",
        b"$3x\r\n",
        b"\r\n",
        b">2\r\n",
        b"x" * 2000,
        b"$3\r\nabcd\r\n",
    ],
)
def test_anything_else_is_refused(stream: bytes):
    with pytest.raises(InvalidResponse):
        receive(stream, [3])


def test_a_closed_connection_is_refused():
    with FakeConnection() as connection:
        connection.disconnect()
        with pytest.raises(RedisConnectionError, match="closed"):
            list(wire.receive_values(connection, ["k"], [1], memoryview(bytearray(1))))


def test_few_gets_are_in_flight():
    num_values = 3 * wire.IN_FLIGHT
    with FakeConnection() as connection:
        connection.server.sendall(bulk(b"x") * num_values)
        names = [f"k{i}" for i in range(num_values)]
        receiving = wire.receive_values(
            connection, names, [1] * num_values, memoryview(bytearray(num_values))
        )
        for num_received in range(1, num_values + 1):
            next(receiving)
            num_sent = connection.sent.count(b"GET")
            assert num_sent == min(num_received - 1 + wire.IN_FLIGHT, num_values) + (
                num_received + wire.IN_FLIGHT <= num_values
            )


def test_sets_are_sent_as_they_lie_with_their_ttl():
    value = memoryview(b"abc")
    with FakeConnection([b"OK"]) as connection:
        wire.send_values(connection, ["key"], [value], ttl_ms=1500)

        expected = b"*5\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nabc\r\n$2\r\nPX\r\n$4\r\n1500\r\n"
        assert connection.sent == expected


@pytest.mark.parametrize("num_values", [0, 1, wire.IN_FLIGHT, 3 * wire.IN_FLIGHT + 1])
def test_every_answer_is_read_and_few_are_awaited(num_values: int):
    with FakeConnection([b"OK"] * num_values) as connection:
        names = [f"k{i}" for i in range(num_values)]
        wire.send_values(connection, names, [memoryview(b"x")] * num_values, ttl_ms=1)

        assert connection.num_unread == 0
        assert connection.most_unread <= wire.IN_FLIGHT


@pytest.mark.parametrize("at", [0, 3, 6])
def test_an_answer_other_than_ok_is_refused(at: int):
    replies: list[Any] = [b"OK"] * 7
    replies[at] = None
    with FakeConnection(replies) as connection, pytest.raises(InvalidResponse, match="None"):
        wire.send_values(connection, list("abcdefg"), [memoryview(b"x")] * 7, ttl_ms=1)
