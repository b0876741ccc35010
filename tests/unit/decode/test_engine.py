from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from tiny_model import EOS_TOKEN_ID, GEOMETRY, generate, load_tiny

from chunkserve.v1 import types_pb2
from services.decode.attention import kv_geometry, use_sequences
from services.decode.engine import READER_CAPACITY, Engine
from services.decode.generation import Generation
from services.decode.memory import KVPool
from services.decode.placement import KVMemory
from services.decode.sampling import SamplingSettings
from services.decode.sequence import DecodeTask
from services.decode.sequence_kv import SequenceKV
from services.models.loader import LoadedModel
from services.runtime.errors import InvalidRequestError, UnavailableError

DEADLINE_S = 30.0
PROMPT = [10, 20, 30, 40, 50]
ENDLESS = SamplingSettings(ignore_eos=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The model as transformers has it, to compare with."""
    return load_tiny()


@pytest.fixture(scope="module")
def served() -> LoadedModel:
    """The same model, as an engine has it."""
    loaded = load_tiny()
    use_sequences(loaded.model)
    assert kv_geometry(loaded.model) == GEOMETRY
    return loaded


class SteppedModel:
    """Lets a test look at, hold and break the steps of a model.

    Attributes:
        steps: The input tokens of each step so far, of all sequences.
        failures: What a step with this token raises.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config, self.device = model.config, model.device
        self.steps: list[list[int]] = []
        self.failures: dict[int, BaseException] = {}
        self._permits = threading.Semaphore(0)
        self._is_free = False

    def __call__(self, *, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if not self._is_free:
            assert self._permits.acquire(timeout=DEADLINE_S)
        self.steps.append(input_ids[0].tolist())
        for token_id in self.steps[-1]:
            if token_id in self.failures:
                raise self.failures[token_id]
        return self._model(input_ids=input_ids, **inputs)

    def allow(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._permits.release()

    def allow_all(self) -> None:
        self._is_free = True
        self._permits.release()


def stepped(loaded: LoadedModel) -> tuple[LoadedModel, SteppedModel]:
    model = SteppedModel(loaded.model)
    return dataclasses.replace(loaded, model=model), model


class Rig:
    """An engine, and memory for its sequences."""

    def __init__(self, loaded: LoadedModel, *, num_slots: int = 64, **options: Any) -> None:
        self.memory = KVMemory(KVPool(16 << 20), GEOMETRY, num_slots=num_slots, queue_size=100)
        self.engine = Engine(loaded, **options)

    @asynccontextmanager
    async def started(
        self, task: DecodeTask, kv_class: type[SequenceKV] = SequenceKV
    ) -> AsyncIterator[Generation]:
        new_tokens = len(task.pending_token_ids) + task.max_tokens - task.num_resumed_tokens
        async with self.memory.placed([], new_tokens=new_tokens) as placement:
            kv = kv_class(
                GEOMETRY,
                [],
                self.memory.pool.view(placement.tail, placement.tail.size_bytes),
                capacity=placement.tail_tokens,
            )
            generation = self.engine.submit(task, kv, on_released=placement.give_back)
            placement.lend()
            try:
                yield generation
            finally:
                generation.cancel()

    async def answer(self, task: DecodeTask) -> list[int]:
        async with self.started(task) as generation:
            return await read(generation, num_resumed=task.num_resumed_tokens)

    def check_nothing_left(self) -> None:
        assert self.engine.num_running == 0
        assert self.memory.num_active == 0
        assert self.memory.pool.used_bytes == 0


@asynccontextmanager
async def running(loaded: LoadedModel, **options: Any) -> AsyncIterator[Rig]:
    rig = Rig(loaded, **options)
    rig.engine.start()
    async with asyncio.timeout(DEADLINE_S):
        try:
            yield rig
        finally:
            if isinstance(loaded.model, SteppedModel):
                loaded.model.allow_all()
            await rig.engine.stop()


def task_of(
    token_ids: Sequence[int],
    *,
    max_tokens: int = 20,
    sampling: SamplingSettings = ENDLESS,
    num_resumed_tokens: int = 0,
) -> DecodeTask:
    return DecodeTask(
        first_position=0,
        pending_token_ids=token_ids,
        sampling=sampling,
        max_tokens=max_tokens,
        num_resumed_tokens=num_resumed_tokens,
    )


async def read(generation: Generation, *, num_resumed: int = 0) -> list[int]:
    token_ids: list[int] = []
    async for delta in generation:
        assert delta.first_token_index == num_resumed + len(token_ids)
        token_ids.extend(delta.token_ids)
    assert token_ids == generation.sequence.new_token_ids
    return token_ids


async def until(condition: Callable[[], bool]) -> None:
    """Wait, within the test's deadline, for what the engine's thread brings about."""
    while not condition():  # noqa: ASYNC110  # the thread sets no event for tests
        await asyncio.sleep(0)


def hot(seed: int) -> SamplingSettings:
    return SamplingSettings(temperature=1.0, seed=seed, ignore_eos=True)


# The same tokens, in whatever company and in whatever pieces.


@pytest.mark.parametrize("prefill_chunk_tokens", [1, 2, 256])
async def test_greedy_tokens_are_those_of_generate(loaded, served, prefill_chunk_tokens):
    async with running(served, prefill_chunk_tokens=prefill_chunk_tokens) as rig:
        token_ids = await rig.answer(task_of(PROMPT, max_tokens=40))

    assert token_ids == generate(loaded, PROMPT, 40)


async def test_sequences_of_any_lengths_give_together_what_they_give_alone(loaded, served):
    prompts = [[t % 257 for t in range(n, 2 * n)] for n in (1, 3, 90, 17, 40, 130, 2)]
    samplings = [ENDLESS, hot(1), ENDLESS, hot(2), hot(3), ENDLESS, hot(4)]
    tasks = [
        task_of(prompt, max_tokens=20 + 10 * index, sampling=sampling)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    async with running(served) as rig:
        alone = [await rig.answer(task) for task in tasks]
    async with running(served) as rig:
        together = await asyncio.gather(*map(rig.answer, tasks))
        rig.check_nothing_left()

    assert together == alone
    for task, token_ids in zip(tasks, alone, strict=True):
        if task.sampling is ENDLESS:
            assert token_ids == generate(loaded, list(task.pending_token_ids), task.max_tokens)


async def test_sequences_that_wait_for_a_place_give_what_they_give_alone(loaded, served):
    prompts = [[t, *PROMPT] for t in range(1, 7)]
    async with running(served, num_slots=4) as rig:
        answers = await asyncio.gather(*(rig.answer(task_of(prompt)) for prompt in prompts))

    assert answers == [generate(loaded, prompt, 20) for prompt in prompts]


async def test_a_seed_gives_the_same_tokens_on_another_engine_and_in_company(served):
    async with running(served) as rig:
        alone = await rig.answer(task_of(PROMPT, sampling=hot(5)))
    async with running(served, num_slots=3) as rig:
        in_company = await asyncio.gather(
            *(rig.answer(task_of(PROMPT, sampling=hot(seed))) for seed in (6, 7, 8, 9, 5))
        )

    assert in_company[-1] == alone
    assert len({tuple(token_ids) for token_ids in in_company}) == len(in_company)


@pytest.mark.parametrize("num_resumed", [0, 8], ids=["as_prompt", "as_answer"])
async def test_a_seeded_answer_goes_on_where_another_worker_stopped(served, num_resumed):
    async with running(served) as rig:
        whole = await rig.answer(task_of(PROMPT, sampling=hot(5)))
    async with running(served) as rig:
        rest = await rig.answer(
            task_of(
                PROMPT + whole[:8],
                max_tokens=12 + num_resumed,
                sampling=hot(5),
                num_resumed_tokens=num_resumed,
            )
        )

    assert rest == whole[8:]


async def test_an_answer_that_had_ended_when_it_came_is_seen_and_gets_no_token(served):
    loaded, model = stepped(served)
    model.allow_all()
    sampling = SamplingSettings(stop_token_ids=frozenset({7}))
    async with running(loaded) as rig:
        task = task_of([*PROMPT, 3, 7], sampling=sampling, num_resumed_tokens=2)
        async with rig.started(task) as generation:
            assert await read(generation) == []
        rig.check_nothing_left()

    assert model.steps == [[*PROMPT, 3]]
    assert generation.sequence.finish_reason == types_pb2.FINISH_REASON_EOS
    assert generation.sequence.token_ids == [3, 7]
    assert generation.kv.num_tokens == len(PROMPT) + 1


async def test_resumed_tokens_behind_the_end_of_the_answer_are_refused(served):
    sampling = SamplingSettings(stop_token_ids=frozenset({7}))
    async with running(served) as rig:
        with pytest.raises(InvalidRequestError):
            await rig.answer(task_of([*PROMPT, 7, 3], sampling=sampling, num_resumed_tokens=2))

        rig.check_nothing_left()


# What a step takes.


async def test_every_step_takes_a_token_of_every_stream(served):
    loaded, model = stepped(served)
    async with (
        running(loaded) as rig,
        rig.started(task_of([1])) as one,
        rig.started(task_of([2])) as two,
    ):
        model.allow(10)
        await until(lambda: len(model.steps) == 10)
        steps = [len(step) for step in model.steps]

    # The thread may have taken its first step before the second sequence was there.
    assert steps in ([2] * 10, [1] + [2] * 9)
    assert len(one.sequence.token_ids) >= 9
    assert len(two.sequence.token_ids) >= 8


@pytest.mark.parametrize(
    ("max_stall_ms", "pieces"),
    # Nothing is known of the machine when the first is taken.
    [(1e9, [8, 8, 4]), (1e-9, [8] + [1] * 12)],
    ids=["patient", "impatient"],
)
async def test_known_tokens_come_in_pieces_beside_a_stream(loaded, served, max_stall_ms, pieces):
    streamed = generate(loaded, [1], 30)
    prompt = list(range(200, 220))
    held, model = stepped(served)
    async with running(held, prefill_chunk_tokens=8, max_stall_ms=max_stall_ms) as rig:
        stream = asyncio.create_task(rig.answer(task_of([1], max_tokens=30)))
        model.allow(2)
        await until(lambda: len(model.steps) == 2)
        late = asyncio.create_task(rig.answer(task_of(prompt, max_tokens=5)))
        await until(lambda: rig.engine.num_running == 2)
        model.allow_all()
        answers = await asyncio.gather(stream, late)

    assert answers == [streamed, generate(loaded, prompt, 5)]
    # Its own token first: the stream had one in every step, until its end.
    assert [step[0] for step in model.steps[:30]] == [1, *streamed[:-1]]
    taken = [step[1:] for step in model.steps if len(step) > 1]
    assert [len(piece) for piece in taken] == pieces + [1] * 4
    assert [token for piece in taken[:-4] for token in piece] == prompt


async def test_a_prompt_that_is_alone_goes_through_in_whole_chunks(served):
    loaded, model = stepped(served)
    model.allow_all()
    async with running(loaded, prefill_chunk_tokens=16, max_stall_ms=1e-9) as rig:
        await rig.answer(task_of(list(range(1, 41)), max_tokens=2))

    assert [len(step) for step in model.steps] == [16, 16, 8, 1]


class ScriptedPace:
    """Allows one known token a step, and keeps what it is told of each step's cost."""

    def __init__(self) -> None:
        self.observed: list[tuple[int, int]] = []  # streams, known tokens

    def known_tokens(self, *, num_streams: int) -> int:
        return 1

    def observe(self, step_ms: float, *, num_streams: int, num_known_tokens: int) -> None:
        self.observed.append((num_streams, num_known_tokens))


async def test_a_known_token_that_is_taken_alone_is_told_to_the_pace(served):
    held, model = stepped(served)
    async with running(held) as rig:
        rig.engine._pace = pace = ScriptedPace()
        stream = asyncio.create_task(rig.answer(task_of([1], max_tokens=30)))
        await until(lambda: rig.engine.num_running == 1)
        model.allow(1)
        await until(lambda: len(model.steps) == 1)
        late = asyncio.create_task(rig.answer(task_of([2, 3, 4], max_tokens=1)))
        await until(lambda: rig.engine.num_running == 2)
        model.allow_all()
        await asyncio.gather(stream, late)

    # Else one slow step, after which every piece is one token, would never be forgotten.
    known = [observed for observed in pace.observed if observed[1] > 0]
    assert known[:2] == [(1, 1), (1, 1)]


# Cancelling.


async def test_who_leaves_frees_the_memory_within_one_step(served):
    loaded, model = stepped(served)
    async with running(loaded, num_slots=1) as rig:
        async with rig.started(task_of(PROMPT, max_tokens=200)):
            model.allow(3)
            await until(lambda: len(model.steps) == 3)
        assert rig.memory.num_active == 1  # the step that runs now
        assert rig.memory.pool.used_bytes > 0

        model.allow(1)
        async with rig.memory.placed([], new_tokens=1):
            num_steps = len(model.steps)
        rig.check_nothing_left()

    assert num_steps <= 4


async def test_a_cancelled_reader_frees_the_memory(served):
    loaded, model = stepped(served)
    async with running(loaded, num_slots=1) as rig:
        reader = asyncio.create_task(rig.answer(task_of(PROMPT, max_tokens=200)))
        model.allow(1)
        await until(lambda: len(model.steps) == 1)

        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        # Only now: a step that ended before the cancellation came would be followed by another.
        model.allow(1)
        async with rig.memory.placed([], new_tokens=1):
            pass

        rig.check_nothing_left()


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_streams_leave_the_others_and_the_memory_alone(loaded, served, seed):
    moments = random.Random(seed)
    prompts = [[t + 1, *range(t, t + moments.randrange(1, 60))] for t in range(60)]
    victims = set(moments.sample(range(60), 30))
    async with running(served, num_slots=24) as rig:

        async def cancelled_at_some_token(prompt: list[int]) -> None:
            num_tokens = moments.randrange(40)
            async with rig.started(task_of(prompt, max_tokens=50)) as generation:
                async for _ in generation:
                    if len(generation.sequence.token_ids) > num_tokens:
                        return

        async def stream(index: int) -> list[int] | None:
            if index not in victims:
                return await rig.answer(task_of(prompts[index], max_tokens=50))
            if index % 3 == 0:  # he leaves
                return await cancelled_at_some_token(prompts[index])
            reader = asyncio.create_task(rig.answer(task_of(prompts[index], max_tokens=50)))
            for _ in range(moments.randrange(2000)):  # he is cancelled, or waits for a place
                await asyncio.sleep(0)
            reader.cancel()
            await asyncio.wait([reader])
            return None

        answers = await asyncio.gather(*map(stream, range(60)))

        await until(lambda: rig.memory.num_active == 0)
        rig.check_nothing_left()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for index in sorted(set(range(60)) - victims):
        assert answers[index] == generate(loaded, prompts[index], 50)


# Readers.


async def test_a_slow_reader_stops_only_his_own_sequence(loaded, served):
    async with running(served) as rig, rig.started(task_of(PROMPT, max_tokens=100)) as unread:
        other = await rig.answer(task_of([1, 2, 3], max_tokens=100))
        assert other == generate(loaded, [1, 2, 3], 100)
        await until(lambda: not unread.has_room)
        assert len(unread.sequence.token_ids) == READER_CAPACITY

        assert await read(unread) == generate(loaded, PROMPT, 100)


async def test_tokens_that_waited_come_as_one_delta(loaded, served):
    async with running(served) as rig, rig.started(task_of(PROMPT, max_tokens=10)) as generation:
        await until(lambda: len(generation._waiting) == 10)

        deltas = [delta async for delta in generation]

    [delta] = deltas
    assert list(delta.token_ids) == generate(loaded, PROMPT, 10)
    assert delta.text == loaded.tokenizer.decode(delta.token_ids, skip_special_tokens=True)


# What can go wrong.


async def test_an_error_of_the_model_fails_the_sequences_of_its_step_and_no_other(loaded, served):
    held, model = stepped(served)
    model.failures[66] = RuntimeError("shapes do not fit")
    async with running(held) as rig, rig.started(task_of(PROMPT, max_tokens=100)) as paused:
        model.allow(READER_CAPACITY)
        await until(lambda: not paused.has_room)

        tasks = [asyncio.create_task(rig.answer(task_of(p))) for p in ([3, 4], [66, 1])]
        await until(lambda: rig.engine.num_running == 3)
        model.allow_all()
        beside, broken = await asyncio.gather(*tasks, return_exceptions=True)
        later = await rig.answer(task_of([3, 4]))
        went_on = [token async for delta in paused for token in delta.token_ids]

    assert isinstance(broken, RuntimeError)
    # It came first, so it is in the step that fails, whether or not it has had one before.
    assert isinstance(beside, RuntimeError)
    assert later == generate(loaded, [3, 4], 20)
    assert went_on == generate(loaded, PROMPT, 100)
    rig.check_nothing_left()


class KVWithoutRoom(SequenceKV):
    """Cannot be compressed when it is full."""

    def make_room(self, num_tokens: int) -> None:
        if self.num_tokens > 8:
            raise ValueError("nothing to drop")


async def test_kv_that_cannot_be_compressed_fails_only_its_sequence(loaded, served):
    async with running(served) as rig:
        full = rig.started(task_of(PROMPT), KVWithoutRoom)
        async with full as generation, rig.started(task_of([1, 2, 3])) as other:
            with pytest.raises(ValueError, match="nothing to drop"):
                await read(generation)
            assert await read(other) == generate(loaded, [1, 2, 3], 20)
        rig.check_nothing_left()

    assert generation.sequence.token_ids == generate(loaded, PROMPT, 5)


class BrokenTokenizer:
    """A tokenizer that cannot decode one token."""

    def __init__(self, tokenizer: Any, broken_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._broken_token_id = broken_token_id
        self.all_special_ids = tokenizer.all_special_ids

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        if self._broken_token_id in token_ids:
            raise ValueError("no such token")
        text: str = self._tokenizer.decode(token_ids, **options)
        return text


async def test_an_error_behind_the_model_fails_only_its_sequence(loaded, served):
    mine, others = generate(loaded, PROMPT, 20), generate(loaded, [1, 2, 3], 20)
    token_id = next(t for t in mine[5:] if t not in others and t != EOS_TOKEN_ID)
    broken = dataclasses.replace(served, tokenizer=BrokenTokenizer(served.tokenizer, token_id))
    async with running(broken) as rig:
        failed, good = await asyncio.gather(
            rig.answer(task_of(PROMPT)), rig.answer(task_of([1, 2, 3])), return_exceptions=True
        )
        rig.check_nothing_left()

    assert isinstance(failed, ValueError)
    assert good == others


@pytest.mark.parametrize(
    "error",
    [SystemExit("thread is gone"), torch.AcceleratorError("device-side assert triggered")],
    ids=["thread", "device"],
)
async def test_a_failed_engine_fails_every_sequence_and_says_so(served, error):
    loaded, model = stepped(served)
    model.failures[66] = error
    async with running(loaded, num_slots=2) as rig:
        tasks = [
            asyncio.create_task(rig.answer(task_of(prompt)))
            for prompt in (PROMPT, [66, 1], [3, 4, 5])
        ]
        await until(lambda: rig.memory.num_active == 3)
        model.allow_all()

        results = await asyncio.gather(*tasks, return_exceptions=True)
        await rig.engine.wait_failed()

        assert [type(result) for result in results] == [UnavailableError] * 3
        assert not rig.engine.is_running
        rig.check_nothing_left()
        with pytest.raises(UnavailableError):
            await rig.answer(task_of(PROMPT))
        rig.check_nothing_left()


async def test_a_stopped_engine_fails_what_still_runs(served):
    loaded, model = stepped(served)
    async with running(loaded) as rig:
        reader = asyncio.create_task(rig.answer(task_of(PROMPT, max_tokens=200)))
        model.allow(2)
        await until(lambda: len(model.steps) == 2)
        assert rig.engine.is_running
        model.allow_all()

        await rig.engine.stop()

        with pytest.raises(UnavailableError, match="send the request to another"):
            await reader
        assert not rig.engine.is_running
        rig.check_nothing_left()


async def test_an_engine_that_was_never_started_can_be_stopped(served):
    engine = Engine(served)

    await engine.stop()

    assert not engine.is_running


async def test_the_engines_thread_alone_computes_with_several(served):
    before = torch.get_num_threads()
    seen = []

    class Counting(SteppedModel):
        def __call__(self, **inputs: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().__call__(**inputs)

    model = Counting(served.model)
    model.allow_all()
    try:
        async with running(dataclasses.replace(served, model=model), num_threads=3) as rig:
            await rig.answer(task_of(PROMPT, max_tokens=2))
            others = await asyncio.to_thread(torch.get_num_threads)
    finally:
        torch.set_num_threads(before)

    assert set(seen) == {3}
    assert others == 1
