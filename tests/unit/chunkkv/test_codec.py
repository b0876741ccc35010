"""Spans to bytes and back; and everything that is damaged, foreign or cut is refused."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import xxhash

from chunkkv import (
    ChunkKVError,
    CompressedKV,
    CorruptError,
    EncodedKV,
    FormatError,
    InvalidInputError,
    LayerShape,
    MismatchError,
    SpanShape,
    decode,
    encode,
    read_header,
)

DTYPES = ("float32", "bfloat16", "float16")
PREFIX = struct.Struct("<4sHIQ")

RAGGED = SpanShape(
    fingerprint="model-a",
    policy="by hand",
    first_token=100,
    num_tokens=40,
    dtype="float32",
    layers=(
        # Every head its own count, and its own positions.
        LayerShape(lengths=(3, 0, 5), key_dim=4, value_dim=4, index_list=0),
        # The heads of this layer and the next share one list.
        LayerShape(lengths=(4, 4, 4), key_dim=4, value_dim=4, index_list=1),
        LayerShape(lengths=(4, 4), key_dim=8, value_dim=2, index_list=1),
        LayerShape(lengths=(2, 2), key_dim=4, value_dim=4, index_list=2, is_sliding=True),
    ),
    index_lengths=(8, 4, 2),
    has_scores=True,
)

# What 30 % of 4,096 tokens take in SmolLM2-135M: 56 MB.
REAL = SpanShape(
    fingerprint="model-a",
    policy="by hand",
    first_token=0,
    num_tokens=4096,
    dtype="float32",
    layers=tuple(
        LayerShape(lengths=(1228,) * 3, key_dim=64, value_dim=64, index_list=i) for i in range(30)
    ),
    index_lengths=(1228,) * 30,
    has_scores=True,
)


def filled(shape: SpanShape, *, seed: int = 0) -> CompressedKV:
    """Return a span with random contents."""
    generator = torch.Generator().manual_seed(seed)
    span = CompressedKV.empty(shape)
    for layer in span.layers:
        for tensor in (layer.keys, layer.values, layer.scores):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        layer.positions.copy_(torch.randint(0, 140, layer.positions.shape, generator=generator))
    return span


def joined(encoded: EncodedKV) -> bytearray:
    return bytearray(b"".join(encoded.parts))


def resigned(header: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a header with another body whose length and checksum are right."""
    magic, version, _, _ = PREFIX.unpack_from(header)
    body = json.loads(header[PREFIX.size :])
    change(body)
    written = json.dumps(body).encode()
    checksum = xxhash.xxh3_64_intdigest(written)
    return PREFIX.pack(magic, version, len(written), checksum) + written


def damaged(byte: int) -> Iterator[int]:
    """Return every other value that one flipped bit makes of a byte, and all zeros and all ones."""
    yield from {byte ^ (1 << bit) for bit in range(8)} | ({0x00, 0xFF} - {byte})


@pytest.fixture(scope="module")
def small() -> EncodedKV:
    return encode(filled(RAGGED), identity="object-1", part_bytes=256)


@pytest.fixture(scope="module")
def real() -> EncodedKV:
    memory = torch.frombuffer(bytearray(random.Random(0).randbytes(_size(REAL))), dtype=torch.uint8)
    return encode(CompressedKV(REAL, memory), identity="object-1")


def _size(shape: SpanShape) -> int:
    return CompressedKV.empty(shape).size_bytes


@pytest.mark.parametrize("has_scores", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_ragged_heads_and_layers(dtype: str, has_scores: bool):
    span = filled(replace(RAGGED, dtype=dtype, has_scores=has_scores))

    encoded = encode(span, identity="object-1", part_bytes=100)
    found = decode(encoded.header, joined(encoded), identity="object-1", fingerprint="model-a")

    assert found.shape == span.shape
    assert found.layers[0].lengths == (3, 0, 5)
    for one, other in zip(found.layers, span.layers, strict=True):
        assert one.keys.dtype == getattr(torch, dtype)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.positions, other.positions)
        assert (one.scores is None) == (not has_scores)
        if one.scores is not None and other.scores is not None:
            assert torch.equal(one.scores, other.scores)


