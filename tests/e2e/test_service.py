"""The whole way of a request, through separate processes, with a real model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import redis
import torch

from chunkkv.evaluation.haystack import prose_sentences
from chunkserve_client import (
    ChunkServeError,
    Client,
    Compression,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Result,
    SessionNotFound,
)
from services.local.cluster import LocalCluster

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.slow]

WHOLE = Compression(keep_ratio=1.0)


def prose(num_sentences: int, *, start: int = 0) -> str:
    return " ".join(prose_sentences()[start : start + num_sentences])


PROMPTS = {
    "short": "What is the capital of France? Answer in one sentence.",
    "long": prose(12) + "\n\nWhat is this text about?",
    "longer": prose(30, start=200) + "\n\nSummarize this text in one sentence.",
}
FOLLOW_UPS = {
    "short": "And what is the capital of Spain?",
    "long": "Say it again in other words.",
    "longer": prose(10, start=400) + "\n\nAnd what is this about?",
}


def greedy(
    reference: tuple[Any, Any], messages: list[dict[str, str]], num_tokens: int
) -> list[int]:
    """Return what transformers generates for a conversation, alone."""
    model, tokenizer = reference
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", ["short", "longer"])
async def test_a_whole_cache_gives_the_tokens_of_plain_transformers_on_both_turns(
    cluster: LocalCluster, reference: tuple[Any, Any], name: str
) -> None:
    first_message = {"role": "user", "content": PROMPTS[name]}
    second_message = {"role": "user", "content": FOLLOW_UPS[name]}
    expected_first = greedy(reference, [first_message], 64)

    async with Client(cluster.address) as client:
        session = await client.create_session(compression=WHOLE)
        first = await session.generate(PROMPTS[name], max_tokens=64).result()
        second = await session.generate(
            FOLLOW_UPS[name], max_tokens=64, avoid_worker=first.prompt_info.decode_worker
        ).result()

    assert list(first.token_ids) == expected_first
    conversation = [first_message, {"role": "assistant", "content": first.text}, second_message]
    assert list(second.token_ids) == greedy(reference, conversation, 64)
    assert second.prompt_info.decode_worker != first.prompt_info.decode_worker
    assert second.prompt_info.num_reused_tokens > 0
    assert second.prompt_info.fetched_bytes > 0


async def test_a_later_turn_computes_only_its_new_tokens_on_either_worker(
    cluster: LocalCluster,
) -> None:
    async with Client(cluster.address) as client:
        answers: list[Result] = []
        for avoid_first in (True, False):
            session = await client.create_session(compression=Compression(keep_ratio=0.3))
            first = await session.generate(PROMPTS["longer"], max_tokens=8).result()
            avoided = first.prompt_info.decode_worker if avoid_first else None
            answers.append(
                await session.generate(
                    FOLLOW_UPS["short"], max_tokens=16, avoid_worker=avoided
                ).result()
            )
            info = await session.refresh()
    cold, resident = answers

    assert cold.token_ids == resident.token_ids
    assert resident.prompt_info.fetched_bytes == 0
    assert cold.prompt_info.fetched_bytes > 0
    assert cold.prompt_info.num_prefilled_tokens < 40
    assert cold.prompt_info.num_kept_tokens < 0.4 * cold.prompt_info.num_prompt_tokens
    assert info.num_turns == 2
    assert info.num_kept_tokens < 0.4 * info.num_tokens


async def test_kept_tokens_are_exactly_the_budget(cluster: LocalCluster) -> None:
    async with Client(cluster.address) as client:
        session = await client.create_session(compression=Compression(keep_ratio=0.25))
        await session.generate(PROMPTS["longer"], max_tokens=4).result()
        segment = (await session.refresh()).segments[0]

    assert segment.num_kept_tokens == math.floor(segment.num_tokens / 4)


async def test_the_same_seed_gives_the_same_answer_on_any_worker(cluster: LocalCluster) -> None:
    async with Client(cluster.address) as client:
        first = await client.generate(
            "Tell me a story.", max_tokens=24, temperature=0.9, seed=7
        ).result()
        again = await client.generate(
            "Tell me a story.",
            max_tokens=24,
            temperature=0.9,
            seed=7,
            avoid_worker=first.prompt_info.decode_worker,
        ).result()
        other = await client.generate(
            "Tell me a story.", max_tokens=24, temperature=0.9, seed=8
        ).result()

    assert again.token_ids == first.token_ids
    assert again.prompt_info.decode_worker != first.prompt_info.decode_worker
    assert other.token_ids != first.token_ids


async def test_a_one_off_request_leaves_nothing_in_the_store(cluster: LocalCluster) -> None:
    store = redis.Redis.from_url(cluster.redis_url)
    before = {key for key in store.scan_iter("*") if b"worker" not in key}

    async with Client(cluster.address) as client:
        await client.generate(PROMPTS["long"], max_tokens=2).result()

    assert {key for key in store.scan_iter("*") if b"worker" not in key} == before
    store.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prompt": ""}, InvalidRequest, "empty"),
        ({"text": "word " * 9000}, InvalidRequest, "send at most"),
        ({"prompt": "hi", "max_tokens": -3}, InvalidRequest, "max_tokens is -3"),
        (
            {"prompt": "hi", "compression": Compression(keep_ratio=0.0)},
            InvalidRequest,
            "keep_ratio",
        ),
        (
            {"prompt": "hi", "compression": Compression(keep_ratio=1.5)},
            InvalidRequest,
            "keep_ratio",
        ),
        (
            {"prompt": "hi", "compression": Compression(keep_ratio=math.nan)},
            InvalidRequest,
            "keep_ratio",
        ),
        (
            {"prompt": "hi", "compression": Compression(chunk_size=500)},
            InvalidRequest,
            "chunk_size is 500",
        ),
        ({"prompt": "hi", "session": "nobody"}, SessionNotFound, "nobody"),
        ({"prompt": "hi", "model": "nothing"}, NotFound, "nothing"),
        ({"token_ids": [1, 49152]}, InvalidRequest, "49152"),
        (
            {"prompt": PROMPTS["longer"], "timeout_s": 0.2},
            DeadlineExceeded,
            "timeout_s=0.2|deadline",
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
async def test_wrong_input_says_what_to_send_instead(
    cluster: LocalCluster, options: dict[str, Any], error: type[ChunkServeError], says: str
) -> None:
    async with Client(cluster.address) as client:
        with pytest.raises(error, match=says) as caught:
            await client.generate(**options).result()

    assert "Traceback" not in str(caught.value)


async def test_a_damaged_segment_is_computed_again(cluster: LocalCluster) -> None:
    store = redis.Redis.from_url(cluster.redis_url)
    async with Client(cluster.address) as client:
        session = await client.create_session()
        first = await session.generate(prose(14, start=600), max_tokens=2).result()
        control = await session.fork()
        await session.refresh()
        segment = session.info.segments[0].segment_id
        part = next(key for key in store.scan_iter(f"*{segment}*") if key.endswith(b":0"))
        data = bytearray(store.get(part))  # type: ignore[arg-type]
        data[len(data) // 2] ^= 1
        store.set(part, bytes(data), keepttl=True)
        options = {"max_tokens": 4, "avoid_worker": first.prompt_info.decode_worker}

        healed = await session.generate("And then?", **options).result()
        same = await control.generate("And then?", **options).result()

        assert healed.prompt_info.rebuilt
        assert healed.prompt_info.num_rebuilt_tokens == session.info.segments[0].num_tokens
        assert not same.prompt_info.rebuilt
        assert healed.token_ids == same.token_ids
        assert (await session.refresh()).version == 3
    store.close()
