"""The compressed KV cache of one span of one sequence, in one piece of memory.

The memory is laid out as it is stored and sent: layers are views into it, so encoding and decoding
copy nothing. Kept counts may differ between layers and between KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch

from chunkkv.errors import InvalidInputError, MismatchError
from chunkkv.policy import Precision

ALIGNMENT: Final = 64

# Positions and scores of the tokens that are kept.
POSITION_DTYPE: Final = torch.int32
SCORE_DTYPE: Final = torch.float32


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's kept KV.

    Attributes:
        lengths: Kept tokens of each KV head.
        key_dim: Width of a key.
        value_dim: Width of a value.
        index_list: Which index list names its positions.
        is_sliding: The layer sees a sliding window, and holds what the model holds for it.
    """

    lengths: tuple[int, ...]
    key_dim: int
    value_dim: int
    index_list: int
    is_sliding: bool = False


@dataclass(frozen=True, slots=True)
class SpanShape:
    """Everything about a compressed span but its tensors' contents.

    Attributes:
        fingerprint: The model that computed it (``model_fingerprint``).
        policy: ``CompressionPolicy.canonical()`` of the policy that chose it.
        first_token: Position of the span's first token in the sequence.
        num_tokens: Tokens of the span, kept or not.
        dtype: Of keys and values, for example ``float32``.
        layers: One for each layer of the model.
        index_lengths: Entries of each index list. A list as long as the heads of its layer
            together holds their positions one head after another; else the heads share it.
        has_scores: Whether each position comes with a score.
        precision: How keys and values are stored (``chunkkv.quantization``). In memory they are
            of ``dtype``, whatever this says.
        merge_layers: Whether ``merged_pairs`` are stored as one layer each (``chunkkv.merging``).
            In memory every layer has keys and values of its own, whatever this says.
    """

    fingerprint: str
    policy: str
    first_token: int
    num_tokens: int
    dtype: str
    layers: tuple[LayerShape, ...]
    index_lengths: tuple[int, ...]
    has_scores: bool
    precision: Precision = "native"
    merge_layers: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of keys and values."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def num_kept_tokens(self) -> int:
        """Kept tokens, averaged over KV heads and full-attention layers, rounded."""
        counts = [n for layer in self.layers if not layer.is_sliding for n in layer.lengths]
        return round(sum(counts) / len(counts)) if counts else 0

    @property
    def is_stored_native(self) -> bool:
        """Whether the span is stored as it lies in memory."""
        return self.precision == "native" and not self.merged_pairs

    @property
    def merged_pairs(self) -> tuple[tuple[int, int], ...]:
        """Layers that are stored as one, shallower first.

        From half of the layers on, each full-attention layer with the next one, if that is of the
        same widths, keeps the same tokens, and is not taken already. Whether they do is known of
        layers that share an index list, and of those that keep every token of the span.
        """
        if not self.merge_layers:
            return ()
        pairs: list[tuple[int, int]] = []
        for first, second in pairwise(range(math.ceil(len(self.layers) / 2), len(self.layers))):
            is_free = not pairs or pairs[-1][1] < first
            if is_free and self._are_alike(self.layers[first], self.layers[second]):
                pairs.append((first, second))
        return tuple(pairs)

    def _are_alike(self, one: LayerShape, other: LayerShape) -> bool:
        widths = (one.key_dim, one.value_dim)
        if one.is_sliding or other.is_sliding or one.lengths != other.lengths:
            return False
        if min(widths) < 1 or widths != (other.key_dim, other.value_dim):
            return False
        is_whole = all(length == self.num_tokens for length in one.lengths)
        return is_whole or one.index_list == other.index_list


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Views of one layer.

    Attributes:
        keys: ``(sum(lengths), key_dim)``, one head after another.
        values: ``(sum(lengths), value_dim)``.
        positions: ``(kept,)`` int32, shared by the heads, or ``(sum(lengths),)``.
        scores: As ``positions``, float32, or ``None``.
        lengths: Kept tokens of each KV head.
        is_sliding: The layer sees a sliding window.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None
    lengths: tuple[int, ...]
    is_sliding: bool

    @property
    def is_uniform(self) -> bool:
        """Whether all heads keep equally many tokens."""
        return len(set(self.lengths)) == 1

    def by_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as ``(num_kv_heads, kept, dim)``.

        Raises:
            InvalidInputError: The heads keep different numbers of tokens.
        """
        if not self.is_uniform:
            raise InvalidInputError(f"heads keep {self.lengths} tokens; they form no rectangle")
        num_heads, kept = len(self.lengths), self.lengths[0]
        return (
            self.keys.view(num_heads, kept, self.keys.shape[-1]),
            self.values.view(num_heads, kept, self.values.shape[-1]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class CompressedKV:
    """Kept keys and values of a contiguous span of one sequence, in all layers.

    Attributes:
        shape: What it is.
        memory: ``(size_bytes,)`` uint8: the tensors, as they are stored.
        layers: Views into ``memory``.
    """

    shape: SpanShape
    memory: torch.Tensor
    layers: tuple[LayerKV, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _views(self.shape, self.memory))

    @classmethod
    def empty(cls, shape: SpanShape, *, device: torch.device | str = "cpu") -> CompressedKV:
        """Allocate memory for a span; its contents are undefined, but for zeros in the gaps."""
        memory = torch.empty(size_bytes(shape), dtype=torch.uint8, device=device)
        end = 0
        for region in _regions(shape):
            memory[end : region.start] = 0
            end = region.stop
        memory[end:] = 0
        return cls(shape, memory)

    @property
    def first_token(self) -> int:
        """Position of the span's first token."""
        return self.shape.first_token

    @property
    def num_tokens(self) -> int:
        """Tokens of the span, kept or not."""
        return self.shape.num_tokens

    @property
    def num_kept_tokens(self) -> int:
        """Kept tokens, averaged over KV heads and full-attention layers, rounded."""
        return self.shape.num_kept_tokens

    @property
    def size_bytes(self) -> int:
        """Bytes of keys, values, positions and scores."""
        return self.memory.numel()

    def check_follows(self, *, num_tokens: int, num_layers: int) -> None:
        """Check that the span continues a cache.

        Args:
            num_tokens: Tokens that the cache has seen.
            num_layers: Layers of the model.

        Raises:
            MismatchError: The span starts elsewhere, or has another number of layers.
        """
        if len(self.layers) != num_layers:
            raise MismatchError(f"span has {len(self.layers)} layers, the model has {num_layers}")
        if self.first_token != num_tokens:
            raise MismatchError(
                f"span starts at token {self.first_token}, the cache ends at token {num_tokens}"
            )

    def to(self, device: torch.device | str) -> CompressedKV:
        """Return it on a device, in one copy; itself if it is there already."""
        moved = self.memory.to(device)
        return self if moved is self.memory else CompressedKV(self.shape, moved)


