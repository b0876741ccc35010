"""Two layers stored as one: the maths, against a slow reference, and everything around it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, FULL_ATTENTION_FAMILIES, prompts, tiny_model

from chunkkv import (
    CompressedKV,
    CompressionPolicy,
    CorruptError,
    EncodedKV,
    FormatError,
    InvalidInputError,
    LayerShape,
    SpanShape,
    decode,
    encode,
    generation_inputs,
    prefill,
    read_header,
    recompress,
    size_bytes,
)
from chunkkv.merging import INTERPOLATION, RETENTION, merge, restore
from chunkkv.policy import Precision
from chunkkv.quantization import quantize, retained_counts, stored_size_bytes

PRECISIONS: tuple[Precision, ...] = ("native", "fp8", "int8", "int4")
PREFIX = struct.Struct("<4sHIQ")

# Six layers: from the fourth on, two share a list, and the last has one of its own.
SHAPE = SpanShape(
    fingerprint="model-a",
    policy="by hand",
    first_token=10,
    num_tokens=100,
    dtype="float32",
    layers=(
        *(LayerShape((40, 40), 16, 8, index_list=0) for _ in range(3)),
        *(LayerShape((40, 40), 16, 8, index_list=1) for _ in range(2)),
        LayerShape((37, 37), 16, 8, index_list=2),
    ),
    index_lengths=(40, 40, 37),
    has_scores=True,
    merge_layers=True,
)
PAIR = (3, 4)


def filled(shape: SpanShape, *, seed: int = 0, apart: float = 0.3) -> CompressedKV:
    """Return a span whose layers are each the one before, turned a little and of other norms."""
    generator = torch.Generator().manual_seed(seed)
    span = CompressedKV.empty(shape)
    for name in ("keys", "values"):
        before: torch.Tensor | None = None
        for layer in span.layers:
            tensor = getattr(layer, name)
            noise = torch.randn(tensor.shape, generator=generator)
            if before is None or before.shape != tensor.shape:
                before = torch.randn(tensor.shape, generator=generator)
            before = (before + apart * noise) * (
                0.5 + torch.rand(len(tensor), 1, generator=generator)
            )
            tensor.copy_(before)
    for layer in span.layers:
        layer.positions.copy_(10 + torch.arange(len(layer.positions)))
        if layer.scores is not None:
            layer.scores.copy_(torch.rand(layer.scores.shape, generator=generator))
    return span


def stored(span: CompressedKV, *, part_bytes: int = 1024) -> tuple[EncodedKV, bytearray]:
    encoded = encode(span, identity="object-1", part_bytes=part_bytes)
    return encoded, bytearray(b"".join(encoded.parts))


def reopened(span: CompressedKV) -> CompressedKV:
    encoded, memory = stored(span)
    return decode(encoded.header, memory)


def norm(row: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in row))


def angle(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the angle between two rows; 0 if one of them is 0."""
    product = norm(one) * norm(other)
    if product == 0:
        return 0.0
    cosine = sum(a * b for a, b in zip(one, other, strict=True)) / product
    return math.acos(max(-1.0, min(1.0, cosine)))


def slow_merge(
    first: list[list[float]], second: list[list[float]], lengths: Sequence[int]
) -> tuple[list[list[float]], list[int]]:
    """Return the common directions and the retained rows, token by token, as documented."""
    directions, retained, start = [], [], 0
    for length in lengths:
        rows = range(start, start + length)
        angles = {row: angle(first[row], second[row]) for row in rows}
        start += length
        for row in rows:
            low, high = min(angles.values()), max(angles.values())
            if angles[row] > max(high - RETENTION * (high - low), 1e-5):
                retained.append(row)
            directions.append(slow_direction(first[row], second[row], angles[row]))
    return directions, retained


def slow_direction(one: list[float], other: list[float], w: float) -> list[float]:
    if norm(one) == 0 and norm(other) == 0:
        return one
    if norm(one) == 0 or norm(other) == 0:
        one = other = one if norm(other) == 0 else other
    u, v = [x / norm(one) for x in one], [x / norm(other) for x in other]
    if w < 1e-6:
        return v
    of_u = math.sin((1 - INTERPOLATION) * w) / math.sin(w)
    of_v = math.sin(INTERPOLATION * w) / math.sin(w)
    return [of_u * a + of_v * b for a, b in zip(u, v, strict=True)]


