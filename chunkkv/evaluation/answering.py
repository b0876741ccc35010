"""Greedy answers of many compressed caches at once.

A decoding step reads the model's weights once for all rows of a batch, whatever was kept for each
of them. Rows that wait are sorted by how many tokens they still have to read and by how much was
kept, so that little of a batch is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from chunkkv.compressed import CompressedKV
from chunkkv.prefill import generation_inputs

DEFAULT_BATCH_BYTES: Final = 1 << 30
MAX_ROWS: Final = 128


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One question to one compressed cache.

    Attributes:
        tag: Whatever the caller knows it by.
        span: The compressed KV, from position 0 on.
        token_ids: The whole prompt; more tokens than the span's.
        max_new_tokens: At most so many are generated; at least 1.
        is_complete: Told the tokens generated so far, whether more would change nothing.
    """

    tag: Any
    span: CompressedKV
    token_ids: tuple[int, ...]
    max_new_tokens: int
    is_complete: Callable[[list[int]], bool] = lambda generated: False

    @property
    def num_pending(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.token_ids) - self.span.num_tokens

    @property
    def longest(self) -> int:
        """Tokens of the layer and head that kept most."""
        return max(max(layer.lengths) for layer in self.span.layers)


@torch.no_grad()
def answer(model: Any, rows: list[Row]) -> list[list[int]]:
    """Return the tokens that the model generates for each row, greedily, without an end token.

    Args:
        model: The model that computed the spans.
        rows: All with equally many pending tokens.
    """
    ends = end_token_ids(model)
    inputs = generation_inputs(
        model, [[row.span] for row in rows], [torch.tensor(row.token_ids) for row in rows]
    )
    pending = rows[0].num_pending
    ids, positions = inputs["input_ids"][:, -pending:], inputs["position_ids"][:, -pending:]
    mask, cache = inputs["attention_mask"], inputs["past_key_values"]
    generated: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    while True:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = logits.argmax(dim=-1, keepdim=True)
        going = []
        for place, (index, token) in enumerate(zip(active, ids[:, 0].tolist(), strict=True)):
            if token in ends:
                continue
            generated[index].append(token)
            row = rows[index]
            if len(generated[index]) < row.max_new_tokens and not row.is_complete(generated[index]):
                going.append(place)
        if not going:
            return generated
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if len(going) < len(active):
            which = torch.tensor(going, device=ids.device)
            active = [active[place] for place in going]
            ids, positions, mask = ids[which], positions[which], mask[which]
            cache.batch_select_indices(which)


def end_token_ids(model: Any) -> frozenset[int]:
    """Return the tokens that end an answer, as the model's generation settings say."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


@dataclass(slots=True)
class Answering:
    """Takes rows as they come, and answers them in batches of bounded memory.

    Attributes:
        model: Answers.
        batch_bytes: What the rows that wait may hold together, and about what a batch's cache
            takes.
    """

    model: Any
    batch_bytes: int = DEFAULT_BATCH_BYTES
    _waiting: dict[tuple[int, Any], list[Row]] = field(default_factory=dict)

    def add(self, row: Row, *, like: Any = None) -> Iterator[tuple[Row, list[int]]]:
        """Take one row; yield those that were answered to make room.

        Args:
            row: To be answered.
            like: Rows with the same are of about the same length.
        """
        bucket = self._waiting.setdefault((row.num_pending, like), [])
        bucket.append(row)
        if len(bucket) >= MAX_ROWS or self._size(bucket) > self.batch_bytes:
            yield from self._answer((row.num_pending, like))
        elif sum(map(self._size, self._waiting.values())) > 2 * self.batch_bytes:
            yield from self._answer(max(self._waiting, key=lambda key: self._size_of(key)))

    def finish(self) -> Iterator[tuple[Row, list[int]]]:
        """Yield what is left."""
        for key in sorted(self._waiting, key=repr):
            yield from self._answer(key)

    def _answer(self, key: tuple[int, Any]) -> Iterator[tuple[Row, list[int]]]:
        rows = self._waiting.pop(key, [])
        if rows:
            yield from zip(rows, answer(self.model, rows), strict=True)

    def _size_of(self, key: tuple[int, Any]) -> int:
        return self._size(self._waiting[key])

    @staticmethod
    def _size(rows: list[Row]) -> int:
        """Bytes of a batch of these rows: each as long as the longest."""
        if not rows:
            return 0
        layers = rows[0].span.shape.layers
        per_token = sum(len(layer.lengths) * (layer.key_dim + layer.value_dim) for layer in layers)
        longest = max(row.longest + row.num_pending + row.max_new_tokens for row in rows)
        return len(rows) * longest * per_token * rows[0].span.shape.torch_dtype.itemsize
