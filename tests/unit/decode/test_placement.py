from __future__ import annotations

import asyncio
import gc
import random
import threading
import zlib
from typing import Any, Final

import pytest

import chunkkv
from chunkkv.compressed import size_bytes
from chunkserve.v1 import session_pb2
from services.decode.geometry import KVGeometry, LayerGeometry
from services.decode.memory import Block, KVPool, aligned
from services.decode.placement import KVMemory, Placement
from services.decode.tail import tail_size_bytes
from services.runtime.errors import InvalidRequestError, OverloadedError

DEADLINE_S = 30.0
GEOMETRY: Final = KVGeometry((LayerGeometry(num_kv_heads=1, key_dim=4, value_dim=4),), "float32")

# Tokens of each segment: so many that they stay where they are, and do not go into the tail.
NUM_TOKENS: Final = 300
SHAPE: Final = GEOMETRY.span_shape([NUM_TOKENS], num_tokens=NUM_TOKENS)
SPAN_BYTES: Final = size_bytes(SHAPE)


def segment(name: str, *, header_bytes: int = 0) -> session_pb2.Segment:
    return session_pb2.Segment(
        segment_id=name,
        num_tokens=NUM_TOKENS,
        num_kept_tokens=NUM_TOKENS,
        size_bytes=SPAN_BYTES + header_bytes,
    )


def tail_bytes(new_tokens: int) -> int:
    return aligned(tail_size_bytes(GEOMETRY, new_tokens))


def memory_of(kv_bytes: int, *, num_slots: int = 100, queue_size: int = 100) -> KVMemory:
    return KVMemory(KVPool(kv_bytes), GEOMETRY, num_slots=num_slots, queue_size=queue_size)


def span_in(memory: KVMemory, block: Block) -> chunkkv.CompressedKV:
    return chunkkv.CompressedKV(SHAPE, memory.pool.view(block, SPAN_BYTES))


def publish_fetched(memory: KVMemory, placement: Placement) -> None:
    for missing, block in placement.missing:
        memory.publish(placement, missing, block, span_in(memory, block))


class Request:
    """Has its memory until it is told to go."""

    def __init__(self, memory: KVMemory, *names: str, new_tokens: int = 1) -> None:
        self.admitted = asyncio.Event()
        self._end = asyncio.Event()
        self._placement: Placement | None = None
        self.task = asyncio.create_task(self._run(memory, names, new_tokens))

    @property
    def placement(self) -> Placement:
        assert self._placement is not None
        return self._placement

    async def _run(self, memory: KVMemory, names: tuple[str, ...], new_tokens: int) -> None:
        async with memory.placed([segment(name) for name in names], new_tokens=new_tokens) as own:
            self._placement = own
            self.admitted.set()
            publish_fetched(memory, own)
            await self._end.wait()

    async def placed(self) -> Placement:
        async with asyncio.timeout(DEADLINE_S):
            await self.admitted.wait()
        return self.placement

    async def end(self) -> None:
        self._end.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def settle() -> None:
    """Let everything happen that nobody has to wait for."""
    for _ in range(10):
        await asyncio.sleep(0)


async def keep(memory: KVMemory, *names: str) -> None:
    """Leave segments in memory, the last one used last."""
    for name in names:
        async with memory.placed([segment(name)], new_tokens=1) as placement:
            publish_fetched(memory, placement)


async def held(memory: KVMemory, *names: str) -> list[str]:
    """Return which of these segments are in memory."""
    found = []
    for name in names:
        async with memory.placed([segment(name)], new_tokens=1) as placement:
            found += placement.spans
    return found


def check_nothing_runs(memory: KVMemory) -> None:
    assert memory.num_active == 0
    assert memory.pool.used_bytes == memory.resident_bytes


# Who is next.


async def test_requests_are_placed_in_order_of_arrival_even_if_a_later_one_would_fit():
    memory = memory_of(tail_bytes(1000))
    first = Request(memory, new_tokens=900)
    await first.placed()
    large, small = Request(memory, new_tokens=950), Request(memory, new_tokens=10)
    await settle()
    assert not large.admitted.is_set()
    assert not small.admitted.is_set()
    assert memory.num_active == 3

    await first.end()
    await large.placed()
    await small.placed()

    await large.end()
    await small.end()
    check_nothing_runs(memory)