@pytest.mark.parametrize("lengths", [(30,), (17, 40), (0, 9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("apart", [0.01, 0.3, 3.0])
def test_merging_equals_the_slow_reference(lengths: tuple[int, ...], apart: float):
    generator = torch.Generator().manual_seed(len(lengths))
    first = torch.randn(sum(lengths), 12, generator=generator)
    second = 2 * first + apart * torch.randn(first.shape, generator=generator)
    first[0] = 0

    merged = merge(first, second, lengths)

    directions, retained = slow_merge(first.double().tolist(), second.double().tolist(), lengths)
    torch.testing.assert_close(merged.directions, torch.tensor(directions), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.norms, torch.stack([first.norm(dim=1), second.norm(dim=1)]))
    assert merged.retained.tolist() == retained


def test_the_deeper_layer_weighs_more():
    merged = merge(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]]), (1,))

    torch.testing.assert_close(
        merged.directions, torch.tensor([[math.cos(0.3 * math.pi), math.sin(0.3 * math.pi)]])
    )
    assert merged.norms.flatten().tolist() == [3.0, 5.0]


def test_parallel_rows_and_zeros_come_back():
    first = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    second = first * torch.linspace(0.001, 700, 50)[:, None]
    first[3], second[3] = 0, 0
    first[4], second[5] = 0, 0

    merged = merge(first, second, (30, 20))
    one, other = restore(merged.directions, merged.norms)

    assert merged.retained.numel() == 0
    torch.testing.assert_close(one, first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other, second, rtol=1e-5, atol=1e-6)
    assert bool((one[3:5] == 0).all())
    assert bool((other[[3, 5]] == 0).all())


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_rows_whose_squares_leave_32_bits_are_merged(scale: float):
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))

    merged = merge(rows * scale, rows * scale, (20,))
    one, _ = restore(merged.directions, merged.norms)

    torch.testing.assert_close(one / scale, rows)


def test_opposite_rows_are_given_a_direction():
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))

    merged = merge(rows, -rows, (20,))

    torch.testing.assert_close(merged.directions, -rows / rows.norm(dim=1, keepdim=True))


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any),
    dim=st.integers(1, 9),
    seed=st.integers(0, 999),
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
)
def test_any_row_keeps_its_norm_and_part_of_its_angle(
    lengths: list[int], dim: int, seed: int, exponents: tuple[int, int]
):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, sum(lengths), dim, generator=generator)
    first, second = first * 2.0 ** exponents[0], second * 2.0 ** exponents[1]

    merged = merge(first, second, lengths)
    found = restore(merged.directions, merged.norms)

    assert len(merged.retained) <= sum(lengths)
    for near, exact, part in zip(
        found, (first, second), (INTERPOLATION, 1 - INTERPOLATION), strict=True
    ):
        torch.testing.assert_close(near.norm(dim=1), exact.norm(dim=1))
        for row, (a, b) in enumerate(zip(near.tolist(), exact.tolist(), strict=True)):
            between = angle(first[row].tolist(), second[row].tolist())
            if between < 3.1:
                assert angle(a, b) == pytest.approx(part * between, abs=2e-3)


def shape_of(*, keep_ratio: float = 0.5, **choices: Any) -> SpanShape:
    """Return the shape of what a policy keeps of 60 tokens in a model of 7 layers."""
    model = tiny_model(num_hidden_layers=7)
    policy = CompressionPolicy(
        keep_ratio=keep_ratio, chunk_size=5, window_size=8, merge_layers=True, **choices
    )
    return prefill(model, prompts(60)[0], policy)[0].shape


