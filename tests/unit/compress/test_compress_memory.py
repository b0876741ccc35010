"""Memory that is lent and used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from services.compress.memory import ReceivePool


def address(view: memoryview) -> int:
    return id(view.obj)


def test_memory_comes_again_if_it_is_large_enough():
    pool = ReceivePool()

    with pool.lend(100) as first:
        kept = first.obj
    with pool.lend(60) as second:
        assert second.obj is kept
        assert len(second) == 60
    with pool.lend(200) as third:
        assert third.obj is not kept
        assert len(third) == 200


def test_two_at_once_never_share():
    pool = ReceivePool()
    both = Barrier(2)

    def lend(_: int) -> int:
        with pool.lend(100) as memory:
            both.wait(10)
            found = address(memory)
            both.wait(10)
        return found

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lend, range(2))

    assert first != second


def test_idle_memory_is_bounded_in_number_and_size():
    pool = ReceivePool(max_idle=1, max_idle_bytes=100)

    with pool.lend(10) as small, pool.lend(20) as other, pool.lend(1000) as large:
        lent = [small.obj, other.obj, large.obj]

    assert pool._idle == [lent[1]]
    assert all(len(memory) <= 100 for memory in pool._idle)


def test_a_failed_receiver_gives_its_memory_back():
    pool = ReceivePool()
    try:
        with pool.lend(10) as memory:
            kept = memory.obj
            raise ConnectionError
    except ConnectionError:
        pass

    with pool.lend(10) as again:
        assert again.obj is kept
