"""Processes that are killed in the middle of turns, and a store that goes away.

The model is tiny, all else is real. What a disturbed turn answers and stores is compared with the
same turn undisturbed, in another session whose segments are deleted before.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from tiny_model import byte_tokenizer, tiny_llama

from chunkserve.v1 import manifest_pb2
from chunkserve_client import (
    ChunkServeError,
    Client,
    Compression,
    Generation,
    Result,
    Session,
    SessionBusy,
    Unavailable,
)
from services.store import Store, open_store
from tests.e2e.decode_process import AFTER_COMMIT, BEFORE_COMMIT
from tests.e2e.process_stack import (
    PrefillProcess,
    ProcessStack,
    eventually,
    eventually_async,
)

pytestmark = pytest.mark.slow

TENANT: Final = "default"
POLICY: Final = Compression(keep_ratio=0.5, chunk_size=4, window_size=4)
WHOLE: Final = Compression(keep_ratio=1.0)
NUM_KILLS: Final = 20
NUM_TOKENS: Final = 48


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessStack]:
    directory: Path = tmp_path_factory.mktemp("f")
    model = directory / "tiny"
    tiny_llama(max_model_len=8192).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    # In small steps, so that a prefill has a middle.
    prefill = {"MIN_COMPRESS_TOKENS": "16", "PREFILL_CHUNK_TOKENS": "2", "SEGMENT_LEASE_S": "1"}
    # A gateway that gets no processor for a while keeps its leases; one that is killed soon loses
    # them.
    with ProcessStack(directory, model, prefill=prefill, gateway={"LEASE_TTL_S": "10"}) as stack:
        yield stack


@pytest.fixture
async def stack(processes: ProcessStack) -> AsyncIterator[ProcessStack]:
    """The stack with all its workers. Afterwards, a session that is deleted leaves nothing."""
    await processes.ready()
    processes.new_log_lines()
    yield processes
    print(processes.new_log_lines())  # pytest shows it if the test has failed
    async with processes.client() as client:
        await eventually_async(
            lambda: has_no_session(client), state=lambda: "a turn still runs in one of them"
        )
    with redis.Redis.from_url(processes.store.url) as admin:
        await eventually(lambda: not left_of_sessions(admin), state=lambda: left_of_sessions(admin))


async def has_no_session(client: Client) -> bool:
    """Delete all sessions; not yet, if a turn of a test that has failed still runs."""
    with suppress(SessionBusy):
        async for session in client.list_sessions():
            await session.delete()
        return True
    return False


@pytest.fixture
async def client(stack: ProcessStack) -> AsyncIterator[Client]:
    async with stack.client() as client:
        yield client


@pytest.fixture
async def store(stack: ProcessStack) -> AsyncIterator[Store]:
    opened = open_store(stack.store.url)
    yield opened
    await opened.close()


def left_of_sessions(admin: redis.Redis) -> Mapping[str, object]:
    """Return the keys that are there for sessions; of sorted sets with their members.

    One-off requests whose worker was killed leave segments, which nobody owns and which expire.
    """
    suffixes = (b":owners", b":manifest", b":lease", b":results", b":turns", b"}:account")
    left = [key for key in admin.scan_iter(count=1000) if key.endswith(suffixes)]
    return {
        key.decode(): admin.zrange(key, 0, -1) if admin.type(key) == b"zset" else admin.pttl(key)
        for key in left
    }


@dataclass(frozen=True)
class Question:
    """A turn's request."""

    token_ids: tuple[int, ...]
    options: dict[str, Any]

    @property
    def seed(self) -> int:
        seed: int = self.options["seed"]
        return seed


def question(rng: random.Random, num_tokens: int, **options: Any) -> Question:
    """Draw a question: greedy or with a seed of its own."""
    ids = tuple(rng.randrange(1, 257) for _ in range(num_tokens))
    sampling = {"temperature": 0.0} if rng.random() < 0.25 else {"temperature": 0.8}
    named = {"max_tokens": NUM_TOKENS, "seed": rng.randrange(1 << 32), "ignore_eos": True}
    return Question(ids, named | sampling | options)


