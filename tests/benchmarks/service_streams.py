"""What lies between the engine and the client, and what a new session costs running streams."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

from chunkserve_client import Client, Compression, Session
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.probed_worker import ProbedWorker
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

NUM_TOKENS = 64
NUM_REPEATS = 5
MOST_MS = 2.0  # the bar: between engine and client, half of the tokens, 16 streams

NUM_RUNNING = 8
NUM_JOINS = 7
JOINING_TOKENS = 1000
TOKENS_BETWEEN_JOINS = 12


def measure_streams(model: str, documents: Documents) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
    """
    with ServiceStack(model) as stack, stack.worker(kv_bytes=2 << 30) as worker:
        return asyncio.run(_measure(stack, worker, documents))


async def _measure(stack: ServiceStack, worker: ProbedWorker, documents: Documents) -> list[Figure]:
    figures: list[Figure] = []
    async with stack.client() as client:
        for num_streams in (1, 16):
            figures += await _relay(client, worker, documents, num_streams)
        return figures + await _joins(client, worker, documents)


async def _relay(
    client: Client, worker: ProbedWorker, documents: Documents, num_streams: int
) -> list[Figure]:
    """Compare when tokens were chosen and when they arrived."""
    repeats = []
    for number in range(NUM_REPEATS):
        tell(f"{num_streams} streams: {number + 1} of {NUM_REPEATS}")
        prompts = [documents.next(30) for _ in range(num_streams)]
        heard = await asyncio.gather(
            *(
                listen(client, prompt, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True)
                for seed, prompt in enumerate(prompts)
            )
        )
        repeats.append(_added_ms(worker.token_times(), heard))
    streams = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
    p50 = statistics.median(statistics.median(added) for added in repeats)
    p99 = statistics.median(statistics.quantiles(added, n=100)[-1] for added in repeats)
    bar = MOST_MS if num_streams > 1 else None
    return [
        Figure(f"engine to client, {streams}, p50", p50, "ms", at_most=bar),
        Figure(f"engine to client, {streams}, p99", p99, "ms"),
    ]


def _added_ms(chosen_ns: dict[tuple[int, int], int], heard: Sequence[Heard]) -> list[float]:
    return [
        (arrived_ns - chosen_ns[seed, index]) / 1e6
        for seed, answer in enumerate(heard)
        for index, arrived_ns in enumerate(answer.arrived_ns)
    ]


async def _joins(client: Client, worker: ProbedWorker, documents: Documents) -> list[Figure]:
    """Let sessions join running streams; compare the gaps between tokens around it."""
    sessions = [await _stored_session(client, documents) for _ in range(NUM_JOINS)]
    worker.forget()
    worker.token_times()
    running = [Heard() for _ in range(NUM_RUNNING)]
    streams = [
        asyncio.create_task(
            listen(client, documents.next(30), heard, seed=seed, max_tokens=4000, ignore_eos=True)
        )
        for seed, heard in enumerate(running)
    ]
    try:
        joins = []
        for number, session in enumerate(sessions):
            tell(f"join {number + 1} of {NUM_JOINS}")
            await _arrived(running, TOKENS_BETWEEN_JOINS)
            start_ns = time.monotonic_ns()
            joined = await listen(session, documents.question(), seed=NUM_RUNNING, max_tokens=4)
            assert joined.prompt_info is not None
            assert joined.prompt_info.fetched_bytes > 0, "nothing was fetched"
            joins.append((start_ns, joined.arrived_ns[0]))
        await _arrived(running, TOKENS_BETWEEN_JOINS)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    tell("\n")
    gaps = _gaps(worker.token_times())
    longest = [
        max(end - start for start, end in gaps if end > join[0] and start < join[1]) / 1e6
        for join in joins
    ]
    usual = statistics.median(
        (end - start) / 1e6
        for start, end in gaps
        if start > joins[0][0] and not any(end > join[0] and start < join[1] for join in joins)
    )
    name = f"{NUM_RUNNING} streams, {JOINING_TOKENS:,} kept tokens join:"
    return [
        Figure(f"{name} median gap without", usual, "ms"),
        Figure(f"{name} longest gap, median of {NUM_JOINS}", statistics.median(longest), "ms"),
        Figure(f"{name} longest gap, maximum", max(longest), "ms"),
        Figure(f"{name} stall, median", statistics.median(longest) - usual, "ms"),
        Figure(f"{name} stall, maximum", max(longest) - usual, "ms"),
    ]


async def _stored_session(client: Client, documents: Documents) -> Session:
    session = await client.create_session(compression=Compression(keep_ratio=1.0))
    # The prompt's last token is not prefilled.
    await listen(session, documents.next(JOINING_TOKENS + 1), max_tokens=1)
    return session


async def _arrived(answers: Sequence[Heard], num_tokens: int) -> None:
    """Wait until each answer has so many more tokens."""
    wanted = [len(answer.token_ids) + num_tokens for answer in answers]
    while any(len(a.token_ids) < n for a, n in zip(answers, wanted, strict=True)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def _gaps(chosen_ns: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """Return start and end of each gap between two tokens of a running stream."""
    gaps = []
    for seed in range(NUM_RUNNING):
        times = [at for (own, _), at in sorted(chosen_ns.items()) if own == seed]
        gaps += itertools.pairwise(times)
    return gaps
