from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from tiny_model import generate, load_tiny

import chunkkv
from services.decode.engine import READER_CAPACITY, Engine
from services.decode.generation import Generation
from services.decode.sampling import SamplingSettings
from services.decode.sequence import DecodeTask
from services.models.loader import LoadedModel
from services.runtime.errors import OverloadedError, UnavailableError

DEADLINE_S = 20.0
PROMPT = [10, 20, 30, 40, 50]
ENDLESS = SamplingSettings(ignore_eos=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_tiny()


class SteppedModel:
    """Lets a test look at, hold and break the steps of a model.

    Attributes:
        steps: The first input token of each step so far.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config, self.device = model.config, model.device
        self.steps: list[int] = []
        self.failures: dict[int, BaseException] = {}
        self._permits = threading.Semaphore(0)
        self._is_free = False

    def __call__(self, *, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if not self._is_free:
            assert self._permits.acquire(timeout=DEADLINE_S)
        first = int(input_ids[0, 0])
        self.steps.append(first)
        if first in self.failures:
            raise self.failures[first]
        return self._model(input_ids=input_ids, **inputs)

    def allow(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._permits.release()

    def allow_all(self) -> None:
        self._is_free = True
        self._permits.release()


@asynccontextmanager
async def running(loaded: LoadedModel, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(loaded, **options)
    engine.start()
    async with asyncio.timeout(DEADLINE_S):
        try:
            yield engine
        finally:
            if isinstance(loaded.model, SteppedModel):
                loaded.model.allow_all()
            await engine.stop()


def stepped(loaded: LoadedModel) -> tuple[LoadedModel, SteppedModel]:
    model = SteppedModel(loaded.model)
    return dataclasses.replace(loaded, model=model), model


def task_of(
    loaded: LoadedModel,
    token_ids: list[int],
    *,
    max_tokens: int = 20,
    sampling: SamplingSettings = ENDLESS,
) -> DecodeTask:
    cache = chunkkv.KVCache.from_segments(loaded.model.config, [], extra_tokens=64)
    return DecodeTask(
        first_position=0,
        pending_token_ids=token_ids,
        sampling=sampling,
        max_tokens=max_tokens,
        cache=cache,
    )


async def read(generation: Generation) -> list[int]:
    token_ids: list[int] = []
    async for delta in generation:
        assert delta.first_token_index == len(token_ids)
        token_ids.extend(delta.token_ids)
    assert token_ids == generation.sequence.token_ids
    return token_ids


async def answer(engine: Engine, task: DecodeTask) -> list[int]:
    async with engine.slot() as slot:
        return await read(slot.start(task))


async def until(condition: Callable[[], bool]) -> None:
    """Wait, within the test's deadline, for what the engine's thread brings about."""
    while not condition():  # noqa: ASYNC110  # the thread sets no event for tests
        await asyncio.sleep(0)


@pytest.mark.parametrize("prefill_chunk_tokens", [1, 2, 512])
async def test_greedy_tokens_are_those_of_generate(loaded, prefill_chunk_tokens):
    async with running(loaded, prefill_chunk_tokens=prefill_chunk_tokens) as engine:
        token_ids = await answer(engine, task_of(loaded, PROMPT, max_tokens=40))

    assert token_ids == generate(loaded, PROMPT, 40)


async def test_sequences_beside_one_another_give_what_they_give_alone(loaded):
    prompts = [[t, *PROMPT] for t in range(1, 7)]
    async with running(loaded, num_slots=4) as engine:
        answers = await asyncio.gather(
            *(answer(engine, task_of(loaded, prompt)) for prompt in prompts)
        )

    assert answers == [generate(loaded, prompt, 20) for prompt in prompts]


async def test_a_seed_gives_the_same_tokens_on_another_engine_and_in_company(loaded):
    sampling = SamplingSettings(temperature=1.0, seed=5, ignore_eos=True)
    others = [SamplingSettings(temperature=1.0, seed=s, ignore_eos=True) for s in range(6, 10)]
    async with running(loaded) as engine:
        alone = await answer(engine, task_of(loaded, PROMPT, sampling=sampling))
    async with running(loaded, num_slots=3) as engine:
        in_company = await asyncio.gather(
            *(answer(engine, task_of(loaded, PROMPT, sampling=s)) for s in [*others, sampling])
        )

    assert in_company[-1] == alone
    assert len({tuple(token_ids) for token_ids in in_company}) == len(in_company)


async def test_a_seeded_answer_goes_on_where_another_worker_stopped(loaded):
    sampling = SamplingSettings(temperature=1.0, seed=5, ignore_eos=True)
    async with running(loaded) as engine:
        whole = await answer(engine, task_of(loaded, PROMPT, sampling=sampling))
    async with running(loaded) as engine:
        rest = await answer(
            engine, task_of(loaded, PROMPT + whole[:8], max_tokens=12, sampling=sampling)
        )

    assert rest == whole[8:]


async def test_sequences_take_turns(loaded):
    loaded, model = stepped(loaded)
    async with (
        running(loaded, prefill_chunk_tokens=1) as engine,
        engine.slot() as one,
        engine.slot() as two,
    ):
        one.start(task_of(loaded, [1, 1, 1, 1]))
        two.start(task_of(loaded, [2, 2, 2, 2]))
        model.allow(7)
        await until(lambda: len(model.steps) == 7)
        steps = list(model.steps)

    # The thread may have taken its first step before the second sequence was there.
    assert steps in ([1, 2, 1, 2, 1, 2, 1], [1, 1, 2, 1, 2, 1, 2])


async def test_leaving_the_slot_frees_it_within_one_step(loaded):
    loaded, model = stepped(loaded)
    async with running(loaded, num_slots=1) as engine:
        async with engine.slot() as slot:
            slot.start(task_of(loaded, PROMPT, max_tokens=200))
            model.allow(3)
            await until(lambda: len(model.steps) == 3)
        assert engine.num_active == 1  # the step that runs now

        model.allow(1)
        async with engine.slot():
            num_steps = len(model.steps)
        assert engine.num_active == 0

    assert num_steps <= 4


async def test_a_cancelled_reader_frees_the_slot(loaded):
    loaded, model = stepped(loaded)
    async with running(loaded, num_slots=1) as engine:
        reader = asyncio.create_task(answer(engine, task_of(loaded, PROMPT, max_tokens=200)))
        model.allow(1)
        await until(lambda: len(model.steps) == 1)

        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        # Only now: a step that ended before the cancellation came would be followed by another.
        model.allow(1)
        async with engine.slot():
            pass

        assert engine.num_active == 0


async def test_more_than_slots_and_queue_hold_is_refused(loaded):
    async with running(loaded, num_slots=1, queue_size=1) as engine:
        async with engine.slot():
            waiting = asyncio.create_task(answer(engine, task_of(loaded, PROMPT)))
            await until(lambda: engine.num_active == 2)

            with pytest.raises(OverloadedError) as caught:
                async with engine.slot():
                    pass
            assert caught.value.retry_after_s == 1.0
        assert await waiting == generate(loaded, PROMPT, 20)


async def test_who_stops_waiting_leaves_the_queue(loaded):
    async with running(loaded, num_slots=1, queue_size=1) as engine:
        async with engine.slot():
            waiting = asyncio.create_task(answer(engine, task_of(loaded, PROMPT)))
            await until(lambda: engine.num_active == 2)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert engine.num_active == 1
        assert engine.num_active == 0


async def test_a_slow_reader_stops_only_his_own_sequence(loaded):
    async with running(loaded) as engine, engine.slot() as slot:
        unread = slot.start(task_of(loaded, PROMPT, max_tokens=100))

        other = await answer(engine, task_of(loaded, [1, 2, 3], max_tokens=100))
        assert other == generate(loaded, [1, 2, 3], 100)
        await until(lambda: not unread.has_room)
        assert len(unread.sequence.token_ids) == READER_CAPACITY

        assert await read(unread) == generate(loaded, PROMPT, 100)


async def test_tokens_that_waited_come_as_one_delta(loaded):
    async with running(loaded) as engine, engine.slot() as slot:
        generation = slot.start(task_of(loaded, PROMPT, max_tokens=10))
        await until(lambda: len(generation._waiting) == 10)

        deltas = [delta async for delta in generation]

    [delta] = deltas
    assert list(delta.token_ids) == generate(loaded, PROMPT, 10)
    assert delta.text == loaded.tokenizer.decode(delta.token_ids, skip_special_tokens=True)


async def test_an_error_of_the_model_fails_only_its_sequence(loaded):
    loaded, model = stepped(loaded)
    model.failures[66] = RuntimeError("shapes do not fit")
    model.allow_all()
    async with running(loaded) as engine:
        broken, good = await asyncio.gather(
            answer(engine, task_of(loaded, [66, 1])),
            answer(engine, task_of(loaded, PROMPT)),
            return_exceptions=True,
        )
        again = await answer(engine, task_of(loaded, PROMPT))

    assert isinstance(broken, RuntimeError)
    assert len(good) == 20
    assert again == good


@pytest.mark.parametrize(
    "error",
    [SystemExit("thread is gone"), torch.AcceleratorError("device-side assert triggered")],
    ids=["thread", "device"],
)
async def test_a_failed_engine_fails_every_sequence_and_says_so(loaded, error):
    loaded, model = stepped(loaded)
    model.failures[66] = error
    async with running(loaded, num_slots=2) as engine:
        tasks = [
            asyncio.create_task(answer(engine, task_of(loaded, prompt)))
            for prompt in (PROMPT, [66, 1], [3, 4, 5])
        ]
        await until(lambda: engine.num_active == 3)
        model.allow_all()

        results = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.wait_failed()

        assert [type(result) for result in results] == [UnavailableError] * 3
        assert not engine.is_running
        assert engine.num_active == 0
        with pytest.raises(UnavailableError):
            await answer(engine, task_of(loaded, PROMPT))


async def test_a_stopped_engine_fails_what_still_runs(loaded):
    loaded, model = stepped(loaded)
    async with running(loaded) as engine:
        reader = asyncio.create_task(answer(engine, task_of(loaded, PROMPT, max_tokens=200)))
        model.allow(2)
        await until(lambda: len(model.steps) == 2)
        assert engine.is_running
        model.allow_all()

        await engine.stop()

        with pytest.raises(UnavailableError, match="send the request to another"):
            await reader
        assert not engine.is_running


async def test_an_engine_that_was_never_started_can_be_stopped(loaded):
    engine = Engine(loaded)

    await engine.stop()

    assert not engine.is_running
