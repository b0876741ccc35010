"""Segments: their names, and their way through a real store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import pytest
import redis
import torch
from structlog.testing import capture_logs

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress.memory import ReceivePool
from services.compress.segments import (
    covered_tokens,
    describe,
    encode_segment,
    fetched_segments,
    find_segment,
    held_bytes,
    library_errors,
    receive_segment,
    segment_id,
    store_segment,
)
from services.runtime.errors import (
    CorruptError,
    InvalidRequestError,
    MismatchError,
    NotFoundError,
    ServiceError,
)
from services.store import Store, keys

TTL_S = 300.0
MODEL = "model-a"


def session(*, num_tokens: int = 40, session_id: str = "s-1", tenant: str = "default") -> Any:
    return manifest_pb2.Manifest(
        tenant=tenant, session_id=session_id, token_ids=range(100, 100 + num_tokens)
    )


def name_of(manifest: Any, **changes: Any) -> str:
    return segment_id(
        manifest, **{"num_tokens": 20, "policy": "half", "fingerprint": MODEL, **changes}
    )


def span(
    *,
    first_token: int = 0,
    num_tokens: int = 20,
    head_dim: int = 8,
    fingerprint: str = MODEL,
    precision: chunkkv.Precision = "native",
) -> chunkkv.CompressedKV:
    """Return a span of two layers that keeps half of its tokens, filled with random bytes."""
    kept = num_tokens // 2
    shape = chunkkv.SpanShape(
        fingerprint=fingerprint,
        policy="half",
        first_token=first_token,
        num_tokens=num_tokens,
        dtype="float32",
        layers=(chunkkv.LayerShape((kept, kept), head_dim, head_dim, index_list=0),) * 2,
        index_lengths=(kept,),
        has_scores=False,
        precision=precision,
    )
    made = chunkkv.CompressedKV.empty(shape)
    generator = torch.Generator().manual_seed(first_token)
    if precision == "native":
        made.memory.copy_(torch.randint(0, 256, made.memory.shape, generator=generator))
        return made
    for layer in made.layers:
        layer.keys.copy_(torch.randn(layer.keys.shape, generator=generator))
        layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
        layer.positions.copy_(torch.arange(kept))
    return made


def stored(store: Store, manifest: Any, **changes: Any) -> session_pb2.Segment:
    """Store the manifest's next span, and name it there."""
    kv = span(first_token=covered_tokens(manifest), **changes)
    segment = store_segment(store, kv, manifest, ttl_s=TTL_S)
    manifest.segments.append(segment)
    return segment


def fetch(store: Store, *segments: session_pb2.Segment, fingerprint: str = MODEL) -> list[bytes]:
    """Return the bytes of segments that were fetched and found intact."""
    pool = ReceivePool()
    with fetched_segments(store, segments, fingerprint=fingerprint, pool=pool) as fetched:
        return [kv.memory.numpy().tobytes() for kv in fetched.kv]


def part_key(client: redis.Redis, segment: session_pb2.Segment, index: int) -> str:
    """Return the key of one part of a stored segment."""
    value = client.get(keys.segment_header(segment.segment_id))
    return keys.segment_parts(segment.segment_id, value)[index]


@pytest.fixture
def client(valkey_url: str) -> Iterator[redis.Redis]:
    """Looks and reaches behind the store."""
    with redis.Redis.from_url(valkey_url) as opened:
        yield opened


def test_name_is_32_hexadecimal_characters():
    name = name_of(session())

    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")


def test_same_span_has_the_same_name_in_every_session():
    longer = session(num_tokens=400, session_id="s-2")

    assert name_of(session()) == name_of(session()) == name_of(longer)


def test_name_depends_on_everything_that_decides_the_contents():
    other_tokens = session()
    other_tokens.token_ids[7] += 1
    on_top = session()
    on_top.segments.add(segment_id="parent-1", num_tokens=20)
    on_another = session()
    on_another.segments.add(segment_id="parent-2", num_tokens=20)

    names = {
        name_of(session()),
        name_of(session(), num_tokens=19),
        name_of(session(), policy="other"),
        name_of(session(), fingerprint="model-b"),
        name_of(session(tenant="another")),
        name_of(other_tokens),
        name_of(on_top),
        name_of(on_another),
    }

    assert len(names) == 8


def test_bounds_between_what_is_hashed_are_part_of_it():
    one = name_of(session(tenant="ab"), fingerprint="c")
    other = name_of(session(tenant="a"), fingerprint="bc")

    assert one != other


