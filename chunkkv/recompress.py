"""Compressing a compressed span further, from what was stored with it. No model.

The positions say where each kept token stood, the scores what it was chosen by, and the policy's
name which rules chose it; so fewer tokens are chosen by the same rules. What the first selection
dropped is gone: a chunk that it cut counts by what is left of it.

Where sentences end is not stored. Of a span that was cut at sentences, kept tokens that follow one
another make a unit, of as many tokens as a sentence has at most; so neighbours that were both kept
may share one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

import torch

from chunkkv.compressed import CompressedKV, LayerKV, LayerShape, SpanShape
from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy, Precision

_RULES: Final = ("unit", "window", "sink")
_SPREADS: Final = ("uniform", "pyramid", "adaptive")
_CUTS: Final = ("chunk", "sentence")
_FLOOR: Final = "[0-9]{1,10}(/[1-9][0-9]{0,9})?"


def recompress(
    kv: CompressedKV,
    *,
    max_kept_tokens: int | None = None,
    keep_ratio: float | None = None,
    precision: Precision | None = None,
) -> CompressedKV:
    """Return the span with fewer tokens in its lists of positions, in a precision.

    How many each list keeps follows the policy's spread: ``uniform``, no more than the budget;
    ``pyramid``, window, sink, and a share of what the lists' budgets leave, by what it holds;
    ``adaptive``, what the ranking gives it in which the units of all lists compete for that budget.
    In each list, the last tokens of the observation window stay, then the sink, as far as the
    budget goes; the rest goes to the chunks of the original grid in the order of their kept tokens'
    summed scores (sentences: average), and the first that does not fit any more gives its best
    tokens. With ``adaptive``, a list's floor of the budget goes to its best units before that.
    Gating is not done again. Layers with a sliding window stay as the model holds them. The span
    keeps its policy's name: the rules are still those.

    Args:
        kv: On the CPU. One that has no scores (``is_prunable``) keeps all its tokens.
        max_kept_tokens: Tokens that each list keeps at most, at least 1; the lists' average, with
            other spreads than ``uniform``.
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
    if rules is None:
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
    spread: str
    floor: Fraction
    cut: str


def _rules(shape: SpanShape) -> _Rules | None:
    """Read the rules out of the policy's name; ``None``: it has none, or the scores are missing."""
    named = dict(word.partition("=")[::2] for word in shape.policy.split())
    # Not the number of digits that nobody's policy has: names come out of a store.
    is_named = all(re.fullmatch("[0-9]{1,10}", named.get(name, "")) for name in _RULES)
    if not shape.has_scores or not is_named:
        return None
    spread, cut = named.get("spread", "uniform"), named.get("cut", "chunk")
    floor = named.get("floor", "0")
    if spread not in _SPREADS or cut not in _CUTS or not re.fullmatch(_FLOOR, floor):
        return None
    unit, window, sink = (int(named[name]) for name in _RULES)
    if unit < 1 or Fraction(floor) > 1:
        return None
    return _Rules(unit, window, sink, spread, Fraction(floor), cut)


_List = tuple[int, bool, tuple[int, ...]]  # an index list, as layers of one kind read it


def _pruned(kv: CompressedKV, shape: SpanShape, rules: _Rules, budget: int) -> CompressedKV:
    keys = [(layer.index_list, view.is_sliding, _rows(view)) for layer, view in _layers(kv)]
    views: dict[_List, LayerKV] = {}  # of each list, the first layer that reads it
    for key, view in zip(keys, kv.layers, strict=True):
        views.setdefault(key, view)
    lists = list(views)
    rows = [row for key in lists for row in _stored(views[key], kv.shape)]
    kept = _kept_of_all(rows, kv.num_tokens, rules, budget)
    if all(len(own) == len(row.places) for own, row in zip(kept, rows, strict=True)):
        return CompressedKV(shape, kv.memory)
    left = iter(kept)
    chosen = {
        key: [torch.arange(n) if view.is_sliding else next(left) for n in _rows(view)]
        for key, view in views.items()
    }
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


@dataclass(frozen=True, slots=True)
class _Row:
    """What is stored of one row of positions.

    Attributes:
        places: ``(kept,)`` int64, ascending: where in the span each token stood.
        scores: ``(kept,)``.
    """

    places: torch.Tensor
    scores: torch.Tensor

    def always(self, num_tokens: int, rules: _Rules, budget: int) -> tuple[int, int]:
        """Return how many of the first and of the last tokens stay, whatever their scores."""
        num_window = min(int((self.places >= num_tokens - rules.window).sum()), budget)
        return min(int((self.places < rules.sink).sum()), budget - num_window), num_window

    def units(self, rules: _Rules) -> torch.Tensor:
        """Return ``(kept,)`` int64, ascending: which tokens are kept or dropped together."""
        if rules.cut == "chunk":
            return self.places // rules.unit
        order = torch.arange(len(self.places))
        begins = torch.ones(len(order), dtype=torch.bool)
        begins[1:] = self.places.diff() != 1
        first = order[begins][begins.cumsum(0) - 1]  # of each token's run
        return ((order - first) % rules.unit == 0).cumsum(0)

    def part(self, start: int, stop: int) -> _Row:
        """Return the tokens from ``start`` to ``stop``."""
        return _Row(self.places[start:stop], self.scores[start:stop])


