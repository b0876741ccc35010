"""Memory that is lent again instead of allocated again."""

from __future__ import annotations

import threading

import pytest

from services.compress.memory import ReceivePool


def address(memory: memoryview) -> int:
    """Return the identity of what a view looks into."""
    return id(memory.obj)


def test_memory_has_the_size_asked_for_and_is_writable():
    with ReceivePool().lend(100) as memory:
        memory[99] = 7

        assert len(memory) == 100


def test_memory_is_lent_again():
    pool = ReceivePool()
    with pool.lend(100) as memory:
        first = address(memory)

    with pool.lend(60) as memory:
        assert address(memory) == first
        assert len(memory) == 60


def test_memory_in_use_is_nobody_elses():
    pool = ReceivePool()

    with pool.lend(100) as one, pool.lend(100) as other:
        assert address(one) != address(other)


def test_memory_comes_back_after_an_error():
    pool = ReceivePool()
    with pool.lend(100) as memory:
        first = address(memory)

    with pytest.raises(ZeroDivisionError), pool.lend(100):
        raise ZeroDivisionError

    with pool.lend(100) as memory:
        assert address(memory) == first


def test_smallest_that_is_large_enough_is_lent():
    pool = ReceivePool()
    with pool.lend(1000) as large, pool.lend(100) as small:
        addresses = {"large": address(large), "small": address(small)}

    with pool.lend(50) as memory:
        assert address(memory) == addresses["small"]
    with pool.lend(500) as memory:
        assert address(memory) == addresses["large"]


def test_memory_that_is_too_small_gives_way():
    pool = ReceivePool(max_idle=1)
    with pool.lend(10) as memory:
        small = address(memory)

    with pool.lend(100) as memory:
        large = address(memory)
    with pool.lend(10) as memory:
        assert address(memory) == large != small


def test_very_large_memory_is_not_kept():
    pool = ReceivePool(max_idle_bytes=50)
    with pool.lend(100) as memory:
        kept = memory.obj

    with pool.lend(100) as memory:
        assert memory.obj is not kept


def test_no_more_than_so_many_pieces_are_kept():
    pool = ReceivePool(max_idle=1)
    with pool.lend(10) as one, pool.lend(10) as other:
        pieces = [one.obj, other.obj]

    with pool.lend(10) as one, pool.lend(10) as other:
        assert sum(any(lent.obj is piece for piece in pieces) for lent in (one, other)) == 1


def test_threads_never_share_memory():
    pool = ReceivePool(max_idle=4)
    wrong: list[int] = []

    def use(number: int) -> None:
        for _ in range(300):
            with pool.lend(64) as memory:
                memory[:] = bytes([number]) * 64
                if bytes(memory) != bytes([number]) * 64:
                    wrong.append(number)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)

    assert wrong == []