async def test_as_many_are_placed_as_fit_when_one_leaves():
    memory = memory_of(tail_bytes(1000))
    first = Request(memory, new_tokens=1000)
    await first.placed()
    waiting = [Request(memory, new_tokens=300) for _ in range(4)]
    await settle()

    await first.end()
    await settle()

    assert [request.admitted.is_set() for request in waiting] == [True, True, True, False]
    for request in waiting:
        await request.placed()
        await request.end()
    check_nothing_runs(memory)


async def test_no_more_requests_are_placed_than_there_are_slots():
    memory = memory_of(1 << 20, num_slots=2)
    requests = [Request(memory) for _ in range(3)]
    await settle()
    assert [request.admitted.is_set() for request in requests] == [True, True, False]

    await requests[0].end()

    await requests[2].placed()
    await requests[1].end()
    await requests[2].end()
    check_nothing_runs(memory)


@pytest.mark.parametrize("queue_size", [0, 2])
async def test_more_than_may_wait_is_refused_at_once(queue_size):
    memory = memory_of(1 << 20, num_slots=1, queue_size=queue_size)
    requests = [Request(memory) for _ in range(1 + queue_size)]
    await settle()

    with pytest.raises(OverloadedError) as caught:
        async with memory.placed([], new_tokens=1):
            pass

    assert caught.value.retry_after_s == 1.0
    assert memory.num_active == 1 + queue_size
    for request in requests:
        await request.placed()
        await request.end()
    check_nothing_runs(memory)


async def test_a_request_that_can_never_fit_is_refused_and_holds_up_nobody():
    memory = memory_of(2 * SPAN_BYTES + tail_bytes(100))
    names = [segment(name) for name in ("a", "b")]
    async with memory.placed(names, new_tokens=100):
        pass

    with pytest.raises(InvalidRequestError) as caught:
        async with memory.placed(names, new_tokens=100 + 64):
            pass

    assert caught.value.error_reason == "KV_TOO_LARGE"
    assert caught.value.field == "sampling.max_tokens"
    check_nothing_runs(memory)


async def test_the_size_counts_small_segments_twice_because_they_go_into_the_tail():
    small = session_pb2.Segment(
        segment_id="small", num_tokens=200, num_kept_tokens=200, size_bytes=8_000
    )
    memory = memory_of(tail_bytes(300) + aligned(8_000))

    async with memory.placed([small], new_tokens=100) as placement:
        assert placement.tail_tokens == 300
        assert memory.pool.free_bytes == 0


# Who leaves.


async def test_who_stops_waiting_lets_a_smaller_one_go_ahead():
    memory = memory_of(tail_bytes(1000))
    first = Request(memory, new_tokens=900)
    await first.placed()
    large, small = Request(memory, new_tokens=950), Request(memory, new_tokens=10)
    await settle()

    await large.cancel()

    assert large.task.cancelled()
    await small.placed()
    assert not first.task.done()
    await first.end()
    await small.end()
    check_nothing_runs(memory)


async def test_who_stops_waiting_leaves_his_place_in_the_queue():
    memory = memory_of(1 << 20, num_slots=1, queue_size=2)
    first, second, third = (Request(memory) for _ in range(3))
    await settle()

    await third.cancel()
    assert memory.num_active == 2
    fourth = Request(memory)
    await settle()

    for request in (first, second, fourth):
        await request.placed()
        await request.end()
    check_nothing_runs(memory)


async def test_the_queue_does_not_grow_by_those_who_stop_waiting_behind_another():
    memory = memory_of(1 << 20, num_slots=1)
    first, second = Request(memory), Request(memory)
    await settle()

    for _ in range(5):
        request = Request(memory)
        await settle()
        await request.cancel()

    assert memory.num_active == 2
    assert len(memory._waiting) == 1
    for request in (first, second):
        await request.placed()
        await request.end()


async def test_a_cancellation_at_the_moment_of_admission_leaks_nothing():
    memory = memory_of(tail_bytes(1000))
    first = Request(memory, new_tokens=900)
    await first.placed()
    second, third = Request(memory, new_tokens=900), Request(memory, new_tokens=900)
    await settle()

    first.placement.lend()
    await first.end()
    first.placement.give_back()  # the last use: the second request is admitted now
    assert memory.num_active == 2
    second.task.cancel()  # and has not run since
    await asyncio.wait([second.task])

    assert second.task.cancelled()
    assert not second.admitted.is_set()
    await third.placed()
    await third.end()
    check_nothing_runs(memory)
    assert memory.pool.used_bytes == 0


async def test_an_error_of_the_request_gives_the_memory_back():
    memory = memory_of(1 << 20)

    with pytest.raises(ValueError, match="mine"):
        async with memory.placed([segment("a")], new_tokens=10):
            raise ValueError("mine")

    check_nothing_runs(memory)
    assert memory.pool.used_bytes == 0


