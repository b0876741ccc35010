"""The asynchronous client against a real gRPC server."""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chunkserve_client import (
    AlreadyExists,
    Cancelled,
    ChunkServeError,
    Client,
    Compression,
    DataLoss,
    DeadlineExceeded,
    Finish,
    InternalError,
    InvalidRequest,
    Mismatch,
    Model,
    NotFound,
    Overloaded,
    PromptInfo,
    SessionBusy,
    SessionNotFound,
    TokenCount,
    TokenDelta,
    Unavailable,
)
from services.runtime import errors as service_errors
from tests.integration.client_stand_in import WAIT_S, StandIn, Status


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn.serve() as stand_in:
        yield stand_in


@pytest.fixture
async def client(gateway: StandIn) -> AsyncIterator[Client]:
    async with Client(gateway.address, max_retries=0) as opened:
        yield opened


@pytest.fixture
def unused_address() -> Iterator[str]:
    with socket.socket() as bound:  # bound but not listening: refused, and nobody else's
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def tls_files(tmp_path: Path) -> tuple[bytes, bytes]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    subject = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(
        [*command.split(), *subject.split(), "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
        timeout=WAIT_S,
    )
    return key.read_bytes(), certificate.read_bytes()


async def happened(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, WAIT_S)


async def test_answer_streams_its_text(client: Client):
    answer = client.generate("Capital of France?")

    texts = [text async for text in answer]

    assert texts == ["Par", "is", " is big."]
    assert answer.text == "Paris is big."
    assert answer.token_ids == (100, 101, 102, 103)


async def test_events_come_in_order_and_stay_readable(client: Client):
    answer = client.generate("hi", seed=3)
    assert (answer.prompt_info, answer.finish, answer.text) == (None, None, "")

    events = [event async for event in answer.events()]

    assert [type(event) for event in events] == [PromptInfo, *[TokenDelta] * 4, Finish]
    assert answer.prompt_info is events[0]
    assert answer.finish is events[-1]
    assert answer.prompt_info.request_id == answer.request_id
    assert (answer.finish.reason, answer.finish.matched_stop, answer.finish.seed) == (
        "stop",
        "!",
        3,
    )


async def test_prompt_info_is_there_with_the_first_text(client: Client):
    async with client.generate("hi") as answer:
        async for _ in answer:
            assert answer.prompt_info is not None
            assert answer.prompt_info.num_kept_tokens == 100
            break


async def test_result_waits_for_all_of_it(client: Client):
    answer = client.generate("hi")

    result = await answer.result()

    assert result.text == "Paris is big."
    assert result.prompt_info.num_prompt_tokens == 1000
    assert result.finish.num_generated_tokens == 4
    assert await answer.result() == result


async def test_nothing_is_sent_before_the_iteration(client: Client, gateway: StandIn):
    answer = client.generate("hi")
    await answer.aclose()

    with pytest.raises(Cancelled):
        await answer.result()
    assert gateway.calls == []


async def test_answer_is_iterated_once(client: Client):
    answer = client.generate("hi")
    await answer.result()

    with pytest.raises(RuntimeError, match="once"):
        [text async for text in answer]


async def test_call_carries_deadline_token_and_request_id(gateway: StandIn):
    async with Client(gateway.address, token="secret", timeout_s=30) as client:
        await client.generate("hi", request_id="mine", timeout_s=20).result()
        await client.list_models()

    first, second = gateway.calls
    assert first.metadata["authorization"] == second.metadata["authorization"] == "Bearer secret"
    assert first.metadata["x-request-id"] == first.request.request_id == "mine"
    # gRPC rounds deadlines up on the way.
    assert 10 < first.time_remaining_s < 22
    assert 22 < second.time_remaining_s < 32


async def test_request_id_that_is_no_header_is_left_to_the_server(client: Client, gateway: StandIn):
    await client.generate("hi", request_id="naïve").result()

    assert gateway.calls[0].request.request_id == "naïve"
    assert "x-request-id" not in gateway.calls[0].metadata


async def test_leaving_the_loop_cancels_the_answer(client: Client, gateway: StandIn):
    gateway.hang_at = 2

    async for text in client.generate("hi"):
        assert text == "Par"
        break

    assert await happened(gateway.cancelled)


async def test_error_in_the_loop_cancels_the_answer(client: Client, gateway: StandIn):
    gateway.hang_at = 2

    async def fail_at_first_text() -> None:
        async for _ in client.generate("hi"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_at_first_text()
    assert await happened(gateway.cancelled)


async def test_closing_an_answer_from_another_task_ends_its_reader(
    client: Client, gateway: StandIn
):
    gateway.hang_at = 2
    answer = client.generate("hi")
    has_read = asyncio.Event()

    async def read() -> None:
        async for _ in answer:
            if answer.text == "Paris":
                has_read.set()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(WAIT_S):
        await has_read.wait()
    await answer.aclose()

    with pytest.raises(Cancelled):
        await reader
    with pytest.raises(Cancelled):
        await answer.result()
    assert await happened(gateway.cancelled)
    assert answer.text == "Paris"


async def test_cancelling_the_task_cancels_the_answer(client: Client, gateway: StandIn):
    gateway.hang_at = 0
    reader = asyncio.create_task(client.generate("hi").result())
    assert await happened(gateway.hanging)

    reader.cancel()

    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await happened(gateway.cancelled)


async def test_closing_the_client_cancels_its_answers(gateway: StandIn):
    gateway.hang_at = 0
    client = Client(gateway.address)
    reader = asyncio.create_task(client.generate("hi").result())
    assert await happened(gateway.hanging)

    await client.aclose()

    with pytest.raises(Cancelled):
        await reader
    with pytest.raises(RuntimeError, match="closed"):
        await client.list_models()


async def test_deadline_of_an_answer_covers_the_stream(client: Client, gateway: StandIn):
    gateway.hang_at = 2

    with pytest.raises(DeadlineExceeded, match=r"timeout_s=2\.5"):
        await client.generate("hi", timeout_s=2.5).result()

    assert await happened(gateway.cancelled)


async def test_stream_without_an_end_is_an_error(client: Client, gateway: StandIn):
    gateway.is_cut = True

    with pytest.raises(InternalError, match="without its last event"):
        await client.generate("hi").result()


async def test_error_in_the_stream_keeps_what_came_before(client: Client, gateway: StandIn):
    gateway.fail_at = (2, service_errors.UnavailableError("worker died"))
    answer = client.generate("hi")

    with pytest.raises(Unavailable, match="worker died"):
        await answer.result()

    assert answer.text == "Paris"
    assert answer.finish is None


async def test_remote_cancel_is_an_error_and_not_a_cancelled_task(client: Client, gateway: StandIn):
    gateway.fail_at = (1, Status(grpc.StatusCode.CANCELLED, "shutting down"))

    with pytest.raises(Cancelled):
        await client.generate("hi").result()


SERVICE_ERRORS = {
    service_errors.InvalidRequestError: InvalidRequest,
    service_errors.NotFoundError: NotFound,
    service_errors.AlreadyExistsError: AlreadyExists,
    service_errors.ConflictError: SessionBusy,
    service_errors.MismatchError: Mismatch,
    service_errors.CorruptError: DataLoss,
    service_errors.OverloadedError: Overloaded,
    service_errors.UnavailableError: Unavailable,
    service_errors.DeadlineError: DeadlineExceeded,
}


def test_every_service_error_is_mapped():
    assert set(SERVICE_ERRORS) == set(service_errors.STATUS_CODES)


@pytest.mark.parametrize("kind", SERVICE_ERRORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", ["stream", "unary"])
async def test_service_error_arrives_whole(
    client: Client, gateway: StandIn, kind: type[service_errors.ServiceError], method: str
):
    gateway.failures.append(
        kind("what to do", metadata={"a": "b"}, field="sampling.top_p", retry_after_s=1.5)
    )

    call = client.generate("hi").result() if method == "stream" else client.list_models()
    with pytest.raises(ChunkServeError) as caught:
        await call

    error = caught.value
    assert type(error) is SERVICE_ERRORS[kind]
    assert (error.message, error.reason, error.retry_after_s) == ("what to do", kind.reason, 1.5)
    assert error.metadata["a"] == "b"
    assert error.field_violations[0].field == "sampling.top_p"
    assert error.request_id == gateway.calls[0].metadata["x-request-id"]


async def test_no_gateway_is_unavailable(unused_address: str):
    async with Client(unused_address, max_retries=0) as client:
        with pytest.raises(Unavailable, match=f"no answer from {unused_address}"):
            await client.list_models()


async def test_server_of_another_kind_is_named(gateway: StandIn):
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(InternalError, match="is it a ChunkServe gateway"):
            await client.list_models()
    await server.stop(None)


async def test_session_lives_from_creation_to_deletion(client: Client):
    policy = Compression(keep_ratio=0.1, unit="chunk", chunk_size=20)
    session = await client.create_session("s-1", compression=policy, ttl_s=90)
    assert (session.session_id, session.info.version, session.info.ttl_s) == ("s-1", 1, 90)
    assert session.info.compression == policy

    await session.generate("first").result()
    info = await session.refresh()
    assert (info.num_turns, info.version, session.info) == (1, 2, info)
    assert info.segments[0].num_kept_tokens == 104
    assert info.create_time.isoformat() == "2026-01-02T03:04:05+00:00"

    same = await client.get_session("s-1")
    assert same.info == info
    await client.generate("second", session=same).result()
    await client.generate("third", session="s-1").result()
    assert (await session.refresh()).num_turns == 3

    await session.delete()
    with pytest.raises(SessionNotFound):
        await session.refresh()
    with pytest.raises(SessionNotFound):
        await session.generate("fourth").result()
    with pytest.raises(SessionNotFound):
        await client.delete_session("s-1")


async def test_listing_walks_over_all_pages(client: Client, gateway: StandIn):
    for _ in range(5):
        await client.create_session()

    ids = [session.session_id async for session in client.list_sessions(page_size=2)]

    assert ids == ["s-0", "s-1", "s-2", "s-3", "s-4"]
    pages = [call.request for call in gateway.calls if call.method == "ListSessions"]
    assert [(page.page_size, page.page_token) for page in pages] == [(2, ""), (2, "2"), (2, "4")]


async def test_tokens_are_counted(client: Client):
    assert await client.count_tokens("one two three") == TokenCount(3, "tiny")
    assert await client.count_tokens(text="one two") == TokenCount(2, "tiny")


async def test_models_are_listed(client: Client):
    default = Compression(keep_ratio=0.1, chunk_size=10)

    assert await client.list_models() == (Model("tiny", 8192, "f00d", 1, 2, default),)


async def test_channel_of_the_caller_is_used_and_left_open(gateway: StandIn):
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        async with Client("nowhere.invalid:1", channel=channel) as client:
            await client.list_models()
        async with Client(channel=channel) as client:
            await client.list_models()


async def test_abandoned_client_leaves_nothing_behind(gateway: StandIn):
    client = Client(gateway.address)
    await client.list_models()
    del client

    gc.collect()  # a warning about something unclosed would fail the test


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
async def test_timeout_that_is_none_is_refused(client: Client, timeout_s: float):
    with pytest.raises(ValueError, match="timeout_s"):
        Client(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        client.generate("hi", timeout_s=timeout_s)


@pytest.mark.parametrize("token", ["", " x", "a\nb", "é"])
def test_token_that_is_no_header_is_refused(token: str):
    with pytest.raises(ValueError, match="token"):
        Client(token=token)


def test_misspelt_client_option_is_refused():
    with pytest.raises(TypeError, match="'timeout'"):
        Client(timeout=3)  # type: ignore[call-arg]


async def test_tls_with_the_callers_certificate(tls_files: tuple[bytes, bytes]):
    key, certificate = tls_files
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    credentials = grpc.ssl_channel_credentials(certificate)

    async with Client(f"localhost:{port}", credentials=credentials) as client:
        with pytest.raises(InternalError, match="does not offer this method"):
            await client.list_models()  # so the handshake is behind us
    async with Client(f"localhost:{port}", tls=True, max_retries=0) as client:
        with pytest.raises(Unavailable):  # the system does not know this certificate
            await client.list_models()
    await server.stop(None)
