"""The growing end of a sequence's KV, in one block of memory that never grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

import chunkkv
from chunkkv.compressed import size_bytes
from services.decode.geometry import KVGeometry

# Tokens that one forward pass adds at most. A sliding window has so much room behind it, so that it
# moves to the front of its memory once in as many tokens.
MAX_NEW_TOKENS: Final = 256


def tail_size_bytes(geometry: KVGeometry, num_tokens: int) -> int:
    """Return the bytes of memory that a tail of ``num_tokens`` takes."""
    return size_bytes(_tail_shape(geometry, num_tokens))


class Tail:
    """Keys and values behind one another, layer by layer.

    All full-attention layers hold equally many tokens, of which the first may belong to earlier
    spans; sliding-window layers hold at least their window.

    Attributes:
        length: Tokens in each full-attention layer.
        num_stored: The first of these that earlier spans have.

    Args:
        geometry: Of the model.
        memory: ``(size,)`` uint8, at least :func:`tail_size_bytes`.
        capacity: Tokens that a full-attention layer has room for.
    """

    def __init__(self, geometry: KVGeometry, memory: torch.Tensor, capacity: int) -> None:
        self.length = 0
        self.num_stored = 0
        self._geometry = geometry
        self._memory = memory
        shape = _tail_shape(geometry, capacity)
        layers = chunkkv.CompressedKV(shape, memory[: size_bytes(shape)]).layers
        self._slabs = [layer.by_head() for layer in layers]
        self._positions = [  # (num_kv_heads, capacity)
            layer.positions.view(len(layer.lengths), -1) for layer in layers
        ]
        self._window_lengths = [0] * len(layers)
        self._is_whole = True

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write behind what a layer has; return views of all that it holds then.

        Args:
            layer: Index of the layer.
            key: ``(num_kv_heads, new, key_dim)``.
            value: ``(num_kv_heads, new, value_dim)``.
        """
        keys, values = self._slabs[layer]
        new = key.shape[1]
        if self._geometry.layers[layer].window is None:
            start = self.length
        else:
            start = self._room_in_window(layer, new)
            self._window_lengths[layer] = start + new
        keys[:, start : start + new] = key
        values[:, start : start + new] = value
        return keys[:, : start + new], values[:, : start + new]

    def advance(self, num_tokens: int, first_position: int) -> None:
        """Count tokens that every layer has got."""
        if not self._is_whole:
            self._note(num_tokens, first_position)
        self.length += num_tokens

    def gather(self, span: chunkkv.CompressedKV) -> None:
        """Copy an earlier span whose heads all keep equally many tokens; before any new token."""
        for index, layer in enumerate(span.layers):
            if not layer.is_sliding:
                self.append(index, *layer.by_head())
        self.length += span.num_kept_tokens
        self.num_stored += span.num_kept_tokens

    def replace_window(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take what a span has of a sliding layer: all that is seen of the tokens up to its end."""
        window = self._geometry.layers[layer].window or 1
        first = max(0, keys.shape[1] - (window - 1))
        self._window_lengths[layer] = 0
        self.append(layer, keys[:, first:], values[:, first:])

    def full_layers(self) -> list[int]:
        """Return the indices of the full-attention layers."""
        return [i for i, layer in enumerate(self._geometry.layers) if layer.window is None]

    def keys(self, layer: int) -> torch.Tensor:
        """Return a full-attention layer's keys ``(num_kv_heads, length, key_dim)``, a view."""
        return self._slabs[layer][0][:, : self.length]

    def select(self, kept: Sequence[torch.Tensor], first_position: int) -> None:
        """Drop tokens that no span has.

        Args:
            kept: For each full-attention layer ``(1 or num_kv_heads, budget)`` indices, counted
                from the first token that no span has, ascending.
            first_position: Position of that token.
        """
        if self._is_whole:
            self._is_whole = False
            num_tokens, self.length = self.length - self.num_stored, self.num_stored
            self._note(num_tokens, first_position)
        first, budget = self.num_stored, kept[0].shape[-1]
        for index, rows in zip(self.full_layers(), kept, strict=True):
            keys, values = self._slabs[index]
            for head in range(keys.shape[0]):
                chosen = first + rows[head % rows.shape[0]]
                for slab in (keys[head], values[head], self._positions[index][head]):
                    slab[first : first + budget] = slab[chosen]
        self.length = first + budget

    def seal(
        self, *, first_token: int, num_tokens: int, fingerprint: str, policy: str
    ) -> chunkkv.CompressedKV:
        """End the tail: return the tokens that no earlier span has, in the tail's own memory.

        The span takes the first ``size_bytes`` of the memory; nothing else may be used afterwards.

        Args:
            first_token: Position of the span's first token.
            num_tokens: Tokens of the span, kept or not.
            fingerprint: Of the model.
            policy: What the kept ones were chosen by.
        """
        chosen = [self._chosen(layer) for layer in range(len(self._slabs))]
        shape = self._geometry.span_shape(
            [rows.stop - rows.start for rows in chosen],
            has_own_lists=not self._is_whole,
            first_token=first_token,
            num_tokens=num_tokens,
            fingerprint=fingerprint,
            policy=policy,
        )
        end = first_token + num_tokens
        positions = [self._positions_of(layer, rows, end) for layer, rows in enumerate(chosen)]
        sealed = chunkkv.CompressedKV(shape, self._memory[: size_bytes(shape)])
        # Layers lie in the order of the tail and none is longer, so each moves towards the front,
        # over nothing that is still to be read.
        for slabs, rows, out in zip(self._slabs, chosen, sealed.layers, strict=True):
            for slab, target in zip(slabs, out.by_head(), strict=True):
                for head in range(slab.shape[0]):
                    target[head] = slab[head, rows].clone()
        for own, out in zip(positions, sealed.layers, strict=True):
            out.positions.copy_(own[: out.positions.shape[0]])
        return sealed

    def _chosen(self, layer: int) -> slice:
        """Return the rows of a layer's slabs that are to be stored."""
        if (window := self._geometry.layers[layer].window) is not None:
            stop = self._window_lengths[layer]
            return slice(max(0, stop - window + 1), stop)
        return slice(self.num_stored, self.length)

    def _positions_of(self, layer: int, rows: slice, end: int) -> torch.Tensor:
        """Return the positions of rows, one head after another; ``end`` is that behind the last."""
        if self._is_whole or self._geometry.layers[layer].window is not None:
            own = torch.arange(end - (rows.stop - rows.start), end, device=self._memory.device)
            return own.repeat(self._slabs[layer][0].shape[0])
        return self._positions[layer][:, rows].flatten()

    def _note(self, num_tokens: int, first_position: int) -> None:
        added = torch.arange(num_tokens, device=self._memory.device) + first_position
        for layer in self.full_layers():
            self._positions[layer][:, self.length : self.length + num_tokens] = added

    def _room_in_window(self, layer: int, new: int) -> int:
        """Return where new tokens of a sliding layer go; moves its window to the front if full."""
        window, length = self._geometry.layers[layer].window or 1, self._window_lengths[layer]
        keys, values = self._slabs[layer]
        if length + new <= keys.shape[1]:
            return length
        kept = min(length, window - 1)
        for slab in (keys, values):
            slab[:, :kept] = slab[:, length - kept : length].clone()
        return kept


def _tail_shape(geometry: KVGeometry, num_tokens: int) -> chunkkv.SpanShape:
    return geometry.span_shape(
        [
            num_tokens if layer.window is None else layer.window - 1 + MAX_NEW_TOKENS
            for layer in geometry.layers
        ],
        # More than a sealed span needs, so that sealing moves everything towards the front.
        has_own_lists=True,
    )
