"""SessionService over the real store."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from chunkserve.v1 import session_pb2, types_pb2
from tests.fakes import ANSWER, MODEL, WAIT_S, FakeCluster, details, error_info


@pytest.fixture(autouse=True)
async def a_model(cluster: FakeCluster) -> None:
    """A model that sessions can name."""
    await cluster.announce("prefill", "127.0.0.1:1", worker_id="p-nowhere", num_active=4)


async def list_page(cluster: FakeCluster, **fields: Any) -> session_pb2.ListSessionsResponse:
    return await cluster.sessions.ListSessions(session_pb2.ListSessionsRequest(**fields))


async def test_a_created_session_is_shown_as_asked(cluster: FakeCluster) -> None:
    policy = types_pb2.CompressionPolicy(keep_ratio=0.5, scope=types_pb2.SCOPE_LAYER)

    created = await cluster.create_session(
        session_id="s-1", model=MODEL, compression=policy, ttl=Duration(seconds=90)
    )
    shown = await cluster.sessions.GetSession(session_pb2.GetSessionRequest(session_id="s-1"))

    assert (created.session_id, created.model, created.version) == ("s-1", MODEL, 1)
    assert created.compression == policy
    assert created.ttl == Duration(seconds=90)
    now_s = time.time()
    assert created.create_time.ToNanoseconds() / 1e9 == pytest.approx(now_s, rel=0, abs=30)
    assert created.expire_time.ToNanoseconds() / 1e9 == pytest.approx(now_s + 90, rel=0, abs=30)
    shown.session.expire_time.CopyFrom(created.expire_time)
    assert shown.session == created


async def test_what_is_not_asked_is_the_servers(cluster: FakeCluster) -> None:
    created = await cluster.create_session()

    assert created.session_id.startswith("s-")
    assert created.model == MODEL
    assert created.ttl == Duration(seconds=86_400)
    assert not created.HasField("compression")


async def test_a_session_that_exists_is_not_created_again(cluster: FakeCluster) -> None:
    await cluster.create_session(session_id="s-1")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.create_session(session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_info(caught.value).reason == "ALREADY_EXISTS"


async def test_a_session_of_an_unknown_model_is_not_created(cluster: FakeCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.create_session(model="gpt-none")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(caught.value).reason == "MODEL_NOT_FOUND"


async def test_sessions_are_listed_by_pages_oldest_first_without_segments(
    cluster: FakeCluster,
) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    for i in range(3):
        await cluster.create_session(session_id=f"s-{i}")
    await cluster.generate("0123456789", session_id="s-0")

    first = await list_page(cluster, page_size=2)
    second = await list_page(cluster, page_size=2, page_token=first.next_page_token)

    assert [session.session_id for session in first.sessions] == ["s-0", "s-1"]
    assert [session.session_id for session in second.sessions] == ["s-2"]
    assert second.next_page_token == ""
    assert len(first.sessions[0].segments) == 0
    assert first.sessions[0].num_tokens == 10 + len(ANSWER)
    assert first.sessions[0].stored_bytes == 10 * (10 + len(ANSWER))
    assert first.sessions[0].num_kept_tokens > 0


async def test_a_shown_session_has_its_segments(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    await cluster.generate("0123456789", session_id="s-1")

    shown = await cluster.sessions.GetSession(session_pb2.GetSessionRequest(session_id="s-1"))

    spans = [(segment.first_token, segment.num_tokens) for segment in shown.session.segments]
    assert spans == [(0, 9), (9, 1 + len(ANSWER))]


async def test_a_page_token_that_was_made_up_is_invalid_argument(cluster: FakeCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await list_page(cluster, page_token="made up")

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [bad_request] = details(caught.value, error_details_pb2.BadRequest)
    assert bad_request.field_violations[0].field == "page_token"


async def test_a_deleted_session_is_gone(cluster: FakeCluster) -> None:
    await cluster.create_session(session_id="s-1")

    await cluster.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s-1"))

    assert list((await list_page(cluster)).sessions) == []
    for method in ("GetSession", "DeleteSession"):
        request = getattr(session_pb2, f"{method}Request")(session_id="s-1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(cluster.sessions, method)(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert error_info(caught.value).reason == "SESSION_NOT_FOUND"


async def test_a_session_whose_turn_is_running_is_not_deleted(cluster: FakeCluster) -> None:
    await cluster.add_prefill()
    decode = await cluster.add_decode()
    decode.after_first_token.is_closed = True
    await cluster.create_session(session_id="s-1")
    turn = asyncio.create_task(cluster.generate(session_id="s-1"))
    await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s-1"))

    assert caught.value.code() is grpc.StatusCode.ABORTED
    decode.after_first_token.released.set()
    await turn


@pytest.mark.parametrize("method", ["GetSession", "DeleteSession"])
async def test_an_empty_session_id_is_invalid_argument(cluster: FakeCluster, method: str) -> None:
    request = getattr(session_pb2, f"{method}Request")()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(cluster.sessions, method)(request)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send 1 to 64 characters" in str(caught.value.details())


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"ttl": Duration(nanos=1)}, "ttl"),
        ({"ttl": Duration(seconds=8 * 86_400)}, "ttl"),
        ({"session_id": "a/b"}, "session_id"),
        ({"compression": types_pb2.CompressionPolicy(chunk_size=0)}, "compression.chunk_size"),
    ],
    ids=["ttl_short", "ttl_long", "session_id", "chunk_size"],
)
async def test_a_wrong_field_of_a_new_session_is_invalid_argument(
    cluster: FakeCluster, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.create_session(**fields)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [bad_request] = details(caught.value, error_details_pb2.BadRequest)
    assert bad_request.field_violations[0].field == path


@pytest.mark.parametrize("page_size", [-1, 1001])
async def test_a_page_size_out_of_range_is_invalid_argument(
    cluster: FakeCluster, page_size: int
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await list_page(cluster, page_size=page_size)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
