"""Lost and damaged segments computed again, with a real prefill worker, decode worker and store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
import redis
import torch
from tiny_model import MAX_MODEL_LEN, load_tiny

import chunkkv
from chunkserve.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    manifest_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    session_pb2,
    types_pb2,
)
from services.compress import policy as policies
from services.compress.memory import ReceivePool
from services.compress.segments import fetched_segments
from services.decode.config import DecodeSettings
from services.decode.worker import DecodeWorker
from services.models.loader import LoadedModel
from services.runtime.server import open_channel
from services.store import Store, keys
from tests.integration.prefill_worker import refused, request, serving, session
from tests.models import tiny_model

DEADLINE_S = 60.0
PROMPT = [1 + i * 7 % 250 for i in range(60)]
TURN_2 = [1 + i * 11 % 250 for i in range(40)]
SHORT_TURN = [7, 8, 9]
ANSWER = types_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
LONG_ANSWER = types_pb2.SamplingParams(max_tokens=60, ignore_eos=True)


class Cluster:
    """One prefill worker, one decode worker, one store."""

    def __init__(
        self,
        store: Store,
        prefill: prefill_pb2_grpc.PrefillServiceStub,
        decode: grpc.aio.Channel,
        load: Callable[[], LoadedModel],
    ) -> None:
        self.store = store
        self.load = load
        self.prefill = prefill
        self.decode = decode_pb2_grpc.DecodeServiceStub(decode)

    async def begin(self, session_id: str = "s") -> manifest_pb2.Manifest:
        manifest = session(session_id=session_id)
        body = manifest.SerializeToString()
        await self.store.create_manifest("t", session_id, body, ttl_s=60)
        return manifest

    async def turn(
        self,
        manifest: manifest_pb2.Manifest,
        ids: list[int],
        *,
        sampling: types_pb2.SamplingParams = ANSWER,
        compression: types_pb2.CompressionPolicy | None = None,
    ) -> manifest_pb2.Manifest:
        """Answer a turn as a gateway does; return what was committed."""
        made = await self.prefill.Prefill(request(manifest, ids, compression=compression))
        await self.answer(made.manifest, sampling, made.compression)
        stored = await self.store.get_manifest("t", manifest.session_id)
        return manifest_pb2.Manifest.FromString(stored.body)

    async def answer(
        self,
        manifest: manifest_pb2.Manifest,
        sampling: types_pb2.SamplingParams = ANSWER,
        compression: types_pb2.CompressionPolicy | None = None,
    ) -> list[int]:
        call = self.decode.Decode(
            decode_pb2.DecodeRequest(manifest=manifest, sampling=sampling, compression=compression),
            timeout=DEADLINE_S,
        )
        return [token async for event in call for token in event.delta.token_ids]

    async def answer_from_store(self, manifest: manifest_pb2.Manifest) -> list[int]:
        """Answer from what is stored now, by a worker that has seen none of it."""
        unseen = manifest_pb2.Manifest()
        unseen.CopyFrom(manifest)
        unseen.session_id = ""  # nothing of it is kept
        async with decoding(self.store, self.load()) as channel:
            return await Cluster(self.store, self.prefill, channel, self.load).answer(unseen)

    async def rebuild(self, manifest: manifest_pb2.Manifest) -> prefill_pb2.RebuildResponse:
        return await self.prefill.Rebuild(
            prefill_pb2.RebuildRequest(manifest=manifest), timeout=DEADLINE_S
        )

    def fetch(self, manifest: manifest_pb2.Manifest) -> list[chunkkv.CompressedKV]:
        lent = fetched_segments(
            self.store,
            manifest.segments,
            fingerprint=manifest.model_fingerprint,
            pool=ReceivePool(),
        )
        with lent as fetched:
            return [chunkkv.CompressedKV(kv.shape, kv.memory.clone()) for kv in fetched.kv]


@asynccontextmanager
async def decoding(store: Store, loaded: LoadedModel) -> AsyncIterator[grpc.aio.Channel]:
    settings = DecodeSettings(model="tiny", kv_bytes=16 << 20)
    worker = DecodeWorker(loaded, store, settings, worker_id="decode-1")
    await worker.start()
    try:
        async with open_channel(worker.address) as channel:
            yield channel
    finally:
        await worker.stop(grace_s=0)


@asynccontextmanager
async def running(store: Store, load: Callable[[], LoadedModel]) -> AsyncIterator[Cluster]:
    async with (
        asyncio.timeout(DEADLINE_S),
        serving(store, loaded=load()) as prefill,
        decoding(store, load()) as decode,
    ):
        yield Cluster(store, prefill, decode, load)


@pytest.fixture
async def cluster(store: Store) -> AsyncIterator[Cluster]:
    async with running(store, load_tiny) as started:
        yield started


@pytest.fixture
def valkey(valkey_url: str) -> redis.Redis:
    with redis.Redis.from_url(valkey_url) as client:
        yield client


async def conversation(cluster: Cluster) -> manifest_pb2.Manifest:
    """Three turns: a prompt and its answer, another one, and a short one stored with its answer."""
    manifest = await cluster.turn(await cluster.begin(), PROMPT)
    manifest = await cluster.turn(manifest, TURN_2)
    return await cluster.turn(manifest, SHORT_TURN)


def lose_header(valkey: redis.Redis, name: str) -> None:
    valkey.delete(keys.segment_header(name))


def damage_header(valkey: redis.Redis, name: str) -> None:
    valkey.setrange(keys.segment_header(name), 30, b"\xff\x00\xff")


def lose_part(valkey: redis.Redis, name: str) -> None:
    [part] = parts(valkey, name)
    valkey.delete(part)


def damage_part(valkey: redis.Redis, name: str) -> None:
    [part] = parts(valkey, name)
    byte = valkey.getrange(part, 100, 100)
    valkey.setrange(part, 100, bytes([byte[0] ^ 1]))


def parts(valkey: redis.Redis, name: str) -> list[str]:
    return keys.segment_parts(name, valkey.get(keys.segment_header(name)))


Damage = Callable[[redis.Redis, str], None]
DAMAGES = [lose_header, damage_header, lose_part, damage_part]


def check_same(
    rebuilt: list[chunkkv.CompressedKV], lost: list[chunkkv.CompressedKV], *, atol: float = 1e-4
) -> None:
    for own, other in zip(rebuilt, lost, strict=True):
        assert own.shape == other.shape
        for layer, expected in zip(own.layers, other.layers, strict=True):
            assert torch.equal(layer.positions, expected.positions)
            torch.testing.assert_close(layer.keys, expected.keys, atol=atol, rtol=1e-4)
            torch.testing.assert_close(layer.values, expected.values, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", [0, 1, 2, 4], ids=["first", "answer", "middle", "last"])
async def test_one_lost_segment_is_computed_again_as_it_was(cluster, valkey, damage, index):
    manifest = await conversation(cluster)
    assert [s.HasField("compression") for s in manifest.segments] == [1, 0, 1, 0, 0]
    manifest.token_ids.append(5)
    lost, answer = cluster.fetch(manifest), await cluster.answer_from_store(manifest)
    damage(valkey, manifest.segments[index].segment_id)

    rebuilt = await cluster.rebuild(manifest)

    assert rebuilt.manifest == manifest
    assert rebuilt.num_rebuilt_tokens == manifest.segments[index].num_tokens
    assert rebuilt.prefill_ms > 0
    assert rebuilt.worker_id == "prefill-1"
    check_same(cluster.fetch(manifest), lost)
    assert await cluster.answer_from_store(manifest) == answer


async def test_a_session_of_which_nothing_is_left_is_computed_again_span_by_span(cluster, valkey):
    manifest = await conversation(cluster)
    lost = cluster.fetch(manifest)
    for segment, damage in zip(manifest.segments, [*DAMAGES, lose_header], strict=True):
        damage(valkey, segment.segment_id)

    rebuilt = await cluster.rebuild(manifest)

    assert rebuilt.manifest == manifest
    assert rebuilt.num_rebuilt_tokens == sum(s.num_tokens for s in manifest.segments)
    check_same(cluster.fetch(manifest), lost)


CHOICES = {
    "adaptive": {"scope": "head", "spread": "adaptive", "head_floor": 0.1, "chunk_size": 4},
    "pyramid": {"scope": "layer", "spread": "pyramid", "pool_size": 3, "chunk_size": 4},
    "sentence": {"unit": "sentence", "chunk_size": 9, "gating": 0.7},
    "heavy_hitter": {"scorer": "heavy_hitter", "unit": "token", "scope": "head"},
    "expected_attention": {
        "scorer": "expected_attention",
        "scope": "head",
        "spread": "adaptive",
        "chunk_size": 2,
    },
    "recall": {"scorer": "recall", "vote_power": 2, "chunk_size": 4},
    "recency": {"scorer": "recency", "unit": "token"},
    "key_norm": {"scorer": "key_norm", "precision": "int8"},
    "merged": {"merge_layers": True, "scope": "global", "keep_ratio": 0.7},
}


@pytest.mark.parametrize("name", [*CHOICES, "durable", "h2o"])
async def test_every_choice_is_computed_again_as_it_was_from_what_its_entry_says(
    cluster, valkey, name
):
    if name in CHOICES:
        asked = policies.message_of({"window_size": 4, **CHOICES[name]})
    else:
        asked = types_pb2.CompressionPolicy(preset=name, keep_ratio=0.3)
    manifest = await cluster.turn(await cluster.begin(), PROMPT, compression=asked)
    manifest = await cluster.turn(manifest, TURN_2, compression=asked)
    lost = cluster.fetch(manifest)
    for segment in manifest.segments:
        lose_header(valkey, segment.segment_id)

    rebuilt = await cluster.rebuild(manifest)

    assert rebuilt.manifest == manifest
    check_same(cluster.fetch(manifest), lost)


def load_gemma() -> LoadedModel:
    """Return a model in which every second layer sees a sliding window."""
    model = tiny_model("gemma3", vocab_size=257)
    return dataclasses.replace(
        load_tiny(), model=model, fingerprint=chunkkv.model_fingerprint(model)
    )


async def test_sliding_windows_are_computed_again_too(store, valkey):
    async with running(store, load_gemma) as cluster:
        manifest = await conversation(cluster)
        manifest.token_ids.append(5)
        lost, answer = cluster.fetch(manifest), await cluster.answer_from_store(manifest)
        for segment in manifest.segments[1:]:
            lose_part(valkey, segment.segment_id)

        rebuilt = await cluster.rebuild(manifest)

        assert rebuilt.manifest == manifest
        check_same(cluster.fetch(manifest), lost)
        assert await cluster.answer_from_store(manifest) == answer


async def test_where_nothing_is_missing_nothing_is_computed(cluster):
    manifest = await conversation(cluster)

    rebuilt = await cluster.rebuild(manifest)

    assert rebuilt.manifest == manifest
    assert (rebuilt.num_rebuilt_tokens, rebuilt.prefill_ms) == (0, 0)


async def test_equal_prompts_find_what_was_mended(cluster, valkey):
    manifest = await cluster.turn(await cluster.begin(), PROMPT)
    damage_part(valkey, manifest.segments[0].segment_id)
    other = await cluster.prefill.Prefill(request(session(session_id="other"), PROMPT))
    assert other.num_prefilled_tokens == 0  # looking a name up reads no parts
    error = await refused(cluster.answer_from_store(other.manifest))
    assert error.code() is grpc.StatusCode.DATA_LOSS

    mended = await cluster.rebuild(other.manifest)

    assert mended.num_rebuilt_tokens == len(PROMPT) - 1
    assert len(await cluster.answer_from_store(mended.manifest)) == 8


def recompressed(manifest: manifest_pb2.Manifest, index: int) -> manifest_pb2.Manifest:
    """Return the manifest with one entry as the compaction stage leaves it."""
    made = manifest_pb2.Manifest()
    made.CopyFrom(manifest)
    entry = made.segments[index]
    entry.recompression.CopyFrom(
        session_pb2.Recompression(
            max_kept_tokens=3,
            original_kept_tokens=entry.num_kept_tokens,
            original_bytes=entry.size_bytes,
            original_segment_id=entry.segment_id,
        )
    )
    entry.segment_id, entry.num_kept_tokens, entry.size_bytes = "f" * 32, 3, 100
    return made


@pytest.mark.parametrize("is_there", [True, False], ids=["original_there", "original_gone"])
async def test_a_recompressed_segment_that_is_lost_becomes_the_original_again(
    cluster, valkey, is_there
):
    manifest = await conversation(cluster)
    lost = cluster.fetch(manifest)
    if not is_there:
        lose_header(valkey, manifest.segments[2].segment_id)

    rebuilt = await cluster.rebuild(recompressed(manifest, 2))

    assert rebuilt.manifest == manifest
    assert rebuilt.num_rebuilt_tokens == (0 if is_there else manifest.segments[2].num_tokens)
    check_same(cluster.fetch(rebuilt.manifest), lost)


@pytest.mark.parametrize("dropped", [True, False])
async def test_a_bounded_answer_is_computed_again_with_as_many_tokens(cluster, valkey, dropped):
    bound = types_pb2.CompressionPolicy(max_kv_tokens=29 + (30 if dropped else 90))
    manifest = await cluster.turn(
        await cluster.begin(), PROMPT, sampling=LONG_ANSWER, compression=bound
    )
    answer = manifest.segments[1]
    lost = cluster.fetch(manifest)
    assert (answer.num_kept_tokens < answer.num_tokens) == dropped
    lose_header(valkey, answer.segment_id)

    rebuilt = await cluster.rebuild(manifest)

    assert rebuilt.num_rebuilt_tokens == answer.num_tokens
    [_, own] = cluster.fetch(rebuilt.manifest)
    assert own.num_kept_tokens == answer.num_kept_tokens
    if not dropped:
        for layer, expected in zip(own.layers, lost[1].layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)


async def test_what_was_compressed_in_another_way_than_its_entry_says_is_not_stored(
    cluster, valkey
):
    manifest = await conversation(cluster)
    manifest.segments[0].compression.keep_ratio = 0.25
    lose_header(valkey, manifest.segments[0].segment_id)

    error = await refused(cluster.rebuild(manifest))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "kept 29 tokens; computed again, it keeps 14" in error.details()
    assert not cluster.store.has_segment(manifest.segments[0].segment_id, ttl_s=1)


def one_off(manifest: manifest_pb2.Manifest) -> None:
    manifest.session_id = ""


def foreign(manifest: manifest_pb2.Manifest) -> None:
    manifest.model_fingerprint = "other"


def too_long(manifest: manifest_pb2.Manifest) -> None:
    manifest.segments[-1].num_tokens = MAX_MODEL_LEN


def with_a_gap(manifest: manifest_pb2.Manifest) -> None:
    del manifest.segments[1]


def with_too_few_tokens(manifest: manifest_pb2.Manifest) -> None:
    del manifest.token_ids[-9:]


def with_unknown_token(manifest: manifest_pb2.Manifest) -> None:
    manifest.token_ids[0] = 257


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (one_off, grpc.StatusCode.INVALID_ARGUMENT, "send the request again"),
        (foreign, grpc.StatusCode.FAILED_PRECONDITION, "cannot be computed again here"),
        (too_long, grpc.StatusCode.FAILED_PRECONDITION, "takes 256: they cannot be"),
        (with_a_gap, grpc.StatusCode.INVALID_ARGUMENT, "the one before ends at 59"),
        (with_too_few_tokens, grpc.StatusCode.INVALID_ARGUMENT, "the session 1"),
        (with_unknown_token, grpc.StatusCode.INVALID_ARGUMENT, "has 257; tiny has tokens 0 to 256"),
    ],
)
async def test_what_cannot_be_computed_again_is_told(cluster, change, code, says):
    manifest = await conversation(cluster)
    change(manifest)

    error = await refused(cluster.rebuild(manifest))

    assert error.code() is code
    assert says in error.details()
