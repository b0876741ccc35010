"""More than the worker can do at once: nothing leaks, nobody starves, no answer changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chunkserve_client import Cancelled, Client, Compression, Session
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.probed_worker import ProbedWorker
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

SEED = 7

NUM_STREAMS = 200
NUM_CANCELLED = 100
STREAM_TOKENS = 16
LATEST_CANCEL_S = 10.0

NUM_SESSIONS = 32
NUM_FITTING = 8
SESSION_PROMPT = 300
SESSION_TOKENS = 24

# Prompts of one batch, each with the fraction of it that is kept.
MIXED = ((5, 1.0), (60, 1.0), (127, 1.0), (200, 1.0), (400, 0.3), (800, 1.0), (1500, 0.1),
         (2500, 0.5))  # fmt: skip
MIXED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that can be made again.

    Attributes:
        token_ids: The prompt.
        is_session: Whether its KV is kept.
        options: Of ``generate``.
    """

    token_ids: list[int]
    is_session: bool
    options: dict[str, Any] = field(default_factory=dict)


def measure_load(model: str, documents: Documents) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
    """
    with ServiceStack(model) as stack:
        with stack.worker(kv_bytes=2 << 30) as worker:
            figures = asyncio.run(_cancelled(stack, worker, documents))
            figures += asyncio.run(_mixed_lengths(stack, documents))
            names, needed = asyncio.run(_stored_sessions(stack, worker, documents))
        with stack.worker(kv_bytes=NUM_FITTING * needed) as worker:
            figures += asyncio.run(_crowded(stack, worker, documents, names))
    return figures


# 200 streams, of which 100 are cancelled.


async def _cancelled(
    stack: ServiceStack, worker: ProbedWorker, documents: Documents
) -> list[Figure]:
    rng = random.Random(SEED)
    asks = [_ask(documents, rng, number) for number in range(NUM_STREAMS)]
    cancelled = set(rng.sample(range(NUM_STREAMS), NUM_CANCELLED))
    num_tasks = worker.state().num_tasks
    async with stack.client() as client:
        tell(f"{NUM_STREAMS} streams at once")
        heard = [Heard() for _ in asks]
        async with asyncio.TaskGroup() as group:
            for number, ask in enumerate(asks):
                answer = _answer(client, ask, heard[number])
                if number in cancelled:
                    answer = _cut(answer, heard[number], rng)
                group.create_task(answer)
        state = await worker.settled(num_tasks)
        differing = 0
        kept = sorted(set(range(NUM_STREAMS)) - cancelled)
        for done, number in enumerate(kept):
            tell(f"alone: {done + 1} of {len(kept)}")
            alone = Heard()
            await _answer(client, asks[number], alone)
            differing += alone.token_ids != heard[number].token_ids
    tell("\n")
    cut = [heard[number] for number in cancelled]
    name = f"{NUM_STREAMS} streams, {NUM_CANCELLED} cancelled:"
    return [
        Figure(f"{name} before their first token", sum(not a.token_ids for a in cut)),
        Figure(f"{name} in the middle", sum(not a.finish and bool(a.token_ids) for a in cut)),
        Figure(f"{name} too late", sum(a.finish is not None for a in cut)),
        Figure(f"{name} bytes used", state.used_bytes, "B"),
        Figure(f"{name} bytes resident", state.resident_bytes, "B"),
        Figure(f"{name} bytes leaked", abs(state.leaked_bytes), "B", at_most=0),
        Figure(f"{name} sequences left", state.num_active + state.num_running, at_most=0),
        Figure(f"{name} tasks left", max(0, state.num_tasks - num_tasks), at_most=0),
        Figure(f"{name} others unlike their solo runs", differing, at_most=0),
    ]


def _ask(documents: Documents, rng: random.Random, number: int) -> Ask:
    """Return a request: every other one sampled, every third one a session's."""
    options: dict[str, Any] = {"seed": number}
    if number % 2:
        options |= {"temperature": 0.8, "top_p": 0.95}
    return Ask(documents.next(rng.randint(5, 40)), is_session=number % 3 == 0, options=options)