def test_positions_that_heads_share_are_stored_once():
    layer = LayerShape(lengths=(64,) * 8, key_dim=2, value_dim=2, index_list=0)
    shared = replace(RAGGED, layers=(layer,) * 2, index_lengths=(64,))
    own = replace(RAGGED, layers=(layer,) * 2, index_lengths=(512,))

    assert _size(own) - _size(shared) == (512 - 64) * (4 + 4)


def test_equal_spans_have_equal_bytes():
    one, other = (encode(filled(RAGGED), identity="x") for _ in range(2))

    assert one.header == other.header
    assert joined(one) == joined(other)


def test_sizes_add_up(small: EncodedKV):
    header = read_header(small.header)

    assert header.part_sizes == tuple(len(part) for part in small.parts)
    assert header.size_bytes == _size(RAGGED)
    assert small.size_bytes == len(small.header) + header.size_bytes


def test_parts_are_views_of_the_span():
    span = filled(RAGGED)
    encoded = encode(span, identity="x", part_bytes=256)

    span.memory[300] = 17

    assert encoded.parts[1][300 - 256] == 17


def test_tensors_are_views_of_the_memory_handed_in(small: EncodedKV):
    memory = joined(small)

    found = decode(small.header, memory)
    found.layers[1].keys[0, 0] = 12345.0

    assert struct.pack("<f", 12345.0) in bytes(memory)


def test_memory_may_be_larger_than_the_span(small: EncodedKV):
    memory = joined(small) + bytearray(1000)

    found = decode(small.header, memory)

    assert found.size_bytes == _size(RAGGED)
    assert torch.equal(found.memory, filled(RAGGED).memory)


def test_memory_that_is_too_short_is_refused(small: EncodedKV):
    memory = joined(small)

    with pytest.raises(CorruptError, match="memory has"):
        decode(small.header, memory[:-1])
    with pytest.raises(InvalidInputError, match="memory has"):
        read_header(small.header).open(memory[:-1])


def test_every_flipped_bit_of_the_header_is_refused(small: EncodedKV):
    header = bytearray(small.header)

    for index, byte in enumerate(small.header):
        for wrong in damaged(byte):
            header[index] = wrong
            with pytest.raises((CorruptError, FormatError)):
                read_header(header)
        header[index] = byte


def test_every_flipped_bit_of_the_parts_is_refused(small: EncodedKV):
    memory = joined(small)

    for index, byte in enumerate(bytes(memory)):
        for wrong in damaged(byte):
            memory[index] = wrong
            with pytest.raises(CorruptError, match="does not match its checksum"):
                decode(small.header, memory)
        memory[index] = byte


def test_every_truncation_of_header_and_parts_is_refused(small: EncodedKV):
    memory = joined(small)
    header = read_header(small.header)

    for length in range(len(small.header)):
        with pytest.raises(CorruptError):
            read_header(small.header[:length])
    for length in range(len(memory)):
        with pytest.raises(CorruptError):
            decode(small.header, memory[:length])
    for index, part in enumerate(small.parts):
        for length in range(len(part)):
            with pytest.raises(CorruptError, match=f"part {index} of object-1 has {length} bytes"):
                header.check_part(index, part[:length])


def test_bytes_behind_the_header_or_a_part_are_refused(small: EncodedKV):
    with pytest.raises(CorruptError):
        read_header(small.header + b"\x00")
    with pytest.raises(CorruptError):
        read_header(small.header).check_part(0, bytes(small.parts[0]) + b"\x00")


