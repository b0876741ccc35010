"""Keys and values in fewer bits, and of two layers in one: how they are stored, and back.

Knows spans and bytes; decides nothing. Positions and scores stay as they are: they are few, and
what a stored span is compressed further by. Sliding-window layers are quantized like the others: in
models that have them they are most of the layers, and the bound on the error is the same.

- ``fp8``: e4m3, scaled per token and KV head.
- ``int8``: keys per channel of a KV head (some channels are large for all tokens), values per
  token and KV head.
- ``int4``: the same, in groups of about 64 tokens and 64 channels, two numbers in a byte. What is
  no multiple of 64 is cut in equal parts, so that no line serves a few leftovers.

Integers lie on a line from the group's least value: ``low + code * step``. ``low`` and ``step`` are
bfloat16, which has the range of every dtype here, rounded outwards, so that no value falls off the
line's ends and no error is more than half a step.

Where two layers are stored as one (``chunkkv.merging``), that is in place of the shallower one: for
keys, then values, the directions of all rows; their norms in both layers, float32 if the span is
native, else bfloat16; which rows are retained, int32; and these, of both layers. Directions are
stored like rows of a layer, retained rows like values: they are too few for lines along channels.

Source: KIVI (https://arxiv.org/abs/2402.02750), for which axis suits keys and which values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch

from chunkkv.compressed import (
    CompressedKV,
    LayerShape,
    SpanShape,
    align,
    aligned_regions,
    index_sizes,
    size_bytes,
)
from chunkkv.errors import FormatError, InvalidInputError
from chunkkv.merging import merge, restore, retained_rows

GROUP_SIZE: Final = 64
FP8_MAX: Final = 448.0

_SCALE_DTYPE: Final = torch.bfloat16
_ROW_DTYPE: Final = torch.int32
_NAMES: Final = ("keys", "values")


def stored_size_bytes(shape: SpanShape, retained: Sequence[int] = ()) -> int:
    """Return the bytes that a span takes where it is stored, header not counted.

    Args:
        shape: Of the span.
        retained: ``retained_counts`` of it.
    """
    if shape.is_stored_native:
        return size_bytes(shape)
    return align(_regions(shape, retained)[-1].stop) if shape.layers else _index_end(shape)


def retained_counts(kv: CompressedKV) -> tuple[int, ...]:
    """Return how many rows of each merged pair are stored of both layers: keys, values, keys, ...

    They depend on the keys and values; whoever reads the span again has to be told.
    """
    counts = []
    for first, second in kv.shape.merged_pairs:
        lengths = kv.shape.layers[first].lengths
        for name in _NAMES:
            one, other = (getattr(kv.layers[layer], name).float() for layer in (first, second))
            counts.append(len(retained_rows(one, other, lengths)))
    return tuple(counts)


def merged_rows(shape: SpanShape) -> list[int]:
    """Return of how many rows each of ``retained_counts`` is a part."""
    firsts = [shape.layers[first] for first, _ in shape.merged_pairs]
    return [sum(layer.lengths) for layer in firsts for _ in _NAMES]


def quantize(kv: CompressedKV, retained: Sequence[int] = ()) -> torch.Tensor:
    """Return the span as it is stored: ``(stored_size_bytes,)`` uint8, on the CPU.

    Native spans of which no layers are merged are not copied if they are there already.

    Args:
        kv: The span.
        retained: ``retained_counts`` of it.

    Raises:
        InvalidInputError: Keys or values are not finite, or too large for a scale or a norm.
    """
    kv = kv.to("cpu")
    if kv.shape.is_stored_native:
        return kv.memory
    stored = torch.zeros(stored_size_bytes(kv.shape, retained), dtype=torch.uint8)
    end = _index_end(kv.shape)
    stored[:end] = kv.memory[:end]
    for place, regions in _placed(kv.shape, retained, stored):
        place.form.write([x.float() for x in place.tensors(kv)], regions)
    return stored


def dequantize(
    shape: SpanShape, stored: torch.Tensor, memory: torch.Tensor, retained: Sequence[int] = ()
) -> CompressedKV:
    """Return the span with keys and values of the model's dtype, in every layer.

    Args:
        shape: Of the span; not stored native.
        stored: As ``quantize`` made it.
        memory: ``(size_bytes(shape),)`` uint8, on the CPU; becomes the span's.
        retained: As ``quantize`` was given.

    Raises:
        FormatError: Rows are named as retained that are not there.
    """
    end = _index_end(shape)
    memory[:end] = stored[:end]
    kv = CompressedKV(shape, memory)
    for place, regions in _placed(shape, retained, stored):
        for tensor, x in zip(place.tensors(kv), place.form.read(regions), strict=True):
            # Of a common direction, an element may be more than what 16 bits hold.
            most = torch.finfo(tensor.dtype).max
            tensor.copy_(x.clamp_(-most, most) if len(place.layers) == 2 else x)
    return kv


@dataclass(frozen=True, slots=True)
class _Native:
    """Rows as they are."""

    num_rows: int
    dim: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int]:
        return (self.num_rows * self.dim * self.dtype.itemsize,)

    def write(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Write ``x`` ``(num_rows, dim)`` float32."""
        _check_finite(x)
        rows.view(self.dtype).view(x.shape).copy_(x)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``(num_rows, dim)`` float32."""
        return rows.view(self.dtype).view(self.num_rows, self.dim).float()


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
    group_size: int | None  # of neighbours, about; None: the whole run

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
        groups = sum(map(self._num_groups, self.runs))
        return (groups, self.dim) if self.axis == 0 else (self.num_rows, groups)

    def _groups(self) -> torch.Tensor:
        """Return how many members each group has, ``(num_groups,)``."""
        counts: list[int] = []
        for run in self.runs:
            if num_groups := self._num_groups(run):
                least, rest = divmod(run, num_groups)
                counts += [least + 1] * rest + [least] * (num_groups - rest)
        return torch.tensor(counts)

    def _num_groups(self, run: int) -> int:
        if run == 0 or self.group_size is None:
            return min(run, 1)
        return max(1, (run + self.group_size // 2) // self.group_size)

    def _members(self) -> torch.Tensor:
        """Return each group's indices, its last one repeated up to the longest group's length."""
        counts = self._groups()
        starts = counts.cumsum(0) - counts
        return starts[:, None] + torch.arange(int(counts.max())).minimum(counts[:, None] - 1)

    def _spread(self, lines: torch.Tensor) -> torch.Tensor:
        """Return what of each group lies at each of its members, float32."""
        return lines.float().repeat_interleave(self._groups(), dim=self.axis)


_Rows = _Native | _Fp8 | _Affine


@dataclass(frozen=True, slots=True)
class _Alone:
    """One layer's rows."""

    rows: _Rows

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.rows.sizes

    def write(self, tensors: Sequence[torch.Tensor], regions: Sequence[torch.Tensor]) -> None:
        """Write one tensor ``(num_rows, dim)`` float32."""
        self.rows.write(tensors[0], *regions)

    def read(self, regions: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return what was written."""
        return (self.rows.read(*regions),)


@dataclass(frozen=True, slots=True)
class _Merged:
    """Two layers' rows as one, but for those that are retained."""

    directions: _Rows
    both: _Rows  # the retained rows, of the shallower layer, then of the deeper one
    lengths: tuple[int, ...]
    norm_dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            *self.directions.sizes,
            2 * self.directions.num_rows * self.norm_dtype.itemsize,
            self.both.num_rows // 2 * _ROW_DTYPE.itemsize,
            *self.both.sizes,
        )

    def write(self, tensors: Sequence[torch.Tensor], regions: Sequence[torch.Tensor]) -> None:
        """Write two tensors ``(num_rows, dim)`` float32."""
        first, second = tensors
        merged = merge(first, second, self.lengths)
        directions, (norms, retained), both = self._parted(regions)
        _check_finite(rounded := merged.norms.to(self.norm_dtype))
        self.directions.write(merged.directions, *directions)
        norms.view(self.norm_dtype).copy_(rounded.flatten())
        retained.view(_ROW_DTYPE).copy_(merged.retained)
        rows = torch.cat([first[merged.retained], second[merged.retained]])
        self.both.write(rows, *both)

    def read(self, regions: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return what was written, as far as the directions stand for it."""
        directions, (norms, retained), both = self._parted(regions)
        lengths = norms.view(self.norm_dtype).float().view(2, -1)
        found = restore(self.directions.read(*directions), lengths)
        rows = retained.view(_ROW_DTYPE).long()
        _check_ascending(rows, self.directions.num_rows)
        for x, exact in zip(found, self.both.read(*both).chunk(2), strict=True):
            x[rows] = exact
        return found

    def _parted(self, regions: Sequence[torch.Tensor]) -> Sequence[Sequence[torch.Tensor]]:
        end = len(self.directions.sizes)
        return regions[:end], regions[end : end + 2], regions[end + 2 :]


@dataclass(frozen=True, slots=True)
class _Place:
    """What is stored together: keys or values of a layer, or of two."""

    form: _Alone | _Merged
    layers: tuple[int, ...]
    name: str

    def tensors(self, kv: CompressedKV) -> Sequence[torch.Tensor]:
        """Return them, in the order in which the form takes them."""
        return [getattr(kv.layers[layer], self.name) for layer in self.layers]


def _places(shape: SpanShape, retained: Sequence[int]) -> Iterator[_Place]:
    """Return how keys and values are stored, in the order in which they are."""
    partners, counts = dict(shape.merged_pairs), iter(retained)
    taken = set(partners.values())
    for index, layer in enumerate(shape.layers):
        if index in taken:
            continue
        for name in _NAMES:
            rows = _rows(shape, layer, name)
            if index not in partners:
                yield _Place(_Alone(rows), (index,), name)
                continue
            both = _by_row(shape, 2 * next(counts), rows.dim)
            norm_dtype = torch.float32 if shape.precision == "native" else _SCALE_DTYPE
            merged = _Merged(rows, both, layer.lengths, norm_dtype)
            yield _Place(merged, (index, partners[index]), name)


def _rows(shape: SpanShape, layer: LayerShape, name: str) -> _Rows:
    """Return how keys or values of a layer are stored, or directions in place of them."""
    if name == "values" or shape.precision in ("native", "fp8"):
        dim = layer.key_dim if name == "keys" else layer.value_dim
        return _by_row(shape, sum(layer.lengths), dim)
    bits, most = (8, None) if shape.precision == "int8" else (4, GROUP_SIZE)
    return _Affine(sum(layer.lengths), layer.key_dim, bits, 0, layer.lengths, most)


def _by_row(shape: SpanShape, num_rows: int, dim: int) -> _Rows:
    """Return how rows are stored that have nothing to do with one another."""
    if shape.precision == "native":
        return _Native(num_rows, dim, shape.torch_dtype)
    if shape.precision == "fp8":
        return _Fp8(num_rows, dim)
    bits, most = (8, None) if shape.precision == "int8" else (4, GROUP_SIZE)
    return _Affine(num_rows, dim, bits, 1, (dim,), most)


def _regions(shape: SpanShape, retained: Sequence[int]) -> list[slice]:
    sizes = chain.from_iterable(place.form.sizes for place in _places(shape, retained))
    return aligned_regions([*index_sizes(shape), *sizes])


def _placed(
    shape: SpanShape, retained: Sequence[int], stored: torch.Tensor
) -> Iterator[tuple[_Place, list[torch.Tensor]]]:
    """Return each place with the bytes of its tensors."""
    regions = iter(_regions(shape, retained)[len(index_sizes(shape)) :])
    for place in _places(shape, retained):
        yield place, [stored[next(regions)] for _ in place.form.sizes]


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
        raise InvalidInputError("keys or values are not finite, or too large to be stored so")


def _check_ascending(rows: torch.Tensor, num_rows: int) -> None:
    within = torch.cat([rows.new_tensor([-1]), rows, rows.new_tensor([num_rows])])
    if not bool((within.diff() > 0).all()):
        raise FormatError(f"rows {rows.tolist()[:8]} of {num_rows} are named as retained")


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Return two 4-bit numbers in each byte, the first one low."""
    if len(numbers) % 2:
        numbers = torch.cat([numbers, numbers.new_zeros(1)])
    return numbers[::2] | (numbers[1::2] << 4)


def _unpacked(codes: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([codes & 0xF, codes >> 4], dim=1).flatten()[:count]
