"""One segment, many who want it: in one process, in several, and when its maker dies."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest
import redis
from prometheus_client import REGISTRY
from tiny_model import load_tiny

from chunkserve.v1 import prefill_pb2
from services.prefill.runner import PrefillRunner
from services.prefill.single_flight import SingleFlight
from services.runtime.errors import OverloadedError, UnavailableError
from services.store import Store, keys, open_store
from tests.integration.prefill_worker import request, serving, session

DEADLINE_S = 60.0
IDS = [1 + i * 7 % 250 for i in range(60)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # other threads and processes make it true
            await asyncio.sleep(0.005)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"chunkserve_prefill_{name}_total", labels) or 0.0


def waits(where: str) -> float:
    return metric("single_flight_waits", where=where)


class Segment:
    """Stands for a segment: it is there once it was made."""

    def __init__(self) -> None:
        self.is_there = False
        self.num_made = 0
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    async def find(self) -> str | None:
        return "segment" if self.is_there else None

    async def make(self) -> str:
        self.num_made += 1
        self.begun.set()
        await self.go.wait()
        self.is_there = True
        return "segment"

    def wanted(self, flights: SingleFlight[str]) -> asyncio.Task[tuple[str, bool]]:
        return asyncio.create_task(flights.run("s", find=self.find, make=self.make))


@pytest.fixture
def flights(store: Store) -> SingleFlight[str]:
    return SingleFlight(store, lease_ttl_s=DEADLINE_S)


async def test_callers_in_one_process_share_one_making(flights):
    segment = Segment()
    callers = [segment.wanted(flights) for _ in range(5)]
    await segment.begun.wait()
    segment.go.set()

    answers = await asyncio.gather(*callers)

    assert answers == [("segment", True), *[("segment", False)] * 4]
    assert segment.num_made == 1


async def test_the_making_goes_on_for_the_others_if_the_first_caller_is_cancelled(flights):
    segment = Segment()
    first, second = segment.wanted(flights), segment.wanted(flights)
    await segment.begun.wait()

    first.cancel()
    await asyncio.wait([first])
    segment.go.set()

    assert await second == ("segment", False)
    assert first.cancelled()
    assert segment.num_made == 1


async def test_a_making_that_nobody_waits_for_ends_and_gives_its_lease_back(flights, store):
    segment = Segment()
    only = segment.wanted(flights)
    await segment.begun.wait()

    only.cancel()
    await asyncio.wait([only])

    assert not segment.is_there
    assert store.acquire_segment_lease("s", "other", ttl_s=1)


async def test_who_comes_after_the_last_one_left_begins_anew(flights):
    segment = Segment()
    only = segment.wanted(flights)
    await segment.begun.wait()
    only.cancel()
    next_one = segment.wanted(flights)
    segment.go.set()

    assert await next_one == ("segment", True)
    assert segment.num_made == 2


async def test_a_failure_is_everybodys_and_the_next_call_tries_again(flights):
    segment = Segment()

    async def fail() -> str:
        raise OverloadedError("full")

    callers = [
        asyncio.create_task(flights.run("s", find=segment.find, make=fail)) for _ in range(2)
    ]
    failures = await asyncio.gather(*callers, return_exceptions=True)
    segment.go.set()

    assert [type(failure) for failure in failures] == [OverloadedError] * 2
    assert await segment.wanted(flights) == ("segment", True)


async def test_another_process_waits_and_finds_what_was_made(flights, valkey_url):
    segment, before = Segment(), waits("cluster")
    elsewhere = open_store(valkey_url)
    first = segment.wanted(flights)
    await segment.begun.wait()
    second = segment.wanted(SingleFlight(elsewhere, lease_ttl_s=DEADLINE_S))
    await until(lambda: waits("cluster") == before + 1)
    segment.go.set()

    assert await asyncio.gather(first, second) == [("segment", True)] * 2
    assert segment.num_made == 1
    await elsewhere.close()


async def test_a_lease_is_renewed_while_its_holder_computes(store, valkey_url):
    segment = Segment()
    making = segment.wanted(SingleFlight(store, lease_ttl_s=1.0))
    await segment.begun.wait()
    with redis.Redis.from_url(valkey_url) as client:
        left_ms = [client.pttl(keys.segment_lease("s"))]

        def is_renewed() -> bool:
            left_ms.append(client.pttl(keys.segment_lease("s")))
            return left_ms[-1] > left_ms[-2]

        await until(is_renewed)
        segment.go.set()
        await making

        assert not client.exists(keys.segment_lease("s"))


async def test_a_store_that_is_away_for_a_moment_costs_no_lease_and_a_lost_one_no_result():
    class Leases:
        """A store that is away at the first renewal, and has forgotten us at the third."""

        def __init__(self) -> None:
            self.num_renewals = 0
            self.released = False

        def acquire_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
            return True

        def renew_segment_lease(self, segment_id: str, token: str, *, ttl_s: float) -> bool:
            self.num_renewals += 1
            if self.num_renewals == 1:
                raise UnavailableError("away")
            return self.num_renewals < 3

        def release_segment_lease(self, segment_id: str, token: str) -> None:
            self.released = True

    leases, segment = Leases(), Segment()
    making = segment.wanted(SingleFlight(leases, lease_ttl_s=0.03))
    await until(lambda: leases.num_renewals == 3)
    segment.go.set()

    assert await making == ("segment", True)
    assert leases.num_renewals == 3
    assert leases.released


HOLDER = """
import asyncio, sys
from services.prefill.single_flight import SingleFlight
from services.store import open_store