def test_sampled_damage_of_a_real_object_is_refused(real: EncodedKV):
    rng = random.Random(1)
    header = read_header(real.header)
    parts = [bytearray(part) for part in real.parts]
    written = bytearray(real.header)

    for _ in range(400):
        index = rng.randrange(len(parts))
        offset = rng.randrange(len(parts[index]))
        parts[index][offset] ^= 1 << rng.randrange(8)
        with pytest.raises(CorruptError):
            header.check_part(index, parts[index])
        parts[index][offset] = real.parts[index][offset]
        with pytest.raises(CorruptError):
            header.check_part(index, memoryview(parts[index])[:offset])
    for _ in range(400):
        offset = rng.randrange(len(written))
        written[offset] ^= 1 << rng.randrange(8)
        with pytest.raises((CorruptError, FormatError)):
            read_header(written)
        written[offset] = real.header[offset]
        with pytest.raises(CorruptError):
            read_header(written[:offset])


def test_a_real_object_has_parts_of_one_mebibyte(real: EncodedKV):
    assert {len(part) for part in real.parts[:-1]} == {1 << 20}
    assert len(real.parts[-1]) <= 1 << 20


def test_swapped_parts_are_refused(small: EncodedKV):
    first, second, *others = small.parts
    assert len(first) == len(second)

    with pytest.raises(CorruptError, match="part 0"):
        decode(small.header, bytearray(b"".join([second, first, *others])))


def test_parts_of_another_object_are_refused(small: EncodedKV):
    other = encode(filled(RAGGED, seed=1), identity="object-1", part_bytes=256)

    with pytest.raises(CorruptError):
        decode(small.header, joined(other))


@pytest.mark.parametrize("magic", [b"CKV\x02", b"\x93NUM", b"PK\x03\x04", bytes(4)])
def test_foreign_magic_is_refused(small: EncodedKV, magic: bytes):
    with pytest.raises(FormatError, match="not a header of a KV object"):
        read_header(magic + small.header[4:])


def test_other_format_version_is_refused_by_its_number(small: EncodedKV):
    for version in (0, 5, 255, 65535):
        header = small.header[:4] + struct.pack("<H", version) + small.header[6:]
        with pytest.raises(FormatError, match=f"version {version}; this library reads 1, 2, 3, 4"):
            read_header(header)


def test_header_of_another_object_is_refused(small: EncodedKV):
    with pytest.raises(MismatchError, match="asked for object object-2, found object-1"):
        decode(small.header, joined(small), identity="object-2")


def test_object_of_another_model_is_refused(small: EncodedKV):
    with pytest.raises(MismatchError, match="made by model model-a, not by model-b"):
        decode(small.header, joined(small), fingerprint="model-b")


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.pop(name)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no identity": _without("identity"),
    "no shape": _without("shape"),
    "no checksums": _without("part_checksums"),
    "unknown field of the shape": lambda body: body["shape"].update(rope=1),
    "no such dtype": lambda body: body["shape"].update(dtype="float99"),
    "something of torch that is no dtype": lambda body: body["shape"].update(dtype="nn"),
    "layers that are no list": lambda body: body["shape"].update(layers=3),
    "another length": lambda body: body["shape"]["layers"][0].update(lengths=[3, 0, 50]),
    "lengths below zero": lambda body: body["shape"]["layers"][0].update(lengths=[9, 1, -2]),
    "no heads": lambda body: body["shape"]["layers"][0].update(lengths=[]),
    "lengths that are no integers": lambda body: body["shape"]["layers"][0].update(
        lengths=[3.0, 0.0, 5.0]
    ),
    "width below zero": lambda body: body["shape"]["layers"][0].update(key_dim=-8, value_dim=16),
    "merged layers of an older version": lambda body: body["shape"].update(merge_layers=False),
    "retained rows of an older version": lambda body: body.update(retained=[]),
    "checksum that is no number": lambda body: body.update(part_checksums=["xyz"]),
    "fewer checksums than parts": lambda body: body["part_checksums"].pop(),
    "index list that is not there": lambda body: body["shape"]["layers"][1].update(index_list=7),
    "index list of another layer": lambda body: body["shape"]["layers"][1].update(index_list=0),
    "index list below zero": lambda body: body["shape"]["layers"][3].update(index_list=-1),
    "unknown precision": lambda body: body["shape"].update(precision="int2"),
    "precision that takes fewer bytes": lambda body: body["shape"].update(precision="int4"),
    "identity that is no text": lambda body: body.update(identity=7),
    "policy that is no text": lambda body: body["shape"].update(policy=None),
    "numbers that are no floats": lambda body: body["shape"].update(dtype="int32"),
    "dtype that is no text": lambda body: body["shape"].update(dtype=None),
    "first token that is no integer": lambda body: body["shape"].update(first_token=0.0),
    "first token below zero": lambda body: body["shape"].update(first_token=-1),
    "first token past all counting": lambda body: body["shape"].update(first_token=2**64),
    "tokens that are no integer": lambda body: body["shape"].update(num_tokens=None),
    "scores that are neither there nor not": lambda body: body["shape"].update(has_scores=1),
    "sliding that is a list": lambda body: body["shape"]["layers"][0].update(is_sliding=[]),
    "sizes of parts that are no list": lambda body: body.update(part_sizes="x"),
    "size of a part that is no integer": lambda body: body.update(part_sizes=[None]),
    "another size of parts": lambda body: body["part_sizes"].append(1),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_header_that_was_written_wrong_is_refused(
    small: EncodedKV, change: Callable[[dict[str, Any]], None]
):
    with pytest.raises(FormatError):
        read_header(resigned(small.header, change))


