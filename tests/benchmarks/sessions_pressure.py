"""More sessions than the store has room for: what each gives up, and what its answers are worth."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import redis

from chunkserve_client import (
    ChunkServeError,
    Client,
    Compression,
    Overloaded,
    Segment,
    Session,
    SessionInfo,
)
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, spread, tell
from tests.benchmarks.probed_worker import ProbedWorker
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

SEED = 11
KEEP_RATIO = 0.3  # the original budget
LEAST_OF_LONGEST = 0.3  # documents have at least so much of the longest one's tokens
FITTING = 0.3  # of the sessions, at their original budget
NUM_SAMPLED = 10

FIRST_TOKENS = 8
ANSWER_TOKENS = 32

# Room above the pressure's high mark: for sessions that come, and smaller segments that are made
# while the old ones stand.
SPARE = 0.2
SPARE_SESSIONS = 1.5
LOW_MARK = 0.9  # of the high one
LOOK_EVERY_S = 0.5

# A store that stays full for so long is not being relieved.
LONGEST_FULL_S = 120.0
UNNAMED_RETRY_S = 1.0

_PRECISIONS = ("native", "fp8", "int8", "int4")  # finest first

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of one session.

    Attributes:
        document: Its first turn.
        question: Its second.
        budget: What its turns may keep.
    """

    document: list[int]
    question: list[int]
    budget: Compression


