"""Processes that are killed in the middle of turns, and a store that goes away.

The model is tiny, all else is real. What a disturbed turn answers and stores is compared with the
same turn undisturbed, in another session whose segments are deleted before.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
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
    TokenDelta,
    Unavailable,
)
from services.store import Store, open_store
from tests.e2e.decode_process import AFTER_COMMIT, BEFORE_COMMIT
from tests.e2e.process_stack import ProcessStack, eventually, eventually_async

pytestmark = pytest.mark.slow

TENANT: Final = "default"
POLICY: Final = Compression(keep_ratio=0.5, chunk_size=4, window_size=4)
NUM_KILLS: Final = 20
NUM_TOKENS: Final = 48


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessStack]:
    directory: Path = tmp_path_factory.mktemp("f")
    model = directory / "tiny"
    tiny_llama(max_model_len=8192).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    with ProcessStack(
        directory,
        model,
        prefill={
            "MIN_COMPRESS_TOKENS": "16",
            "PREFILL_CHUNK_TOKENS": "1",
            "SEGMENT_LEASE_S": "1",
        },
        gateway={"LEASE_TTL_S": "2"},
    ) as stack:
        yield stack


@pytest.fixture
async def stack(processes: ProcessStack) -> ProcessStack:
    """The stack with all its workers."""
    await processes.ready()
    return processes


@pytest.fixture
async def client(stack: ProcessStack) -> AsyncIterator[Client]:
    async with stack.client() as client:
        yield client


@pytest.fixture
async def store(stack: ProcessStack) -> AsyncIterator[Store]:
    opened = open_store(stack.store.url)
    yield opened
    await opened.close()


@dataclass(frozen=True)
class Question:
    """A turn's request."""

    token_ids: tuple[int, ...]
    options: dict[str, Any]


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


async def heard(answer: Generation, num_tokens: int) -> AsyncIterator[None]:
    """Iterate over the answer; yield once, when it has that many tokens."""
    has_yielded = False
    async with aclosing(answer.events()) as events:
        async for _ in events:
            if len(answer.token_ids) >= num_tokens and not has_yielded:
                has_yielded = True
                yield


@pytest.mark.parametrize("part", range(4))
async def test_a_decode_worker_killed_at_random_moments_changes_no_answer(
    stack: ProcessStack, client: Client, store: Store, part: int
) -> None:
    rng = random.Random(part)
    for _ in range(NUM_KILLS // 4):
        questions = [question(rng, 40), question(rng, 30)]
        expected, manifest = await undisturbed(client, store, questions)
        session = await client.create_session(compression=POLICY)
        await ask(client, questions[0], session.session_id).result()
        place = rng.choice([*range(1, NUM_TOKENS), BEFORE_COMMIT, AFTER_COMMIT])

        result = await killed_at(stack, ask(client, questions[1], session.session_id), place, rng)

        assert said(result) == expected[1]
        assert await stored(store, session.session_id) == manifest
        await session.delete()


async def killed_at(
    stack: ProcessStack, answer: Generation, place: int, rng: random.Random
) -> Result:
    """Return the answer, whose worker is killed at ``place`` or shortly before."""
    print(f"killed at {place}")
    for worker in stack.decode.values():
        await worker.hold_at(place)
    num_heard = min(place, NUM_TOKENS) - rng.randrange(3)
    async with aclosing(heard(answer, max(num_heard, 1))) as moments:
        await anext(moments)
        assert answer.prompt_info is not None
        worker_id = answer.prompt_info.decode_worker
        if place in (BEFORE_COMMIT, AFTER_COMMIT):
            await stack.decode[worker_id].held()
        stack.kill_decode(worker_id)
        stack.add_decode()
        for worker in stack.decode.values():
            await worker.ready()
            await worker.hold_at(None)
        async for _ in moments:
            raise AssertionError("it yields once")
    return await answer.result()