# Segments that stay.


async def test_a_segment_that_was_fetched_is_found_by_its_name():
    memory = memory_of(1 << 20)
    await keep(memory, "a")
    assert (memory.num_residents, memory.resident_bytes) == (1, SPAN_BYTES)

    async with memory.placed([segment("a"), segment("b")], new_tokens=10) as placement:
        assert list(placement.spans) == ["a"]
        assert [missing.segment_id for missing, _ in placement.missing] == ["b"]
        assert memory.resident_bytes == 0

    assert memory.resident_bytes == SPAN_BYTES
    check_nothing_runs(memory)


async def test_a_quantized_segment_gets_room_for_what_it_takes_once_it_is_opened():
    memory = memory_of(1 << 20)
    small = session_pb2.Segment(
        segment_id="a", num_tokens=NUM_TOKENS, num_kept_tokens=NUM_TOKENS, size_bytes=200
    )
    small.kv_bytes = SPAN_BYTES

    async with memory.placed([small], new_tokens=1) as placement:
        [(_, block)] = placement.missing
        assert block.size_bytes == aligned(SPAN_BYTES)
        publish_fetched(memory, placement)

    assert memory.resident_bytes == aligned(SPAN_BYTES)


async def test_what_was_not_published_is_not_kept():
    memory = memory_of(1 << 20)

    async with memory.placed([segment("a")], new_tokens=10) as placement:
        assert len(placement.missing) == 1

    assert memory.num_residents == 0
    assert memory.pool.used_bytes == 0


async def test_a_sealed_tail_is_found_and_the_rest_of_its_memory_is_free():
    memory = memory_of(1 << 20)

    async with memory.placed([segment("a")], new_tokens=NUM_TOKENS + 200) as placement:
        publish_fetched(memory, placement)
        memory.publish(placement, segment("b"), placement.tail, span_in(memory, placement.tail))
        assert memory.pool.used_bytes == 2 * SPAN_BYTES

    assert await held(memory, "a", "b") == ["a", "b"]
    check_nothing_runs(memory)


async def test_the_least_recently_used_segment_is_given_up_first():
    memory = memory_of(3 * SPAN_BYTES + tail_bytes(1))
    await keep(memory, "a", "b", "c")
    assert await held(memory, "a") == ["a"]

    async with memory.placed([segment("d")], new_tokens=1) as placement:
        publish_fetched(memory, placement)

    assert await held(memory, "a", "c", "d") == ["a", "c", "d"]
    assert await held(memory, "b") == []
    check_nothing_runs(memory)


async def test_no_more_segments_are_given_up_than_are_in_the_way():
    memory = memory_of(3 * SPAN_BYTES + tail_bytes(1))
    await keep(memory, "a", "b", "c")

    async with memory.placed([], new_tokens=NUM_TOKENS):
        pass

    assert memory.num_residents == 2


async def test_a_segment_in_use_is_never_given_up():
    memory = memory_of(2 * SPAN_BYTES + tail_bytes(100))
    first = Request(memory, "a")
    await first.placed()
    large = Request(memory, "b", "c", new_tokens=100)
    await settle()
    assert not large.admitted.is_set()
    assert memory.num_residents == 1

    await first.end()

    await large.placed()
    await large.end()
    assert await held(memory, "a") == []
    check_nothing_runs(memory)


async def test_a_shared_prefix_is_in_memory_once():
    memory = memory_of(1 << 20)
    first = Request(memory, "a", "b", new_tokens=10)
    await first.placed()
    before = memory.pool.used_bytes

    second = Request(memory, "a", "b", new_tokens=10)
    placement = await second.placed()

    assert memory.pool.used_bytes == before + tail_bytes(10)
    assert placement.missing == []
    await first.end()
    assert memory.resident_bytes == 0  # the second still uses them
    await second.end()
    assert memory.resident_bytes == 2 * SPAN_BYTES
    check_nothing_runs(memory)


async def test_of_two_copies_that_were_fetched_at_once_one_is_kept():
    memory = memory_of(1 << 20)
    stored = segment("a", header_bytes=500)
    block_bytes = aligned(stored.size_bytes)
    async with memory.placed([stored], new_tokens=10) as one:
        async with memory.placed([stored], new_tokens=10) as other:
            assert one.missing
            assert other.missing
            publish_fetched(memory, one)
            publish_fetched(memory, other)
            assert memory.pool.used_bytes == 2 * (block_bytes + tail_bytes(10))  # both are read
        assert memory.pool.used_bytes == block_bytes + tail_bytes(10)

    assert memory.resident_bytes == block_bytes
    check_nothing_runs(memory)