def test_names_of_one_off_requests_are_unique():
    names = {name_of(session(session_id="")) for _ in range(100)}

    assert len(names) == 100


def test_span_must_lie_within_the_tokens():
    with pytest.raises(ValueError, match="manifest has 10 of the span's 20 tokens"):
        name_of(session(num_tokens=10))


def test_tokens_behind_the_last_segment_are_pending():
    manifest = session()
    assert covered_tokens(manifest) == 0

    manifest.segments.add(first_token=0, num_tokens=12)
    manifest.segments.add(first_token=12, num_tokens=9)

    assert covered_tokens(manifest) == 21


async def test_segments_come_back_as_they_went(store: Store):
    manifest = session()
    segments = [stored(store, manifest) for _ in range(2)]
    pool = ReceivePool()

    with fetched_segments(store, segments, fingerprint=MODEL, pool=pool) as fetched:
        shapes = [kv.shape for kv in fetched.kv]
        memories = [kv.memory.clone() for kv in fetched.kv]

    for index, first_token in enumerate((0, 20)):
        expected = span(first_token=first_token)
        assert shapes[index] == expected.shape
        assert torch.equal(memories[index], expected.memory)
    assert fetched.size_bytes == sum(segment.size_bytes for segment in segments)
    assert fetched.fetch_ms > 0


async def test_segment_of_many_parts_comes_back(store: Store, client: redis.Redis):
    manifest = session(num_tokens=4000)
    segment = stored(store, manifest, num_tokens=4000, head_dim=64)
    assert segment.size_bytes > 3 << 20, "several parts of 1 MiB"

    [found] = fetch(store, segment)

    assert found == span(num_tokens=4000, head_dim=64).memory.numpy().tobytes()
    assert client.strlen(part_key(client, segment, 0)) == 1 << 20


async def test_manifest_entry_says_what_was_stored(store: Store, client: redis.Redis):
    segment = stored(store, session())

    in_store = client.strlen(keys.segment_header(segment.segment_id)) - keys.RECORD_SIZE
    in_store += client.strlen(part_key(client, segment, 0))
    assert (segment.first_token, segment.num_tokens, segment.num_kept_tokens) == (0, 20, 10)
    assert segment.size_bytes == in_store


async def test_segment_that_is_there_is_not_written_again(store: Store, client: redis.Redis):
    first = stored(store, session())
    before = set(client.scan_iter())

    again = stored(store, session(session_id="s-2"))

    assert again == first
    assert set(client.scan_iter()) - before == {keys.reserved_segments("default", "s-2").encode()}


async def test_segment_is_found_by_its_name_and_lives_on(store: Store, client: redis.Redis):
    segment = stored(store, session())

    found = find_segment(store, segment.segment_id, ttl_s=10 * TTL_S)

    assert found == segment
    assert client.ttl(part_key(client, segment, 0)) > TTL_S


async def test_segment_that_is_not_there_is_not_found(store: Store):
    assert find_segment(store, "0" * 32, ttl_s=TTL_S) is None
    with pytest.raises(NotFoundError):
        fetch(store, session_pb2.Segment(segment_id="0" * 32))


@pytest.mark.parametrize("lost", ["header", "part"])
async def test_expired_segment_is_not_found(store: Store, client: redis.Redis, lost: str):
    segment = stored(store, session())
    header = keys.segment_header(segment.segment_id)
    client.delete(header if lost == "header" else part_key(client, segment, 0))

    with pytest.raises(NotFoundError):
        fetch(store, segment)
    assert find_segment(store, segment.segment_id, ttl_s=TTL_S) is None


async def test_segments_of_which_one_is_gone_are_not_used(store: Store, client: redis.Redis):
    manifest = session()
    segments = [stored(store, manifest) for _ in range(2)]
    client.delete(keys.segment_header(segments[1].segment_id))

    with pytest.raises(NotFoundError):
        fetch(store, *segments)


async def test_every_flipped_byte_of_a_stored_part_is_refused(store: Store, client: redis.Redis):
    segment = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)
    key = part_key(client, segment, 0)
    intact: Any = client.get(key)

    for offset, byte in enumerate(intact):
        client.setrange(key, offset, bytes([byte ^ 0x10]))
        with pytest.raises(CorruptError, match="stored KV is damaged"):
            fetch(store, segment)
        client.setrange(key, offset, bytes([byte]))

    assert fetch(store, segment) == [span(num_tokens=2, head_dim=1).memory.numpy().tobytes()]