async def find():
    return None

async def make():
    print("begun", flush=True)
    await asyncio.Event().wait()

asyncio.run(SingleFlight(open_store(sys.argv[1]), lease_ttl_s=1.0).run("s", find=find, make=make))
"""


async def test_another_process_computes_if_the_one_that_did_is_killed(flights, valkey_url):
    segment, before = Segment(), waits("cluster")
    segment.go.set()
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, valkey_url), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE_S):
        assert await holder.stdout.readline() == b"begun\n"
        waiting = segment.wanted(flights)
        await until(lambda: waits("cluster") == before + 1)

        holder.kill()
        await holder.wait()

        assert await waiting == ("segment", True)
    assert segment.num_made == 1


class Held:
    """A runner whose model stops before every forward pass until it is let go."""

    def __init__(self, go: threading.Event) -> None:
        self.loaded = load_tiny()
        self.runner = PrefillRunner(self.loaded, prefill_chunk_tokens=8, queue_size=8)
        self._go = go
        self.loaded.model.base_model.register_forward_pre_hook(self._hold)

    def _hold(self, module: object, arguments: object) -> None:
        assert self._go.wait(DEADLINE_S)


async def all_waiting(calls: list[Awaitable[object]], *, before: tuple[float, float]) -> None:
    """Wait until all calls but one, half of them at each of two workers, wait for that one."""
    there = len(calls) // 2
    await until(
        lambda: (
            waits("process") == before[0] + 2 * (there - 1) and waits("cluster") == before[1] + 1
        )
    )


async def test_concurrent_first_requests_at_two_workers_compute_once(store, valkey_url):
    go, before = threading.Event(), (waits("process"), waits("cluster"))
    tokens = metric("tokens")
    elsewhere = open_store(valkey_url)
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(store, Held(go).runner) as one,
        serving(elsewhere, Held(go).runner) as other,
    ):
        calls = [
            stub.Prefill(request(session(session_id=f"s-{number}"), IDS))
            for number, stub in enumerate([one, other] * 4)
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await all_waiting(tasks, before=before)
        go.set()
        answers: list[prefill_pb2.PrefillResponse] = await asyncio.gather(*tasks)
    await elsewhere.close()

    assert metric("tokens") - tokens == len(IDS) - 1
    assert len({answer.manifest.segments[0].segment_id for answer in answers}) == 1
    assert all(answer.manifest.segments[0] == answers[0].manifest.segments[0] for answer in answers)
    assert sorted((a.num_prefilled_tokens, a.num_shared_tokens) for a in answers) == [
        *[(0, 59)] * 7,
        (59, 0),
    ]


async def test_concurrent_rebuilds_of_one_segment_compute_once(store, valkey_url):
    go = threading.Event()
    go.set()
    async with asyncio.timeout(DEADLINE_S), serving(store, Held(go).runner) as stub:
        made = await stub.Prefill(request(session(), IDS))
        store.delete_segments([made.manifest.segments[0].segment_id])
        before, tokens = waits("process"), metric("tokens")
        rebuilt = metric("rebuilt_segments")
        go.clear()

        calls = [
            asyncio.ensure_future(stub.Rebuild(prefill_pb2.RebuildRequest(manifest=made.manifest)))
            for _ in range(4)
        ]
        await until(lambda: waits("process") == before + 3)
        go.set()
        answers = await asyncio.gather(*calls)

    assert [answer.num_rebuilt_tokens for answer in answers] == [59] * 4
    assert all(answer.manifest == made.manifest for answer in answers)
    assert metric("tokens") - tokens == 59
    assert metric("rebuilt_segments") - rebuilt == 1
