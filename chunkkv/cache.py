"""A transformers cache over memory of its own, whose kept tokens are fewer than those seen.

``KVCache`` goes wherever transformers takes ``past_key_values``. It tells the model how many
tokens were *seen* (so positions continue where the text does) and the mask how many are *kept*.

Where heads or layers keep different numbers of tokens, no mask can say so. All heads are then
padded to the longest of their layer, on the left, and attention is told how much of each is
padding: only a model whose attention is ours (``chunkkv.make_observable``) reads such a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chunkkv.attention import RaggedKeys
from chunkkv.compressed import CompressedKV, LayerKV, LayerShape, SpanShape
from chunkkv.errors import InvalidInputError

WHOLE: str = "whole"
"""Policy name of spans that are kept as they are, without scores."""


class KeptLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One full-attention layer: a slab, of which the first ``kept_len`` tokens are filled.

    The slab takes what was reserved, and doubles when that is full, so that the cost of growth
    does not depend on the number of steps.

    Attributes:
        kept_len: Columns that are filled: tokens of the head that keeps most.
        seen_len: Tokens seen, kept or not.
        whole_from: Tokens from this position on were all kept.
        hidden: ``(batch, num_kv_heads)`` int64: leading columns of each row and head that hold
            nothing (zeros); attention must be told. ``None``: the model's mask says it all.
    """

    def __init__(self) -> None:
        self.is_initialized = False
        self.min_capacity = 0
        self.kept_len = 0
        self.seen_len = 0
        self.whole_from = 0
        self.hidden: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """``(batch, num_kv_heads, kept_len, head_dim)``, a view."""
        return None if self._keys is None else self._keys[:, :, : self.kept_len]

    @keys.setter
    def keys(self, value: torch.Tensor) -> None:
        self._keys = value

    @property
    def values(self) -> torch.Tensor | None:
        """``(batch, num_kv_heads, kept_len, head_dim)``, a view."""
        return None if self._values is None else self._values[:, :, : self.kept_len]

    @values.setter
    def values(self, value: torch.Tensor) -> None:
        self._values = value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | RaggedKeys, torch.Tensor]:
        """Append keys and values ``(batch, num_kv_heads, new, head_dim)``; return all of them."""
        keys, values = self.append(key_states, value_states, seen=key_states.shape[-2])
        return (keys if self.hidden is None else RaggedKeys(keys, self.hidden)), values

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, *, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append what was kept of ``seen`` tokens."""
        start, stop = self.kept_len, self.kept_len + keys.shape[-2]
        self._keys = self._with_room(self._keys, keys, stop)
        self._values = self._with_room(self._values, values, stop)
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        self.kept_len, self.seen_len = stop, self.seen_len + seen
        if keys.shape[-2] != seen:
            self.whole_from = self.seen_len
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def append_heads(self, parts: Sequence[LayerKV], seen: Sequence[int]) -> None:
        """Append what each head kept of spans of ``seen`` tokens. Batch of one.

        What is there moves, so that all heads end in the same column.
        """
        num_heads = len(parts[0].lengths)
        hidden = [0] * num_heads if self.hidden is None else self.hidden[0].tolist()
        lengths = [
            self.kept_len - hidden[head] + sum(part.lengths[head] for part in parts)
            for head in range(num_heads)
        ]
        end = max(lengths)

        def packed(held: torch.Tensor | None, added: Sequence[torch.Tensor]) -> torch.Tensor:
            rows: list[Sequence[torch.Tensor]] = [
                torch.split(new, list(part.lengths)) for new, part in zip(added, parts, strict=True)
            ]
            if held is not None:
                rows.insert(0, [own[start:] for own, start in zip(held[0], hidden, strict=True)])
            return _packed(rows, end=end, capacity=max(end, self.min_capacity))

        keys = packed(self.keys, [part.keys for part in parts])
        values = packed(self.values, [part.values for part in parts])
        self._keys, self._values, self.kept_len = keys, values, end
        self._hide([[end - length for length in lengths]])
        for part, num_tokens in zip(parts, seen, strict=True):
            self.seen_len += num_tokens
            if set(part.lengths) != {num_tokens}:
                self.whole_from = self.seen_len
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def num_kept(self) -> torch.Tensor:
        """Return how many columns of each row and head hold something."""
        assert self.hidden is not None  # the heads of other layers hold equally many
        return self.kept_len - self.hidden

    def hide_nothing(self) -> None:
        """Let attention be told what is hidden, also if it is nothing."""
        if self.hidden is None and self._keys is not None:
            batch, num_heads = self._keys.shape[:2]
            self._hide([[0] * num_heads] * batch)

    def reserve(self, num_tokens: int) -> None:
        """Make the next allocation large enough for ``num_tokens`` more."""
        self.min_capacity = max(self.min_capacity, self.kept_len + num_tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a query sees at most, and the position that the first stands for.

        Kept tokens stand directly before the query, whatever their real positions: causality
        among them was settled when they were computed.
        """
        return self.kept_len + query_length, self.seen_len - self.kept_len

    def get_seq_length(self) -> int:
        """Return the tokens seen: the position of the next one."""
        return self.seen_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            InvalidInputError: The number is positive, or not all of these tokens were kept.
        """
        removed = -tokens_to_remove
        if not 0 <= removed <= self.seen_len - self.whole_from:
            raise InvalidInputError(
                f"cannot forget {removed} tokens; the last {self.seen_len - self.whole_from} of "
                f"{self.seen_len} were kept whole"
            )
        self.kept_len -= removed
        self.seen_len -= removed

    def reset(self) -> None:
        """Forget everything, but keep the memory."""
        self.kept_len = self.seen_len = self.whole_from = 0
        self.hidden = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.hidden is not None:
            self.hidden = self.hidden.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        if self.hidden is not None:
            self.hidden = self.hidden[indices]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put rows in another order."""
        super().reorder_cache(beam_idx)
        if self.hidden is not None:
            self.hidden = self.hidden.index_select(0, beam_idx.to(self.hidden.device))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self._keys, self._values) if t is not None)

    def _with_room(
        self, slab: torch.Tensor | None, like: torch.Tensor, length: int
    ) -> torch.Tensor:
        if slab is not None and slab.shape[2] >= length:
            return slab
        capacity = max(length, self.min_capacity, 0 if slab is None else 2 * slab.shape[2])
        batch, num_heads, _, dim = like.shape
        # Not an inference tensor, whoever calls: it must stay writable outside inference mode.
        with torch.inference_mode(False):
            grown = torch.empty(
                batch, num_heads, capacity, dim, dtype=like.dtype, device=like.device
            )
        if slab is not None:
            grown[:, :, : self.kept_len] = slab[:, :, : self.kept_len]
        return grown

    def _hide(self, hidden: Sequence[Sequence[int]]) -> None:
        assert self._keys is not None
        with torch.inference_mode(False):
            self.hidden = torch.tensor(hidden, device=self._keys.device)