async def test_a_segment_fits_where_its_equal_was_given_up():
    stored, other = segment("a", header_bytes=500), segment("b", header_bytes=500)
    memory = memory_of(aligned(stored.size_bytes) + tail_bytes(10))
    for each in (stored, other, stored):
        async with memory.placed([each], new_tokens=10) as placement:
            assert placement.missing
            publish_fetched(memory, placement)

    assert memory.num_residents == 1
    check_nothing_runs(memory)


async def test_a_published_segment_makes_room_for_who_waits():
    memory = memory_of(SPAN_BYTES + tail_bytes(NUM_TOKENS + 500))
    async with memory.placed([segment("a")], new_tokens=NUM_TOKENS + 500) as placement:
        waiting = Request(memory, new_tokens=300)
        await settle()
        assert not waiting.admitted.is_set()

        memory.publish(placement, segment("b"), placement.tail, span_in(memory, placement.tail))

        await waiting.placed()
    await waiting.end()
    check_nothing_runs(memory)


async def fragmented() -> KVMemory:
    """Leave two segments with holes before and behind them; each hole holds about 300 tokens."""
    memory = memory_of(4 * SPAN_BYTES)
    async with memory.placed([], new_tokens=NUM_TOKENS):
        await keep(memory, "a")
        async with memory.placed([], new_tokens=NUM_TOKENS - 30):
            await keep(memory, "b")
    assert memory.pool.used_bytes == memory.resident_bytes == 2 * SPAN_BYTES
    assert memory.pool.allocate(memory.pool.free_bytes) is None
    return memory


async def test_own_segments_that_are_in_the_way_are_fetched_again_if_nobody_else_runs():
    memory = await fragmented()

    async with memory.placed([segment("a"), segment("b")], new_tokens=450) as placement:
        assert placement.spans == {}
        assert [missing.segment_id for missing, _ in placement.missing] == ["a", "b"]
        publish_fetched(memory, placement)

    assert await held(memory, "a", "b") == ["a", "b"]
    check_nothing_runs(memory)


async def test_a_request_that_is_alone_is_placed_whatever_is_in_the_way():
    memory = memory_of(SPAN_BYTES + tail_bytes(900))
    await keep(memory, "a")

    request = Request(memory, "b", new_tokens=900)
    await settle()

    # Nobody runs whose end could place it later.
    is_placed = request.admitted.is_set()
    await request.cancel()
    assert is_placed


async def test_own_segments_that_are_in_the_way_stay_while_somebody_runs():
    memory = await fragmented()
    first = Request(memory, "b")
    await first.placed()
    large = Request(memory, "a", "b", new_tokens=450)
    await settle()
    assert not large.admitted.is_set()
    assert memory.num_residents == 2

    await first.end()

    placement = await large.placed()
    assert len(placement.missing) == 2
    await large.end()
    check_nothing_runs(memory)


# Threads.


