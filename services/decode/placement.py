"""Who may use which part of the KV memory: admission by bytes, in order of arrival.

A request gets all the memory that it can come to need, or waits; so nothing that runs is ever
thrown out. Segments that nobody uses stay for as long as there is room, the least recently used
given up first. They are found by their content address, so a manifest that names one means this
very content, whatever session, turn or version it belongs to, and sessions that share a prefix
share its memory. Event loop only; knows no model and no store.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import chunkkv
from chunkserve.v1 import session_pb2
from services.compress.segments import held_bytes
from services.decode.geometry import KVGeometry
from services.decode.limit import KVLimit
from services.decode.memory import Block, KVPool, aligned
from services.decode.sequence_kv import tail_tokens
from services.decode.tail import tail_size_bytes
from services.runtime.errors import InvalidRequestError, OverloadedError


@dataclass(slots=True, eq=False)
class Resident:
    """A segment in memory.

    Attributes:
        block: Where it is.
        span: Views of it.
        num_users: Placements that hold it.
    """

    block: Block
    span: chunkkv.CompressedKV
    num_users: int = 0


@dataclass(slots=True, eq=False)
class Placement:
    """The memory of one request.

    Attributes:
        spans: Segments in place, by id.
        missing: Segments that are to be fetched, and where to.
        tail: Where new tokens go.
        tail_tokens: How many tokens fit there, small segments included.
        limit: Bounds the KV.
    """

    spans: dict[str, chunkkv.CompressedKV]
    missing: list[tuple[session_pb2.Segment, Block]]
    tail: Block
    tail_tokens: int
    limit: KVLimit | None
    _held: list[str]
    _own: list[Block]
    _on_unused: Callable[[Placement], None]
    _num_users: int = field(default=1)

    def lend(self) -> None:
        """Count a thread that reads or writes the memory."""
        self._num_users += 1

    def give_back(self) -> None:
        """End one use; at the last the memory is somebody else's."""
        self._num_users -= 1
        if self._num_users == 0:
            self._on_unused(self)

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a blocking function that uses the memory.

        A caller who is cancelled leaves it running, and the memory stays taken until it ends.
        """
        self.lend()
        work = asyncio.ensure_future(asyncio.to_thread(function, *args))
        work.add_done_callback(self._end_work)
        return await asyncio.shield(work)

    def _end_work(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # seen: nobody may be left who would
        self.give_back()


@dataclass(frozen=True, slots=True)
class _Request:
    segments: Sequence[session_pb2.Segment]
    new_tokens: int
    limit: KVLimit | None
    tail_tokens: int
    tail_bytes: int


@dataclass(slots=True, eq=False)
class _Waiting:
    request: _Request
    admitted: asyncio.Future[Placement]


class KVMemory:
    """Shares a pool among requests and the segments of earlier ones.

    Args:
        pool: The memory.
        geometry: Of the model.
        num_slots: Requests that have memory at once, at least 1.
        queue_size: Requests that may wait, at least 0; one more is refused at once.
        retry_after_s: What a refused caller is told to wait.
    """

    def __init__(
        self,
        pool: KVPool,
        geometry: KVGeometry,
        *,
        num_slots: int,
        queue_size: int,
        retry_after_s: float = 1.0,
    ) -> None:
        self.num_slots = num_slots
        self.pool = pool
        self._geometry = geometry
        self._queue_size = queue_size
        self._retry_after_s = retry_after_s
        self._num_placed = 0
        self._waiting: deque[_Waiting] = deque()
        # The least recently used first.
        self._residents: OrderedDict[str, Resident] = OrderedDict()

    @property
    def num_active(self) -> int:
        """Requests that have memory or wait for it."""
        return self._num_placed + len(self._waiting)

    @property
    def resident_bytes(self) -> int:
        """Bytes of segments that nobody uses at the moment."""
        return sum(
            resident.block.size_bytes
            for resident in self._residents.values()
            if resident.num_users == 0
        )

    @property
    def num_residents(self) -> int:
        """Segments in memory that other requests may find."""
        return len(self._residents)

    @asynccontextmanager
    async def placed(
        self,
        segments: Sequence[session_pb2.Segment],
        *,
        new_tokens: int,
        limit: KVLimit | None = None,
    ) -> AsyncIterator[Placement]:
        """Hold memory for a sequence inside the block; and until no thread uses it any more.

        Args:
            segments: That the sequence begins with, in order.
            new_tokens: Tokens that the model will see at most.
            limit: Bounds the KV.

        Raises:
            InvalidRequestError: It would not fit if it were alone.
            OverloadedError: The memory is taken and the queue is full.
        """
        kept = [segment.num_kept_tokens for segment in segments]
        in_tail = tail_tokens(kept, new_tokens=new_tokens, limit=limit)
        placement = await self._admit(
            _Request(
                segments,
                new_tokens,
                limit,
                tail_tokens=in_tail,
                tail_bytes=tail_size_bytes(self._geometry, in_tail),
            )
        )
        try:
            yield placement
        finally:
            placement.give_back()

    def publish(
        self,
        placement: Placement,
        segment: session_pb2.Segment,
        block: Block,
        span: chunkkv.CompressedKV,
    ) -> None:
        """Let others find a segment that the placement has fetched, or sealed in its tail.

        Args:
            placement: Has the block.
            segment: As the manifest names it. The block is cut to its size, so that the hole that
                it leaves one day fits it again.
            block: Where it is.
            span: Views of the block.
        """
        self.pool.shrink(block, held_bytes(segment))
        name = segment.segment_id
        if name not in self._residents:  # else two fetched it at once; one copy is enough
            self._residents[name] = Resident(block, span, num_users=1)
            placement._own.remove(block)
            placement._held.append(name)
        self._admit_waiting()

    async def _admit(self, request: _Request) -> Placement:
        self._check_size(request)
        if not self._waiting and (placement := self._try(request)) is not None:
            return placement
        if len(self._waiting) >= self._queue_size:
            raise OverloadedError(
                f"the KV memory of this worker ({self.pool.size_bytes} bytes, {self.num_slots} "
                f"requests at once) is taken and {self._queue_size} requests wait already; try "
                "again later",
                retry_after_s=self._retry_after_s,
            )
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            return await waiting.admitted
        except asyncio.CancelledError:
            if waiting.admitted.cancelled():
                self._waiting.remove(waiting)
                self._admit_waiting()  # it may have been first, and in the way of smaller ones
            else:
                waiting.admitted.result().give_back()
            raise

    def _admit_waiting(self) -> None:
        while self._waiting:
            first = self._waiting[0]
            if first.admitted.cancelled():
                return  # its own cancellation goes on from here
            if (placement := self._try(first.request)) is None:
                return
            self._waiting.popleft()
            first.admitted.set_result(placement)

    def _check_size(self, request: _Request) -> None:
        needed = aligned(request.tail_bytes)
        needed += sum(aligned(held_bytes(segment)) for segment in request.segments)
        if needed > self.pool.size_bytes:
            raise InvalidRequestError(
                f"the conversation's KV and {request.new_tokens} new tokens take {needed} bytes; a "
                f"worker has {self.pool.size_bytes}. Send a smaller max_tokens, or compress more",
                reason="KV_TOO_LARGE",
                field="sampling.max_tokens",
            )

    def _try(self, request: _Request) -> Placement | None:
        """Place a sequence now, giving up unused segments if needed; ``None``: there is no room."""
        if self._num_placed >= self.num_slots:
            return None
        held = [s.segment_id for s in request.segments if s.segment_id in self._residents]
        for name in held:
            self._residents[name].num_users += 1
        placement = self._allocate(request, held)
        if placement is None:
            for name in held:
                self._residents[name].num_users -= 1
            if self._num_placed == 0:
                # Alone it fits, but for what lies in the way, its own segments included.
                while self._give_up_oldest():
                    pass
                placement = self._allocate(request, [])
        if placement is not None:
            self._num_placed += 1
        return placement

    def _allocate(self, request: _Request, held: list[str]) -> Placement | None:
        missing = [segment for segment in request.segments if segment.segment_id not in held]
        sizes = [*(held_bytes(segment) for segment in missing), request.tail_bytes]
        if sum(map(aligned, sizes)) > self.pool.free_bytes + self.resident_bytes:
            return None
        blocks: list[Block] = []
        for size in sizes:
            while (block := self.pool.allocate(size)) is None:
                if not self._give_up_oldest():
                    for taken in blocks:
                        self.pool.free(taken)
                    return None
            blocks.append(block)
        return Placement(
            spans={name: self._residents[name].span for name in held},
            missing=list(zip(missing, blocks[:-1], strict=True)),
            tail=blocks[-1],
            tail_tokens=request.tail_tokens,
            limit=request.limit,
            _held=held,
            _own=blocks,
            _on_unused=self._end,
        )

    def _give_up_oldest(self) -> bool:
        for name, resident in self._residents.items():
            if resident.num_users == 0:
                self.pool.free(self._residents.pop(name).block)
                return True
        return False

    def _end(self, placement: Placement) -> None:
        for name in placement._held:
            self._residents[name].num_users -= 1
            self._residents.move_to_end(name)
        for block in placement._own:
            self.pool.free(block)
        self._num_placed -= 1
        self._admit_waiting()
