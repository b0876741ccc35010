"""Spans whose heads and layers keep different numbers of tokens, cut by hand out of whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from chunkkv import CompressedKV

Rows = Sequence[Sequence[Sequence[int]]]
"""By full-attention layer, by KV head: places in the span, ascending."""


def random_rows(lengths: Sequence[Sequence[int]], num_tokens: int, *, seed: int = 0) -> Rows:
    """Return random places, ``lengths[layer][head]`` of them, among ``num_tokens``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            sorted(torch.randperm(num_tokens, generator=generator)[:length].tolist())
            for length in layer
        ]
        for layer in lengths
    ]


def ragged_span(whole: CompressedKV, rows: Rows, *, policy: str = "by hand") -> CompressedKV:
    """Return what ``rows`` keep of a span in which every token is kept; sliding layers stay.

    Scores, if the span has some, are those that it has for the kept tokens: one list for the
    heads of a layer makes a list for each.
    """
    kept = iter(rows)
    by_layer = [None if layer.is_sliding else next(kept) for layer in whole.layers]
    shape = replace(
        whole.shape,
        policy=policy,
        layers=tuple(
            replace(
                own,
                index_list=index,
                lengths=own.lengths if heads is None else tuple(map(len, heads)),
            )
            for index, (own, heads) in enumerate(zip(whole.shape.layers, by_layer, strict=True))
        ),
        index_lengths=tuple(
            len(layer.positions) if heads is None else sum(map(len, heads))
            for layer, heads in zip(whole.layers, by_layer, strict=True)
        ),
    )
    span = CompressedKV.empty(shape)
    for source, out, heads in zip(whole.layers, span.layers, by_layer, strict=True):
        num_heads, held = len(source.lengths), source.lengths[0]
        places = [range(held)] * num_heads if heads is None else heads
        index = torch.tensor([h * held + p for h in range(num_heads) for p in places[h]]).long()
        out.keys.copy_(source.keys[index])
        out.values.copy_(source.values[index])
        # Sliding layers, and lists that heads share, have one entry for all heads.
        entries = index % len(source.positions)
        entries = entries[: len(out.positions)]
        out.positions.copy_(source.positions[entries])
        if out.scores is not None and source.scores is not None:
            out.scores.copy_(source.scores[entries])
    return span