def _stored(view: LayerKV, shape: SpanShape) -> list[_Row]:
    """Return the rows of a layer's index list, of which tokens can be dropped."""
    if view.is_sliding:
        return []
    assert view.scores is not None  # only spans that have them are pruned
    lengths = list(_rows(view))
    places = torch.split(view.positions.long() - shape.first_token, lengths)
    return [_Row(*row) for row in zip(places, torch.split(view.scores, lengths), strict=True)]


def _kept_of_all(
    rows: Sequence[_Row], num_tokens: int, rules: _Rules, budget: int
) -> list[torch.Tensor]:
    """Return which entries of each row are kept, ascending.

    Args:
        rows: Of all lists.
        num_tokens: Of the span.
        rules: Say which ones.
        budget: Entries of each row, at most or on the average; at least 1.
    """
    held = [len(row.places) for row in rows]
    budgets = [budget] * len(rows)
    if rules.spread == "pyramid":
        budgets = _shares(rows, num_tokens, rules, budget)
    is_shared = rules.spread == "adaptive"
    fits = all(n <= most for n, most in zip(held, budgets, strict=True))
    if fits or (is_shared and sum(held) <= sum(budgets)):
        return [torch.arange(n) for n in held]
    if not all(bool(torch.isfinite(row.scores).all()) for row in rows):
        raise InvalidInputError("stored scores are not finite")
    if is_shared:
        return _kept_together(rows, num_tokens, rules, budget)
    return [_kept(row, num_tokens, rules, own) for row, own in zip(rows, budgets, strict=True)]


def _shares(rows: Sequence[_Row], num_tokens: int, rules: _Rules, budget: int) -> list[int]:
    """Return ``budget`` a row shared out: window and sink, and the rest by what each has of it."""
    held = [len(row.places) for row in rows]
    always = [sum(row.always(num_tokens, rules, budget)) for row in rows]
    more, given = sum(held) - sum(always), min(budget * len(rows), sum(held)) - sum(always)
    if more == 0:
        return held
    parts = [divmod((n - own) * given, more) for n, own in zip(held, always, strict=True)]
    missing = given - sum(whole for whole, _ in parts)
    first = sorted(range(len(rows)), key=lambda row: -parts[row][1])[:missing]
    return [always[row] + whole + (row in first) for row, (whole, _) in enumerate(parts)]


def _kept(row: _Row, num_tokens: int, rules: _Rules, budget: int) -> torch.Tensor:
    """Return which ``budget`` tokens of one row are kept, ascending."""
    kept = len(row.places)
    if budget >= kept:
        return torch.arange(kept)
    num_sink, num_window = row.always(num_tokens, rules, budget)
    start, stop = num_sink, kept - num_window
    body = row.part(start, stop)
    ranked = _ranked(body.units(rules), body.scores, rules)
    best = ranked.tokens[: budget - num_window - num_sink].sort().values
    return torch.cat([torch.arange(start), start + best, torch.arange(stop, kept)])


def _kept_together(
    rows: Sequence[_Row], num_tokens: int, rules: _Rules, budget: int
) -> list[torch.Tensor]:
    """Return which tokens of each row are kept, ``budget`` a row on the average, ascending.

    The rows hold more than that.
    """
    kept, units, scores = [], [], []
    num_units = 0
    for row in rows:
        num_sink, num_window = row.always(num_tokens, rules, budget)
        start, stop = num_sink, len(row.places) - num_window
        own, body = torch.ones(len(row.places), dtype=torch.bool), row.part(start, stop)
        own[start:stop] = False
        of_token = body.units(rules)
        floor = int(rules.floor * (budget - num_sink - num_window))
        own[start + _ranked(of_token, body.scores, rules).whole(floor)] = True
        kept.append(own)
        # Units of different rows are different ones.
        units.append(of_token[~own[start:stop]] + num_units)
        scores.append(row.scores[~own])
        num_units += int(of_token[-1]) + 1 if len(of_token) else 0
    room = budget * len(rows) - sum(int(own.sum()) for own in kept)
    best = _ranked(torch.cat(units), torch.cat(scores), rules).tokens[:room]
    chosen = torch.zeros(sum(map(len, units)), dtype=torch.bool)
    chosen[best] = True
    for own, more in zip(kept, torch.split(chosen, list(map(len, units))), strict=True):
        own[~own] = more
    return [own.nonzero()[:, 0] for own in kept]


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Tokens in the order in which they are kept: units by rank, inside one its best tokens first.

    Attributes:
        tokens: ``(n,)`` int64: their indices.
        ends: ``(units,)`` int64: how many of them the units up to each one have.
    """

    tokens: torch.Tensor
    ends: torch.Tensor

    def whole(self, num_tokens: int) -> torch.Tensor:
        """Return the tokens of the first units, as far as ``num_tokens`` has room for all."""
        ends = self.ends[self.ends <= num_tokens]
        return self.tokens[: int(ends[-1])] if len(ends) else self.tokens[:0]


def _ranked(units: torch.Tensor, scores: torch.Tensor, rules: _Rules) -> _Ranked:
    """Return the order of tokens with these units, ``(n,)`` int64, ascending, and scores."""
    _, of_token, sizes = torch.unique_consecutive(units, return_inverse=True, return_counts=True)
    worth = scores.new_zeros(len(sizes)).index_add(0, of_token, scores)
    if rules.cut == "sentence":
        worth /= sizes  # as selection does it: sentences differ in length
    order = worth.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    by_score = scores.sort(descending=True, stable=True).indices
    by_unit = rank[of_token[by_score]].sort(stable=True).indices
    return _Ranked(by_score[by_unit], sizes[order].cumsum(0))


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
