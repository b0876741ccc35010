"""Every choice of a policy, from the request to the answer: stored, shown, read and gone on from.

A gateway with real workers of a tiny model. What they store and answer is compared with what the
library computes and transformers' ``generate`` says, span by span.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
import torch

import chunkkv
from chunkserve.v1 import inference_pb2, manifest_pb2, session_pb2, types_pb2
from services.compress import policy as policies
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments
from tests.integration.session_cluster import MODEL, SessionCluster, load_chatty

BOOK = "Call me Ishmael. Some years ago, never mind how long! I went to sea? I did. " * 2
TURN_2 = "There now is your city of the Manhattoes. Belted round by wharves! And who is he?"
NUM_ANSWERED = 6
SMALL: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 4, "window_size": 4, "sink_tokens": 2}
POLICIES: dict[str, dict[str, Any]] = {
    "adaptive": {**SMALL, "scope": "head", "spread": "adaptive", "head_floor": 0.25},
    "adaptive_layers": {**SMALL, "scope": "layer", "spread": "adaptive"},
    "pyramid": {**SMALL, "scope": "head", "spread": "pyramid", "unit": "token", "vote_power": 2},
    "durable": {"preset": "durable", "keep_ratio": 0.4},
    "sentence": {**SMALL, "unit": "sentence", "chunk_size": 12, "gating": 0.9},
    "heavy_hitter": {**SMALL, "scorer": "heavy_hitter", "scope": "head", "spread": "adaptive"},
    "expected": {**SMALL, "scorer": "expected_attention", "scope": "head", "spread": "pyramid"},
    "recall": {**SMALL, "scorer": "recall", "scope": "head", "spread": "adaptive"},
    "recency": {"preset": "streamingllm", "max_kept_tokens": 30},
    "key_norm": {**SMALL, "scorer": "key_norm", "precision": "int8", "spread": "adaptive"},
    "merged": {**SMALL, "scope": "global", "merge_layers": True},
    "h2o": {"preset": "h2o", "keep_ratio": 0.5},
}
RAGGED = ("adaptive", "adaptive_layers", "pyramid", "durable", "heavy_hitter", "expected")


def asked(name: str) -> types_pb2.CompressionPolicy:
    fields = dict(POLICIES[name])
    preset = fields.pop("preset", None)
    message = policies.message_of(fields)
    if preset is not None:
        message.preset = preset
    return message


def expected_policy(name: str, num_tokens: int) -> chunkkv.CompressionPolicy:
    fields = {"preset": "fast", **POLICIES[name]}  # the server's, where none is named
    if fields.get("scope") in ("group", "global"):
        fields.setdefault("spread", "uniform")
    return chunkkv.preset(fields.pop("preset"), num_tokens=num_tokens, **fields)


@pytest.fixture
async def cluster(valkey_url: str) -> AsyncIterator[SessionCluster]:
    async with SessionCluster(valkey_url) as running:
        yield running


async def create(cluster: SessionCluster, session_id: str, name: str) -> None:
    request = session_pb2.CreateSessionRequest(
        session_id=session_id, model=MODEL, compression=asked(name)
    )
    await cluster.sessions.CreateSession(request)


async def turn(cluster: SessionCluster, session_id: str, text: str) -> list[int]:
    call = cluster.inference.Generate(
        inference_pb2.GenerateRequest(
            session_id=session_id,
            text=text,
            sampling=types_pb2.SamplingParams(max_tokens=NUM_ANSWERED, ignore_eos=True),
        )
    )
    return [token async for event in call for token in event.delta.token_ids]


async def shown(cluster: SessionCluster, session_id: str) -> session_pb2.Session:
    request = session_pb2.GetSessionRequest(session_id=session_id)
    return (await cluster.sessions.GetSession(request)).session


async def stored(cluster: SessionCluster, session_id: str) -> manifest_pb2.Manifest:
    found = await cluster.store.get_manifest("default", session_id)
    return manifest_pb2.Manifest.FromString(found.body)


def fetch(
    cluster: SessionCluster, segments: Sequence[session_pb2.Segment], fingerprint: str
) -> list[chunkkv.CompressedKV]:
    lent = fetched_segments(cluster.store, segments, fingerprint=fingerprint, pool=ReceivePool())
    with lent as fetched:
        return [chunkkv.CompressedKV(kv.shape, kv.memory.clone()) for kv in fetched.kv]


def computed(
    name: str, ids: Sequence[int], before: Sequence[chunkkv.CompressedKV]
) -> chunkkv.CompressedKV:
    """Return what the library keeps of a prompt behind spans as they are stored."""
    loaded, policy = load_chatty(), expected_policy(name, len(ids))
    new_ids = torch.tensor([ids])
    past = chunkkv.KVCache.from_segments(loaded.model.config, list(before))
    prefilled = chunkkv.run_prefill(
        loaded.model,
        new_ids,
        window_size=policy.window_size,
        scorers=[policy.scorer],
        past=past,
        prefill_chunk_tokens=64,
    )
    prefilled = chunkkv.repeat(loaded.model, prefilled, new_ids, [policy.scorer])
    if policy.unit == "sentence":
        ends = chunkkv.sentence_ending_tokens(loaded.tokenizer)[new_ids]
        prefilled = dataclasses.replace(prefilled, sentence_ends=ends)
    return chunkkv.compress(prefilled, policy)[0]


def continued(spans: Sequence[chunkkv.CompressedKV], ids: Sequence[int]) -> list[int]:
    """Return what transformers answers to ``ids``, of which the spans hold the beginning."""
    model = load_chatty().model
    with torch.inference_mode():
        output = model.generate(
            **chunkkv.generation_inputs(model, [list(spans)], [torch.tensor(ids)]),
            max_new_tokens=NUM_ANSWERED,
            do_sample=False,
            eos_token_id=None,
        )
    return output[0, len(ids) :].tolist()


def kept_slots(kv: chunkkv.CompressedKV) -> int:
    """Return the tokens that all heads of all layers keep together."""
    return sum(length for layer in kv.shape.layers for length in layer.lengths)


@pytest.mark.parametrize("name", POLICIES)
async def test_two_turns_are_stored_and_answered_as_the_library_says(
    cluster: SessionCluster, name: str
):
    await create(cluster, "s", name)

    answers = [await turn(cluster, "s", text) for text in (BOOK, TURN_2)]

    manifest, session = await stored(cluster, "s"), await shown(cluster, "s")
    ids = list(manifest.token_ids)
    spans = fetch(cluster, manifest.segments, manifest.model_fingerprint)
    assert session.compression == asked(name)
    assert [segment.HasField("compression") for segment in session.segments] == [1, 0, 1, 0]
    for index in (0, 2):
        segment, span = session.segments[index], spans[index]
        policy = expected_policy(name, segment.num_tokens)
        assert policies.from_wire(segment.compression).canonical() == policy.canonical()
        assert span.shape.policy == policy.canonical()
        end = segment.first_token + segment.num_tokens
        own = computed(name, ids[segment.first_token : end], spans[:index])
        assert span.shape.layers == own.shape.layers
        for layer, expected in zip(span.layers, own.layers, strict=True):
            assert torch.equal(layer.positions, expected.positions)
            if policy.precision == "native" and not policy.merge_layers:
                torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
        # The last token of the first prompt is left to the decode worker.
        prompt_end = end + 1
        assert answers[index // 2] == continued(spans[: index + 1], ids[:prompt_end])


@pytest.mark.parametrize("name", RAGGED)
async def test_of_spread_budgets_the_sum_is_exact_and_memory_is_what_is_kept(
    cluster: SessionCluster, name: str
):
    await create(cluster, "s", name)

    await turn(cluster, "s", BOOK)

    session, manifest = await shown(cluster, "s"), await stored(cluster, "s")
    segment, *_ = session.segments
    [span, *_] = fetch(cluster, manifest.segments, manifest.model_fingerprint)
    policy = expected_policy(name, segment.num_tokens)
    lengths = [length for layer in span.shape.layers for length in layer.lengths]
    assert len(set(lengths)) > 1, "the budget is spread unevenly"
    budget = policy.budget(segment.num_tokens)
    assert sum(lengths) == budget * len(lengths)
    assert segment.num_kept_tokens == budget
    assert session.num_kept_tokens == budget + sum(s.num_kept_tokens for s in session.segments[1:])
    assert session.stored_bytes == sum(s.size_bytes for s in session.segments)
    # Keys and values of the tokens that each head keeps; positions and scores beside them.
    geometry = span.shape.layers[0]
    kv_bytes = sum(lengths) * (geometry.key_dim + geometry.value_dim) * 4
    assert kv_bytes <= span.size_bytes < 1.5 * kv_bytes
    workers = cluster.workers["decode"]
    [(resident, memory)] = [
        (memory._residents[segment.segment_id], memory)
        for memory in (worker._worker.memory for worker in workers)
        if segment.segment_id in memory._residents
    ]
    assert span.size_bytes <= resident.block.size_bytes <= segment.size_bytes + 4096
    assert memory.resident_bytes == sum(r.block.size_bytes for r in memory._residents.values())


@pytest.mark.parametrize("name", ["adaptive", "pyramid", "adaptive_layers"])
@pytest.mark.parametrize("precision", [0, types_pb2.PRECISION_INT8])
async def test_ragged_sessions_are_compressed_again_carried_elsewhere_and_gone_on_from(
    cluster: SessionCluster, name: str, precision: Any
):
    await create(cluster, "s", name)
    await turn(cluster, "s", BOOK)
    before = await shown(cluster, "s")

    smaller = types_pb2.CompressionPolicy(max_kept_tokens=40, precision=precision)
    done = await cluster.sessions.CompressSession(
        session_pb2.CompressSessionRequest(session_id="s", compression=smaller)
    )
    pieces = [
        response.piece
        async for response in cluster.sessions.ExportSession(
            session_pb2.ExportSessionRequest(session_id="s")
        )
    ]
    await cluster.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s"))
    requests = [session_pb2.ImportSessionRequest(piece=piece) for piece in pieces]
    requests[0].new_session_id = "copy"
    await cluster.sessions.ImportSession(iter(requests))
    answer = await turn(cluster, "copy", TURN_2)

    manifest = await stored(cluster, "copy")
    spans = fetch(cluster, manifest.segments, manifest.model_fingerprint)
    assert done.session.num_kept_tokens == 40 < before.num_kept_tokens
    assert done.session.stored_bytes < before.stored_bytes
    heads = [length for layer in spans[0].shape.layers for length in layer.lengths]
    assert len(set(heads)) > 1 or name == "adaptive_layers"  # two layers may well be equal
    kept = [kept_slots(span) for span in spans[:2]]
    assert sum(kept) == 40 * len(heads)
    ids = list(manifest.token_ids)
    assert answer == continued(spans[:3], ids[: len(ids) - NUM_ANSWERED])


async def test_bad_values_are_refused_by_the_gateway_and_conflicts_by_whoever_knows(
    cluster: SessionCluster,
):
    for field, value, says in [
        ("pool_size", 4, "compression.pool_size is 4; send an odd number of at least 1"),
        ("gating", 2.0, "compression.gating is 2; send a number from 0 to 1"),
        ("preset", "slow", "compression.preset is 'slow'; send one of fast, durable, "),
        ("prefix_preset", "slow", "compression.prefix_preset is 'slow'; send one of fast"),
        ("spread", 9, "compression.spread is 9; send one of BUDGET_SPREAD_UNSPECIFIED, "),
    ]:
        request = session_pb2.CreateSessionRequest(model=MODEL)
        setattr(request.compression, field, value)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.sessions.CreateSession(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert says in caught.value.details()

    await create(cluster, "global", "merged")
    call = cluster.inference.Generate(
        inference_pb2.GenerateRequest(
            session_id="global",
            text=BOOK,
            compression=types_pb2.CompressionPolicy(spread=types_pb2.BUDGET_SPREAD_ADAPTIVE),
        )
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "spread is 'adaptive' and scope 'global'" in caught.value.details()
