"""A decode worker in a process of its own that tells what no client can see.

The worker is the real one: model, engine, gRPC server, heartbeat. Beside serving it notes when the
engine chose each token and in which order requests got memory, and answers questions on a pipe.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import uvloop

from chunkserve.v1 import session_pb2
from services.decode.attention import kv_geometry
from services.decode.config import DecodeSettings
from services.decode.limit import KVLimit
from services.decode.memory import aligned
from services.decode.placement import Placement
from services.decode.sequence import DecodeSequence
from services.decode.sequence_kv import tail_tokens
from services.decode.tail import tail_size_bytes
from services.decode.worker import DecodeWorker, load
from services.runtime.telemetry import configure_logging
from services.store import open_store

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker holds at one moment.

    Attributes:
        size_bytes: Its KV memory.
        used_bytes: Of it, taken now.
        resident_bytes: Of these, segments that nobody uses.
        peak_bytes: The most that was ever taken.
        rss_bytes: Memory of the process, less what it had before the first request.
        num_active: Requests that have memory or wait for it.
        num_running: Sequences that the engine knows.
        num_tasks: Tasks on the event loop.
    """

    size_bytes: int
    used_bytes: int
    resident_bytes: int
    peak_bytes: int
    rss_bytes: int
    num_active: int
    num_running: int
    num_tasks: int

    @property
    def leaked_bytes(self) -> int:
        """Bytes that are taken, and that no resident segment explains."""
        return self.used_bytes - self.resident_bytes


@dataclass(slots=True)
class Admissions:
    """How requests got memory.

    Attributes:
        sizes: For each arrival, bytes that it needs.
        order: For each admission, which arrival it was, counted from 0.
        waited_s: For each admission, seconds since the arrival.
        most_at_once: Requests that had memory at the same time, at most.
    """

    sizes: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    most_at_once: int = 0


class ProbedWorker:
    """A running worker, seen from another process. A context manager.

    Args:
        settings: Of the worker (:class:`DecodeSettings`).

    Attributes:
        worker_id: Its id, once it runs.
    """

    def __init__(self, **settings: Any) -> None:
        self.worker_id = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_run, args=(settings, other), name="decode", daemon=True
        )

    def __enter__(self) -> ProbedWorker:
        self._process.start()
        if not self._pipe.poll(START_TIMEOUT_S):
            self._process.kill()
            raise RuntimeError(f"the worker is not ready after {START_TIMEOUT_S} s")
        self.worker_id = self._pipe.recv()
        return self

    def __exit__(self, *exc: object) -> None:
        self._pipe.close()  # which tells it to stop
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def state(self) -> WorkerState:
        """Return what it holds now."""
        state: WorkerState = self._ask("state")
        return state

    def token_times(self) -> dict[tuple[int, int], int]:
        """Return ``time.monotonic_ns()`` of the tokens chosen since the last call.

        By the request's seed and the token's place in the answer.
        """
        times: dict[tuple[int, int], int] = self._ask("token_times")
        return times

    def admissions(self) -> Admissions:
        """Return how requests got memory since the last call."""
        admissions: Admissions = self._ask("admissions")
        return admissions

    def forget(self) -> None:
        """Give up all segments that nobody uses, so that they must be fetched again."""
        self._ask("forget")

    async def settled(self, num_tasks: int, timeout_s: float = 10.0) -> WorkerState:
        """Return the state once nothing runs, or as it is when the time is over.

        Args:
            num_tasks: Tasks that were there before.
            timeout_s: Seconds to wait.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.state()
            is_idle = not state.num_active and state.num_tasks <= num_tasks
            if (is_idle and not state.leaked_bytes) or time.monotonic() > deadline:
                return state
            await asyncio.sleep(0.05)

    def _ask(self, question: str) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()


# In the worker's process.


def _run(settings: dict[str, Any], pipe: Connection) -> None:
    uvloop.run(_serve(DecodeSettings(**settings), pipe))  # as Ray runs its replicas


async def _serve(settings: DecodeSettings, pipe: Connection) -> None:
    configure_logging(settings.log_level)
    loaded = await asyncio.to_thread(load, settings)
    store = open_store(settings.redis_url)
    worker_id = f"decode-{uuid.uuid4().hex[:8]}"
    worker = DecodeWorker(loaded, store, settings, worker_id=worker_id)
    probe = _Probe(worker, kv_geometry(loaded.model))
    stopped = asyncio.Event()
    await worker.start()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), functools.partial(_answer, probe, pipe, stopped))
    pipe.send(worker_id)
    await stopped.wait()
    loop.remove_reader(pipe.fileno())
    await worker.stop(grace_s=0)
    await store.close()


def _answer(probe: _Probe, pipe: Connection, stopped: asyncio.Event) -> None:
    try:
        pipe.send(getattr(probe, pipe.recv())())
    except EOFError:
        stopped.set()


class _Probe:
    """Answers the questions of :class:`ProbedWorker`."""

    def __init__(self, worker: DecodeWorker, geometry: Any) -> None:
        self._worker = worker
        self._geometry = geometry
        self._first_rss = psutil.Process().memory_info().rss
        self._tokens: dict[tuple[int, int], int] = {}
        self._admissions = Admissions()
        self._num_placed = 0
        self._note_tokens()
        self._note_admissions()

    def state(self) -> WorkerState:
        memory = self._worker.memory
        return WorkerState(
            size_bytes=memory.pool.size_bytes,
            used_bytes=memory.pool.used_bytes,
            resident_bytes=memory.resident_bytes,
            peak_bytes=memory.pool.peak_bytes,
            rss_bytes=psutil.Process().memory_info().rss - self._first_rss,
            num_active=memory.num_active,
            num_running=self._worker.engine.num_running,
            num_tasks=len(asyncio.all_tasks()),
        )

    def token_times(self) -> dict[tuple[int, int], int]:
        times = dict(self._tokens)
        self._tokens.clear()
        return times

    def admissions(self) -> Admissions:
        seen, self._admissions = self._admissions, Admissions()
        return seen

    def forget(self) -> None:
        while self._worker.memory._give_up_oldest():
            pass

    def _note_tokens(self) -> None:
        accept = DecodeSequence.accept

        def noted(sequence: DecodeSequence, logits: torch.Tensor) -> Any:
            delta = accept(sequence, logits)
            if delta is not None:
                key = (sequence._sampling.seed, delta.first_token_index)
                self._tokens[key] = time.monotonic_ns()
            return delta

        DecodeSequence.accept = noted  # type: ignore[assignment,method-assign]

    def _note_admissions(self) -> None:
        memory = self._worker.memory
        placed = memory.placed

        @asynccontextmanager
        async def noted(
            segments: Sequence[session_pb2.Segment],
            *,
            new_tokens: int,
            limit: KVLimit | None = None,
        ) -> AsyncIterator[Placement]:
            seen = self._admissions
            arrival, arrived_at = len(seen.sizes), time.monotonic()
            kept = [segment.num_kept_tokens for segment in segments]
            tail = tail_tokens(kept, new_tokens=new_tokens, limit=limit)
            seen.sizes.append(
                aligned(tail_size_bytes(self._geometry, tail))
                + sum(aligned(segment.size_bytes) for segment in segments)
            )
            async with placed(segments, new_tokens=new_tokens, limit=limit) as placement:
                seen.order.append(arrival)
                seen.waited_s.append(time.monotonic() - arrived_at)
                self._num_placed += 1
                seen.most_at_once = max(seen.most_at_once, self._num_placed)
                try:
                    yield placement
                finally:
                    self._num_placed -= 1

        memory.placed = noted  # type: ignore[method-assign]