async def test_every_truncation_of_a_stored_part_is_refused(store: Store, client: redis.Redis):
    segment = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)
    key = part_key(client, segment, 0)
    intact: Any = client.get(key)

    for length in range(len(intact)):
        client.set(key, intact[:length], keepttl=True)
        with pytest.raises(CorruptError):
            fetch(store, segment)


def damaged_headers(client: redis.Redis, segment: session_pb2.Segment) -> Iterator[None]:
    """Damage what is stored of a segment's header, once for each time round, in another way."""
    key = keys.segment_header(segment.segment_id)
    intact: Any = client.get(key)
    for offset, byte in enumerate(intact):
        for damaged in (
            intact[:offset] + bytes([byte ^ 0x10]) + intact[offset + 1 :],
            intact[:offset],
        ):
            client.set(key, damaged, px=int(TTL_S * 1000))
            yield


async def test_every_damage_of_a_stored_header_is_refused_by_whoever_needs_it(
    store: Store, client: redis.Redis
):
    segment = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)

    for _ in damaged_headers(client, segment):
        with pytest.raises(CorruptError):
            fetch(store, segment)


async def test_every_damaged_header_counts_as_absent_for_who_would_save_work(
    store: Store, client: redis.Redis
):
    segment = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)

    for _ in damaged_headers(client, segment):
        with capture_logs() as logs:
            assert find_segment(store, segment.segment_id, ttl_s=TTL_S) is None

        [line] = logs
        assert (line["event"], line["log_level"]) == ("segment.damaged", "warning")
        assert line["segment_id"] == segment.segment_id


async def test_segment_with_a_damaged_header_is_replaced(store: Store, client: redis.Redis):
    segment = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)
    made = span(num_tokens=2, head_dim=1).memory.numpy().tobytes()

    for _ in damaged_headers(client, segment):
        again = stored(store, session(num_tokens=2), num_tokens=2, head_dim=1)

        assert again == segment
        assert fetch(store, segment) == [made]


async def test_segment_that_expires_while_it_is_looked_for_is_not_found(
    store: Store, client: redis.Redis
):
    segment = stored(store, session())

    class Expiring:
        """The store, with a header that expires as soon as it was asked for."""

        def has_segment(self, *args: Any, **kwargs: Any) -> bool:
            found = store.has_segment(*args, **kwargs)
            [segment_id] = args
            client.delete(keys.segment_header(segment_id))
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    assert find_segment(cast(Store, Expiring()), segment.segment_id, ttl_s=TTL_S) is None


async def test_part_of_another_segment_in_its_place_is_refused(store: Store, client: redis.Redis):
    manifest = session()
    one, other = (stored(store, manifest) for _ in range(2))
    client.copy(part_key(client, other, 0), part_key(client, one, 0), replace=True)

    with pytest.raises(CorruptError):
        fetch(store, one)


async def test_segment_under_anothers_name_is_refused(store: Store, client: redis.Redis):
    segment = stored(store, session())
    encoded = chunkkv.encode(span(), identity="its own name")
    store.put_segment("f" * 32, encoded.header, encoded.parts, ttl_s=TTL_S)
    segment.segment_id = "f" * 32

    for use in (
        lambda: fetch(store, segment),
        lambda: find_segment(store, segment.segment_id, ttl_s=TTL_S),
    ):
        with pytest.raises(MismatchError, match="found its own name"):
            use()


async def test_segment_of_another_model_is_refused(store: Store):
    segment = stored(store, session())

    with pytest.raises(MismatchError, match="made by model model-a, not by model-b") as caught:
        fetch(store, segment, fingerprint="model-b")

    assert caught.value.error_reason == "MODEL_MISMATCH"


def nearly(found: bytes, kv: chunkkv.CompressedKV) -> bool:
    """Whether keys and values are the span's, up to one step of 8 bits over their whole range."""
    opened = chunkkv.CompressedKV(kv.shape, torch.frombuffer(bytearray(found), dtype=torch.uint8))
    return all(
        torch.equal(one.positions, other.positions)
        and torch.allclose(one.keys, other.keys, rtol=0, atol=float(other.keys.abs().max()) / 64)
        for one, other in zip(opened.layers, kv.layers, strict=True)
    )


async def test_quantized_segments_arrive_in_the_models_dtype(store: Store):
    manifest = session()
    native = stored(store, manifest)
    small = stored(store, manifest, precision="int8")

    found = fetch(store, native, small, native)

    kv = span(first_token=20, precision="int8")
    assert found[0] == found[2] == span().memory.numpy().tobytes()
    assert nearly(found[1], kv)
    assert native.kv_bytes == 0
    assert held_bytes(native) == native.size_bytes
    assert held_bytes(small) == small.kv_bytes == kv.size_bytes > small.size_bytes
    assert find_segment(store, small.segment_id, ttl_s=TTL_S) == small


