"""The KV of one sequence: immutable spans as they were stored, and a tail that grows.

Spans lie in memory as they came from the store; the tail takes what the model sees here. Attention
reads both where they are: it costs what is kept, whatever other sequences keep, and whatever other
layers and KV heads of this one keep. Knows no model, no store and no batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

import chunkkv
from chunkkv.cache import WHOLE
from services.decode.geometry import KVGeometry
from services.decode.limit import KVLimit, RecentQueries, chosen_tokens
from services.decode.piecewise import Heads, attention
from services.decode.tail import MAX_NEW_TOKENS, Tail

# Spans of at most so many tokens go into the tail: reading many small ones costs a call each.
GATHERED_TOKENS: Final = 256


def tail_tokens(
    kept_tokens: Sequence[int], *, new_tokens: int, limit: KVLimit | None = None
) -> int:
    """Return how many tokens a sequence's tail needs room for.

    Args:
        kept_tokens: Of each span that the sequence begins with.
        new_tokens: That the model will see.
        limit: Bounds the KV.
    """
    gathered = sum(kept for kept in kept_tokens if kept <= GATHERED_TOKENS)
    needed = gathered + new_tokens
    if limit is None:
        return needed
    return max(1, min(needed, limit.max_kv_tokens - (sum(kept_tokens) - gathered)))


class SequenceKV:
    """Keys and values that one sequence attends to.

    Attributes:
        num_tokens: Tokens seen, kept or not: the position of the next one.

    Args:
        geometry: Of the model.
        spans: What earlier turns kept, from position 0, without a gap. They stay the caller's,
            and their memory must live as long as this.
        tail_memory: ``(size,)`` uint8; at least ``tail_size_bytes`` of ``capacity``.
        capacity: Tokens that the tail has room for, small spans included.
        limit: Compresses what the tail holds when it is full; unset: it must never be.

    Raises:
        MismatchError: The spans have a gap, or another shape than the model's KV.
        InvalidInputError: The limit leaves no room behind the spans.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        spans: Sequence[chunkkv.CompressedKV],
        tail_memory: torch.Tensor,
        *,
        capacity: int,
        limit: KVLimit | None = None,
    ) -> None:
        self.num_tokens = 0
        if limit is not None:
            limit.check(sum(span.num_kept_tokens for span in spans))
        self._geometry = geometry
        self._limit = limit
        self._tail = Tail(geometry, tail_memory, capacity)
        self._spans: list[chunkkv.CompressedKV] = []
        for span in spans:
            self._add(span)
        self._num_span_tokens = self.num_tokens
        self._pieces = [self._pieces_of(layer) for layer in range(len(geometry.layers))]
        # The tail was given room for all small spans; those that did not go into it count too.
        self._capacity = capacity
        if limit is not None:
            held = sum(span.num_kept_tokens for span in self._spans)
            self._capacity = min(capacity, limit.max_kv_tokens - held)
        self._queries = None if limit is None else RecentQueries(limit.policy.window_size)

    @property
    def num_kept_tokens(self) -> int:
        """Kept tokens, averaged over KV heads and full-attention layers, rounded."""
        return sum(span.num_kept_tokens for span in self._spans) + self._tail.length

    @property
    def max_new_tokens(self) -> int:
        """Tokens that one forward pass may add."""
        if self._limit is None:
            return MAX_NEW_TOKENS
        return min(MAX_NEW_TOKENS, self._limit.step(self._capacity - self._tail.num_stored))

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

        Every layer must be called once with the same tokens, between :meth:`make_room` and
        :meth:`advance`.

        Args:
            layer: Index of the layer.
            query: ``(new, num_kv_heads, group, key_dim)``, scaled.
            key: ``(num_kv_heads, new, key_dim)``.
            value: ``(num_kv_heads, new, value_dim)``.
            softcap: Bound of the logits, if the model has one.
            sinks: ``(num_kv_heads, group)``: logits of a key that takes weight and gives nothing.

        Returns:
            ``(new, num_kv_heads, group, value_dim)``.
        """
        window = self._geometry.layers[layer].window
        keys, values = self._tail.append(layer, key, value)
        if window is not None:
            seen = slice(max(0, keys.shape[1] - key.shape[1] - window + 1), None)
            keys, values = keys[:, seen], values[:, seen]
        elif self._queries is not None:
            self._queries.add(layer, query, softcap)
        pieces = [*self._pieces[layer], (keys, values)]
        return attention(query, pieces, window=window, softcap=softcap, sinks=sinks)

    def make_room(self, num_tokens: int) -> None:
        """Compress the tail if it has no room for ``num_tokens`` more, and may be compressed.

        Args:
            num_tokens: At most :attr:`max_new_tokens`.
        """
        tail = self._tail
        if self._limit is None or tail.length + num_tokens <= self._capacity:
            return
        assert self._queries is not None  # a limit comes with them
        num_droppable = tail.length - tail.num_stored
        layers = tail.full_layers()
        kept = chosen_tokens(
            self._queries,
            [self._all_keys(layer) for layer in layers],
            layers,
            self._limit.choosing(num_droppable - self._limit.step(num_droppable)),
            num_candidates=num_droppable,
        )
        tail.select(kept, self._num_span_tokens)

    def advance(self, num_tokens: int) -> None:
        """Count tokens that went through all layers."""
        self._tail.advance(num_tokens, self.num_tokens)
        self.num_tokens += num_tokens

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
        return self._tail.seal(
            first_token=self._num_span_tokens,
            num_tokens=new,
            fingerprint=fingerprint,
            policy=WHOLE if self._limit is None else self._limit.canonical(),
        )

    def _add(self, span: chunkkv.CompressedKV) -> None:
        self._check(span)
        lengths = {kept for layer in span.layers if not layer.is_sliding for kept in layer.lengths}
        if span.num_kept_tokens <= GATHERED_TOKENS and len(lengths) == 1:
            self._tail.gather(span)
        else:
            self._spans.append(span)
        for index, layer in enumerate(span.layers):
            if layer.is_sliding:
                self._tail.replace_window(index, *layer.by_head())
        self.num_tokens += span.num_tokens

    def _pieces_of(self, layer: int) -> list[tuple[Heads, Heads]]:
        """Return the spans' keys and values, as attention takes them."""
        if self._geometry.layers[layer].window is not None:
            return []
        parts = [span.layers[layer] for span in self._spans]
        return [
            part.by_head() if part.is_uniform else _ragged(part)
            for part in parts
            if any(part.lengths)
        ]

    def _all_keys(self, layer: int) -> list[torch.Tensor]:
        """Return, for each KV head, the keys of a layer: spans first, then the tail."""
        pieces = [*(keys for keys, _ in self._pieces[layer]), self._tail.keys(layer)]
        return [torch.cat(own) for own in zip(*pieces, strict=True)]

    def _check(self, span: chunkkv.CompressedKV) -> None:
        span.check_follows(num_tokens=self.num_tokens, num_layers=len(self._geometry.layers))
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


def _ragged(layer: chunkkv.LayerKV) -> tuple[Heads, Heads]:
    """Return keys and values of each head, views."""
    lengths = list(layer.lengths)
    return torch.split(layer.keys, lengths), torch.split(layer.values, lengths)
