"""A worker's KV memory: allocated once, handed out in blocks, never more than was configured.

Knows no sessions and no layers. Not thread-safe: the event loop allocates and frees; threads read
and write the memory of blocks that are theirs.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Final

import torch

# Blocks begin where any tensor may, and where a cache line does.
ALIGNMENT: Final = 64


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a pool's memory.

    Attributes:
        start: First byte in the pool.
        size_bytes: How many; 0 once it is freed.
    """

    start: int
    size_bytes: int


class KVPool:
    """Memory of a fixed size.

    First fit from the low end, so that memory which was used before is used again: fresh pages
    cost more than the bytes that they take. Free neighbours are joined at once.

    Args:
        size_bytes: Of the whole pool, at least 1. The operating system commits pages when they
            are first written.
        device: Where the model runs.
    """

    def __init__(self, size_bytes: int, *, device: torch.device | str = "cpu") -> None:
        self.size_bytes = size_bytes // ALIGNMENT * ALIGNMENT
        self.used_bytes = 0
        self.peak_bytes = 0
        self._memory = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._free = [(0, self.size_bytes)] if self.size_bytes else []  # (start, stop), ascending

    @property
    def free_bytes(self) -> int:
        """Bytes that no block has, not necessarily in one piece."""
        return self.size_bytes - self.used_bytes

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._memory.device

    def allocate(self, size_bytes: int) -> Block | None:
        """Return a block, or ``None`` if no free piece is large enough. Its contents are undefined.

        Args:
            size_bytes: At least 1; rounded up to :data:`ALIGNMENT`.
        """
        size = aligned(size_bytes)
        for index, (start, stop) in enumerate(self._free):
            if stop - start < size:
                continue
            self._free[index : index + 1] = [(start + size, stop)] if start + size < stop else []
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return Block(start, size)
        return None

    def free(self, block: Block) -> None:
        """Take a block back. Nobody may touch its memory any more. Idempotent."""
        self.shrink(block, 0)

    def shrink(self, block: Block, size_bytes: int) -> None:
        """Take back all but the first ``size_bytes`` (rounded up to :data:`ALIGNMENT`)."""
        start, stop = block.start + aligned(size_bytes), block.start + block.size_bytes
        if start >= stop:
            return
        block.size_bytes = start - block.start
        self.used_bytes -= stop - start
        index = bisect.bisect(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, stop))

    def view(self, block: Block, size_bytes: int) -> torch.Tensor:
        """Return the first ``size_bytes`` of a block: ``(size_bytes,)`` uint8."""
        assert size_bytes <= block.size_bytes
        return self._memory[block.start : block.start + size_bytes]


def aligned(size_bytes: int) -> int:
    """Return the size rounded up to :data:`ALIGNMENT`."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
