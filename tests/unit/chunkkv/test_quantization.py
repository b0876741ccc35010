"""Keys and values in fewer bits: bounded errors, exact sizes, nothing silently wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkkv import (
    CompressedKV,
    CorruptError,
    EncodedKV,
    InvalidInputError,
    LayerShape,
    SpanShape,
    decode,
    encode,
    read_header,
    size_bytes,
)
from chunkkv.policy import Precision
from chunkkv.quantization import quantize, stored_size_bytes

QUANTIZED: tuple[Precision, ...] = ("fp8", "int8", "int4")
BFLOAT16_EPS = 2.0**-7  # between neighbours, relative

SHAPE = SpanShape(
    fingerprint="model-a",
    policy="by hand",
    first_token=0,
    num_tokens=100,
    dtype="float32",
    layers=(
        LayerShape(lengths=(37, 0, 5), key_dim=6, value_dim=40, index_list=0),
        LayerShape(lengths=(64, 64), key_dim=5, value_dim=3, index_list=1),
        LayerShape(lengths=(7, 7), key_dim=4, value_dim=4, index_list=2, is_sliding=True),
    ),
    index_lengths=(42, 64, 7),
    has_scores=True,
)


def filled(shape: SpanShape, *, seed: int = 0, scale: float = 1.0) -> CompressedKV:
    """Return a span with random contents, whose channels are unlike, as those of keys are."""
    generator = torch.Generator().manual_seed(seed)
    span = CompressedKV.empty(shape)
    for layer in span.layers:
        for tensor in (layer.keys, layer.values):
            channels = torch.randn(tensor.shape[1], generator=generator).exp()
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_((noise + 3) * channels * scale)
        layer.positions.copy_(torch.arange(len(layer.positions)))
        if layer.scores is not None:
            layer.scores.copy_(torch.rand(layer.scores.shape, generator=generator))
    return span


def stored(span: CompressedKV, *, part_bytes: int = 256) -> tuple[EncodedKV, bytearray]:
    encoded = encode(span, identity="object-1", part_bytes=part_bytes)
    return encoded, bytearray(b"".join(encoded.parts))


def half_step(group: torch.Tensor, bits: int) -> float:
    """Return the largest error of a group whose line is rounded outwards to bfloat16."""
    low, high = float(group.min()), float(group.max())
    width = high - low + BFLOAT16_EPS * abs(low)
    return width / (2**bits - 1) * (1 + BFLOAT16_EPS) / 2


def num_groups(length: int, bits: int) -> int:
    """Return how many groups that many neighbours make."""
    return 1 if bits == 8 else max(1, math.floor(length / 64 + 0.5))


def check_groups(
    found: torch.Tensor, original: torch.Tensor, counts: tuple[int, int], bits: int
) -> None:
    """Check a tensor group by group; ``counts`` are how many its rows and columns are cut in."""
    rows_of = zip(found.tensor_split(counts[0]), original.tensor_split(counts[0]), strict=True)
    for rows, exact_rows in rows_of:
        for group, exact in zip(
            rows.tensor_split(counts[1], dim=1),
            exact_rows.tensor_split(counts[1], dim=1),
            strict=True,
        ):
            bound = half_step(exact, bits) + rounding(original)
            assert float((group - exact).abs().max()) <= bound


def rounding(original: torch.Tensor) -> float:
    """Return what the dtype itself rounds away, and the arithmetic in 32 bits."""
    return float(original.abs().max()) * 2 * (torch.finfo(original.dtype).eps + 2.0**-23)


def check_span(found: CompressedKV, span: CompressedKV, precision: Precision) -> None:
    """Check that no element is further from the original than its scale says."""
    for one, other in zip(found.layers, span.layers, strict=True):
        assert torch.equal(one.positions, other.positions)
        assert one.scores is None or torch.equal(one.scores, other.scores)
        if precision == "fp8":
            for near, exact in ((one.keys, other.keys), (one.values, other.values)):
                # Three bits of mantissa; below the least normal number, fixed steps.
                scale = exact.abs().amax(dim=1, keepdim=True).float() / 448 * (1 + BFLOAT16_EPS)
                bound = torch.maximum(exact.abs().float() * 2.0**-4, scale * 2.0**-10)
                error = (near.float() - exact.float()).abs()
                assert bool((error <= bound + rounding(exact)).all())
            continue
        bits = 8 if precision == "int8" else 4
        for near, exact in zip(
            one.keys.split(list(other.lengths)), other.keys.split(list(other.lengths)), strict=True
        ):
            if len(exact):
                check_groups(near, exact, (num_groups(len(exact), bits), exact.shape[1]), bits)
        num_rows, dim = other.values.shape
        if num_rows:
            check_groups(one.values, other.values, (num_rows, num_groups(dim, bits)), bits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_errors_are_bounded_by_the_scale(precision: Precision, dtype: str):
    span = filled(replace(SHAPE, dtype=dtype, precision=precision))
    encoded, memory = stored(span)

    found = decode(encoded.header, memory)

    assert found.shape == span.shape
    assert found.layers[0].keys.dtype == getattr(torch, dtype)
    check_span(found, span, precision)


@given(
    precision=st.sampled_from(QUANTIZED),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3).filter(any),
    dims=st.tuples(st.integers(1, 140), st.integers(1, 70)),
    has_scores=st.booleans(),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 99),
)
def test_any_shape_comes_back(
    precision: Precision,
    dtype: str,
    lengths: list[int],
    dims: tuple[int, int],
    has_scores: bool,
    exponent: int,
    seed: int,
):
    layer = LayerShape(tuple(lengths), *dims, index_list=0)
    shape = replace(
        SHAPE,
        layers=(layer, layer),
        index_lengths=(sum(lengths),),
        has_scores=has_scores,
        precision=precision,
        dtype=dtype,
    )
    span = filled(shape, seed=seed, scale=2.0**exponent)
    encoded, memory = stored(span)

    found = decode(encoded.header, memory)

    check_span(found, span, precision)
    assert sum(map(len, encoded.parts)) == stored_size_bytes(shape)


def test_sizes_are_exact():
    def padded(*sizes: int) -> int:
        return sum(math.ceil(size / 64) * 64 for size in sizes)

    index = padded(*chain.from_iterable((4 * n, 4 * n) for n in SHAPE.index_lengths))
    fp8 = padded(42 * 6, 42 * 2, 42 * 40, 42 * 2, 128 * 5, 256, 128 * 3, 256, 56, 28, 56, 28)
    # Two bfloat16 for each channel of each head that keeps anything; two for each token's values.
    int8 = padded(42 * 6, 2 * 6 * 4, 42 * 40, 42 * 4, 128 * 5, 2 * 5 * 4, 128 * 3, 128 * 4)
    int8 += padded(56, 2 * 4 * 4, 56, 14 * 4)
    # Groups of about 64: 37 + 0 + 5 tokens make two, 64 + 64 two; 40 channels make one.
    int4 = padded(42 * 3, 2 * 6 * 4, 42 * 20, 42 * 4, 320, 2 * 5 * 4, 192, 128 * 4)
    int4 += padded(28, 2 * 4 * 4, 28, 14 * 4)

    for precision, size in (("fp8", fp8), ("int8", int8), ("int4", int4)):
        shape = replace(SHAPE, precision=precision)
        assert stored_size_bytes(shape) == len(quantize(filled(shape))) == index + size
    assert stored_size_bytes(SHAPE) == size_bytes(SHAPE)
    assert stored_size_bytes(replace(SHAPE, layers=(), precision="int4")) == index


@pytest.mark.parametrize("precision", QUANTIZED)
def test_groups_of_one_value_are_exact(precision: Precision):
    span = filled(replace(SHAPE, precision=precision))
    for layer in span.layers:
        layer.keys.fill_(-2.5)
        layer.values.zero_()
    encoded, memory = stored(span)

    found = decode(encoded.header, memory)

    for layer in found.layers:
        # A scale is a little more than the value over 448; the rest is exact.
        assert bool(((layer.keys + 2.5).abs() <= 2.5 * 2.0**-4 * (precision == "fp8")).all())
        assert bool((layer.values == 0).all())


@pytest.mark.parametrize("precision", QUANTIZED)
def test_quantizing_again_changes_no_more_than_one_step(precision: Precision):
    encoded, memory = stored(filled(replace(SHAPE, precision=precision)))
    once = decode(encoded.header, memory)
    encoded, memory = stored(once)

    twice = decode(encoded.header, memory)

    check_span(twice, once, precision)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("precision", QUANTIZED)
def test_what_is_not_finite_is_refused(precision: Precision, which: str, bad: float):
    span = filled(replace(SHAPE, precision=precision))
    getattr(span.layers[0], which)[3, 2] = bad

    with pytest.raises(InvalidInputError, match="not finite"):
        encode(span, identity="object-1")


def test_native_span_is_not_copied():
    span = filled(SHAPE)

    assert quantize(span) is span.memory


@pytest.mark.parametrize("precision", QUANTIZED)
def test_every_damaged_byte_is_refused(precision: Precision):
    encoded, memory = stored(filled(replace(SHAPE, precision=precision)))

    for index in range(0, len(memory), 37):
        damaged = bytearray(memory)
        damaged[index] ^= 0x10
        with pytest.raises(CorruptError):
            decode(encoded.header, damaged)


def test_memory_that_is_too_short_is_refused():
    encoded, memory = stored(filled(replace(SHAPE, precision="int8")))
    header = read_header(encoded.header)

    assert header.kv_bytes == size_bytes(SHAPE) > header.size_bytes
    with pytest.raises(InvalidInputError, match=f"takes {header.size_bytes}"):
        header.open(memory[:-1])
    with pytest.raises(InvalidInputError, match=f"takes {header.kv_bytes}"):
        header.open(memory, out=bytearray(header.kv_bytes - 1))


def test_span_is_opened_in_memory_of_the_callers():
    encoded, memory = stored(filled(replace(SHAPE, precision="int4")))
    header = read_header(encoded.header)
    out = bytearray(header.kv_bytes + 10)

    found = header.open(memory, out=memoryview(out)[:-10])

    assert bytes(found.memory.numpy()) == bytes(out[:-10])
    assert out[-10:] == bytes(10)
