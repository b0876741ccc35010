"""Compressing a compressed span further, from what was stored with it. No model.

The positions say where each kept token stood, the scores what it was chosen by, and the policy's
name which rules chose it; so fewer tokens are chosen by the same rules. What the first selection
dropped is gone: a chunk that it cut counts by what is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from chunkkv.compressed import CompressedKV, LayerKV, LayerShape, SpanShape
from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy, Precision

_RULES: Final = ("unit", "window", "sink")


def recompress(
    kv: CompressedKV,
    *,
    max_kept_tokens: int | None = None,
    keep_ratio: float | None = None,
    precision: Precision | None = None,
) -> CompressedKV:
    """Return the span with at most as many tokens in each list of positions, in a precision.

    The last tokens of the observation window stay, then the sink, as far as the budget goes; the
    rest goes to the chunks of the original grid in the order of their kept tokens' summed scores,
    and the first that does not fit any more gives its best tokens. Layers with a sliding window
    stay as the model holds them. The span keeps its policy's name: the rules are still those.

    Args:
        kv: On the CPU. One that has no scores (``is_prunable``) keeps all its tokens.
        max_kept_tokens: Tokens that each list keeps at most, at least 1.
        keep_ratio: The same as a fraction of the span's tokens, kept or not; exclusive with
            ``max_kept_tokens``. Neither: all of them stay.
        precision: How it is stored from now on; ``None``: as before. What was lost is not found
            again.

    Raises:
        InvalidPolicyError: A value is out of range, or both budgets are given.
        InvalidInputError: Scores are not finite.
    """
    shape = replace(kv.shape, precision=precision or kv.shape.precision)
    if max_kept_tokens is None and keep_ratio is None:
        return CompressedKV(shape, kv.memory)
    budget = CompressionPolicy(max_kept_tokens=max_kept_tokens, keep_ratio=keep_ratio).budget(
        kv.num_tokens
    )
    rules = _rules(kv.shape)
    if rules is None or budget >= _longest(kv):
        return CompressedKV(shape, kv.memory)
    return _pruned(kv, shape, rules, budget)


def is_prunable(shape: SpanShape) -> bool:
    """Whether tokens can be dropped: there are scores, and a policy whose rules are known."""
    return _rules(shape) is not None


@dataclass(frozen=True, slots=True)
class _Rules:
    """What chose the kept tokens, in tokens."""

    unit: int
    window: int
    sink: int


def _rules(shape: SpanShape) -> _Rules | None:
    """Read the rules out of the policy's name; ``None``: it has none, or the scores are missing."""
    named = dict(word.partition("=")[::2] for word in shape.policy.split())
    if not shape.has_scores or not all(named.get(name, "").isdecimal() for name in _RULES):
        return None
    rules = _Rules(**{name: int(named[name]) for name in _RULES})
    return rules if rules.unit else None


def _longest(kv: CompressedKV) -> int:
    return max((max(layer.lengths) for layer in kv.layers if not layer.is_sliding), default=0)


def _pruned(kv: CompressedKV, shape: SpanShape, rules: _Rules, budget: int) -> CompressedKV:
    keys = [(layer.index_list, view.is_sliding, _rows(view)) for layer, view in _layers(kv)]
    chosen: dict[tuple[int, bool, tuple[int, ...]], list[torch.Tensor]] = {}
    for key, view in zip(keys, kv.layers, strict=True):
        if key not in chosen:
            chosen[key] = _kept_rows(view, kv.shape, rules, budget)
    lists = list(chosen)
    layers = tuple(
        replace(layer, lengths=_lengths(chosen[key], layer), index_list=lists.index(key))
        for key, layer in zip(keys, kv.shape.layers, strict=True)
    )
    index_lengths = tuple(sum(map(len, rows)) for rows in chosen.values())
    pruned = CompressedKV.empty(replace(shape, layers=layers, index_lengths=index_lengths))
    for key, view, out in zip(keys, kv.layers, pruned.layers, strict=True):
        _gather(view, chosen[key], out)
    return pruned


