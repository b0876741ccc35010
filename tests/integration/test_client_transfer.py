"""Forks, exports and imports through the asynchronous client, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from chunkserve_client import (
    AlreadyExists,
    Client,
    Compression,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    SessionNotFound,
)
from services.runtime import errors as service_errors
from tests.integration.client_stand_in import WAIT_S, StandIn, exported


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn.serve() as stand_in:
        yield stand_in


@pytest.fixture
async def client(gateway: StandIn) -> AsyncIterator[Client]:
    async with Client(gateway.address, max_retries=0) as opened:
        await opened.create_session("s-1")
        yield opened


async def export(client: Client) -> bytes:
    return b"".join([data async for data in client.export_session("s-1")])


async def test_a_fork_is_another_session(client: Client, gateway: StandIn):
    fork = await client.fork_session("s-1", "s-2", ttl_s=60)
    session = await client.get_session("s-1")
    again = await session.fork()

    assert (fork.session_id, again.session_id) == ("s-2", "s-2")
    assert gateway.sessions["s-2"].ttl.seconds == 0
    with pytest.raises(SessionNotFound):
        await client.fork_session("nobody")


async def test_a_session_is_compressed_further(client: Client, gateway: StandIn):
    session = await client.get_session("s-1")
    await session.generate("hi").result()

    result = await session.compress(Compression(max_kept_tokens=50, precision="int4"))

    assert (result.original_kept_tokens, result.original_bytes) == (104, 3 << 20)
    assert session.info == result.info
    assert result.info.num_kept_tokens == 52


async def test_a_request_that_waits_says_so(client: Client, gateway: StandIn):
    await client.generate("hi", session="s-1", wait_if_busy=True).result()

    assert gateway.calls[-1].request.wait_if_busy


@pytest.mark.parametrize("num_bytes", [1, 1000, 1 << 19, 1 << 30])
async def test_an_export_cut_anywhere_is_imported(client: Client, gateway: StandIn, num_bytes: int):
    data = (await export(client))[: 1 << 30]
    head, rest = data[:200], data[200:]
    chunks = [head[i : i + num_bytes] for i in range(0, len(head), num_bytes)]
    large = max(num_bytes, 1000)
    chunks += [rest[i : i + large] for i in range(0, len(rest), large)]

    session = await client.import_session(chunks, "copy")

    assert session.session_id == "copy"
    assert gateway.imported == exported(gateway.sessions["s-1"])


async def test_an_export_is_piped_into_an_import(client: Client, gateway: StandIn):
    session = await client.get_session("s-1")

    copy = await client.import_session(session.export(), "copy")

    assert copy.info.model == "tiny"


async def test_an_export_of_an_unknown_session_is_not_found(client: Client):
    with pytest.raises(SessionNotFound):
        async for _ in client.export_session("nobody"):
            pass


async def test_an_export_that_fails_in_the_middle_raises(client: Client, gateway: StandIn):
    gateway.fail_at = (2, service_errors.CorruptError("damaged"))

    with pytest.raises(DataLoss, match="damaged"):
        await export(client)


async def test_an_export_ends_at_its_deadline(client: Client, gateway: StandIn):
    gateway.hang_at = 1

    with pytest.raises(DeadlineExceeded):
        async for _ in client.export_session("s-1", timeout_s=0.5):
            pass


async def test_an_import_that_is_refused_early_says_why(client: Client, gateway: StandIn):
    data = await export(client)
    gateway.fail_at = (1, service_errors.AlreadyExistsError("session s-1 exists"))

    with pytest.raises(AlreadyExists, match="session s-1 exists"):
        await client.import_session([data])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "no exported session"),
        (lambda data: b"x" + data, "no exported session"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"\xff\xff\xff\xff", "a piece of 4294967295 bytes"),
        (lambda data: data + b"\x02\x00\x00\x00\xff\xff", "damaged"),
    ],
    ids=["empty", "mark", "cut", "length", "message"],
)
async def test_what_is_no_export_is_refused_and_the_call_ended(
    client: Client, gateway: StandIn, spoil, message: str
):
    data = await export(client)

    with pytest.raises(InvalidRequest, match=message):
        await client.import_session([spoil(data)], "copy")

    assert "copy" not in gateway.sessions


async def test_an_error_of_the_source_comes_out_and_ends_the_call(client: Client, gateway: StandIn):
    data = await export(client)

    async def source() -> AsyncIterator[bytes]:
        yield data[:1000]
        while gateway.calls[-1].method != "ImportSession":  # noqa: ASYNC110  # another thread's
            await asyncio.sleep(0.005)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        await client.import_session(source(), "copy")

    assert await asyncio.to_thread(gateway.cancelled.wait, WAIT_S)
    assert "copy" not in gateway.sessions