async def test_quantized_segment_is_received_into_memory_of_the_callers(store: Store):
    segment = stored(store, session(), precision="int8")
    memory = memoryview(bytearray(held_bytes(segment) + 9))

    found = receive_segment(
        store, segment.segment_id, memory, fingerprint=MODEL, staging=ReceivePool()
    )

    assert nearly(bytes(memory[:-9]), span(precision="int8"))
    assert found.memory.data_ptr() == torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    with pytest.raises(CorruptError, match="more than the 99"):
        receive_segment(
            store, segment.segment_id, memory[:99], fingerprint=MODEL, staging=ReceivePool()
        )


@pytest.mark.parametrize("precision", ["native", "int8"])
async def test_merged_segments_arrive_in_every_layer(store: Store, precision: chunkkv.Precision):
    shape = span(precision=precision).shape
    shape = dataclasses.replace(shape, layers=shape.layers * 2, merge_layers=True)
    generator = torch.Generator().manual_seed(0)
    kv = chunkkv.CompressedKV.empty(shape)
    for layer in kv.layers:
        layer.keys.copy_(torch.randn(layer.keys.shape, generator=generator))
        layer.values.copy_(torch.randn(layer.values.shape, generator=generator))
        layer.positions.copy_(torch.arange(10))
    encoded = chunkkv.encode(kv, identity="by hand")
    opened = chunkkv.decode(encoded.header, bytearray(b"".join(encoded.parts)))

    segment = store_segment(store, kv, session(), ttl_s=TTL_S)
    memory = memoryview(bytearray(held_bytes(segment)))
    receive_segment(store, segment.segment_id, memory, fingerprint=MODEL, staging=ReceivePool())

    assert shape.merged_pairs == ((2, 3),)
    assert held_bytes(segment) == segment.kv_bytes == kv.size_bytes
    assert fetch(store, segment) == [bytes(memory)] == [opened.memory.numpy().tobytes()]
    assert find_segment(store, segment.segment_id, ttl_s=TTL_S) == segment


async def test_damaged_quantized_segment_is_refused(store: Store, client: redis.Redis):
    segment = stored(store, session(), precision="int8")
    client.setrange(part_key(client, segment, 0), 200, b"\xff\xfe")

    with pytest.raises(CorruptError):
        fetch(store, segment)


def test_what_cannot_be_quantized_is_the_requests_fault():
    kv = span(precision="int8")
    kv.layers[0].keys[0, 0] = float("nan")

    with pytest.raises(InvalidRequestError, match="not finite"):
        encode_segment(kv, session())


async def test_segment_of_a_later_format_is_refused(store: Store):
    segment = stored(store, session())
    header = bytearray(store.get_header(segment.segment_id))
    header[4] = 9
    store.delete_segments([segment.segment_id])
    store.put_segment(segment.segment_id, header, [], ttl_s=TTL_S)

    with pytest.raises(MismatchError, match="format version 9") as caught:
        fetch(store, segment)

    assert caught.value.error_reason == "FORMAT_MISMATCH"


async def test_memory_is_used_again_and_does_not_leak_into_the_next_segment(store: Store):
    manifest = session()
    large = stored(store, manifest)
    small = stored(store, manifest, num_tokens=4)
    pool, contents = ReceivePool(), []

    for segment in (large, small):
        with fetched_segments(store, [segment], fingerprint=MODEL, pool=pool) as fetched:
            contents.append(fetched.kv[0].memory.numpy().tobytes())

    assert contents[1] == span(first_token=20, num_tokens=4).memory.numpy().tobytes()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (chunkkv.InvalidPolicyError, InvalidRequestError),
        (chunkkv.InvalidInputError, InvalidRequestError),
        (chunkkv.CorruptError, CorruptError),
        (chunkkv.FormatError, MismatchError),
        (chunkkv.MismatchError, MismatchError),
    ],
)
def test_errors_of_the_library_become_errors_of_the_services(
    raised: type[Exception], expected: type[ServiceError]
):
    def fail() -> None:
        with library_errors():
            raise raised("what was wrong")

    with pytest.raises(expected, match="what was wrong"):
        fail()


def test_other_errors_pass():
    def fail() -> None:
        with library_errors():
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        fail()


def test_description_is_taken_from_the_shape():
    described = describe("name", span(first_token=7).shape, 99)

    assert (described.segment_id, described.first_token, described.size_bytes) == ("name", 7, 99)
