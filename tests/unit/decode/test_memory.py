"""The pool against a slow, obvious one: a list of intervals."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.decode.memory import ALIGNMENT, Block, KVPool, aligned

POOL_BYTES = 20 * ALIGNMENT


class PoolMachine(RuleBasedStateMachine):
    """Allocates, shrinks and frees; every block's bytes are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool(POOL_BYTES + ALIGNMENT - 1)
        self.blocks: list[tuple[Block, int]] = []  # with the byte that fills it
        self.freed: list[Block] = []
        self.most_used = 0
        self.num_allocated = 0

    def gaps(self) -> list[tuple[int, int]]:
        """Return start and size of what no block has."""
        gaps, end = [], 0
        for block in sorted((block for block, _ in self.blocks), key=lambda block: block.start):
            gaps.append((end, block.start - end))
            end = block.start + block.size_bytes
        gaps.append((end, POOL_BYTES - end))
        return gaps

    @rule(size_bytes=st.integers(1, POOL_BYTES + 1))
    def allocate(self, size_bytes: int) -> None:
        fitting = [start for start, size in self.gaps() if size >= aligned(size_bytes)]

        block = self.pool.allocate(size_bytes)

        if not fitting:
            assert block is None
            return
        assert block is not None
        assert (block.start, block.size_bytes) == (fitting[0], aligned(size_bytes))
        self.num_allocated += 1
        fill = self.num_allocated % 256
        self.pool.view(block, block.size_bytes).fill_(fill)
        self.blocks.append((block, fill))
        self.most_used = max(self.most_used, sum(block.size_bytes for block, _ in self.blocks))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block, _ = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.pool.free(block)
        self.freed.append(block)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        self.pool.free(data.draw(st.sampled_from(self.freed)))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), size_bytes=st.integers(1, POOL_BYTES))
    def shrink(self, data: st.DataObject, size_bytes: int) -> None:
        block, _ = data.draw(st.sampled_from(self.blocks))
        expected = min(block.size_bytes, aligned(size_bytes))

        self.pool.shrink(block, size_bytes)

        assert block.size_bytes == expected

    @invariant()
    def blocks_are_aligned_and_never_overlap(self) -> None:
        assert all(size >= 0 for _, size in self.gaps())
        for block, fill in self.blocks:
            assert block.start % ALIGNMENT == 0
            assert (self.pool.view(block, block.size_bytes) == fill).all()

    @invariant()
    def every_byte_is_counted(self) -> None:
        used = sum(block.size_bytes for block, _ in self.blocks)
        assert self.pool.used_bytes == used
        assert self.pool.free_bytes == POOL_BYTES - used
        assert self.pool.peak_bytes == self.most_used

    def teardown(self) -> None:
        for block, _ in self.blocks:
            self.pool.free(block)
        assert self.pool.used_bytes == 0
        whole = self.pool.allocate(POOL_BYTES)
        assert whole is not None
        assert (whole.start, whole.size_bytes) == (0, POOL_BYTES)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_more_than_the_pool_has_is_not_given() -> None:
    pool = KVPool(1000)

    assert pool.size_bytes == 960
    assert pool.allocate(961) is None
    assert pool.used_bytes == pool.peak_bytes == 0
    assert pool.allocate(960) is not None
    assert pool.allocate(1) is None


def test_a_pool_smaller_than_a_block_has_nothing_to_give() -> None:
    pool = KVPool(ALIGNMENT - 1)

    assert pool.size_bytes == 0
    assert pool.allocate(1) is None


def test_a_view_is_the_pools_own_memory() -> None:
    pool = KVPool(1 << 12)
    block = pool.allocate(100)
    assert block is not None

    pool.view(block, 100)[:] = 7

    assert pool.view(block, 60).shape == (60,)
    assert pool.view(block, 60).dtype == torch.uint8
    assert (pool.view(block, 100) == 7).all()
    assert pool.device == torch.device("cpu")
