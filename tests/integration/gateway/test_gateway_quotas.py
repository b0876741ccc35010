"""Sessions, stored bytes and concurrent turns of a tenant are limited."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from chunkserve.v1 import session_pb2
from services.store import Store
from tests.fakes import WAIT_S, FakeCluster, details, error_info


def check_exceeded(error: grpc.aio.AioRpcError, quota: str, limit: int) -> None:
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = error_info(error)
    assert (info.reason, info.metadata["quota"]) == ("QUOTA_EXCEEDED", quota)
    assert info.metadata["limit"] == str(limit)
    assert int(info.metadata["used"]) >= limit
    [failure] = details(error, error_details_pb2.QuotaFailure)
    [violation] = failure.violations
    assert violation.subject == "tenant:default"
    assert violation.description == error.details()


async def add_workers(cluster: FakeCluster) -> Any:
    await cluster.add_prefill()
    return await cluster.add_decode()


async def test_no_more_sessions_are_made_than_the_quota(store: Store) -> None:
    async with FakeCluster(store, quota_sessions=2) as cluster:
        await add_workers(cluster)
        await cluster.create_session(session_id="s-1")
        await cluster.create_session(session_id="s-2")
        export = cluster.sessions.ExportSession(session_pb2.ExportSessionRequest(session_id="s-1"))
        requests = [
            session_pb2.ImportSessionRequest(piece=response.piece, new_session_id="s-3")
            async for response in export
        ]

        for call in (
            lambda: cluster.create_session(session_id="s-3"),
            lambda: cluster.sessions.ForkSession(session_pb2.ForkSessionRequest(session_id="s-1")),
            lambda: cluster.sessions.ImportSession(iter(requests)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            check_exceeded(caught.value, "sessions", 2)

        await cluster.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s-1"))
        await cluster.create_session(session_id="s-3")


async def test_a_tenant_over_its_bytes_takes_no_more_turns_until_it_deletes_some(
    store: Store,
) -> None:
    async with FakeCluster(store, quota_stored_bytes=500) as cluster:
        await add_workers(cluster)
        await cluster.create_session(session_id="s-1")
        await cluster.create_session(session_id="s-2")
        await cluster.generate(session_id="s-1")
        await cluster.generate(session_id="s-1")

        for session_id in ("s-1", "s-2"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.generate(session_id=session_id)
            check_exceeded(caught.value, "stored_bytes", 500)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.create_session()
        check_exceeded(caught.value, "stored_bytes", 500)

        # A one-off request stores nothing that stays.
        assert len(await cluster.generate()) > 2
        await cluster.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s-1"))
        assert len(await cluster.generate(session_id="s-2")) > 2


async def test_a_stored_result_is_returned_although_the_bytes_are_used_up(store: Store) -> None:
    async with FakeCluster(store, quota_stored_bytes=1) as cluster:
        await add_workers(cluster)
        await cluster.create_session(session_id="s-1")
        await cluster.generate(session_id="s-1", request_id="r-1")

        again = await cluster.generate(session_id="s-1", request_id="r-1")

    assert again[0].prompt_info.replayed


async def test_no_more_turns_run_at_once_than_the_quota_on_all_gateways(store: Store) -> None:
    async with (
        FakeCluster(store, quota_concurrent_turns=1) as one,
        FakeCluster(store, quota_concurrent_turns=1) as other,
    ):
        decode = await add_workers(one)
        decode.after_first_token.is_closed = True
        turn = asyncio.create_task(one.generate())
        await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.generate()

        check_exceeded(caught.value, "concurrent_turns", 1)
        assert len(details(caught.value, error_details_pb2.RetryInfo)) == 1
        decode.after_first_token.is_closed = False
        decode.after_first_token.released.set()
        await turn
        await one.gateway.wait_idle()
        assert len(await other.generate()) > 2


async def test_without_quotas_nothing_is_limited(store: Store) -> None:
    async with FakeCluster(store) as cluster:
        await add_workers(cluster)
        for i in range(5):
            await cluster.create_session(session_id=f"s-{i}")

        answers = await asyncio.gather(*(cluster.generate(session_id=f"s-{i}") for i in range(5)))

    assert len(answers) == 5