def test_object_of_the_first_version_is_read(small: EncodedKV):
    header = resigned(small.header, lambda body: body["shape"].pop("precision"))
    header = header[:4] + struct.pack("<H", 1) + header[6:]

    found = decode(header, joined(small), identity="object-1")

    assert found.shape == RAGGED
    assert bytes(found.memory.numpy()) == bytes(joined(small))


@pytest.mark.parametrize("version", [2, 3])
def test_int4_of_an_earlier_version_is_refused(version: int):
    span = filled(replace(RAGGED, precision="int4"))
    encoded = encode(span, identity="object-1")
    header = encoded.header[:4] + struct.pack("<H", version) + encoded.header[6:]

    with pytest.raises(FormatError, match=f"int4 as format version {version} .* compress the text"):
        read_header(header)


@pytest.mark.parametrize("version", [3, 4])
def test_version_of_other_fields_is_refused(small: EncodedKV, version: int):
    header = small.header[:4] + struct.pack("<H", version) + small.header[6:]

    with pytest.raises(FormatError, match=f"what version {version} does not"):
        read_header(header)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"3", b"\xff\xfe"])
def test_header_whose_body_is_something_else_is_refused(small: EncodedKV, body: bytes):
    prefix = PREFIX.pack(small.header[:4], 1, len(body), xxhash.xxh3_64_intdigest(body))

    with pytest.raises(FormatError):
        read_header(prefix + body)


def test_header_that_was_resigned_unchanged_is_read(small: EncodedKV):
    header = read_header(resigned(small.header, copy.copy))

    assert header == read_header(small.header)


def test_memory_of_another_size_makes_no_span():
    with pytest.raises(InvalidInputError, match="this span takes uint8"):
        CompressedKV(RAGGED, torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(InvalidInputError, match="this span takes uint8"):
        CompressedKV(RAGGED, torch.zeros(_size(RAGGED)))


def test_heads_of_different_lengths_form_no_rectangle():
    span = filled(RAGGED)

    assert not span.layers[0].is_uniform
    with pytest.raises(InvalidInputError, match="no rectangle"):
        span.layers[0].by_head()
    keys, values = span.layers[2].by_head()
    assert keys.shape == (2, 4, 8)
    assert values.shape == (2, 4, 2)


def test_kept_tokens_are_averaged_over_heads_of_full_attention():
    assert filled(RAGGED).num_kept_tokens == round((3 + 0 + 5 + 4 * 5) / 8)


def test_span_on_its_own_device_is_itself():
    span = filled(RAGGED)

    assert span.to("cpu") is span


def test_codec_errors_are_library_errors():
    for error in (CorruptError, FormatError, MismatchError):
        assert issubclass(error, ChunkKVError)