class Work:
    """A thread's work that ends when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.entered, self._released = threading.Event(), threading.Event()
        self._error = error

    def __call__(self) -> str:
        self.entered.set()
        assert self._released.wait(DEADLINE_S)
        if self._error is not None:
            raise self._error
        return "done"

    def release(self) -> None:
        self._released.set()


async def abandon(memory: KVMemory, work: Work) -> None:
    """Start a thread in all of the memory, and cancel who waits for it."""

    async def run() -> None:
        async with memory.placed([], new_tokens=1000) as placement:
            await placement.in_thread(work)

    caller = asyncio.create_task(run())
    assert await asyncio.to_thread(work.entered.wait, DEADLINE_S)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()


async def test_memory_stays_taken_until_the_thread_ends_although_its_caller_was_cancelled():
    memory, work = memory_of(tail_bytes(1000)), Work()
    await abandon(memory, work)
    waiting = Request(memory)
    await settle()
    assert not waiting.admitted.is_set()
    assert memory.pool.free_bytes == 0
    assert memory.num_active == 2

    work.release()

    await waiting.placed()
    await waiting.end()
    check_nothing_runs(memory)


async def test_an_error_that_nobody_waits_for_frees_the_memory_and_is_not_reported():
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    memory, work = memory_of(tail_bytes(1000)), Work(ValueError("nobody listens"))
    await abandon(memory, work)

    work.release()

    async with asyncio.timeout(DEADLINE_S), memory.placed([], new_tokens=1000):
        pass
    gc.collect()
    assert reported == []
    check_nothing_runs(memory)


async def test_a_threads_result_and_its_error_reach_the_caller():
    memory = memory_of(1 << 20)
    done, broken = Work(), Work(ValueError("no"))
    done.release()
    broken.release()

    async with memory.placed([], new_tokens=1) as placement:
        assert await placement.in_thread(done) == "done"
        with pytest.raises(ValueError, match="no"):
            await placement.in_thread(broken)

    check_nothing_runs(memory)


async def test_a_lent_placement_is_given_back_at_its_last_use():
    memory = memory_of(1 << 20)
    async with memory.placed([segment("a")], new_tokens=10) as placement:
        publish_fetched(memory, placement)
        placement.lend()
        placement.lend()
    assert memory.num_active == 1

    placement.give_back()
    assert memory.pool.used_bytes == SPAN_BYTES + tail_bytes(10)
    assert memory.resident_bytes == 0
    placement.give_back()

    check_nothing_runs(memory)


# All of it at once.


def fill_of(name: str) -> int:
    return zlib.crc32(name.encode()) % 251


class Crowd:
    """Requests with prefixes in common that come, fetch, write, seal, and are cancelled.

    Every segment is full of a byte of its name and every tail full of a byte of its request, so
    memory that two have at once is seen.
    """

    def __init__(self, memory: KVMemory, seed: int) -> None:
        self.memory = memory
        self.num_served = self.num_found = 0
        self._chance = random.Random(seed)

    async def request(self, number: int) -> None:
        await self._pause(200)
        path = [self._chance.choice("xyz") for _ in range(self._chance.randrange(4))]
        names = ["/".join(path[: depth + 1]) for depth in range(len(path))]
        new_tokens = self._chance.randrange(1, 600)
        segments = [segment(name, header_bytes=500) for name in names]
        async with self.memory.placed(segments, new_tokens=new_tokens) as own:
            self.num_found += len(own.spans)
            await own.in_thread(self._fetch, own)
            spans = own.spans | {
                missing.segment_id: span_in(self.memory, block) for missing, block in own.missing
            }
            publish_fetched(self.memory, own)
            tail = self.memory.pool.view(own.tail, own.tail.size_bytes)
            tail.fill_(number % 251)
            await self._pause(20)
            assert (tail == number % 251).all()
            for name in names:
                assert (spans[name].memory == fill_of(name)).all()
            if new_tokens > NUM_TOKENS and self._chance.random() < 0.7:
                await self._seal(own, "/".join([*path, "xyz"[number % 3]]))
            self.num_served += 1

    async def cancel_sometimes(self, request: asyncio.Task[None]) -> None:
        if self._chance.random() < 0.4:
            await self._pause(600)
            request.cancel()

    def _fetch(self, placement: Placement) -> None:
        for missing, block in placement.missing:
            span_in(self.memory, block).memory.fill_(fill_of(missing.segment_id))

    async def _seal(self, placement: Placement, name: str) -> None:
        span = span_in(self.memory, placement.tail)
        await placement.in_thread(span.memory.fill_, fill_of(name))
        self.memory.publish(placement, segment(name), placement.tail, span)
        await self._pause(5)

    async def _pause(self, most: int) -> None:
        for _ in range(self._chance.randrange(most)):
            await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_requests_do_the_memory_is_never_shared_nor_lost(seed):
    memory = memory_of(tail_bytes(3000), num_slots=6, queue_size=200)
    crowd = Crowd(memory, seed)

    async with asyncio.timeout(DEADLINE_S):
        requests = [asyncio.create_task(crowd.request(number)) for number in range(150)]
        await asyncio.gather(*map(crowd.cancel_sometimes, requests))
        results = await asyncio.gather(*requests, return_exceptions=True)

        num_cancelled = sum(isinstance(each, asyncio.CancelledError) for each in results)
        assert crowd.num_served + num_cancelled >= len(requests)
        assert [each for each in results if isinstance(each, Exception)] == []
        assert crowd.num_found > 0
        assert num_cancelled > 0
        while memory.num_active:  # noqa: ASYNC110  # threads of who was cancelled
            await asyncio.sleep(0)
    assert memory.num_residents > 0
    check_nothing_runs(memory)
    assert memory.pool.peak_bytes <= memory.pool.size_bytes
    async with memory.placed([], new_tokens=3000):
        assert memory.pool.free_bytes == 0
    assert memory.pool.used_bytes == 0