@pytest.mark.parametrize(
    ("choices", "pairs"),
    [
        ({"scope": "global"}, ((4, 5),)),
        ({"scope": "group"}, ((4, 5),)),
        ({"scope": "group", "reuse_interval": 3}, ((4, 5),)),
        ({"scope": "group", "reuse_interval": 5}, ((5, 6),)),
        ({"scope": "layer"}, ()),
        ({"scope": "head"}, ()),
        ({"scope": "layer", "keep_ratio": 1.0}, ((4, 5),)),
        ({"scope": "head", "keep_ratio": 1.0}, ((4, 5),)),
    ],
    ids=str,
)
def test_neighbours_of_the_deeper_half_that_keep_the_same_tokens_are_merged(
    choices: dict[str, Any], pairs: tuple[tuple[int, int], ...]
):
    shape = shape_of(**choices)

    assert shape.merge_layers
    assert shape.merged_pairs == pairs
    assert shape.is_stored_native == (not pairs)
    assert replace(shape, merge_layers=False).merged_pairs == ()


def test_layers_of_other_widths_or_lengths_or_with_windows_are_not_merged():
    second = SHAPE.layers[PAIR[1]]

    def pairs(other: LayerShape) -> int:
        return len(
            replace(SHAPE, layers=(*SHAPE.layers[:4], other, *SHAPE.layers[5:])).merged_pairs
        )

    assert pairs(second) == 1
    assert pairs(replace(second, key_dim=8)) == 0
    assert pairs(replace(second, value_dim=16)) == 0
    assert pairs(replace(second, lengths=(30, 50))) == 0
    assert pairs(replace(second, is_sliding=True)) == 0
    assert pairs(replace(second, index_list=0)) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_spans_lose_the_angle_of_merged_rows_alone(dtype: str):
    span = filled(replace(SHAPE, dtype=dtype))
    eps = torch.finfo(getattr(torch, dtype)).eps

    found = reopened(span)

    assert found.shape == span.shape
    assert found.shape.merged_pairs == (PAIR,)
    first, second = (span.layers[layer] for layer in PAIR)
    for name in ("keys", "values"):
        one, other = getattr(first, name).float(), getattr(second, name).float()
        directions, retained = slow_merge(one.tolist(), other.tolist(), first.lengths)
        for layer, exact in zip(PAIR, (one, other), strict=True):
            near = getattr(found.layers[layer], name).float()
            expected = torch.tensor(directions) * exact.norm(dim=1, keepdim=True)
            expected[retained] = exact[retained]
            assert torch.equal(near[retained], exact[retained])
            torch.testing.assert_close(near, expected, rtol=4 * eps, atol=8 * eps)
    for index in set(range(6)) - set(PAIR):
        assert torch.equal(found.layers[index].keys, span.layers[index].keys)
        assert torch.equal(found.layers[index].values, span.layers[index].values)
    for near, exact in zip(found.layers, span.layers, strict=True):
        assert torch.equal(near.positions, exact.positions)
        assert near.scores is not None
        assert exact.scores is not None
        assert torch.equal(near.scores, exact.scores)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_that_are_parallel_come_back_as_without_merging(precision: Precision):
    span = filled(replace(SHAPE, precision=precision))
    first, second = (span.layers[layer] for layer in PAIR)
    second.keys.copy_(3 * first.keys)
    second.values.copy_(first.values)
    bound = {"native": 1e-6, "fp8": 0.05, "int8": 0.01, "int4": 0.15}[precision]

    found = reopened(span)

    assert retained_counts(span) == (0, 0)
    for layer in PAIR:
        for name in ("keys", "values"):
            near, exact = getattr(found.layers[layer], name), getattr(span.layers[layer], name)
            error = (near - exact).norm(dim=1) / exact.norm(dim=1)
            assert float(error.max()) < bound


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_adds_little_to_what_merging_loses(precision: Precision):
    span = filled(SHAPE)
    bound = {"native": 1e-6, "fp8": 0.06, "int8": 0.04, "int4": 0.5}[precision]

    merged = reopened(span)
    found = reopened(CompressedKV(replace(SHAPE, precision=precision), span.memory))

    for near, exact in zip(found.layers, merged.layers, strict=True):
        for name in ("keys", "values"):
            error = getattr(near, name) - getattr(exact, name)
            assert float((error.norm(dim=1) / getattr(exact, name).norm(dim=1)).max()) < bound


