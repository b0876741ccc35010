"""The KV of one sequence: immutable spans as they were stored, and a tail that grows.

Spans lie in memory as they came from the store; the tail takes what the model sees here. Attention
reads both where they are: it costs what is kept, whatever other sequences keep, and whatever other
layers and KV heads of this one keep. Knows no model, no store and no batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

import chunkkv
from chunkkv.cache import WHOLE
from chunkkv.compressed import size_bytes
from services.decode.geometry import KVGeometry

# Spans of at most so many tokens go into the tail: reading many small ones costs a call each.
GATHERED_TOKENS: Final = 256

# Tokens that one forward pass adds at most. A sliding window has so much room behind it, so that it
# moves to the front of its memory once in as many tokens.
MAX_NEW_TOKENS: Final = 256

# Matrix products of four rows read memory faster than those of three (MKL).
_ROWS: Final = 4


def tail_size_bytes(geometry: KVGeometry, num_tokens: int) -> int:
    """Return the bytes of memory that a tail of ``num_tokens`` takes."""
    return size_bytes(_tail_shape(geometry, num_tokens))


def is_gathered(num_kept_tokens: int) -> bool:
    """Return whether a span's tokens go into the tail, if all heads keep equally many."""
    return num_kept_tokens <= GATHERED_TOKENS