def ask(
    client: Client, asked: Question, session_id: str | None = None, **options: Any
) -> Generation:
    return client.generate(
        token_ids=asked.token_ids, session=session_id, **(asked.options | options)
    )


def said(result: Result) -> dict[str, Any]:
    """Return what must not depend on what happened meanwhile."""
    finish = result.finish
    return {
        "token_ids": result.token_ids,
        "text": result.text,
        "reason": finish.reason,
        "num_generated_tokens": finish.num_generated_tokens,
        "num_total_tokens": finish.num_total_tokens,
        "session_version": finish.session_version,
    }


async def stored(store: Store, session_id: str) -> dict[str, Any]:
    """Return what is stored of a session, but for its times and names."""
    found = await store.get_manifest(TENANT, session_id)
    manifest = manifest_pb2.Manifest.FromString(found.body)
    return {
        "version": (found.version, manifest.version),
        "num_turns": manifest.num_turns,
        "token_ids": tuple(manifest.token_ids),
        "segments": [
            (s.segment_id, s.first_token, s.num_tokens, s.num_kept_tokens, s.size_bytes)
            for s in manifest.segments
        ],
    }


async def undisturbed(
    client: Client, store: Store, questions: Sequence[Question]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what the turns of a session answer, and what is then stored; delete it."""
    session = await client.create_session(compression=POLICY)
    answers = [said(await ask(client, q, session.session_id).result()) for q in questions]
    manifest = await stored(store, session.session_id)
    await session.delete()
    return answers, manifest


async def session_after(client: Client, questions: Sequence[Question]) -> Session:
    """Return a session in which the questions were answered."""
    session = await client.create_session(compression=POLICY)
    for asked in questions:
        await ask(client, asked, session.session_id).result()
    return session


async def heard(answer: Generation, *counts: int) -> AsyncIterator[None]:
    """Iterate over the answer to its end; yield for each count, when it has so many tokens."""
    left = list(counts)
    async with aclosing(answer.events()) as events:
        async for _ in events:
            while left and len(answer.token_ids) >= left[0]:
                del left[0]
                yield


# A decode worker dies.


@pytest.mark.parametrize("part", range(4))
async def test_a_decode_worker_killed_at_a_random_moment_changes_no_answer(
    stack: ProcessStack, client: Client, store: Store, part: int
) -> None:
    rng = random.Random(part)
    for _ in range(NUM_KILLS // 4):
        first, watched, follow_up = (question(rng, n) for n in (40, 30, 20))
        beside = [question(rng, 20) for _ in range(2)]
        expected, manifest = await undisturbed(client, store, [first, watched, follow_up])
        expected_beside = [said(await ask(client, q).result()) for q in beside]
        session = await session_after(client, [first])
        place = rng.choice([rng.randrange(1, NUM_TOKENS)] * 4 + [BEFORE_COMMIT, AFTER_COMMIT])

        answers = [asyncio.create_task(ask(client, q).result()) for q in beside]
        answer = ask(client, watched, session.session_id)
        result = await killed_at(stack, answer, watched.seed, place, rng)
        last = await ask(client, follow_up, session.session_id).result()

        assert [said(result), said(last)] == expected[1:]
        assert await stored(store, session.session_id) == manifest
        assert [said(await answer) for answer in answers] == expected_beside
        await session.delete()


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
async def test_a_killed_decode_worker_changes_no_answer_of_a_one_off_request(
    stack: ProcessStack, client: Client, temperature: float
) -> None:
    rng = random.Random(40)
    asked = question(rng, 60, temperature=temperature)
    expected = said(await ask(client, asked).result())
    place = rng.randrange(1, NUM_TOKENS)

    result = await killed_at(stack, ask(client, asked), asked.seed, place, rng)

    assert said(result) == expected


async def test_an_answer_whose_workers_all_died_waits_for_a_new_one(
    stack: ProcessStack, client: Client, store: Store
) -> None:
    rng = random.Random(41)
    questions = [question(rng, 40), question(rng, 30)]
    expected, manifest = await undisturbed(client, store, questions)
    session = await session_after(client, questions[:1])
    for worker in stack.decode.values():
        await worker.hold_at(10, seed=questions[1].seed)

    answer = ask(client, questions[1], session.session_id)
    async with aclosing(heard(answer, 10, 30)) as moments:
        await anext(moments)
        assert answer.prompt_info is not None
        stack.kill_decode(answer.prompt_info.decode_worker)
        [other] = stack.decode.values()
        await other.hold_at(30, seed=questions[1].seed)
        await anext(moments)
        stack.kill_decode(other.worker_id)
        stack.add_decode()
        stack.add_decode()
        await anext(moments, None)

    assert said(await answer.result()) == expected[1]
    assert await stored(store, session.session_id) == manifest


@pytest.mark.model
async def test_a_killed_decode_worker_changes_no_answer_of_the_demo_model(
    model_path: str, tmp_path: Path
) -> None:
    rng = random.Random(47)
    with ProcessStack(tmp_path, Path(model_path), prefill={}, gateway={}) as stack:
        await stack.ready()
        async with stack.client() as client:
            session = await client.create_session()
            whole = await client.create_session()
            first, watched = (
                question(rng, num_tokens, temperature=0.8) for num_tokens in (300, 30)
            )
            for each in (session, whole):
                await ask(client, first, each.session_id).result()
            expected = said(await ask(client, watched, whole.session_id).result())

            place = rng.randrange(1, NUM_TOKENS)
            answer = ask(client, watched, session.session_id)
            result = await killed_at(stack, answer, watched.seed, place, rng)

            assert said(result) == expected


async def killed_at(
    stack: ProcessStack, answer: Generation, seed: int, place: int, rng: random.Random
) -> Result:
    """Return the answer, whose worker is killed at ``place`` or shortly before."""
    print(f"killed at {place}")
    for worker in stack.decode.values():
        await worker.hold_at(place, seed=seed)
    num_heard = max(min(place, NUM_TOKENS) - rng.randrange(3), 1)
    async with aclosing(heard(answer, num_heard)) as moments:
        await anext(moments)
        assert answer.prompt_info is not None
        worker_id = answer.prompt_info.decode_worker
        if place in (BEFORE_COMMIT, AFTER_COMMIT):
            await stack.decode[worker_id].held()
        stack.kill_decode(worker_id)
        stack.add_decode()
        for worker in stack.decode.values():
            await worker.ready()
            await worker.go_on()
        await anext(moments, None)
    return await answer.result()


# A prefill worker dies.


async def test_prefill_workers_killed_during_turns_change_no_answer(
    stack: ProcessStack, client: Client, store: Store
) -> None:
    rng = random.Random(42)
    conversations = [[question(rng, 300), question(rng, 300)] for _ in range(3)]
    beside = [question(rng, 300) for _ in range(2)]
    expected = [await undisturbed(client, store, questions) for questions in conversations]
    expected_beside = [said(await ask(client, q).result()) for q in beside]

    for num_turns in (0, 1):
        sessions = [await session_after(client, c[:num_turns]) for c in conversations]
        await stack.ready()
        await eventually_async(
            lambda: no_prefill_worker_is_busy(store), state=lambda: "one is, of the turns before"
        )
        turns = [
            asyncio.create_task(ask(client, questions[num_turns], session.session_id).result())
            for questions, session in zip(conversations, sessions, strict=True)
        ]
        answers = [asyncio.create_task(ask(client, q).result()) for q in beside]
        busy = await eventually_async(
            lambda: busy_prefill_worker(store), state=partial(repr, turns)
        )
        assert not all(turn.done() for turn in turns)
        await stack.kill_prefill(busy)
        stack.add_prefill()

        results = [await turn for turn in turns]
        assert [said(r) for r in results] == [each[0][num_turns] for each in expected]
        assert [said(await answer) for answer in answers] == expected_beside
        for session in sessions:
            await session.delete()


async def test_the_death_of_the_worker_that_computes_a_shared_prompt_ends_nobodys_turn(
    stack: ProcessStack, client: Client, store: Store
) -> None:
    rng = random.Random(43)
    first = question(rng, 600)
    # Three: of two, both would go to one worker if the other one's load was seen a moment ago.
    questions = [first]
    for seed in (1, 2):
        options = first.options | {"seed": seed, "temperature": 0.8}
        questions.append(replace(first, options=options))
    expected = [await undisturbed(client, store, [asked]) for asked in questions]
    sessions = [await session_after(client, []) for _ in questions]
    before = {worker: await num_waits(worker) for worker in stack.prefill}

    turns = [
        asyncio.create_task(ask(client, asked, session.session_id).result())
        for asked, session in zip(questions, sessions, strict=True)
    ]
    waiting = await eventually_async(
        lambda: waiting_prefill_worker(before), state=partial(repr, turns)
    )
    [computing] = [worker for worker in stack.prefill if worker is not waiting]
    computing.kill()
    stack.prefill.remove(computing)
    stack.add_prefill()

    for turn, session, (answers, manifest) in zip(turns, sessions, expected, strict=True):
        assert said(await turn) == answers[0]
        assert await stored(store, session.session_id) == manifest
        await session.delete()


async def busy_prefill_worker(store: Store) -> str | None:
    """Return the id of a prefill worker that has something to do."""
    for worker in await store.workers():
        if worker.role == "prefill" and worker.num_active:
            return worker.worker_id
    return None


async def no_prefill_worker_is_busy(store: Store) -> bool:
    """Whether none has anything to do, nor says so of a moment ago."""
    return await busy_prefill_worker(store) is None


async def waiting_prefill_worker(
    before: Mapping[PrefillProcess, float],
) -> PrefillProcess | None:
    """Return the prefill worker that waits, other than before, for what another one computes."""
    for worker, num_before in before.items():
        if await num_waits(worker) > num_before:
            return worker
    return None


async def num_waits(worker: PrefillProcess) -> float:
    """Return how often a worker has waited, in its life, for what another one computed."""
    return await worker.metric("chunkserve_prefill_single_flight_waits_total", where="cluster")


# The gateway dies.


@pytest.mark.parametrize("place", [10, BEFORE_COMMIT, AFTER_COMMIT])
async def test_a_turn_whose_gateway_was_killed_is_there_or_not_and_can_be_repeated(
    stack: ProcessStack, client: Client, store: Store, place: int
) -> None:
    rng = random.Random(44)
    questions = [question(rng, 40), question(rng, 30), question(rng, 20)]
    _, whole_turn = await undisturbed(client, store, questions[:2])
    expected, manifest = await undisturbed(client, store, questions)
    session = await session_after(client, questions[:1])
    before = await stored(store, session.session_id)
    for worker in stack.decode.values():
        await worker.hold_at(place, seed=questions[1].seed)

    answer = ask(client, questions[1], session.session_id)
    async with aclosing(heard(answer, min(place, NUM_TOKENS))) as moments:
        await anext(moments)
        assert answer.prompt_info is not None
        await stack.decode[answer.prompt_info.decode_worker].held()
        stack.kill_gateway()
        with pytest.raises(Unavailable):
            await anext(moments)
    stack.start_gateway()
    await stack.ready()
    left = await stored(store, session.session_id)
    for worker in stack.decode.values():
        await worker.go_on()
    again, last = [
        await ask(client, asked, session.session_id, wait_if_busy=True, **named).result()
        for asked, named in ((questions[1], {"request_id": answer.request_id}), (questions[2], {}))
    ]

    assert left == (whole_turn if place == AFTER_COMMIT else before)
    assert again.prompt_info.replayed or place != AFTER_COMMIT
    assert [said(again), said(last)] == expected[1:]
    assert await stored(store, session.session_id) == manifest
    await session.delete()


# The store goes away and comes back, with all that it had confirmed.


@pytest.mark.parametrize("ends", ["shut_down", "killed"])
async def test_sessions_lose_no_turn_when_the_store_ends_under_load(
    stack: ProcessStack, client: Client, store: Store, ends: str
) -> None:
    talks = [Talk(client, await session_after(client, []), seed) for seed in range(4)]
    one_offs = Talk(client, None, 4)

    def told() -> object:
        return [(len(talk.answers), talk.errors[-3:]) for talk in (*talks, one_offs)]

    async with asyncio.TaskGroup() as tasks:
        for talk in (*talks, one_offs):
            tasks.create_task(talk.run())
        await eventually(lambda: all(len(talk.answers) >= 2 for talk in talks), state=told)
        if ends == "killed":
            stack.kill_store()
        else:
            stack.shut_down_store()
        await eventually(lambda: all(talk.errors for talk in talks), state=told)
        await stack.heartbeats_expired()  # so that the registry has forgotten all workers
        stack.store.start()
        num_before = [len(talk.answers) for talk in talks]
        await eventually(lambda: num_more(talks, num_before) >= 1, state=told)
        num_errors = [len(talk.errors) for talk in talks]
        await eventually(lambda: num_more(talks, num_before) >= 3, state=told)
        for talk in (*talks, one_offs):
            talk.is_over = True

    assert [len(talk.errors) for talk in talks] == num_errors
    for error in (error for talk in (*talks, one_offs) for error in talk.errors):
        assert (type(error), error.reason) == (Unavailable, "STORE_UNAVAILABLE")
        assert error.retry_after_s
    listed = {session.session_id async for session in client.list_sessions()}
    for talk in talks:
        assert talk.session is not None
        assert talk.session.session_id in listed
        found = await stored(store, talk.session.session_id)
        await talk.session.delete()
        assert (talk.answers, found) == await undisturbed(client, store, talk.answered)
    for asked, answer in zip(one_offs.answered, one_offs.answers, strict=True):
        assert answer == said(await ask(client, asked).result())


def num_more(talks: Sequence[Talk], num_before: Sequence[int]) -> int:
    """Return how many more answers each has than before, at least."""
    return min(len(talk.answers) - num for talk, num in zip(talks, num_before, strict=True))


async def test_one_off_requests_go_on_without_the_store(
    stack: ProcessStack, client: Client, store: Store
) -> None:
    asked = question(random.Random(46), 40, compression=WHOLE)
    expected = said(await ask(client, asked).result())
    session = await session_after(client, [asked])

    stack.shut_down_store()
    try:
        with pytest.raises(Unavailable) as caught:
            await ask(client, asked, session.session_id).result()
        await stack.heartbeats_expired()  # which the view of the workers outlives
        without = [said(await ask(client, asked).result()) for _ in range(3)]
    finally:
        stack.store.start()
    await eventually_async(
        lambda: answered(client, asked, session), state=lambda: "the store is away"
    )

    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert caught.value.retry_after_s
    assert without == [expected] * 3
    assert said(await ask(client, asked).result()) == expected
    await session.delete()


class Talk:
    """A client that asks one question after another, each until it is answered.

    Args:
        client: Asks.
        session: Where; ``None``: nowhere, with uncompressed prompts, whose answers are the same
            without the store.
        seed: Of what it asks.

    Attributes:
        answers: Of the questions, in their order.
        errors: That it met.
        is_over: Whether to ask no more.
    """

    def __init__(self, client: Client, session: Session | None, seed: int) -> None:
        self.session = session
        self.answers: list[dict[str, Any]] = []
        self.errors: list[ChunkServeError] = []
        self.is_over = False
        self._client = client
        self._rng = random.Random(seed)
        self._questions: list[Question] = []

    @property
    def answered(self) -> Sequence[Question]:
        """The questions that were answered."""
        return self._questions[: len(self.answers)]

    async def run(self) -> None:
        """Ask until it is over."""
        options = {} if self.session else {"compression": WHOLE}
        while not self.is_over:
            asked = question(self._rng, self._rng.choice([8, 40, 100]), **options)
            self._questions.append(asked)
            await self._insist(asked)

    async def _insist(self, asked: Question) -> None:
        """Ask again, under the same id, as long as it fails."""
        session_id = self.session and self.session.session_id
        request_id = uuid.uuid4().hex
        while not self.is_over:
            answer = ask(self._client, asked, session_id, request_id=request_id, wait_if_busy=True)
            try:
                self.answers.append(said(await answer.result()))
            except ChunkServeError as error:
                self.errors.append(error)
                await asyncio.sleep(error.retry_after_s or 0.1)
            else:
                return


async def answered(client: Client, asked: Question, session: Session) -> bool:
    """Whether a turn is answered; not yet, if the store is away."""
    with suppress(Unavailable):
        await ask(client, asked, session.session_id, wait_if_busy=True).result()
        return True
    return False