@given(
    precision=st.sampled_from(PRECISIONS),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    num_layers=st.integers(1, 6),
    has_scores=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_comes_back(
    precision: Precision,
    dtype: str,
    lengths: list[int],
    dims: tuple[int, int],
    num_layers: int,
    has_scores: bool,
    seed: int,
):
    shape = replace(
        SHAPE,
        layers=(LayerShape(tuple(lengths), *dims, index_list=0),) * num_layers,
        index_lengths=(sum(lengths),),
        has_scores=has_scores,
        precision=precision,
        dtype=dtype,
    )
    span = filled(shape, seed=seed)
    encoded, memory = stored(span)

    found = decode(encoded.header, memory)

    assert len(shape.merged_pairs) == num_layers // 2 // 2 or num_layers == 3
    assert found.shape == shape
    counts = retained_counts(span)
    assert read_header(encoded.header).retained == counts
    assert len(memory) == stored_size_bytes(shape, counts) == len(quantize(span, counts))
    for near, exact in zip(found.layers, span.layers, strict=True):
        assert torch.equal(near.positions, exact.positions)
        assert bool(torch.isfinite(near.keys).all())
        assert bool(torch.isfinite(near.values).all())


def test_sizes_are_exact():
    def padded(*sizes: int) -> int:
        return sum(math.ceil(size / 64) * 64 for size in sizes)

    index = padded(*(4 * n for n in SHAPE.index_lengths for _ in range(2)))
    few, many = 3, 5  # retained rows of 80: of keys, of values

    native = padded(*[80 * 16 * 4, 80 * 8 * 4] * 3)
    native += padded(80 * 16 * 4, 2 * 80 * 4, 4 * few, 2 * few * 16 * 4)
    native += padded(80 * 8 * 4, 2 * 80 * 4, 4 * many, 2 * many * 8 * 4)
    native += padded(74 * 16 * 4, 74 * 8 * 4)
    int4 = padded(*[80 * 8, 2 * 16 * 4, 80 * 4, 80 * 4] * 3)
    int4 += padded(80 * 8, 2 * 16 * 4, 2 * 80 * 2, 4 * few, 2 * few * 8, 2 * few * 4)
    int4 += padded(80 * 4, 80 * 4, 2 * 80 * 2, 4 * many, 2 * many * 4, 2 * many * 4)
    int4 += padded(74 * 8, 2 * 16 * 4, 74 * 4, 74 * 4)

    assert stored_size_bytes(SHAPE, (few, many)) == index + native
    assert stored_size_bytes(replace(SHAPE, precision="int4"), (few, many)) == index + int4


def test_a_merged_span_takes_three_quarters():
    layer = LayerShape((200,) * 3, 64, 64, index_list=0)
    shape = replace(SHAPE, num_tokens=200, layers=(layer,) * 16, index_lengths=(200,))
    span = filled(shape)

    plain_span = CompressedKV(replace(shape, merge_layers=False), span.memory)
    merged, memory = stored(span, part_bytes=1 << 20)
    plain, plain_memory = stored(plain_span, part_bytes=1 << 20)

    assert len(shape.merged_pairs) == 4
    # Norms are 1/32 of a row of 64; of some rows, both are stored.
    assert 0.75 < len(memory) / len(plain_memory) < 0.78
    assert len(merged.header) - len(plain.header) < 50 + 2 * 5 * len(shape.merged_pairs)


@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_every_family_are_stored_and_opened(
    family: str, precision: Precision, keep_ratio: float
):
    model = tiny_model(family)
    ids, mask = prompts(60, 37)
    policy = CompressionPolicy(
        keep_ratio=keep_ratio,
        chunk_size=5,
        window_size=8,
        scope="global",
        precision=precision,
        merge_layers=True,
    )

    spans = prefill(model, ids, policy, attention_mask=mask)

    assert len(spans) == 2
    for span in spans:
        found = reopened(span)
        assert found.shape == span.shape
        assert found.shape.merge_layers
        is_full = family in FULL_ATTENTION_FAMILIES
        assert found.shape.merged_pairs == (((2, 3),) if is_full else ())
        for index, (near, exact) in enumerate(zip(found.layers, span.layers, strict=True)):
            assert torch.equal(near.positions, exact.positions)
            if precision == "native" and not (is_full and index in (2, 3)):
                assert torch.equal(near.keys, exact.keys)
            elif precision == "native":
                kept = near.keys.norm(dim=1), near.values.norm(dim=1)
                torch.testing.assert_close(kept[0], exact.keys.norm(dim=1))
                torch.testing.assert_close(kept[1], exact.values.norm(dim=1))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_model_goes_on_from_a_merged_span(num_kv_heads: int):
    model = tiny_model(num_key_value_heads=num_kv_heads)
    ids, _ = prompts(60)
    policy = CompressionPolicy(
        keep_ratio=0.5, chunk_size=5, window_size=8, scope="global", merge_layers=True
    )
    span = prefill(model, ids[:, :-1], policy)[0]

    found = reopened(span)

    assert found.layers[2].lengths == (29,) * num_kv_heads
    inputs = generation_inputs(model, [[found]], [ids[0]])
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 65)


