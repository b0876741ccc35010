"""Every wrong request: its status, its details, and a message that helps."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from services.runtime.errors import ERROR_DOMAIN, InvalidRequestError
from services.store import Store, open_store
from services.store.embedded import EmbeddedOptions, EmbeddedValkey
from tests.fakes import (
    ANSWER,
    FINGERPRINT,
    MODEL,
    WAIT_S,
    FakeCluster,
    details,
    error_info,
    generate_request,
    read_rest,
)


async def fail_generate(cluster: FakeCluster, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(**fields)
    assert error_info(caught.value).domain == ERROR_DOMAIN
    return caught.value


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": types_pb2.SamplingParams(**fields)}


def compression(**fields: Any) -> dict[str, Any]:
    return {"compression": types_pb2.CompressionPolicy(**fields)}


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        (sampling(max_tokens=-3), "sampling.max_tokens", "is -3; send 1 or more"),
        (sampling(logit_bias={3: math.nan}), "sampling.logit_bias[3]", "is nan; send -100 to 100"),
        (sampling(logprobs=21), "sampling.logprobs", "is 21; send 0 to 20"),
        (compression(keep_ratio=0), "compression.keep_ratio", "is 0; send"),
        (compression(keep_ratio=1.5), "compression.keep_ratio", "is 1.5; send"),
        (compression(keep_ratio=math.nan), "compression.keep_ratio", "is nan; send"),
        ({"text": ""}, "text", "is empty; send at least one character"),
        ({"session_id": "no spaces"}, "session_id", "send 1 to 64 characters"),
    ],
    ids=[
        "max_tokens",
        "bias",
        "logprobs",
        "ratio_0",
        "ratio_1.5",
        "ratio_nan",
        "empty_text",
        "session_id",
    ],
)
async def test_a_field_out_of_range_is_invalid_argument(
    cluster: FakeCluster, fields: dict[str, Any], path: str, message: str
) -> None:
    error = await fail_generate(cluster, **fields)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(error.details())
    [bad_request] = details(error, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad_request.field_violations] == [path]


async def test_a_request_without_input_is_invalid_argument(cluster: FakeCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.inference.Generate(inference_pb2.GenerateRequest()).read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "input is not set; send one of chat, text and token_ids"


async def test_a_prompt_that_is_too_long_is_the_workers_to_refuse(cluster: FakeCluster) -> None:
    prefill = await cluster.add_prefill()
    await cluster.add_decode()
    prefill.error = InvalidRequestError(
        "prompt has 9000 tokens; send at most 8191", reason="PROMPT_TOO_LONG", field="input"
    )

    error = await fail_generate(cluster)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "prompt has 9000 tokens; send at most 8191"
    assert error_info(error).reason == "PROMPT_TOO_LONG"
    [bad_request] = details(error, error_details_pb2.BadRequest)
    assert bad_request.field_violations[0].field == "input"


async def test_an_unknown_session_is_not_found(cluster: FakeCluster) -> None:
    error = await fail_generate(cluster, session_id="s-none")

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(error).reason == "SESSION_NOT_FOUND"
    [resource] = details(error, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("session", "s-none")


async def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(
    cluster: FakeCluster,
) -> None:
    await cluster.announce("prefill", "127.0.0.1:1")

    error = await fail_generate(cluster, model="gpt-none")

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(error).reason == "MODEL_NOT_FOUND"
    assert error.details() == f"no model 'gpt-none' here; send one of: {MODEL}"


async def test_no_model_is_named_and_several_live(cluster: FakeCluster) -> None:
    await cluster.announce("prefill", "127.0.0.1:1")
    await cluster.announce("prefill", "127.0.0.1:2", model="other-model")

    error = await fail_generate(cluster)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{MODEL}, other-model" in str(error.details())


@pytest.mark.parametrize("call", ["generate", "count_tokens", "create_session"])
async def test_no_worker_at_all_is_unavailable(cluster: FakeCluster, call: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "generate": cluster.generate,
        "count_tokens": lambda: cluster.inference.CountTokens(
            inference_pb2.CountTokensRequest(text="a")
        ),
        "create_session": cluster.create_session,
    }

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calls[call]()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "NO_PREFILL_WORKER"
    [retry] = details(caught.value, error_details_pb2.RetryInfo)
    assert retry.retry_delay == Duration(seconds=1)


async def test_no_decode_worker_is_unavailable_before_anything_is_prefilled(
    cluster: FakeCluster,
) -> None:
    prefill = await cluster.add_prefill()

    error = await fail_generate(cluster)

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(error).reason == "NO_DECODE_WORKER"
    assert prefill.requests == []


async def test_no_prefill_worker_is_unavailable(cluster: FakeCluster) -> None:
    await cluster.add_decode()

    error = await fail_generate(cluster)

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(error).reason == "NO_PREFILL_WORKER"


async def test_another_model_than_the_sessions_is_failed_precondition(
    cluster: FakeCluster,
) -> None:
    await cluster.announce("prefill", "127.0.0.1:1")
    await cluster.create_session(session_id="s-1")

    error = await fail_generate(cluster, session_id="s-1", model="other-model")

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error_info(error).reason == "MODEL_MISMATCH"
    assert f"belongs to model {MODEL!r}, not 'other-model'" in str(error.details())


async def test_a_session_of_other_weights_is_failed_precondition(store: Store) -> None:
    async with FakeCluster(store) as before:
        await before.add_prefill(fingerprint="old-weights")
        await before.add_decode(fingerprint="old-weights")
        await before.create_session(session_id="s-1")
        await before.generate(session_id="s-1")
        for worker in await store.workers():
            await store.withdraw(worker)

    async with FakeCluster(store) as after:
        await after.add_prefill(fingerprint=FINGERPRINT)
        await after.add_decode(fingerprint=FINGERPRINT)
        error = await fail_generate(after, session_id="s-1")

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "other weights" in str(error.details())
    assert error_info(error).metadata == {"session_fingerprint": "old-weights"}


METHODS = [
    "InferenceService/Generate",
    "InferenceService/CountTokens",
    "SessionService/CreateSession",
    "SessionService/GetSession",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "raw", [b"\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["bad_utf8", "no_message"]
)
async def test_raw_bytes_that_are_no_message_are_invalid_argument(
    cluster: FakeCluster, method: str, raw: bytes
) -> None:
    path = f"/chunkserve.v1.{method}"
    channel: Any = cluster.channel
    if method.endswith("Generate"):
        answer = channel.unary_stream(path)(raw).read()
    else:
        answer = channel.unary_unary(path)(raw)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).reason == "MALFORMED_MESSAGE"
    assert "all strings in UTF-8" in str(caught.value.details())


async def test_a_long_text_in_a_wrong_field_does_not_break_the_answer(
    cluster: FakeCluster,
) -> None:
    error = await fail_generate(cluster, session_id="ä" * 1_000_000)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send 1 to 64 characters" in str(error.details())


async def test_a_store_that_went_away_is_unavailable_quickly() -> None:
    with EmbeddedValkey() as server:
        store = open_store(server.url)
        async with FakeCluster(store) as cluster:
            await cluster.add_prefill()
            await cluster.add_decode()
            await cluster.create_session(session_id="s-1")
            server.stop()
            started = time.monotonic()

            error = await fail_generate(cluster, session_id="s-1")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.sessions.ListSessions(session_pb2.ListSessionsRequest())

        await store.close()
    assert time.monotonic() - started < 20
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(error).reason == "STORE_UNAVAILABLE"
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    [retry] = details(error, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0


async def test_one_off_requests_and_recovery_need_no_restart(tmp_path: Path) -> None:
    options = EmbeddedOptions(directory=tmp_path)
    with EmbeddedValkey(options) as server:
        store = open_store(server.url)
        async with closing_store(store), FakeCluster(store, heartbeat_ttl_s=60) as cluster:
            await cluster.add_prefill()
            await cluster.add_decode()
            await cluster.generate()
            server.stop()

            for _ in range(5):  # also once the circuit breaker is open
                events = await cluster.generate()
                assert events[-1].finish.num_generated_tokens == len(ANSWER)
                assert events[0].prompt_info.stored_bytes == 0
            with EmbeddedValkey(options):
                await answers_with_the_store(cluster)


@asynccontextmanager
async def closing_store(store: Store) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await store.close()


async def answers_with_the_store(cluster: FakeCluster) -> None:
    """Wait until a request is answered with its KV stored on the way."""
    async with asyncio.timeout(WAIT_S):
        while (await cluster.generate())[0].prompt_info.stored_bytes == 0:
            pass


async def test_a_store_that_goes_away_during_a_turn_does_not_hold_the_answer_up() -> None:
    with EmbeddedValkey() as server:
        store = open_store(server.url)
        async with FakeCluster(store) as cluster:
            await cluster.add_prefill()
            decode = await cluster.add_decode()
            decode.after_first_token.is_closed = True
            await cluster.create_session(session_id="s-1")
            call = cluster.inference.Generate(generate_request(session_id="s-1"), timeout=WAIT_S)
            for _ in range(2):
                await call.read()

            server.stop()
            decode.after_first_token.released.set()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_rest(call)

        await store.close()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_info(caught.value).reason == "STORE_UNAVAILABLE"


async def test_two_gateways_share_the_lease(store: Store) -> None:
    async with FakeCluster(store) as one, FakeCluster(store) as other:
        await one.add_prefill()
        decode = await one.add_decode()
        decode.after_first_token.is_closed = True
        await one.create_session(session_id="s-1")
        turn = asyncio.create_task(one.generate(session_id="s-1"))
        await asyncio.wait_for(decode.after_first_token.reached.wait(), WAIT_S)

        error = await fail_generate(other, session_id="s-1")

        assert error.code() is grpc.StatusCode.ABORTED
        decode.after_first_token.released.set()
        await turn