class SequenceKV:
    """Keys and values that one sequence attends to.

    Attributes:
        num_tokens: Tokens seen, kept or not: the position of the next one.

    Args:
        geometry: Of the model.
        spans: What earlier turns kept, from position 0, without a gap. They stay the caller's,
            and their memory must live as long as this.
        tail_memory: ``(size,)`` uint8; at least :func:`tail_size_bytes` of ``tail_tokens``.
        tail_tokens: Tokens that the tail has room for, small spans included.

    Raises:
        MismatchError: The spans have a gap, or another shape than the model's KV.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        spans: Sequence[chunkkv.CompressedKV],
        tail_memory: torch.Tensor,
        *,
        tail_tokens: int,
    ) -> None:
        self.num_tokens = 0
        self._geometry = geometry
        self._memory = tail_memory
        shape = _tail_shape(geometry, tail_tokens)
        self._tail = [
            layer.by_head()
            for layer in chunkkv.CompressedKV(shape, tail_memory[: size_bytes(shape)]).layers
        ]
        self._capacity = tail_tokens
        self._tail_length = 0  # tokens in the tail of each full-attention layer
        self._num_gathered = 0  # of these, tokens of earlier spans
        self._sliding_lengths = [0] * len(geometry.layers)
        self._spans: list[chunkkv.CompressedKV] = []
        for span in spans:
            self._add(span)
        self._num_span_tokens = self.num_tokens
        self._runs = [self._runs_of(layer) for layer in range(len(geometry.layers))]

    @property
    def num_kept_tokens(self) -> int:
        """Kept tokens, averaged over KV heads and full-attention layers, rounded."""
        return sum(span.num_kept_tokens for span in self._spans) + self._tail_length

    @property
    def room(self) -> int:
        """Tokens that the tail can still take."""
        return self._capacity - self._tail_length

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add a layer's new keys and values, and return what the new tokens read.

        Every layer must be called once with the same tokens; then :meth:`advance`.

        Args:
            layer: Index of the layer.
            query: ``(new, num_kv_heads, group, key_dim)``, scaled; at most :data:`MAX_NEW_TOKENS`
                and at most :attr:`room`.
            key: ``(num_kv_heads, new, key_dim)``.
            value: ``(num_kv_heads, new, value_dim)``.
            softcap: Bound of the logits, if the model has one.
            sinks: ``(num_kv_heads, group)``: logits of a key that takes weight and gives nothing.

        Returns:
            ``(new, num_kv_heads, group, value_dim)``.
        """
        window = self._geometry.layers[layer].window
        keys, values = self._append(layer, key, value)
        new = key.shape[1]
        if window is not None:
            seen = slice(max(0, keys.shape[1] - new - window + 1), None)
            keys, values = keys[:, seen], values[:, seen]
        return torch.cat(
            [
                _attention(
                    query[:, heads],
                    [*parts, (keys[heads], values[heads])],
                    window=window,
                    softcap=softcap,
                    sinks=None if sinks is None else sinks[heads],
                )
                for heads, parts in self._runs[layer]
            ],
            dim=1,
        )

    def advance(self, num_tokens: int) -> None:
        """Count tokens that went through all layers."""
        self.num_tokens += num_tokens
        self._tail_length += num_tokens

    def seal(self, *, fingerprint: str) -> chunkkv.CompressedKV | None:
        """End the sequence: return the tail's new tokens as a span, in the tail's own memory.

        The span takes the first ``size_bytes`` of the memory. Nothing else of this object may be
        used afterwards.

        Args:
            fingerprint: Of the model.

        Returns:
            The span of all tokens behind the spans that it began with; ``None`` if there is none.
        """
        new = self.num_tokens - self._num_span_tokens
        if new == 0:
            return None
        held = [
            new if layer.window is None else min(length, layer.window - 1)
            for layer, length in zip(self._geometry.layers, self._sliding_lengths, strict=True)
        ]
        shape = self._geometry.span_shape(
            held,
            first_token=self._num_span_tokens,
            num_tokens=new,
            fingerprint=fingerprint,
            policy=WHOLE,
        )
        sealed = chunkkv.CompressedKV(shape, self._memory[: size_bytes(shape)])
        # Layers lie in the order of the tail and none is longer, so each moves towards the front,
        # over nothing that is still to be read.
        for index, out in enumerate(sealed.layers):
            stop = self._sliding_lengths[index] if out.is_sliding else self._tail_length
            for source, target in zip(self._tail[index], out.by_head(), strict=True):
                for head in range(target.shape[0]):
                    target[head] = source[head, stop - held[index] : stop].clone()
        for out in sealed.layers:
            length = out.positions.shape[0]
            torch.arange(self.num_tokens - length, self.num_tokens, out=out.positions)
        return sealed

    def _add(self, span: chunkkv.CompressedKV) -> None:
        self._check(span)
        flat = {len(set(layer.lengths)) == 1 and layer.lengths[0] for layer in _full(span)}
        if flat and is_gathered(span.num_kept_tokens) and flat == {span.num_kept_tokens}:
            self._gather(span)
        else:
            self._spans.append(span)
        for index, layer in enumerate(span.layers):
            if layer.is_sliding:
                self._replace_window(index, *layer.by_head())
        self.num_tokens += span.num_tokens

    def _gather(self, span: chunkkv.CompressedKV) -> None:
        for index, layer in enumerate(span.layers):
            if not layer.is_sliding:
                self._append(index, *layer.by_head())
        self._tail_length += span.num_kept_tokens
        self._num_gathered += span.num_kept_tokens

    def _replace_window(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take what a span has of a sliding layer: all that is seen of the tokens up to its end."""
        window = self._geometry.layers[layer].window or 1
        first = max(0, keys.shape[1] - (window - 1))
        self._sliding_lengths[layer] = 0
        self._append(layer, keys[:, first:], values[:, first:])

    def _append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what the tail has; return views of all that a layer's tail holds then."""
        keys, values = self._tail[layer]
        new = key.shape[1]
        if self._geometry.layers[layer].window is None:
            start = self._tail_length
        else:
            start = self._room_in_window(layer, new)
            self._sliding_lengths[layer] = start + new
        keys[:, start : start + new] = key
        values[:, start : start + new] = value
        return keys[:, : start + new], values[:, : start + new]

    def _room_in_window(self, layer: int, new: int) -> int:
        """Return where new tokens of a sliding layer go; moves its window to the front if full."""
        window, length = self._geometry.layers[layer].window or 1, self._sliding_lengths[layer]
        keys, values = self._tail[layer]
        if length + new <= keys.shape[1]:
            return length
        kept = min(length, window - 1)
        for slab in (keys, values):
            slab[:, :kept] = slab[:, length - kept : length].clone()
        return kept

    def _runs_of(self, layer: int) -> list[tuple[slice, list[tuple[torch.Tensor, torch.Tensor]]]]:
        """Return the spans' keys and values for neighbouring heads that keep equally many."""
        num_heads = self._geometry.layers[layer].num_kv_heads
        if self._geometry.layers[layer].window is not None or not self._spans:
            return [(slice(0, num_heads), [])]
        kept = [span.layers[layer] for span in self._spans]
        lengths = list(zip(*(part.lengths for part in kept), strict=True))
        runs = []
        for _, group in itertools.groupby(range(num_heads), key=lengths.__getitem__):
            heads = list(group)
            parts = [
                _heads(part, heads[0], len(heads)) for part in kept if part.lengths[heads[0]] > 0
            ]
            runs.append((slice(heads[0], heads[-1] + 1), parts))
        return runs

    def _check(self, span: chunkkv.CompressedKV) -> None:
        if span.first_token != self.num_tokens:
            raise chunkkv.MismatchError(
                f"span starts at token {span.first_token}, the one before ends at {self.num_tokens}"
            )
        if len(span.layers) != len(self._geometry.layers):
            raise chunkkv.MismatchError(
                f"span has {len(span.layers)} layers, the model has {len(self._geometry.layers)}"
            )
        for index, (held, own) in enumerate(
            zip(span.shape.layers, self._geometry.layers, strict=True)
        ):
            seen = (len(held.lengths), held.key_dim, held.value_dim, held.is_sliding)
            expected = (own.num_kv_heads, own.key_dim, own.value_dim, own.window is not None)
            if seen != expected:
                raise chunkkv.MismatchError(
                    f"layer {index} of the span has (KV heads, key width, value width, slides) "
                    f"{seen}, the model has {expected}"
                )


def _tail_shape(geometry: KVGeometry, num_tokens: int) -> chunkkv.SpanShape:
    return geometry.span_shape(
        [
            num_tokens if layer.window is None else layer.window - 1 + MAX_NEW_TOKENS
            for layer in geometry.layers
        ],
        # More than a sealed span needs, so that sealing moves everything towards the front.
        has_own_lists=True,
    )


def _full(span: chunkkv.CompressedKV) -> list[chunkkv.LayerKV]:
    return [layer for layer in span.layers if not layer.is_sliding]


def _heads(layer: chunkkv.LayerKV, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``(count, length, dim)`` of heads that keep equally many, views."""
    start, length = sum(layer.lengths[:first]), layer.lengths[first]
    rows = slice(start, start + count * length)
    return (
        layer.keys[rows].view(count, length, -1),
        layer.values[rows].view(count, length, -1),
    )


def _attention(
    query: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax(query keys) values over keys that lie in several pieces.

    The last keys are the queries' own; all before are visible to every query, but for a window.

    Args:
        query: ``(new, num_heads, group, key_dim)``, scaled.
        parts: ``(num_heads, length, dim)`` keys and values.
        window: Keys that a query sees at most, its own included.
        softcap: See :meth:`SequenceKV.attend`.
        sinks: ``(num_heads, group)``.

    Returns:
        ``(new, num_heads, group, value_dim)``.
    """
    new, num_heads, group, _ = query.shape
    if new == 1:
        rows = F.pad(query[0], (0, 0, 0, -group % _ROWS))  # (num_heads, rows, key_dim)
    else:
        rows = query.permute(1, 2, 0, 3).reshape(num_heads, group * new, -1)
    # Keys times queries, not queries times keys: a third faster on a CPU, for the same numbers.
    scores = torch.cat(
        [torch.bmm(keys, rows.to(keys.dtype).transpose(1, 2)).transpose(1, 2) for keys, _ in parts],
        dim=2,
    ).float()  # (num_heads, rows, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if new > 1:
        by_query = scores.view(num_heads, group, new, -1)
        by_query.masked_fill_(_hidden(new, scores.shape[-1], window, scores.device), float("-inf"))
    if sinks is not None:
        sink = F.pad(sinks.repeat_interleave(new, dim=1), (0, rows.shape[1] - group * new))
        scores = torch.cat([scores, sink[:, :, None].float()], dim=2)
    weights = scores.softmax(dim=-1)

    read, start = None, 0
    for _, values in parts:
        stop = start + values.shape[1]
        part = torch.bmm(weights[:, :, start:stop].to(values.dtype), values)
        read = part if read is None else read + part
        start = stop
    assert read is not None
    read = read[:, : group * new].to(query.dtype)
    return read.view(num_heads, group, new, -1).permute(2, 0, 1, 3)


def _hidden(new: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return ``(new, length)``: which keys each of the last ``new`` positions may not see."""
    own = torch.arange(length - new, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    hidden = key > own
    return hidden if window is None else hidden | (key <= own - window)
