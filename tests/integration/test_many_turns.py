"""A long conversation: what a turn adds, what it leaves alone, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from services.store import Store
from tests.integration.session_cluster import MODEL, WAIT_S, SessionCluster

NUM_TURNS = 50
LONG_EVERY = 10
SHORT = [5, 6, 7]
LONG = list(range(10, 60))
HALF = types_pb2.CompressionPolicy(keep_ratio=0.5, window_size=4, chunk_size=4)


async def turn(cluster: SessionCluster, token_ids: list[int]) -> list[Any]:
    request = inference_pb2.GenerateRequest(
        session_id="s-1",
        token_ids=types_pb2.TokenIds(ids=token_ids),
        sampling=types_pb2.SamplingParams(max_tokens=3, ignore_eos=True),
    )
    return [event async for event in cluster.inference.Generate(request, timeout=WAIT_S)]


async def segments_of(cluster: SessionCluster) -> list[session_pb2.Segment]:
    shown = await cluster.sessions.GetSession(session_pb2.GetSessionRequest(session_id="s-1"))
    return list(shown.session.segments)


@pytest.mark.slow
async def test_fifty_turns_in_a_row(valkey_url: str, store: Store) -> None:
    async with SessionCluster(valkey_url) as cluster:
        await cluster.sessions.CreateSession(
            session_pb2.CreateSessionRequest(session_id="s-1", model=MODEL, compression=HALF)
        )
        num_tokens, before = 0, []
        for number in range(NUM_TURNS):
            new = LONG if number % LONG_EVERY == 0 else SHORT

            events = await turn(cluster, new)

            info, finish = events[0].prompt_info, events[-1].finish
            # The KV of what was there is reused, except of the answer's last token, which the
            # model has not seen: the cost is that of the new tokens, however long it all is.
            assert info.num_prompt_tokens == num_tokens + len(new)
            assert info.num_prefilled_tokens <= len(new) + 1
            num_tokens += len(new) + finish.num_generated_tokens
            assert finish.num_total_tokens == num_tokens
            assert finish.session_version == number + 2
            after = await segments_of(cluster)
            # Old turns are never compressed again.
            assert after[: len(before)] == before
            answer = after[-1]
            assert not answer.HasField("compression")
            assert answer.num_kept_tokens == answer.num_tokens
            # Long enough to compress: a segment of its own; a short turn is stored whole.
            added = after[len(before) :]
            assert [s.HasField("compression") for s in added] == [True, False][-len(added) :]
            assert len(added) == (2 if new is LONG else 1)
            before = after

        stored = await store.get_manifest("default", "s-1")
        assert stored.version == NUM_TURNS + 1
        ends = [s.first_token + s.num_tokens for s in before]
        assert [s.first_token for s in before] == [0, *ends[:-1]]
        assert ends[-1] == num_tokens - 1
