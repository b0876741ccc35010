"""What lies between the engine and the client, and what a new session costs running streams."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

import uvloop

from chunkserve_client import Client, Compression, Session
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.probed_worker import ProbedWorker
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

NUM_TOKENS = 64
NUM_REPEATS = 5
MOST_MS = 2.0  # the bar: between engine and client, half of the tokens, 16 streams

STEP_GAP_NS = 8_000_000  # between two tokens of one step it is less, between two steps more

NUM_RUNNING = 8
NUM_JOINS = 7
JOINING_TOKENS = 1000
TOKENS_BETWEEN_JOINS = 12

# Start and end, ``time.monotonic_ns()``.
Span = tuple[int, int]


def measure_streams(model: str, documents: Documents) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
    """
    with ServiceStack(model) as stack, stack.worker(kv_bytes=2 << 30) as worker:
        return uvloop.run(_measure(stack, worker, documents))


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
    repeats: list[list[float]] = []
    step_repeats: list[list[float]] = []
    for number in range(NUM_REPEATS):
        tell(f"{num_streams} streams: {number + 1} of {NUM_REPEATS}")
        prompts = [documents.next(30) for _ in range(num_streams)]
        heard = await asyncio.gather(
            *(
                listen(client, prompt, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True)
                for seed, prompt in enumerate(prompts)
            )
        )
        chosen_ns = worker.token_times()
        repeats.append(_added_ms(chosen_ns, heard))
        step_repeats.append(_added_ms(_step_times(chosen_ns), heard))
    streams = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
    p50 = statistics.median(statistics.median(added) for added in repeats)
    p99 = statistics.median(statistics.quantiles(added, n=100)[-1] for added in repeats)
    step_p50 = statistics.median(statistics.median(added) for added in step_repeats)
    bar = MOST_MS if num_streams > 1 else None
    return [
        Figure(f"engine to client, {streams}, p50", p50, "ms", at_most=bar),
        Figure(f"engine to client, {streams}, p99", p99, "ms"),
        Figure(f"step's first token to client, {streams}, p50", step_p50, "ms"),
    ]


def _added_ms(chosen_ns: dict[tuple[int, int], int], heard: Sequence[Heard]) -> list[float]:
    return [
        (arrived_ns - chosen_ns[seed, index]) / 1e6
        for seed, answer in enumerate(heard)
        for index, arrived_ns in enumerate(answer.arrived_ns)
    ]


def _step_times(chosen_ns: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Return for each token when the first one of its step was chosen.

    So that what makes choosing the others slower is not left out.
    """
    times: dict[tuple[int, int], int] = {}
    first_ns = last_ns = 0
    for token, at_ns in sorted(chosen_ns.items(), key=lambda item: item[1]):
        if at_ns - last_ns > STEP_GAP_NS:
            first_ns = at_ns
        times[token], last_ns = first_ns, at_ns
    return times


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
    joins: list[Span] = []
    try:
        for number, session in enumerate(sessions):
            tell(f"join {number + 1} of {NUM_JOINS}")
            await _arrived(running, TOKENS_BETWEEN_JOINS)
            joins.append(await _join(session, documents))
        await _arrived(running, TOKENS_BETWEEN_JOINS)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    tell("\n")
    return _stalls(_gaps(worker.token_times()), joins)


def _stalls(gaps: Sequence[Span], joins: Sequence[Span]) -> list[Figure]:
    usual_ms = statistics.median(
        _length_ms(gap)
        for gap in gaps
        if gap[0] > joins[0][0] and not any(_overlap(gap, join) for join in joins)
    )
    longest_ms = [max(_length_ms(gap) for gap in gaps if _overlap(gap, join)) for join in joins]
    median_ms = statistics.median(longest_ms)
    name = f"{NUM_RUNNING} streams, {JOINING_TOKENS:,} kept tokens join:"
    return [
        Figure(f"{name} median gap without", usual_ms, "ms"),
        Figure(f"{name} longest gap, median of {len(joins)}", median_ms, "ms"),
        Figure(f"{name} longest gap, maximum", max(longest_ms), "ms"),
        Figure(f"{name} stall, median", median_ms - usual_ms, "ms"),
        Figure(f"{name} stall, maximum", max(longest_ms) - usual_ms, "ms"),
    ]


async def _stored_session(client: Client, documents: Documents) -> Session:
    session = await client.create_session(compression=Compression(keep_ratio=1.0))
    # The prompt's last token is not prefilled.
    await listen(session, documents.next(JOINING_TOKENS + 1), max_tokens=1)
    return session


async def _join(session: Session, documents: Documents) -> Span:
    """Ask a session that the worker must fetch; return when this began, and the first token."""
    start_ns = time.monotonic_ns()
    joined = await listen(session, documents.question(), seed=NUM_RUNNING, max_tokens=4)
    assert joined.prompt_info is not None
    assert joined.prompt_info.fetched_bytes > 0, "nothing was fetched"
    return start_ns, joined.arrived_ns[0]


async def _arrived(answers: Sequence[Heard], num_tokens: int) -> None:
    """Wait until each answer has so many more tokens."""
    wanted = [len(answer.token_ids) + num_tokens for answer in answers]
    # Nobody tells when an answer grows: an event for each token would cost what is measured.
    while any(len(a.token_ids) < n for a, n in zip(answers, wanted, strict=True)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def _gaps(chosen_ns: dict[tuple[int, int], int]) -> list[Span]:
    """Return each gap between two tokens of a running stream."""
    gaps: list[Span] = []
    for seed in range(NUM_RUNNING):
        times = [at for (own, _), at in sorted(chosen_ns.items()) if own == seed]
        gaps += itertools.pairwise(times)
    return gaps


def _overlap(one: Span, other: Span) -> bool:
    return one[1] > other[0] and one[0] < other[1]


def _length_ms(span: Span) -> float:
    return (span[1] - span[0]) / 1e6