@dataclass(frozen=True, slots=True)
class Control:
    """Answers with room for everything.

    Attributes:
        first: Of the first turn.
        follow_up: Of the second, at the same budget.
        uncompressed: Of the second, behind the same tokens, all of whose KV is kept.
    """

    first: list[int]
    follow_up: list[int]
    uncompressed: list[int]


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for sessions.

    Attributes:
        bytes: All of it.
        high_bytes: Past it, sessions are made smaller.
    """

    bytes: int
    high_bytes: int


@dataclass(slots=True)
class Refusals:
    """How often the store was full, and for whom."""

    first_turns: int = 0
    follow_ups: int = 0


@dataclass(frozen=True, slots=True)
class FollowedUp:
    """A session that was asked again.

    Attributes:
        first: Answer of its first turn.
        info: As it was just before the second; ``None`` if it was gone.
        heard: The second answer; ``None`` if there was none.
        failure: Why there was none.
    """

    first: list[int]
    info: SessionInfo | None = None
    heard: Heard | None = None
    failure: str = ""


@dataclass(slots=True)
class Pressed:
    """What happened under pressure."""

    refusals: Refusals = field(default_factory=Refusals)
    sessions: list[FollowedUp] = field(default_factory=list)


def measure_pressure(
    model: str, documents: Documents, *, num_tokens: int, num_sessions: int, precision: str
) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
        num_tokens: Tokens of the longest document.
        num_sessions: Sessions; there is room for three tenths of them.
        precision: Of their documents' KV before memory is short.
    """
    rng = random.Random(SEED)
    least = int(LEAST_OF_LONGEST * num_tokens)
    budget = Compression(keep_ratio=KEEP_RATIO, precision=precision)
    plans = [
        Plan(documents.next(rng.randint(least, num_tokens)), documents.question(), budget)
        for _ in range(num_sessions)
    ]
    sampled = range(0, num_sessions, max(1, num_sessions // NUM_SAMPLED))[:NUM_SAMPLED]
    with ServiceStack(model) as stack, stack.worker(kv_bytes=1 << 30) as worker:
        bytes_per_token, controls = asyncio.run(_with_room(stack, [plans[i] for i in sampled]))
        needed = bytes_per_token * sum(len(plan.document) for plan in plans)
        room = _room(needed, largest=bytes_per_token * num_tokens)
        _take_room(stack, room)
        worker.forget()
        pressed = asyncio.run(_pressed(stack, worker, plans))
        evicted = stack.metric("compress", "chunkserve_evicted_sessions_total")
    of_sample = list(zip([pressed.sessions[index] for index in sampled], controls, strict=True))
    return [
        Figure("sessions", num_sessions),
        Figure("bytes of all at their original budget", round(needed), "B"),
        Figure("bytes that the store has room for", room.bytes, "B"),
        Figure("  of it, pressure begins at", room.high_bytes, "B"),
        *_survival_figures(pressed, evicted),
        *_loss_figures(pressed.sessions),
        *_agreement_figures(of_sample),
    ]


def _room(needed: float, *, largest: float) -> Room:
    """Return the room for a part of the sessions.

    Args:
        needed: Bytes of all of them.
        largest: Bytes of one, at most.
    """
    size = FITTING * needed
    high = size - max(SPARE * size, SPARE_SESSIONS * largest)
    if high <= 0:
        raise SystemExit("so few sessions leave no room to press them in; take 20 or more")
    return Room(round(size), round(high))


def _take_room(stack: ServiceStack, room: Room) -> None:
    """Leave the store so much room, and have somebody who sees to it."""
    with redis.Redis.from_url(stack.store_url) as client:
        client.config_set("maxmemory", _used_bytes(stack) + room.bytes)
    stack.start(
        "compress",
        pressure_high_bytes=room.high_bytes,
        pressure_low_bytes=round(LOW_MARK * room.high_bytes),
        pressure_interval_s=LOOK_EVERY_S,
    )
    stack.metric("compress", "chunkserve_stored_bytes")  # it is there


# With room for everything.


async def _with_room(stack: ServiceStack, plans: Sequence[Plan]) -> tuple[float, list[Control]]:
    """Return what sessions answer when they have what they need, and leave nothing behind.

    Returns:
        Bytes in the store for each token of a document, and the answers.
    """
    async with stack.client() as client:
        empty_bytes = _used_bytes(stack)
        sessions, firsts = [], []
        for number, plan in enumerate(plans):
            tell(f"with room: session {number + 1} of {len(plans)}")
            sessions.append(await client.create_session(compression=plan.budget))
            firsts.append(await _ask(sessions[-1], plan.document, FIRST_TOKENS))
        used = _used_bytes(stack) - empty_bytes
        controls = []
        for number, plan in enumerate(plans):
            tell(f"with room: follow-up {number + 1} of {len(plans)}")
            first = firsts[number].token_ids
            follow_up = await _ask(sessions[number], plan.question, ANSWER_TOKENS)
            uncompressed = await _ask(
                client,
                plan.document + first + plan.question,
                ANSWER_TOKENS,
                Compression(keep_ratio=1.0),
            )
            controls.append(Control(first, follow_up.token_ids, uncompressed.token_ids))
        for session in sessions:
            await session.delete()
    tell("\n")
    return used / sum(len(plan.document) for plan in plans), controls


async def _ask(
    asker: Client | Session,
    token_ids: list[int],
    num_tokens: int,
    compression: Compression | None = None,
) -> Heard:
    return await listen(
        asker,
        token_ids,
        max_tokens=num_tokens,
        ignore_eos=True,
        compression=compression,
        wait_if_busy=True,  # the pressure policy may be at it
    )


def _used_bytes(stack: ServiceStack) -> int:
    with redis.Redis.from_url(stack.store_url) as client:
        while client.info("memory")["lazyfree_pending_objects"]:
            time.sleep(0.01)
        return int(client.info("memory")["used_memory"])


# Under pressure.


async def _pressed(stack: ServiceStack, worker: ProbedWorker, plans: Sequence[Plan]) -> Pressed:
    """Create all sessions, no faster than there is room, then ask each a second time."""
    pressed = Pressed()
    async with stack.client() as client:
        created = []
        for number, plan in enumerate(plans):
            tell(f"under pressure: session {number + 1} of {len(plans)}")
            created.append(await _created(client, plan, pressed.refusals))
        worker.forget()  # what it has shows nothing of what is stored
        for number, (plan, (session, first)) in enumerate(zip(plans, created, strict=True)):
            tell(f"under pressure: follow-up {number + 1} of {len(plans)}")
            pressed.sessions.append(
                await _followed_up(session, plan, first.token_ids, pressed.refusals)
            )
    tell("\n")
    return pressed


async def _created(client: Client, plan: Plan, refusals: Refusals) -> tuple[Session, Heard]:
    def refused() -> None:
        refusals.first_turns += 1

    session = await _when_there_is_room(
        lambda: client.create_session(compression=plan.budget), refused
    )
    first = await _when_there_is_room(lambda: _ask(session, plan.document, FIRST_TOKENS), refused)
    return session, first


async def _followed_up(
    session: Session, plan: Plan, first: list[int], refusals: Refusals
) -> FollowedUp:
    def refused() -> None:
        refusals.follow_ups += 1

    info = None
    try:
        info = await session.refresh()
        heard = await _when_there_is_room(
            lambda: _ask(session, plan.question, ANSWER_TOKENS), refused
        )
    except ChunkServeError as error:
        return FollowedUp(first, info, failure=error.reason or str(error))
    return FollowedUp(first, info, heard)


async def _when_there_is_room(
    attempt: Callable[[], Awaitable[_T]], refused: Callable[[], None]
) -> _T:
    """Return what an attempt gives; while the store is full, wait as long as it says, and retry.

    Args:
        attempt: To be made again and again.
        refused: Called for every attempt that the store had no room for.

    Raises:
        Overloaded: It stays full.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LONGEST_FULL_S
    while True:
        try:
            return await attempt()
        except Overloaded as error:
            if error.reason != "STORE_FULL" or loop.time() > deadline:
                raise
            refused()
            await asyncio.sleep(error.retry_after_s or UNNAMED_RETRY_S)


# What it came to.


def _survival_figures(pressed: Pressed, evicted: float) -> list[Figure]:
    answers = [session.heard for session in pressed.sessions if session.heard]
    infos = [heard.prompt_info for heard in answers if heard.prompt_info]
    failures = sorted({session.failure for session in pressed.sessions if session.failure})
    unanswered = len(pressed.sessions) - len(answers)
    return [
        Figure("turns refused while the store was full, first ones", pressed.refusals.first_turns),
        Figure("turns refused while the store was full, follow-ups", pressed.refusals.follow_ups),
        Figure("sessions evicted", evicted, at_most=0),
        Figure(" ".join(["follow-ups not answered", *failures]), unanswered, at_most=0),
        Figure("follow-ups with a rebuild", sum(i.rebuilt for i in infos), at_most=0),
        Figure("follow-ups that fetched nothing", sum(not i.fetched_bytes for i in infos)),
    ]


def _loss_figures(sessions: Sequence[FollowedUp]) -> list[Figure]:
    """Return what sessions had given up when they were asked again, by kind of loss."""
    by_loss: dict[str, list[SessionInfo]] = {}
    for session in sessions:
        if session.info is not None:
            by_loss.setdefault(_loss(session.info), []).append(session.info)
    figures = []
    for loss in sorted(by_loss, key=_mildest_first):
        infos = by_loss[loss]
        figures.append(Figure(f"{loss}: sessions", len(infos)))
        figures += spread(f"  {loss}: kept tokens, now/original", [_kept_share(i) for i in infos])
        figures += spread(f"  {loss}: bytes, now/original", [_bytes_share(i) for i in infos])
    return figures


def _loss(info: SessionInfo) -> str:
    """Return the coarsest precision of a session's segments, and whether tokens were dropped."""
    coarsest = max((_precision(s) for s in info.segments), key=_PRECISIONS.index, default="native")
    is_pruned = any(s.recompression and s.recompression.max_kept_tokens for s in info.segments)
    return f"{coarsest}, fewer tokens" if is_pruned else coarsest


def _mildest_first(loss: str) -> tuple[int, str]:
    return _PRECISIONS.index(loss.partition(",")[0]), loss


def _precision(segment: Segment) -> str:
    if segment.recompression and segment.recompression.precision:
        return segment.recompression.precision
    return (segment.compression and segment.compression.precision) or "native"


def _kept_share(info: SessionInfo) -> float:
    original = sum(
        s.recompression.original_kept_tokens if s.recompression else s.num_kept_tokens
        for s in info.segments
    )
    return sum(s.num_kept_tokens for s in info.segments) / max(original, 1)


def _bytes_share(info: SessionInfo) -> float:
    original = sum(
        s.recompression.original_bytes if s.recompression else s.size_bytes for s in info.segments
    )
    return sum(s.size_bytes for s in info.segments) / max(original, 1)


def _agreement_figures(sample: Sequence[tuple[FollowedUp, Control]]) -> list[Figure]:
    """Return after how many tokens a sample's answers differ from those with room for all."""
    answered = [(session, control) for session, control in sample if session.heard]
    differing = sum(session.first != control.first for session, control in sample)
    name = f"of {ANSWER_TOKENS} tokens alike,"
    return [
        Figure("sampled sessions", len(sample)),
        Figure("  first answers unlike those with room", differing),
        *spread(
            f"  {name} pressed and not pressed",
            _alike((s.heard.token_ids, c.follow_up) for s, c in answered if s.heard),
        ),
        *spread(
            f"  {name} pressed and uncompressed",
            _alike((s.heard.token_ids, c.uncompressed) for s, c in answered if s.heard),
        ),
        *spread(
            f"  {name} not pressed and uncompressed",
            _alike((c.follow_up, c.uncompressed) for _, c in sample),
        ),
    ]


def _alike(pairs: Iterable[tuple[list[int], list[int]]]) -> list[float]:
    """Return the number of leading tokens that are equal, of each pair."""
    alike = []
    for one, other in pairs:
        pairwise = enumerate(zip(one, other, strict=True))
        alike.append(float(next((i for i, (a, b) in pairwise if a != b), len(one))))
    return alike