def test_storing_again_changes_nothing():
    once = reopened(filled(SHAPE))

    twice = reopened(once)

    for near, exact in zip(twice.layers, once.layers, strict=True):
        torch.testing.assert_close(near.keys, exact.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(near.values, exact.values, rtol=1e-5, atol=1e-5)


def test_a_merged_span_is_pruned_and_stored_merged_again():
    policy = CompressionPolicy(
        keep_ratio=0.5, chunk_size=5, window_size=8, scope="global", merge_layers=True
    )
    once = reopened(prefill(tiny_model(), prompts(60)[0], policy)[0])

    pruned = recompress(once, max_kept_tokens=12, precision="int8")
    found = reopened(pruned)

    assert found.shape.merged_pairs == ((2, 3),)
    assert (found.shape.precision, found.num_kept_tokens) == ("int8", 12)
    assert torch.equal(found.layers[2].positions, pruned.layers[2].positions)
    rows = torch.isin(once.layers[2].positions, found.layers[2].positions)
    expected = once.layers[2].by_head()[0][:, rows]
    assert float((found.layers[2].by_head()[0] - expected).norm() / expected.norm()) < 0.35


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, *PAIR])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_is_refused(precision: Precision, layer: int, bad: float):
    for name in ("keys", "values"):
        span = filled(replace(SHAPE, precision=precision))
        getattr(span.layers[layer], name)[3, 2] = bad

        with pytest.raises(InvalidInputError, match="not finite"):
            encode(span, identity="object-1")


def test_elements_that_grow_past_sixteen_bits_are_cut():
    span = filled(replace(SHAPE, dtype="float16"))
    first, second = (span.layers[layer].keys for layer in PAIR)
    first.fill_(60000.0)
    second.zero_()
    second[:, 0] = 1.0

    found = reopened(span)

    assert bool(torch.isfinite(found.layers[PAIR[0]].keys).all())


def test_norms_past_thirty_two_bits_are_refused():
    span = filled(SHAPE)
    span.layers[PAIR[0]].keys[5] = 3e38

    with pytest.raises(InvalidInputError, match="too large"):
        encode(span, identity="object-1")


def test_spans_without_merged_layers_are_written_as_before():
    span = filled(replace(SHAPE, merge_layers=False))

    header = encode(span, identity="object-1").header

    assert PREFIX.unpack_from(header)[1] == 2
    body = json.loads(header[PREFIX.size :])
    assert "retained" not in body
    assert "merge_layers" not in body["shape"]
    assert quantize(span) is span.memory


def test_a_span_that_has_nothing_to_merge_is_stored_as_it_lies():
    layers = tuple(replace(layer, index_list=0) for layer in SHAPE.layers[:3])
    span = filled(replace(SHAPE, layers=layers[:1], index_lengths=(40,)))
    encoded, memory = stored(span)

    found = decode(encoded.header, memory)

    assert quantize(span) is span.memory
    assert PREFIX.unpack_from(encoded.header)[1] == 3
    assert read_header(encoded.header).retained == ()
    assert found.shape == span.shape
    found.layers[0].keys[0, 0] = 12345.0
    assert struct.pack("<f", 12345.0) in bytes(memory)