def _layers(kv: CompressedKV) -> Sequence[tuple[LayerShape, LayerKV]]:
    return list(zip(kv.shape.layers, kv.layers, strict=True))


def _rows(view: LayerKV) -> tuple[int, ...]:
    """Return the entries of each row of a layer's index list: one row for all heads, or each's."""
    entries = view.positions.shape[0]
    return (entries,) if set(view.lengths) == {entries} else view.lengths


def _lengths(rows: list[torch.Tensor], layer: LayerShape) -> tuple[int, ...]:
    if len(rows) == len(layer.lengths):
        return tuple(map(len, rows))
    return (len(rows[0]),) * len(layer.lengths)


def _kept_rows(view: LayerKV, shape: SpanShape, rules: _Rules, budget: int) -> list[torch.Tensor]:
    """Return which entries of each row are kept, ascending."""
    lengths = _rows(view)
    if view.is_sliding:
        return [torch.arange(length) for length in lengths]
    assert view.scores is not None  # only spans that have them are pruned
    places = [
        positions.long() - shape.first_token
        for positions in torch.split(view.positions, list(lengths))
    ]
    return [
        _kept(places, scores, shape.num_tokens, rules, budget)
        for places, scores in zip(places, torch.split(view.scores, list(lengths)), strict=True)
    ]


def _kept(
    places: torch.Tensor, scores: torch.Tensor, num_tokens: int, rules: _Rules, budget: int
) -> torch.Tensor:
    """Return which ``budget`` tokens of one row are kept.

    Args:
        places: ``(kept,)`` int64, ascending: where in the span each token stood.
        scores: ``(kept,)``.
        num_tokens: Of the span.
        rules: Say which ones.
        budget: At least 1.
    """
    kept = len(places)
    if budget >= kept:
        return torch.arange(kept)
    if not bool(torch.isfinite(scores).all()):
        raise InvalidInputError("stored scores are not finite")
    num_window = min(int((places >= num_tokens - rules.window).sum()), budget)
    num_sink = min(int((places < rules.sink).sum()), budget - num_window)
    start, stop = num_sink, kept - num_window
    best = _best(
        places[start:stop] // rules.unit, scores[start:stop], budget - num_window - num_sink
    )
    return torch.cat([torch.arange(start), start + best, torch.arange(stop, kept)])


def _best(chunks: torch.Tensor, scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Return ``budget`` indices, ascending, of tokens with these chunks and scores.

    Args:
        chunks: ``(n,)`` int64, ascending: the chunk of each token.
        scores: ``(n,)``.
        budget: 0 to ``n``.
    """
    _, of_token, sizes = torch.unique_consecutive(chunks, return_inverse=True, return_counts=True)
    sums = scores.new_zeros(len(sizes)).index_add(0, of_token, scores)
    order = sums.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    # Chunks by rank, inside a chunk its best tokens first: the first ones of that are kept.
    by_score = scores.sort(descending=True, stable=True).indices
    by_chunk = rank[of_token[by_score]].sort(stable=True).indices
    ranked = by_score[by_chunk][:budget]
    return ranked.sort().values


def _gather(view: LayerKV, rows: list[torch.Tensor], out: LayerKV) -> None:
    """Copy what is kept of a layer; ``rows`` are entries of each row of its index list."""
    is_shared = len(rows) < len(view.lengths)
    by_head = rows * len(view.lengths) if is_shared else rows
    index = _joined(by_head, view.lengths)
    torch.index_select(view.keys, 0, index, out=out.keys)
    torch.index_select(view.values, 0, index, out=out.values)
    entries = rows[0] if is_shared else _joined(rows, _rows(view))
    torch.index_select(view.positions, 0, entries, out=out.positions)
    if view.scores is not None and out.scores is not None:
        torch.index_select(view.scores, 0, entries, out=out.scores)


def _joined(rows: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Return indices into rows of these lengths as indices into all of them, end to end."""
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    return torch.cat([row + start for row, start in zip(rows, starts, strict=True)])
