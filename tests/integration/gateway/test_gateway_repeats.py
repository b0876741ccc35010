"""A request that is sent again, and one that waits for its session."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import grpc.aio
import pytest

from chunkserve.v1 import manifest_pb2, types_pb2
from services.runtime.errors import UnavailableError
from tests.fakes import ANSWER, WAIT_S, FakeCluster, FakeDecode, error_info, generate_request


@pytest.fixture
async def decode(cluster: FakeCluster) -> FakeDecode:
    """The decode worker of a cluster with one of each, and the session ``s-1``."""
    await cluster.add_prefill()
    worker = await cluster.add_decode()
    await cluster.create_session(session_id="s-1")
    return worker


async def ask(cluster: FakeCluster, text: str = "Hello", **fields: Any) -> list[Any]:
    return await cluster.generate(text, session_id="s-1", **fields)


async def hold_turn(cluster: FakeCluster, decode: FakeDecode, **fields: Any) -> asyncio.Task[Any]:
    """Begin a turn that stands still after its first token."""
    decode.after_first_token.is_closed = True
    turn = asyncio.create_task(ask(cluster, **fields))
    await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)
    return turn


async def test_the_same_request_again_returns_the_stored_turn(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await ask(cluster, request_id="r-1")

    info, delta, finish = await ask(cluster, request_id="r-1")

    assert info.prompt_info.replayed
    assert info.prompt_info.request_id == "r-1"
    assert info.prompt_info.num_prompt_tokens == info.prompt_info.num_reused_tokens == 5
    assert delta.delta.text == ANSWER.decode()
    assert list(delta.delta.token_ids) == list(ANSWER)
    assert finish == first[-1]
    assert not first[0].prompt_info.replayed
    assert len(decode.requests) == 1


async def test_an_earlier_turn_is_replayed_after_later_ones(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await ask(cluster, request_id="r-1")
    await ask(cluster, request_id="r-2")

    replayed = await ask(cluster, request_id="r-1")

    assert replayed[-1].finish.session_version == first[-1].finish.session_version == 2
    assert len(decode.requests) == 2


async def test_whether_to_wait_is_no_part_of_what_is_asked(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    await ask(cluster, request_id="r-1")

    replayed = await ask(cluster, request_id="r-1", wait_if_busy=True)

    assert replayed[0].prompt_info.replayed


async def test_an_id_of_another_request_is_refused(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    await ask(cluster, request_id="r-1")

    for text, sampling in (("Bye", None), ("Hello", types_pb2.SamplingParams(seed=1))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(cluster, text, request_id="r-1", sampling=sampling)

        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert error_info(caught.value).reason == "REQUEST_ID_REUSED"


async def test_an_id_belongs_to_its_session(cluster: FakeCluster, decode: FakeDecode) -> None:
    await cluster.create_session(session_id="s-2")
    await ask(cluster, request_id="r-1")

    other = await cluster.generate("Bye", session_id="s-2", request_id="r-1")

    assert not other[0].prompt_info.replayed


async def test_a_turn_that_was_cancelled_is_run_again(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    decode.after_first_token.is_closed = True
    request = generate_request(session_id="s-1", request_id="r-1")
    call = cluster.inference.Generate(request, timeout=WAIT_S)
    await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)
    call.cancel()
    await asyncio.wait_for(decode.after_first_token.cancelled.wait(), WAIT_S)
    await cluster.gateway.wait_idle()
    decode.after_first_token.is_closed = False

    again = await ask(cluster, request_id="r-1")

    assert not again[0].prompt_info.replayed
    assert again[-1].finish.session_version == 2


async def test_a_request_without_an_id_is_stored_under_the_one_that_the_server_made(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await ask(cluster)
    made_up = first[0].prompt_info.request_id

    stored = await cluster.store.get_turn_result("default", "s-1", made_up)
    again = await ask(cluster)

    assert stored is not None
    assert not again[0].prompt_info.replayed


async def test_a_turn_that_asked_to_wait_runs_after_the_one_before(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await hold_turn(cluster, decode)
    second = asyncio.create_task(ask(cluster, wait_if_busy=True))
    third = asyncio.create_task(ask(cluster, wait_if_busy=True))

    decode.after_first_token.is_closed = False
    decode.after_first_token.released.set()

    versions = [(await turn)[-1].finish.session_version for turn in (first, second, third)]
    assert versions[0] == 2
    assert sorted(versions) == [2, 3, 4]


async def test_a_turn_waits_no_longer_than_its_deadline(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await hold_turn(cluster, decode)
    request = generate_request(session_id="s-1", wait_if_busy=True)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.inference.Generate(request, timeout=0.3):
            pass

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    decode.after_first_token.released.set()
    assert (await first)[-1].finish.session_version == 2


async def test_the_same_request_while_its_turn_runs_waits_for_its_result(
    cluster: FakeCluster, decode: FakeDecode
) -> None:
    first = await hold_turn(cluster, decode, request_id="r-1", wait_if_busy=True)
    again = asyncio.create_task(ask(cluster, request_id="r-1", wait_if_busy=True))

    decode.after_first_token.released.set()

    assert (await again)[-1] == (await first)[-1]
    assert len(decode.requests) == 1


async def test_a_turn_that_a_worker_commits_while_it_is_repeated_is_one_turn(
    cluster: FakeCluster, decode: FakeDecode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cluster.store
    # A gateway that is killed gives nothing back, and its worker goes on.
    monkeypatch.setattr(store, "release_reserved", AsyncMock())
    decode.errors_at_end = [UnavailableError("gone", reason="WORKER_UNAVAILABLE")]
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(cluster, request_id="r-1")
    [late] = decode.requests
    late.manifest.token_ids.extend(ANSWER)
    look, commits = store.get_turn_result, [decode._commit]

    async def look_before_the_commit(*args: Any) -> bytes | None:
        found = await look(*args)
        while commits:
            await commits.pop()(late, types_pb2.Finish(num_generated_tokens=len(ANSWER)))
        return found

    monkeypatch.setattr(store, "get_turn_result", look_before_the_commit)

    again = await ask(cluster, request_id="r-1")

    assert b"".join(bytes(event.delta.token_ids) for event in again) == ANSWER
    assert again[-1].WhichOneof("event") == "finish"
    stored = await store.get_manifest("default", "s-1")
    assert manifest_pb2.Manifest.FromString(stored.body).num_turns == 1
