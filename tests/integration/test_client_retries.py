"""What the client tries again, and what it must not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from chunkserve_client import (
    Cancelled,
    Client,
    DataLoss,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    SessionBusy,
    Unavailable,
)
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from tests.integration.client_stand_in import WAIT_S, StandIn, Status


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn.serve() as stand_in:
        yield stand_in


@pytest.fixture
async def client(gateway: StandIn) -> AsyncIterator[Client]:
    async with Client(gateway.address, max_retries=2) as opened:
        yield opened


def away(retry_after_s: float | None = 0.01) -> ServiceError:
    return UnavailableError("no worker", retry_after_s=retry_after_s)


def full() -> ServiceError:
    return OverloadedError("all full", retry_after_s=0.01)


def count(gateway: StandIn, method: str) -> int:
    return sum(call.method == method for call in gateway.calls)


@pytest.mark.parametrize(
    "failure",
    [away(), full(), away(None), Status(grpc.StatusCode.UNAVAILABLE, "proxy says no")],
    ids=["unavailable", "overloaded", "no_delay_named", "no_details"],
)
async def test_answer_is_asked_again_before_its_first_event(
    client: Client, gateway: StandIn, failure: ServiceError | Status
):
    gateway.failures.extend([failure, failure])

    result = await client.generate("hi", request_id="r-1").result()

    assert result.text == "Paris is big."
    assert [call.request.request_id for call in gateway.calls] == ["r-1"] * 3


async def test_answer_is_not_asked_again_after_its_first_event(client: Client, gateway: StandIn):
    gateway.fail_at = (0, away())

    with pytest.raises(Unavailable):
        await client.generate("hi").result()

    assert count(gateway, "Generate") == 1


async def test_retries_are_bounded(client: Client, gateway: StandIn):
    gateway.failures.extend([full()] * 5)

    with pytest.raises(Overloaded):
        await client.generate("hi").result()

    assert count(gateway, "Generate") == 3


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ConflictError("busy", retry_after_s=0.01), SessionBusy),
        (CorruptError("damaged"), DataLoss),
        (Status(grpc.StatusCode.INTERNAL, "bug"), InternalError),
        (Status(grpc.StatusCode.CANCELLED, "no"), Cancelled),
    ],
    ids=["aborted", "data_loss", "internal", "cancelled"],
)
async def test_other_errors_are_not_tried_again(
    client: Client, gateway: StandIn, failure: ServiceError | Status, error: type[Exception]
):
    gateway.failures.append(failure)

    with pytest.raises(error):
        await client.generate("hi").result()

    assert count(gateway, "Generate") == 1


async def test_reads_are_tried_again(client: Client, gateway: StandIn):
    await client.create_session("s-1")
    gateway.failures.append(away())
    assert len(await client.list_models()) == 1
    gateway.failures.append(away())
    assert (await client.count_tokens("a b")).num_tokens == 2
    gateway.failures.append(away())
    assert [session.session_id async for session in client.list_sessions()] == ["s-1"]
    gateway.failures.append(away())
    session = await client.get_session("s-1")

    # A second attempt at these could report what the first one did.
    gateway.failures.append(away())
    with pytest.raises(Unavailable):
        await session.delete()
    gateway.failures.append(away())
    with pytest.raises(Unavailable):
        await client.create_session("s-2")


async def test_named_delay_is_waited_for(client: Client, gateway: StandIn):
    gateway.failures.append(away(0.3))
    start = time.monotonic()

    await client.list_models()

    assert time.monotonic() - start >= 0.3


async def test_delay_past_the_deadline_is_not_waited_for(client: Client, gateway: StandIn):
    gateway.failures.append(away(240))
    start = time.monotonic()

    with pytest.raises(Unavailable):
        await client.generate("hi", timeout_s=120).result()

    assert time.monotonic() - start < 60
    assert count(gateway, "Generate") == 1


async def test_attempts_share_one_deadline(client: Client, gateway: StandIn):
    gateway.failures.append(away(1.0))

    await client.generate("hi", timeout_s=30).result()

    first, second = gateway.calls
    assert second.time_remaining_s < first.time_remaining_s - 0.5


async def test_closing_while_waiting_for_a_retry_sends_nothing_more(
    client: Client, gateway: StandIn
):
    gateway.failures.append(away(30))
    answer = client.generate("hi", timeout_s=120)
    reader = asyncio.create_task(answer.result())
    assert await asyncio.to_thread(gateway.arrived.wait, WAIT_S)

    await answer.aclose()

    with pytest.raises((Cancelled, Unavailable)):
        await reader
    assert count(gateway, "Generate") == 1


async def test_gateway_that_comes_up_is_reached():
    with StandIn.serve() as stopped:
        address = stopped.address
    async with Client(address, max_retries=5) as client:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.count_tokens("hi", timeout_s=0.1)

        with StandIn.serve(address):
            assert len(await client.list_models()) == 1
