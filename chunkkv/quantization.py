"""Keys and values in fewer bits: how they are stored, and back.

Knows spans and bytes; decides nothing. Positions and scores stay as they are: they are few, and
what a stored span is compressed further by. Sliding-window layers are quantized like the others: in
models that have them they are most of the layers, and the bound on the error is the same.

- ``fp8``: e4m3, scaled per token and KV head.
- ``int8``: keys per channel of a KV head (some channels are large for all tokens), values per
  token and KV head.
- ``int4``: the same, in groups of 32 tokens and of 32 channels, two numbers in a byte.

Integers lie on a line from the group's least value: ``low + code * step``. ``low`` and ``step`` are
bfloat16, which has the range of every dtype here, rounded outwards, so that no value falls off the
line's ends and no error is more than half a step.

Source: KIVI (https://arxiv.org/abs/2402.02750), for which axis suits keys and which values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch

from chunkkv.compressed import (
    CompressedKV,
    SpanShape,
    align,
    aligned_regions,
    index_sizes,
    size_bytes,
)
from chunkkv.errors import InvalidInputError

GROUP_SIZE: Final = 32
FP8_MAX: Final = 448.0

_SCALE_DTYPE: Final = torch.bfloat16


def stored_size_bytes(shape: SpanShape) -> int:
    """Return the bytes that a span takes where it is stored, header not counted."""
    if shape.precision == "native":
        return size_bytes(shape)
    return align(_regions(shape)[-1].stop) if shape.layers else _index_end(shape)


def quantize(kv: CompressedKV) -> torch.Tensor:
    """Return the span as it is stored: ``(stored_size_bytes,)`` uint8, on the CPU.

    Native spans are not copied if they are there already.

    Raises:
        InvalidInputError: Keys or values are not finite, or too large for a scale.
    """
    kv = kv.to("cpu")
    if kv.shape.precision == "native":
        return kv.memory
    stored = torch.zeros(stored_size_bytes(kv.shape), dtype=torch.uint8)
    end = _index_end(kv.shape)
    stored[:end] = kv.memory[:end]
    tensors = chain.from_iterable((layer.keys, layer.values) for layer in kv.layers)
    for tensor, form, (codes, scales) in zip(
        tensors, _forms(kv.shape), _pairs(kv.shape, stored), strict=True
    ):
        form.write(tensor.float(), codes, scales)
    return stored


def dequantize(shape: SpanShape, stored: torch.Tensor, memory: torch.Tensor) -> CompressedKV:
    """Return the span with keys and values of the model's dtype.

    Args:
        shape: Of the span; not native.
        stored: As ``quantize`` made it.
        memory: ``(size_bytes(shape),)`` uint8, on the CPU; becomes the span's.
    """
    end = _index_end(shape)
    memory[:end] = stored[:end]
    kv = CompressedKV(shape, memory)
    tensors = chain.from_iterable((layer.keys, layer.values) for layer in kv.layers)
    for tensor, form, (codes, scales) in zip(
        tensors, _forms(shape), _pairs(shape, stored), strict=True
    ):
        tensor.copy_(form.read(codes, scales))
    return kv


@dataclass(frozen=True, slots=True)
class _Fp8:
    """Rows of e4m3, each with its scale."""

    num_rows: int
    dim: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.num_rows * self.dim, self.num_rows * _SCALE_DTYPE.itemsize

    def write(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Write ``x`` ``(num_rows, dim)`` float32."""
        scale = _rounded_up(_largest(x.abs(), axis=1) / FP8_MAX)
        _check_finite(scale)
        scales.view(_SCALE_DTYPE).copy_(scale)
        scaled = _divided(x, scale.float()[:, None])
        codes.copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten())

    def read(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return ``(num_rows, dim)`` float32."""
        x = codes.view(torch.float8_e4m3fn).view(self.num_rows, self.dim).float()
        return x.mul_(scales.view(_SCALE_DTYPE).float()[:, None])


@dataclass(frozen=True, slots=True)
class _Affine:
    """Integers of ``bits`` bits, on a line of its own for each group along ``axis``."""

    num_rows: int
    dim: int
    bits: int
    axis: int
    runs: tuple[int, ...]  # lengths along the axis that no group reaches over
    group_size: int | None  # of neighbours; None: the whole run

    @property
    def sizes(self) -> tuple[int, int]:
        lines = math.prod(self._lines_shape())
        codes = (self.num_rows * self.dim * self.bits + 7) // 8
        return codes, 2 * lines * _SCALE_DTYPE.itemsize

    def write(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Write ``x`` ``(num_rows, dim)`` float32."""
        if not x.numel():
            return
        lines = scales.view(_SCALE_DTYPE).view(2, *self._lines_shape())
        along = x if self.axis == 0 else x.T
        parts = along[self._members()]  # (groups, longest group, channels or rows)
        low, high = parts.amin(dim=1), parts.amax(dim=1)
        if self.axis == 1:
            low, high = low.T, high.T
        low = _rounded_down(low)
        step = _rounded_up((high - low.float()) / ((1 << self.bits) - 1))
        _check_finite(low)
        _check_finite(step)
        lines[0], lines[1] = low, step
        steps = _divided(x - self._spread(low), self._spread(step))
        numbers = steps.round_().clamp_(0, (1 << self.bits) - 1).to(torch.uint8).flatten()
        codes.copy_(_packed(numbers) if self.bits == 4 else numbers)

    def read(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return ``(num_rows, dim)`` float32."""
        count = self.num_rows * self.dim
        if not count:
            return torch.empty(self.num_rows, self.dim)
        low, step = scales.view(_SCALE_DTYPE).view(2, *self._lines_shape())
        numbers = (_unpacked(codes, count) if self.bits == 4 else codes).float()
        return (
            numbers.view(self.num_rows, self.dim).mul_(self._spread(step)).add_(self._spread(low))
        )

    def _lines_shape(self) -> tuple[int, int]:
        # Counted, not listed: a header's lengths are believed only once its sizes were checked.
        groups = sum(-(-run // (self.group_size or max(run, 1))) for run in self.runs)
        return (groups, self.dim) if self.axis == 0 else (self.num_rows, groups)

    def _groups(self) -> torch.Tensor:
        """Return how many members each group has, ``(num_groups,)``."""
        counts: list[int] = []
        for run in self.runs:
            whole, rest = divmod(run, self.group_size or max(run, 1))
            counts += [self.group_size or run] * whole + [rest] * (rest > 0)
        return torch.tensor(counts)

    def _members(self) -> torch.Tensor:
        """Return each group's indices, its last one repeated up to the longest group's length."""
        counts = self._groups()
        starts = counts.cumsum(0) - counts
        return starts[:, None] + torch.arange(int(counts.max())).minimum(counts[:, None] - 1)

    def _spread(self, lines: torch.Tensor) -> torch.Tensor:
        """Return what of each group lies at each of its members, float32."""
        return lines.float().repeat_interleave(self._groups(), dim=self.axis)


def _forms(shape: SpanShape) -> Iterator[_Fp8 | _Affine]:
    """Return how keys and values of each layer are stored."""
    for layer in shape.layers:
        rows = sum(layer.lengths)
        if shape.precision == "fp8":
            yield _Fp8(rows, layer.key_dim)
            yield _Fp8(rows, layer.value_dim)
            continue
        bits, most = (8, None) if shape.precision == "int8" else (4, GROUP_SIZE)
        yield _Affine(rows, layer.key_dim, bits, 0, layer.lengths, most)
        yield _Affine(rows, layer.value_dim, bits, 1, (layer.value_dim,), most)


def _regions(shape: SpanShape) -> list[slice]:
    sizes = chain.from_iterable(form.sizes for form in _forms(shape))
    return aligned_regions([*index_sizes(shape), *sizes])


def _pairs(shape: SpanShape, stored: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return codes and scales of each tensor, as bytes."""
    regions = _regions(shape)[len(index_sizes(shape)) :]
    for codes, scales in zip(regions[::2], regions[1::2], strict=True):
        yield stored[codes], stored[scales]


def _index_end(shape: SpanShape) -> int:
    """Return where keys and values begin."""
    return align(max((region.stop for region in aligned_regions(index_sizes(shape))), default=0))


def _largest(x: torch.Tensor, *, axis: int) -> torch.Tensor:
    return x.amax(dim=axis) if x.shape[axis] else x.sum(dim=axis)


def _divided(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return ``x / step``; 0 where the step is 0, because all of the group is one value."""
    return torch.where(step > 0, x / step, 0.0)


def _rounded_up(x: torch.Tensor) -> torch.Tensor:
    near = x.to(_SCALE_DTYPE)
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.float() < x, above, near)


def _rounded_down(x: torch.Tensor) -> torch.Tensor:
    return -_rounded_up(-x)


def _check_finite(scale: torch.Tensor) -> None:
    if not bool(torch.isfinite(scale).all()):
        raise InvalidInputError("keys or values are not finite, or too large to be quantized")


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Return two 4-bit numbers in each byte, the first one low."""
    if len(numbers) % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(1)])
    return numbers[::2] | (numbers[1::2] << 4)


def _unpacked(codes: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([codes & 0xF, codes >> 4], dim=1).flatten()[:count]