class _LookaheadLayer(KeptLayer):
    """Shows another layer's tokens and new ones to one forward pass, and keeps nothing."""

    def __init__(self, layer: KeptLayer) -> None:
        self.__dict__.update(layer.__dict__)

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, *, seen: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # One layer's copy at a time: room for the tokens in the slab might double all layers'.
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class KVCache(Cache):  # type: ignore[misc]
    """The KV cache of a batch of sequences, in all layers of a model.

    Args:
        config: The model's transformers configuration: says which layers slide.

    Raises:
        InvalidInputError: A layer is neither full nor sliding-window attention.
    """

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(
            layers=[
                _own_layer(layer, index)
                for index, layer in enumerate(DynamicCache(config=config).layers)
            ]
        )

    @classmethod
    def from_segments(
        cls,
        config: Any,
        segments: Sequence[CompressedKV],
        *,
        extra_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Return the cache of one sequence whose KV is kept in ``segments``, in order.

        Args:
            config: The model's transformers configuration.
            segments: Spans that follow one another without a gap, from position 0.
            extra_tokens: Room for tokens to come.
            device: Where the model runs.

        Raises:
            MismatchError: The spans have a gap, or another number of layers than the model.
        """
        cache = cls(config)
        cache.reserve(sum(_longest(segment) for segment in segments) + extra_tokens)
        if all(layer.is_uniform for segment in segments for layer in segment.layers):
            for segment in segments:
                cache.append_segment(segment.to(device))
        else:
            # Heads are laid out anew for whatever is appended to them: once for all spans.
            cache._append(segments, device=device)
        return cache

    @classmethod
    def stack(cls, config: Any, rows: Sequence[KVCache]) -> KVCache:
        """Return one cache for a batch, shorter rows padded left; see ``generation_inputs``."""
        stacked = cls(config)
        slides = any(layer.is_sliding for layer in stacked.layers)
        # One mask cannot say which columns each kind of layer holds: those that slide get it.
        is_ragged = any(row.is_ragged for row in rows) or (
            slides and any(row.num_dropped_tokens for row in rows)
        )
        seen = max(row.get_seq_length() for row in rows)
        for index, layer in enumerate(stacked.layers):
            parts = [row.layers[index] for row in rows]
            keys = _pad_left([part.keys for part in parts])
            values = _pad_left([part.values for part in parts])
            if layer.is_sliding:
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values, layer.cumulative_length = keys, values, seen
            else:
                layer.append(keys, values, seen=seen)
                if is_ragged:
                    layer.hidden = torch.cat([_hidden(part, keys.shape[2]) for part in parts])
        return stacked

    def reserve(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` more in every layer at the next allocation."""
        for layer in self.layers:
            if isinstance(layer, KeptLayer):
                layer.reserve(num_tokens)

    def append_segment(self, segment: CompressedKV) -> None:
        """Append the span that follows the tokens seen so far. Batch of one.

        Raises:
            MismatchError: The span starts elsewhere, or has another number of layers.
        """
        self._append([segment], device=segment.memory.device)

    def lookahead(self) -> KVCache:
        """Return a cache for one forward pass over tokens that follow; this one stays as it is."""
        ahead = copy.copy(self)
        ahead.layers = [
            _LookaheadLayer(layer) if isinstance(layer, KeptLayer) else copy.copy(layer)
            for layer in self.layers
        ]
        return ahead

    def excerpt(self, row: int, columns: torch.Tensor, *, seen: int) -> KVCache:
        """Return a cache for one forward pass of one row that sees a part of its tokens.

        Sliding-window layers show what they hold. This cache stays as it is.

        Args:
            row: Of the batch.
            columns: ``(kept,)`` int64: tokens that full-attention layers show, in this order,
                counted from the end of what they hold: -1 is the last.
            seen: Tokens of the row's sequence, padding not counted.
        """
        part = copy.copy(self)
        part.layers = []
        for layer in self.layers:
            own = copy.copy(layer)
            if isinstance(layer, KeptLayer):
                assert layer.keys is not None
                assert layer.values is not None
                own = KeptLayer()
                # Heads are right-aligned: a token has the same place from the end in all of them.
                keys, values = layer.keys[row, None], layer.values[row, None]
                own.append(keys[:, :, columns], values[:, :, columns], seen=seen)
            else:
                own.keys = layer.keys[row, None, :, -seen:]
                own.values = layer.values[row, None, :, -seen:]
                own.cumulative_length = seen
            part.layers.append(own)
        return part

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the full-attention layers: those that are scored and compressed."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, KeptLayer))

    @property
    def is_ragged(self) -> bool:
        """Whether only attention of our own can read it: see the module's first lines."""
        return any(layer.hidden is not None for layer in self._full_layers)

    @property
    def num_kept_tokens(self) -> int:
        """Kept tokens, averaged over rows, KV heads and full-attention layers, rounded.

        Padding counts, unless the cache is ragged.
        """
        if self.is_ragged:
            counts = torch.cat([layer.num_kept().flatten() for layer in self._full_layers])
            return round(counts.double().mean().item())
        lengths = [layer.kept_len for layer in self.layers if isinstance(layer, KeptLayer)]
        return round(sum(lengths) / len(lengths)) if lengths else 0

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens that full-attention layers saw and did not keep, averaged, rounded."""
        slides_only = not any(isinstance(layer, KeptLayer) for layer in self.layers)
        return 0 if slides_only else self.get_seq_length() - self.num_kept_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory allocated."""
        return sum(
            layer.nbytes
            if isinstance(layer, KeptLayer)
            else sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
            for layer in self.layers
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen: the position of the next one."""
        return int(super().get_seq_length(layer_idx))

    def take_tail(self, first_token: int, *, fingerprint: str) -> CompressedKV:
        """Return the KV of all tokens from position ``first_token`` on, kept whole. A copy.

        Args:
            first_token: These tokens must have come through the model, uncompressed.
            fingerprint: Of the model, for the span's identity.

        Raises:
            InvalidInputError: There is no such token, or some of them were dropped.
        """
        num_tokens = self.get_seq_length() - first_token
        if num_tokens < 1:
            raise InvalidInputError(
                f"no token at or after {first_token}; {self.get_seq_length()} were seen"
            )
        whole_from = max(
            (layer.whole_from for layer in self.layers if isinstance(layer, KeptLayer)), default=0
        )
        if first_token < whole_from:
            raise InvalidInputError(
                f"tokens before {whole_from} were compressed; "
                f"the tail cannot begin at {first_token}"
            )
        held = [_held(layer, num_tokens) for layer in self.layers]
        index_lengths = sorted({keys.shape[1] for keys, _ in held})
        shape = SpanShape(
            fingerprint=fingerprint,
            policy=WHOLE,
            first_token=first_token,
            num_tokens=num_tokens,
            dtype=str(held[0][0].dtype).removeprefix("torch."),
            layers=tuple(
                LayerShape(
                    lengths=(keys.shape[1],) * keys.shape[0],
                    key_dim=keys.shape[2],
                    value_dim=values.shape[2],
                    index_list=index_lengths.index(keys.shape[1]),
                    is_sliding=layer.is_sliding,
                )
                for layer, (keys, values) in zip(self.layers, held, strict=True)
            ),
            index_lengths=tuple(index_lengths),
            has_scores=False,
        )
        span = CompressedKV.empty(shape, device=held[0][0].device)
        end = self.get_seq_length()
        for out, (keys, values) in zip(span.layers, held, strict=True):
            out.keys.view(keys.shape).copy_(keys)
            out.values.view(values.shape).copy_(values)
            torch.arange(end - keys.shape[1], end, out=out.positions)
        return span

    @property
    def _full_layers(self) -> list[KeptLayer]:
        return [layer for layer in self.layers if isinstance(layer, KeptLayer)]

    def _append(self, segments: Sequence[CompressedKV], *, device: torch.device | str) -> None:
        seen = self.get_seq_length()
        for segment in segments:
            segment.check_follows(num_tokens=seen, num_layers=len(self.layers))
            seen += segment.num_tokens
        num_tokens = [segment.num_tokens for segment in segments]
        for index, layer in enumerate(self.layers):
            # One layer's copy at a time, where the device is another.
            parts = [_moved(segment.layers[index], device) for segment in segments]
            if parts[-1].is_sliding:
                keys, values = (part[None].clone() for part in parts[-1].by_head())
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values, layer.cumulative_length = keys, values, seen
            elif all(part.is_uniform for part in parts):
                for part, new in zip(parts, num_tokens, strict=True):
                    keys, values = (held[None] for held in part.by_head())
                    layer.append(keys, values, seen=new)
            else:
                layer.append_heads(parts, num_tokens)
        lengths = {layer.kept_len for layer in self._full_layers}
        if self.is_ragged or len(lengths) > 1:
            # The model makes one mask for all of them, after the first one's length.
            for layer in self._full_layers:
                layer.hide_nothing()


def _packed(rows: Sequence[Sequence[torch.Tensor]], *, end: int, capacity: int) -> torch.Tensor:
    """Return a slab ``(1, num_kv_heads, capacity, dim)`` whose heads end in column ``end``.

    Args:
        rows: By part, by head: ``(n, dim)`` each. Parts follow one another.
        end: At least the tokens of each head.
        capacity: At least ``end``.
    """
    like = rows[0][0]
    # Not an inference tensor: see KeptLayer._with_room.
    with torch.inference_mode(False):
        slab = torch.empty(
            1, len(rows[0]), capacity, like.shape[-1], dtype=like.dtype, device=like.device
        )
    for head, parts in enumerate(zip(*rows, strict=True)):
        stop = end
        for part in reversed(parts):
            slab[0, head, stop - len(part) : stop] = part
            stop -= len(part)
        slab[0, head, :stop] = 0  # zero weight times garbage may be NaN
    return slab


def _hidden(layer: KeptLayer, length: int) -> torch.Tensor:
    """Return ``(1, num_kv_heads)``: what is hidden in a row padded to ``length`` columns."""
    assert layer.keys is not None
    hidden = layer.hidden
    if hidden is None:
        hidden = torch.zeros(layer.keys.shape[:2], dtype=torch.int64, device=layer.keys.device)
    return hidden + (length - layer.kept_len)


def _held(layer: Any, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last tokens' ``(num_kv_heads, n, dim)``; of a sliding layer, all that it holds."""
    keys, values = layer.keys, layer.values
    if layer.is_sliding:
        return keys[0], values[0]
    return keys[0, :, -num_tokens:], values[0, :, -num_tokens:]


def _moved(layer: LayerKV, device: torch.device | str) -> LayerKV:
    keys = layer.keys.to(device)
    if keys is layer.keys:
        return layer
    return replace(layer, keys=keys, values=layer.values.to(device))


def _longest(segment: CompressedKV) -> int:
    return max(max(layer.lengths) for layer in segment.layers)


def _pad_left(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack ``(1, num_kv_heads, n, dim)`` of different ``n``; padding is 0."""
    longest = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows])


def _own_layer(layer: Any, index: int) -> Any:
    if type(layer) is DynamicLayer:
        return KeptLayer()
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer
    raise InvalidInputError(
        f"layer {index} of the model keeps its state as {type(layer).__name__}; "
        "full attention and sliding windows are supported"
    )