def test_every_flipped_bit_and_every_truncation_of_the_header_is_refused():
    encoded, _ = stored(filled(SHAPE))
    header = bytearray(encoded.header)

    for index, byte in enumerate(encoded.header):
        for bit in range(8):
            header[index] = byte ^ (1 << bit)
            with pytest.raises((CorruptError, FormatError)):
                read_header(header)
        header[index] = byte
    for length in range(len(header)):
        with pytest.raises(CorruptError):
            read_header(header[:length])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_damaged_and_cut_parts_are_refused(precision: Precision):
    encoded, memory = stored(filled(replace(SHAPE, precision=precision)))

    for index in range(0, len(memory), 37):
        memory[index] ^= 0x10
        with pytest.raises(CorruptError):
            decode(encoded.header, memory)
        memory[index] ^= 0x10
    for length in range(0, len(memory), 61):
        with pytest.raises(CorruptError):
            decode(encoded.header, memory[:length])


def resigned(header: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    magic, version, _, _ = PREFIX.unpack_from(header)
    body = json.loads(header[PREFIX.size :])
    change(body)
    written = json.dumps(body).encode()
    return PREFIX.pack(magic, version, len(written), xxhash.xxh3_64_intdigest(written)) + written


def _counts(*counts: object) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.update(retained=counts)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no counts": lambda body: body.pop("retained"),
    "counts of another number of layers": _counts(1, 1, 1, 1),
    "one count": lambda body: body["retained"].pop(),
    "counts below zero": _counts(-1, 1),
    "counts above the rows": _counts(81, 1),
    "counts that no memory could hold": _counts(10**18, 10**18),
    "counts that are no integers": _counts(1.0, 1.0),
    "counts that are no numbers": _counts("1", True),
    "counts that are no list": lambda body: body.update(retained=3),
    "a few more rows": lambda body: body.update(retained=[n + 8 for n in body["retained"]]),
    "layers that are not merged": lambda body: body["shape"].update(merge_layers=False),
    "layers that may be merged": lambda body: body["shape"].update(merge_layers=1),
    "nothing about merging": lambda body: body["shape"].pop("merge_layers"),
    "another list for one of two": lambda body: body["shape"]["layers"][4].update(index_list=0),
    "rows that no memory could hold": lambda body: [
        body["shape"]["layers"][layer].update(lengths=[10**15] * 2) for layer in PAIR
    ],
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_header_that_contradicts_itself_is_refused(change: Callable[[dict[str, Any]], Any]):
    encoded, _ = stored(filled(SHAPE))

    with pytest.raises(FormatError):
        read_header(resigned(encoded.header, change))


@pytest.mark.parametrize("rows", [[80], [-1], [5, 5], [6, 5]], ids=str)
def test_retained_rows_that_are_not_there_are_refused(rows: list[int]):
    span = filled(SHAPE)
    counts = retained_counts(span)
    flat = quantize(span, counts)
    found = torch.cat([torch.tensor(rows), torch.arange(60, 60 + counts[0])])[: counts[0]]
    whole = flat.numpy().tobytes()
    first, second = (span.layers[layer] for layer in PAIR)
    exact = merge(first.keys, second.keys, first.lengths).retained.int().numpy().tobytes()
    assert counts[0] >= len(rows)
    assert whole.count(exact) == 1
    wrong = whole.replace(exact, found.int().numpy().tobytes())
    encoded, _ = stored(span, part_bytes=len(whole))
    header = resigned(
        encoded.header,
        lambda body: body.update(part_checksums=[f"{xxhash.xxh3_64_intdigest(wrong):016x}"]),
    )

    with pytest.raises(FormatError, match="named as retained"):
        decode(header, bytearray(wrong))


def test_memory_says_what_it_takes_where_it_is_used():
    encoded, memory = stored(filled(SHAPE))
    header = read_header(encoded.header)

    assert header.kv_bytes == size_bytes(SHAPE) > header.size_bytes == len(memory)
    with pytest.raises(InvalidInputError, match=f"takes {header.size_bytes}"):
        header.open(memory[:-1])
    with pytest.raises(InvalidInputError, match=f"takes {header.kv_bytes}"):
        header.open(memory, out=bytearray(header.kv_bytes - 1))