async def _answer(client: Client, ask: Ask, heard: Heard) -> None:
    asker = await client.create_session() if ask.is_session else client
    await listen(
        asker, ask.token_ids, heard, max_tokens=STREAM_TOKENS, ignore_eos=True, **ask.options
    )


async def _cut(answer: Any, heard: Heard, rng: random.Random) -> None:
    """Cancel an answer at a random moment, or after a random token."""
    at_s, at_token = rng.uniform(0, LATEST_CANCEL_S), rng.randrange(STREAM_TOKENS - 1)
    is_timed = rng.random() < 0.5
    task = asyncio.ensure_future(answer)
    if is_timed:
        await asyncio.wait([task], timeout=at_s)
    else:
        while len(heard.token_ids) <= at_token and not task.done():
            await asyncio.wait([task], timeout=0.005)
    task.cancel()
    with suppress(asyncio.CancelledError, Cancelled):
        await task


# Sequences of very different lengths in one batch.


async def _mixed_lengths(stack: ServiceStack, documents: Documents) -> list[Figure]:
    async with stack.client() as client:
        pairs = []
        for length, keep_ratio in MIXED:
            tell(f"mixed lengths: preparing {length} tokens")
            prompt = documents.next(length)
            compression = Compression(keep_ratio=keep_ratio)
            # The second finds the first one's segment, so both begin with the same KV.
            pairs.append([await _after_turn(client, prompt, compression) for _ in range(2)])
        tell("mixed lengths: alone, then together")
        alone = [await _next_turn(session, documents, MIXED_TOKENS) for session, _ in pairs]
        together = await asyncio.gather(
            *(_next_turn(session, documents, MIXED_TOKENS) for _, session in pairs)
        )
    tell("\n")
    differing = sum(a.token_ids != b.token_ids for a, b in zip(alone, together, strict=True))
    name = f"{len(MIXED)} lengths ({MIXED[0][0]} to {MIXED[-1][0]:,}) in a batch:"
    return [Figure(f"{name} unlike solo", differing, at_most=0)]


async def _after_turn(client: Client, prompt: list[int], compression: Compression) -> Session:
    session = await client.create_session(compression=compression)
    await listen(session, prompt, max_tokens=1)
    return session


async def _next_turn(session: Session, documents: Documents, num_tokens: int) -> Heard:
    return await listen(session, documents.question(), max_tokens=num_tokens, ignore_eos=True)


# More sessions than fit.


async def _stored_sessions(
    stack: ServiceStack, worker: ProbedWorker, documents: Documents
) -> tuple[Sequence[str], int]:
    """Return the ids of sessions that wait for their second turn, and what one needs for it."""
    async with stack.client() as client:
        sessions = []
        for number in range(NUM_SESSIONS + 1):
            tell(f"sessions: preparing {number} of {NUM_SESSIONS}")
            prompt = documents.next(SESSION_PROMPT)
            sessions.append(await _after_turn(client, prompt, Compression(keep_ratio=1.0)))
        worker.admissions()
        await _next_turn(sessions.pop(), documents, SESSION_TOKENS)
    tell("\n")
    return [session.session_id for session in sessions], worker.admissions().sizes[0]


async def _crowded(
    stack: ServiceStack, worker: ProbedWorker, documents: Documents, names: Sequence[str]
) -> list[Figure]:
    async with stack.client() as client:
        sessions = [await client.get_session(name) for name in names]
        heard = await asyncio.gather(
            *(_next_turn(session, documents, SESSION_TOKENS) for session in sessions)
        )
    admissions, state = worker.admissions(), worker.state()
    served = sum(len(answer.token_ids) == SESSION_TOKENS for answer in heard)
    early = sum(arrival != place for place, arrival in enumerate(admissions.order))
    name = f"{NUM_SESSIONS} sessions, room for {NUM_FITTING}:"
    return [
        Figure(f"{name} not served", NUM_SESSIONS - served, at_most=0),
        Figure(f"{name} out of order", early, at_most=0),
        Figure(f"{name} at once, at most", admissions.most_at_once, at_most=NUM_FITTING),
        Figure(f"{name} longest wait", max(admissions.waited_s), "s"),
        Figure(f"{name} peak_bytes", state.peak_bytes, "B", at_most=state.size_bytes),
        Figure(f"{name} process grew by", state.rss_bytes, "B"),
    ]