def size_bytes(shape: SpanShape) -> int:
    """Return the bytes of memory that a span takes."""
    return align(max((region.stop for region in _regions(shape)), default=0))


def _views(shape: SpanShape, memory: torch.Tensor) -> tuple[LayerKV, ...]:
    if memory.dtype != torch.uint8 or memory.shape != (size_bytes(shape),):
        raise InvalidInputError(
            f"memory is {memory.dtype} {tuple(memory.shape)}; "
            f"this span takes uint8 ({size_bytes(shape)},)"
        )
    regions = iter(_regions(shape))

    def view(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
        region = next(regions)
        return memory[region].view(dtype).view(*sizes)

    lists = [
        (view(POSITION_DTYPE, n), view(SCORE_DTYPE, n) if shape.has_scores else None)
        for n in shape.index_lengths
    ]
    return tuple(
        LayerKV(
            keys=view(shape.torch_dtype, sum(layer.lengths), layer.key_dim),
            values=view(shape.torch_dtype, sum(layer.lengths), layer.value_dim),
            positions=lists[layer.index_list][0],
            scores=lists[layer.index_list][1],
            lengths=layer.lengths,
            is_sliding=layer.is_sliding,
        )
        for layer in shape.layers
    )


def _regions(shape: SpanShape) -> Sequence[slice]:
    """Return where each tensor lies: index lists first, then keys and values layer by layer."""
    sizes = []
    for layer in shape.layers:
        kept = sum(layer.lengths)
        sizes += [
            kept * dim * shape.torch_dtype.itemsize for dim in (layer.key_dim, layer.value_dim)
        ]
    return aligned_regions([*index_sizes(shape), *sizes])


def index_sizes(shape: SpanShape) -> list[int]:
    """Return the bytes of each tensor before the keys and values: positions, scores."""
    sizes = []
    for length in shape.index_lengths:
        sizes.append(length * POSITION_DTYPE.itemsize)
        if shape.has_scores:
            sizes.append(length * SCORE_DTYPE.itemsize)
    return sizes


def aligned_regions(sizes: Sequence[int]) -> list[slice]:
    """Return where tensors of these sizes lie, each beginning at a multiple of ``ALIGNMENT``."""
    regions, start = [], 0
    for size in sizes:
        regions.append(slice(start, start + size))
        start = align(start + size)
    return regions


def align(size: int) -> int:
    """Return the next multiple of ``ALIGNMENT``."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
