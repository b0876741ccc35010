"""Prefixes that sessions share, with a tiny model, a chat template and a real store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest
import redis
import torch
from prometheus_client import REGISTRY
from tiny_model import load_tiny

import chunkkv
from chunkserve.v1 import manifest_pb2, prefill_pb2, prefill_pb2_grpc, types_pb2
from services.compress import policy as policies
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments
from services.models.loader import LoadedModel
from services.store import Store, keys
from tests.integration.prefill_worker import refused, serving, session

DEADLINE_S = 120.0
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea."
CHAPTER = "There now is your insular city of the Manhattoes, belted round by wharves."
QUESTION = "What did he do, and why, and for how long?"
# The default's methods, with what the session asks for.
OF_SESSION = {"chunk_size": 4, "window_size": 4}
POLICY = chunkkv.preset("fast", keep_ratio=0.5, **OF_SESSION)
PREFIX_POLICY = chunkkv.preset("durable", keep_ratio=0.5, **OF_SESSION)


def chatty() -> LoadedModel:
    loaded = load_tiny(max_model_len=1024)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@pytest.fixture
async def stub(store: Store) -> AsyncIterator[prefill_pb2_grpc.PrefillServiceStub]:
    async with asyncio.timeout(DEADLINE_S), serving(store, loaded=chatty()) as opened:
        yield opened


def asked(
    *messages: tuple[str, str, bool],
    manifest: manifest_pb2.Manifest | None = None,
    **fields: object,
) -> prefill_pb2.PrefillRequest:
    chat = types_pb2.ChatInput(
        messages=[
            types_pb2.ChatMessage(role=role, content=content, cache_breakpoint=is_marked)
            for role, content, is_marked in messages
        ]
    )
    return prefill_pb2.PrefillRequest(
        manifest=session() if manifest is None else manifest, chat=chat, **fields
    )


def spans(answer: prefill_pb2.PrefillResponse) -> list[tuple[int, int, bool]]:
    return [(s.first_token, s.num_tokens, s.is_prefix) for s in answer.manifest.segments]


def length(role: str, content: str) -> int:
    return len(f"<{role}>{content}\n")


PREFIX_LEN = length("system", BOOK)
CHAPTER_LEN = length("user", CHAPTER)
QUESTION_LEN = length("user", QUESTION) + len("<assistant>") - 1  # but the last token


async def test_a_marked_message_ends_a_segment_of_its_own(stub):
    answer = await stub.Prefill(asked(("system", BOOK, True), ("user", QUESTION, False)))

    assert spans(answer) == [(0, PREFIX_LEN, True), (PREFIX_LEN, QUESTION_LEN, False)]
    assert answer.num_prefilled_tokens == answer.num_new_tokens - 1
    assert answer.num_shared_tokens == 0
    assert answer.prefill_ms > 0


async def test_several_marks_end_several_segments_each_compressed_on_top_of_the_last(stub, store):
    loaded = chatty()

    answer = await stub.Prefill(
        asked(("system", BOOK, True), ("user", CHAPTER, True), ("user", QUESTION, False))
    )

    ids = list(answer.manifest.token_ids)
    expected: list[chunkkv.CompressedKV] = []
    for first, num_tokens, is_prefix in spans(answer):
        # Of prefixes the default is a method that knows no question.
        policy = PREFIX_POLICY if is_prefix else POLICY
        past = chunkkv.KVCache.from_segments(loaded.model.config, expected)
        new_ids = torch.tensor([ids[first : first + num_tokens]])
        prefilled = chunkkv.run_prefill(loaded.model, new_ids, window_size=4, past=past)
        prefilled = chunkkv.repeat(loaded.model, prefilled, new_ids, [policy.scorer])
        expected += chunkkv.compress(prefilled, policy)
    lent = fetched_segments(
        store, answer.manifest.segments, fingerprint=loaded.fingerprint, pool=ReceivePool()
    )
    assert [is_prefix for _, _, is_prefix in spans(answer)] == [True, True, False]
    with lent as fetched:
        for kv, own in zip(fetched.kv, expected, strict=True):
            for layer, own_layer in zip(kv.layers, own.layers, strict=True):
                assert torch.equal(layer.positions, own_layer.positions)
                torch.testing.assert_close(layer.keys, own_layer.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked_scorer", "name"),
    [(types_pb2.SCORER_RECONSTRUCTION, "reconstruction"), (types_pb2.SCORER_KEY_DIFF, "key_diff")],
)
async def test_a_prefix_is_compressed_by_a_scorer_that_knows_no_question(
    stub, store, asked_scorer, name
):
    request = asked(("system", BOOK, True), ("user", QUESTION, False))
    request.compression.prefix_scorer = asked_scorer

    answer = await stub.Prefill(request)

    prefix, rest = answer.manifest.segments
    assert prefix.compression.scorer == asked_scorer
    assert rest.compression.scorer == types_pb2.SCORER_WINDOW
    loaded = chatty()
    new_ids = torch.tensor([list(answer.manifest.token_ids)[:PREFIX_LEN]])
    prefilled = chunkkv.run_prefill(loaded.model, new_ids, window_size=4)
    if name == "reconstruction":
        prefilled = chunkkv.reconstruct(loaded.model, prefilled, new_ids)
    [expected] = chunkkv.compress(prefilled, dataclasses.replace(PREFIX_POLICY, scorer=name))
    lent = fetched_segments(store, [prefix], fingerprint=loaded.fingerprint, pool=ReceivePool())
    with lent as fetched:
        for layer, own in zip(fetched.kv[0].layers, expected.layers, strict=True):
            assert torch.equal(layer.positions, own.positions)


@pytest.mark.parametrize("num_known", [1, 2], ids=["one_prefix_known", "both_known"])
async def test_another_session_computes_only_what_follows_the_prefixes_that_are_stored(
    stub, num_known
):
    prefixes = [("system", BOOK, True), ("user", CHAPTER, True)]
    first = await stub.Prefill(asked(*prefixes[:num_known], ("user", "Well, who is he?", False)))

    other = asked(*prefixes, ("user", QUESTION, False), manifest=session(session_id="other"))
    second = await stub.Prefill(other)

    known = PREFIX_LEN + (CHAPTER_LEN if num_known == 2 else 0)
    assert second.manifest.segments[:num_known] == first.manifest.segments[:num_known]
    assert second.num_shared_tokens == known
    assert second.num_prefilled_tokens == PREFIX_LEN + CHAPTER_LEN + QUESTION_LEN - known
    alone = await stub.Prefill(asked(*prefixes, ("user", QUESTION, False)))
    assert alone.manifest.segments == second.manifest.segments


@pytest.mark.parametrize("damage", ["part_gone", "part_damaged"])
async def test_a_prefix_that_is_found_and_damaged_is_mended_on_the_way(
    stub, store, valkey_url, damage
):
    first = await stub.Prefill(asked(("system", BOOK, True), ("user", "Who?" * 5, False)))
    name = first.manifest.segments[0].segment_id
    with redis.Redis.from_url(valkey_url) as client:
        [part] = keys.segment_parts(name, client.get(keys.segment_header(name)))
        if damage == "part_gone":
            client.delete(part)
        else:
            client.setrange(part, 100, b"\xff\x00\xff")
    other = asked(("system", BOOK, True), ("user", QUESTION, False))

    second = await stub.Prefill(other)
    third = await stub.Prefill(other)

    assert second.num_prefilled_tokens == PREFIX_LEN + QUESTION_LEN
    # One that is not complete is not found, and so is not known to have been there.
    assert second.num_rebuilt_tokens == (0 if damage == "part_gone" else PREFIX_LEN)
    assert third.num_rebuilt_tokens == 0
    assert second.num_shared_tokens == 0
    assert second.manifest.segments[0] == first.manifest.segments[0]
    assert third.num_shared_tokens == PREFIX_LEN + QUESTION_LEN
    lent = fetched_segments(
        store,
        third.manifest.segments,
        fingerprint=third.manifest.model_fingerprint,
        pool=ReceivePool(),
    )
    with lent as fetched:
        assert [kv.num_tokens for kv in fetched.kv] == [PREFIX_LEN, QUESTION_LEN]


async def test_another_tenants_prefix_is_not_shared(stub):
    messages = [("system", BOOK, True), ("user", QUESTION, False)]
    await stub.Prefill(asked(*messages))

    other = await stub.Prefill(asked(*messages, manifest=session(tenant="other")))

    assert other.num_shared_tokens == 0


async def test_a_prefix_too_short_for_a_segment_is_merged_into_what_follows(store):
    async with serving(store, loaded=chatty(), min_compress_tokens=100) as stub:
        answer = await stub.Prefill(
            asked(("system", BOOK, True), ("user", CHAPTER, True), ("user", QUESTION, False))
        )

    # What follows the last prefix is too short, too, and is left to the decode worker.
    assert spans(answer) == [(0, PREFIX_LEN + CHAPTER_LEN, True)]
    assert answer.num_prefilled_tokens == PREFIX_LEN + CHAPTER_LEN


async def test_a_mark_in_a_later_turn_ends_a_prefix_behind_the_stored_ones(stub):
    first = await stub.Prefill(asked(("system", BOOK, True), ("user", QUESTION, False)))
    manifest = manifest_pb2.Manifest()
    manifest.CopyFrom(first.manifest)
    num_before = len(manifest.token_ids)

    second = await stub.Prefill(
        asked(("user", CHAPTER, True), ("user", QUESTION, False), manifest=manifest)
    )

    *_, chapter, question = spans(second)
    closing = 1  # the line break behind the answer
    # The last token of the first turn was left pending.
    assert chapter == (num_before - 1, 1 + closing + CHAPTER_LEN, True)
    assert question == (num_before + closing + CHAPTER_LEN, QUESTION_LEN, False)
    again = await stub.Prefill(
        asked(("user", CHAPTER, True), ("user", QUESTION, False), manifest=manifest)
    )
    assert again.num_shared_tokens == again.num_new_tokens - 1


async def test_a_one_off_request_shares_nothing_so_its_marks_mean_nothing(stub):
    one_off = session(session_id="")

    answer = await stub.Prefill(
        asked(("system", BOOK, True), ("user", QUESTION, False), manifest=one_off)
    )

    assert spans(answer) == [(0, PREFIX_LEN + QUESTION_LEN, False)]


@pytest.mark.parametrize(
    ("session_asks", "request_asks", "preset", "changes"),
    [
        ({}, {"prefix_preset": "kvzip"}, "kvzip", {}),
        ({"prefix_preset": "kvzip"}, {}, "kvzip", OF_SESSION),
        ({"prefix_preset": "kvzip"}, {"prefix_preset": "snapkv"}, "snapkv", {}),
        (
            {"prefix_preset": "fast"},
            {"prefix_scorer": types_pb2.SCORER_RECENCY},
            "fast",
            {**OF_SESSION, "scorer": "recency"},
        ),
        ({"prefix_scorer": types_pb2.SCORER_RECENCY}, {"prefix_preset": "kvzip"}, "kvzip", {}),
        ({}, {"preset": "snapkv", "scorer": types_pb2.SCORER_RECENCY}, "durable", OF_SESSION),
        (
            {},
            {"scope": types_pb2.SCOPE_GLOBAL},
            "durable",
            {**OF_SESSION, "scope": "global", "spread": "uniform"},
        ),
    ],
    ids=[
        "request",
        "session",
        "request_before_session",
        "scorer_of_a_preset",
        "preset_before_an_older_scorer",
        "not_the_prompts_own",
        "no_spread_that_does_not_go_with_a_scope",
    ],
)
async def test_a_prefix_is_compressed_by_a_preset_of_its_own(
    stub, session_asks, request_asks, preset, changes
):
    manifest = session()
    manifest.compression.MergeFrom(types_pb2.CompressionPolicy(**session_asks))
    request = asked(("system", BOOK, True), ("user", QUESTION, False), manifest=manifest)
    request.compression.MergeFrom(types_pb2.CompressionPolicy(**request_asks))

    answer = await stub.Prefill(request)

    prefix, _ = answer.manifest.segments
    expected = chunkkv.preset(
        preset,
        keep_ratio=0.5,
        num_tokens=PREFIX_LEN,
        **changes,
    )
    # As the wire has it: fractions have 32 bits.
    assert prefix.compression == policies.to_wire(expected)
    assert not prefix.compression.HasField("preset")


async def test_a_worker_has_a_preset_of_prefixes(store):
    async with serving(store, loaded=chatty(), prefix_preset="keydiff") as stub:
        manifest = session()
        manifest.ClearField("compression")
        answer = await stub.Prefill(
            asked(("system", BOOK, True), ("user", QUESTION, False), manifest=manifest)
        )

    prefix, rest = answer.manifest.segments
    assert (
        policies.from_wire(prefix.compression).canonical() == chunkkv.preset("keydiff").canonical()
    )
    assert policies.from_wire(rest.compression).canonical() == chunkkv.preset("fast").canonical()


async def test_the_answer_names_the_scorer_of_prefixes(stub):
    policy = types_pb2.CompressionPolicy(prefix_scorer=types_pb2.SCORER_WINDOW)

    answer = await stub.Prefill(asked(("user", QUESTION, False), compression=policy))

    assert answer.compression.prefix_scorer == types_pb2.SCORER_WINDOW


async def test_an_unknown_scorer_of_prefixes_is_refused(stub):
    manifest = session()
    manifest.compression.prefix_scorer = 99

    error = await refused(stub.Prefill(asked(("user", QUESTION, False), manifest=manifest)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "scorer is 'number 99'" in error.details()


@pytest.mark.parametrize("field", ["preset", "prefix_preset"])
async def test_an_unknown_preset_is_refused_with_the_names_that_there_are(stub, field):
    request = asked(("user", QUESTION, False))
    setattr(request.compression, field, "slow")

    error = await refused(stub.Prefill(request))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"no preset 'slow'; give one of {', '.join(chunkkv.PRESETS)}" in error.details()


async def test_a_mark_that_the_template_does_not_allow_is_refused(store):
    loaded = chatty()
    loaded.tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    async with serving(store, loaded=loaded) as stub:
        error = await refused(
            stub.Prefill(asked(("system", BOOK, True), ("user", QUESTION, False)))
        )

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "messages[0]" in error.details()


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"chunkserve_prefill_{name}_total", labels) or 0.0


async def test_twenty_sessions_over_one_prefix_store_and_prefill_it_once(store, valkey_url):
    document = (BOOK + CHAPTER) * 4
    prefix_len = length("system", document)
    questions = [f"Question number {number:02}: what did he do?" for number in range(20)]
    rest_len = length("user", questions[0]) + len("<assistant>") - 1
    before = [
        metric("tokens"),
        metric("shared_tokens"),
        metric("segments", source="computed"),
        metric("segments", source="found"),
    ]

    async with asyncio.timeout(DEADLINE_S), serving(store, loaded=chatty()) as stub:
        answers = [
            await stub.Prefill(
                asked(
                    ("system", document, True),
                    ("user", question, False),
                    manifest=session(session_id=f"s-{number}"),
                )
            )
            for number, question in enumerate(questions)
        ]

    after = [
        metric("tokens"),
        metric("shared_tokens"),
        metric("segments", source="computed"),
        metric("segments", source="found"),
    ]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        prefix_len + 20 * rest_len,
        19 * prefix_len,
        1 + 20,
        19,
    ]
    [prefix] = {answer.manifest.segments[0].SerializeToString() for answer in answers}
    names = {s.segment_id for answer in answers for s in answer.manifest.segments}
    entries = {s.segment_id: s for answer in answers for s in answer.manifest.segments}
    assert len(names) == 1 + 20
    with redis.Redis.from_url(valkey_url) as client:
        stored = {name: stored_bytes(client, name) for name in names}
        num_owner_sets, num_reserving_sessions = len(names), len(answers)
        assert client.dbsize() == sum(number for number, _ in stored.values()) + (
            num_owner_sets + num_reserving_sessions
        )
    for name, (_, size_bytes) in stored.items():
        assert size_bytes == entries[name].size_bytes + keys.RECORD_SIZE
    assert stored[answers[0].manifest.segments[0].segment_id][1] > 5 * max(
        size for name, (_, size) in stored.items() if entries[name].SerializeToString() != prefix
    )


def stored_bytes(client: redis.Redis, name: str) -> tuple[int, int]:
    """Return how many keys a segment has, and their bytes."""
    header = keys.segment_header(name)
    names = [header, *keys.segment_parts(name, client.get(header))]
    return len(names), sum(client.strlen(key) for key in names)
