"""The gateway reads and renames the headers that the library writes."""

from __future__ import annotations

import pytest
import torch

import chunkkv
from services.gateway.segment_header import read_segment_header, renamed_segment_header
from services.runtime.errors import CorruptError


@pytest.fixture
def encoded() -> chunkkv.EncodedKV:
    """A span of 20 tokens from position 40 on, in three parts."""
    shape = chunkkv.SpanShape(
        fingerprint="model-a",
        policy="half",
        first_token=40,
        num_tokens=20,
        dtype="float32",
        layers=(chunkkv.LayerShape((10, 10), 8, 8, index_list=0),) * 2,
        index_lengths=(10,),
        has_scores=False,
    )
    span = chunkkv.CompressedKV.empty(shape)
    generator = torch.Generator().manual_seed(0)
    span.memory.copy_(torch.randint(0, 256, span.memory.shape, generator=generator))
    return chunkkv.encode(span, identity="old", part_bytes=len(span.memory) // 2 - 8)


def test_a_header_of_the_library_is_read(encoded: chunkkv.EncodedKV):
    header = read_segment_header(encoded.header)

    assert (header.identity, header.fingerprint) == ("old", "model-a")
    assert (header.first_token, header.num_tokens) == (40, 20)
    assert header.part_sizes == tuple(len(part) for part in encoded.parts)
    for index, part in enumerate(encoded.parts):
        header.check_part(index, bytes(part))
        with pytest.raises(CorruptError, match=f"part {index} of segment old"):
            header.check_part(index, bytes(part)[:-1])
        with pytest.raises(CorruptError, match="checksum"):
            header.check_part(index, bytes(len(part)))


def test_a_renamed_header_differs_in_its_name_alone(encoded: chunkkv.EncodedKV):
    before = chunkkv.read_header(encoded.header)

    after = chunkkv.read_header(renamed_segment_header(encoded.header, "new"))

    assert after.identity == "new"
    assert after.shape == before.shape
    assert (after.part_sizes, after.part_checksums) == (before.part_sizes, before.part_checksums)
    assert renamed_segment_header(encoded.header, "old") == encoded.header


def test_every_flipped_byte_and_every_truncation_is_corrupt(encoded: chunkkv.EncodedKV):
    data = encoded.header
    # Of the prefix, the version is another reader's to judge.
    damaged = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    del damaged[4:6]

    for wrong in (*damaged, *(data[:length] for length in range(len(data))), data + b" "):
        with pytest.raises(CorruptError):
            read_segment_header(wrong)
