"""What surrounds every call: request id, log line, errors. Real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, NoReturn

import grpc.aio
import pytest
import structlog

from chunkserve.v1 import inference_pb2, session_pb2, session_pb2_grpc
from services.runtime import interceptors
from services.runtime.errors import NotFoundError
from services.runtime.interceptors import (
    ErrorInterceptor,
    bind_request_id,
    current_request_id,
    request_id_metadata,
)
from services.runtime.server import GrpcServer, open_channel
from services.runtime.telemetry import add_request_fields
from tests.fakes import WAIT_S, error_info

COUNT = inference_pb2.CountTokensRequest(text="abc")
GENERATE = inference_pb2.GenerateRequest()

# From one second on, gRPC rounds a deadline up on the wire, and the caller gives up before the
# server knows why.
DEADLINE_S = 0.9


class Log(list[dict[str, Any]]):
    """Takes the place of the log's output, and can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._is_done = asyncio.Event()

    def __call__(self, logger: Any, level: str, event: Any) -> NoReturn:
        self.append({**event, "level": level})
        if event["event"].endswith(".done"):
            self._is_done.set()
        raise structlog.DropEvent

    async def wait(self) -> None:
        """Wait for a request's last line: the caller may have its status before."""
        await asyncio.wait_for(self._is_done.wait(), WAIT_S)


@pytest.fixture
def events() -> Iterator[Log]:
    """All events that are logged."""
    log = Log()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, log])
    yield log
    structlog.reset_defaults()


async def test_a_service_error_becomes_its_status(stub: Any, scripted: Any) -> None:
    async def act(context: Any) -> None:
        raise NotFoundError("session s-1 is gone", reason="SESSION_NOT_FOUND")

    scripted.act = act

    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await stub.CountTokens(COUNT)
    call = stub.Generate(GENERATE)
    assert [await call.read() for _ in range(2)] == [inference_pb2.GenerateResponse()] * 2
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await call.read()

    for caught in (unary, stream):
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "session s-1 is gone"
        assert error_info(caught.value).reason == "SESSION_NOT_FOUND"


async def test_a_bug_becomes_a_fixed_text_and_a_traceback_in_the_log(
    stub: Any, scripted: Any, events: Log
) -> None:
    async def act(context: Any) -> None:
        raise RuntimeError("secret")

    scripted.act = act

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(COUNT, metadata=(("x-request-id", "r-1"),))
    await events.wait()

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    assert error_info(caught.value).metadata == {"request_id": "r-1"}
    failed, done = events
    assert (failed["event"], failed["exc_info"]) == ("request.failed", True)
    assert (done["event"], done["code"]) == ("count_tokens.done", "INTERNAL")


async def test_a_status_that_the_handler_sent_itself_is_kept(stub: Any, scripted: Any) -> None:
    async def act(context: Any) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")

    scripted.act = act

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(COUNT)

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "by hand")


async def test_a_failure_after_the_deadline_is_not_an_internal_error(
    stub: Any, scripted: Any, events: Log
) -> None:
    has_ended = asyncio.Event()

    async def act(context: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            has_ended.set()
            raise RuntimeError("broken off") from None

    scripted.act = act

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CountTokens(COUNT, timeout=DEADLINE_S)
    await asyncio.wait_for(has_ended.wait(), WAIT_S)
    await events.wait()

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert [(event["event"], event["code"]) for event in events] == [
        ("count_tokens.done", "DEADLINE_EXCEEDED")
    ]


async def test_a_write_to_a_caller_who_has_left_is_no_internal_error(
    stub: Any, scripted: Any, events: Log
) -> None:
    has_begun = asyncio.Event()

    async def act(context: Any) -> None:
        has_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise grpc.aio.InternalError("Failed to write") from None

    scripted.act = act
    call = stub.CountTokens(COUNT)
    await asyncio.wait_for(has_begun.wait(), WAIT_S)

    call.cancel()
    await events.wait()

    assert [(event["event"], event["code"]) for event in events] == [
        ("count_tokens.done", "CANCELLED")
    ]


@pytest.mark.parametrize(
    ("timeout_s", "code"), [(None, "CANCELLED"), (DEADLINE_S, "DEADLINE_EXCEEDED")]
)
async def test_a_cancelled_stream_is_closed_in_its_own_task(
    stub: Any, scripted: Any, events: Log, timeout_s: float | None, code: str
) -> None:
    async def act(context: Any) -> None:
        await asyncio.Event().wait()

    scripted.act = act
    call = stub.Generate(GENERATE, timeout=timeout_s)
    for _ in range(2):
        await call.read()

    if timeout_s is None:
        call.cancel()
    await asyncio.wait_for(scripted.closed.wait(), WAIT_S)
    await events.wait()

    assert scripted.closed_in is scripted.handled_in
    assert [event["code"] for event in events] == [code]


async def test_a_stream_that_is_cancelled_while_it_writes_is_closed_in_its_own_task(
    stub: Any, scripted: Any
) -> None:
    scripted.num_events = 10_000_000  # nobody reads them: the flow control stops the writer
    call = stub.Generate(GENERATE)
    await call.read()

    call.cancel()

    await asyncio.wait_for(scripted.closed.wait(), WAIT_S)
    assert scripted.closed_in is scripted.handled_in


@pytest.mark.parametrize("raw", [b"\x0a\x02\xff\xfe", b"\xff\xff"], ids=["utf8", "no_message"])
async def test_bytes_that_are_no_message_are_invalid_argument(channel: Any, raw: bytes) -> None:
    path = "/chunkserve.v1.InferenceService/"

    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await channel.unary_unary(f"{path}CountTokens")(raw)
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await channel.unary_stream(f"{path}Generate")(raw).read()

    for caught in (unary, stream):
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error_info(caught.value).reason == "MALFORMED_MESSAGE"
        assert "encode it with the published .proto files" in str(caught.value.details())


async def test_a_method_that_does_not_exist_is_unimplemented(channel: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/chunkserve.v1.InferenceService/Nothing")(b"")

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_request_id_of_the_caller_is_bound(stub: Any, scripted: Any, events: Log) -> None:
    seen = []

    async def act(context: Any) -> None:
        seen.append((current_request_id(), request_id_metadata()))

    scripted.act = act

    await stub.CountTokens(COUNT, metadata=(("x-request-id", "r-1"),))

    assert seen == [("r-1", (("x-request-id", "r-1"),))]
    assert events[0]["request_id"] == "r-1"
    assert current_request_id() == ""
    assert request_id_metadata() == ()


@pytest.mark.parametrize("sent", [(), (("x-request-id", "x" * 129),)], ids=["none", "too_long"])
async def test_a_request_without_a_proper_id_gets_one(
    stub: Any, events: Log, sent: tuple[Any, ...]
) -> None:
    for _ in range(2):
        await stub.CountTokens(COUNT, metadata=sent)

    ids = {event["request_id"] for event in events}
    assert len(ids) == 2
    assert {len(request_id) for request_id in ids} == {32}


async def test_one_line_is_logged_with_what_the_servicer_adds(
    stub: Any, scripted: Any, events: Log
) -> None:
    async def act(context: Any) -> None:
        bind_request_id("renamed")
        add_request_fields(num_prompt_tokens=3)

    scripted.act = act

    await stub.ListModels(inference_pb2.ListModelsRequest())

    [line] = events
    assert line.pop("duration_ms") > 0
    assert line == {
        "event": "list_models.done",
        "method": "/chunkserve.v1.InferenceService/ListModels",
        "code": "OK",
        "num_prompt_tokens": 3,
        "request_id": "renamed",
        "level": "info",
    }


async def test_fields_outside_of_a_request_go_nowhere() -> None:
    add_request_fields(num_prompt_tokens=3)


IMPORT = "/chunkserve.v1.SessionService/ImportSession"


class Importer(session_pb2_grpc.SessionServiceServicer):
    """Counts the messages of a stream."""

    async def ImportSession(
        self, request: AsyncIterator[session_pb2.ImportSessionRequest], context: Any
    ) -> session_pb2.ImportSessionResponse:
        add_request_fields(session_id=current_request_id())
        num_pieces = 0
        async for message in request:
            num_pieces += 1
            if message.new_session_id == "taken":
                raise NotFoundError("gone")
        return session_pb2.ImportSessionResponse(session=session_pb2.Session(num_tokens=num_pieces))


@pytest.fixture
async def importer() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of a method with streaming requests."""
    add = partial(session_pb2_grpc.add_SessionServiceServicer_to_server, Importer())
    server = GrpcServer("127.0.0.1:0", [add], [])
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def test_a_stream_of_requests_is_served_and_logged_under_its_id(
    importer: Any, events: Log
) -> None:
    pieces = [session_pb2.ImportSessionRequest()] * 3
    call = session_pb2_grpc.SessionServiceStub(importer).ImportSession(
        iter(pieces), metadata=(("x-request-id", "r-1"),)
    )

    response = await call

    assert response.session.num_tokens == 3
    await events.wait()
    [line] = [event for event in events if event["event"] == "import_session.done"]
    assert (line["code"], line["request_id"], line["session_id"]) == ("OK", "r-1", "r-1")


async def test_an_error_in_a_stream_of_requests_becomes_its_status(importer: Any) -> None:
    pieces = [session_pb2.ImportSessionRequest(new_session_id="taken")] * 3

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await session_pb2_grpc.SessionServiceStub(importer).ImportSession(iter(pieces))

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_refused_stream_is_not_read_for_ever(
    importer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "_READ_REST_S", 0.01)
    call = session_pb2_grpc.SessionServiceStub(importer).ImportSession()
    await call.write(session_pb2.ImportSessionRequest(new_session_id="taken"))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, WAIT_S)

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_bytes_in_a_stream_that_are_no_message_are_invalid_argument(importer: Any) -> None:
    good = session_pb2.ImportSessionRequest().SerializeToString()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await importer.stream_unary(IMPORT)(iter([good, b"\xff\xff"]))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).reason == "MALFORMED_MESSAGE"


async def test_streams_both_ways_are_not_served_silently() -> None:
    handler: Any = grpc.stream_stream_rpc_method_handler(lambda requests, context: None)

    class Details:
        method = "/chunkserve.v1.Some/Method"
        invocation_metadata = ()

    async def find_handler(details: Any) -> Any:
        return handler

    with pytest.raises(NotImplementedError, match="stream both ways"):
        await ErrorInterceptor().intercept_service(find_handler, Details())  # type: ignore[arg-type]


async def test_methods_that_are_not_ours_are_left_alone() -> None:
    handler: Any = grpc.stream_unary_rpc_method_handler(lambda requests, context: None)

    class Details:
        method = "/grpc.health.v1.Health/Watch"
        invocation_metadata = ()

    async def find_handler(details: Any) -> Any:
        return handler

    found = await ErrorInterceptor().intercept_service(find_handler, Details())  # type: ignore[arg-type]

    assert found is handler
