"""Pruning of stored rows as its rules say it, token by token: slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Row = Sequence[tuple[int, float]]
"""Kept tokens: place and score, ascending."""


def slow_units(places: Sequence[int], *, unit: int, is_sentence: bool) -> list[list[int]]:
    """Return the indices that are kept or dropped together."""
    units: list[list[int]] = []
    for index, place in enumerate(places):
        if index == 0:
            goes_on = False
        elif is_sentence:
            goes_on = place == places[index - 1] + 1 and len(units[-1]) < unit
        else:
            goes_on = place // unit == places[index - 1] // unit
        if goes_on:
            units[-1].append(index)
        else:
            units.append([index])
    return units


def always_kept(row: Row, budget: int, num_tokens: int, *, window: int, sink: int) -> set[int]:
    """Return the indices of window and sink, as far as the budget goes."""
    last = [i for i in range(len(row)) if row[i][0] >= num_tokens - window]
    last = last[max(0, len(last) - budget) :]
    first = [i for i in range(len(row)) if row[i][0] < sink and i not in last]
    return {*first[: budget - len(last)], *last}


def in_order(
    units: Sequence[list[tuple[int, int]]], rows: Sequence[Row], *, by_mean: bool
) -> list[list[tuple[int, int]]]:
    """Return units of tokens (row, index), the best first."""

    def score(unit: list[tuple[int, int]]) -> float:
        total = sum(rows[row][index][1] for row, index in unit)
        return total / len(unit) if by_mean else total

    return sorted(units, key=lambda unit: -score(unit))


def slow_adaptive(
    rows: Sequence[Row],
    budget: int,
    num_tokens: int,
    *,
    unit: int,
    window: int,
    sink: int,
    floor: Fraction = Fraction(0),
    is_sentence: bool = False,
) -> list[list[int]]:
    """Return the places that each row keeps, ``budget`` on the average."""
    if sum(map(len, rows)) <= budget * len(rows):
        return [[place for place, _ in row] for row in rows]
    kept: set[tuple[int, int]] = set()
    competing = []
    for r, row in enumerate(rows):
        always = always_kept(row, budget, num_tokens, window=window, sink=sink)
        kept |= {(r, i) for i in always}
        body = [i for i in range(len(row)) if i not in always]
        units = [
            [(r, body[i]) for i in own]
            for own in slow_units([row[i][0] for i in body], unit=unit, is_sentence=is_sentence)
        ]
        room = int(floor * (budget - len(always)))
        for own in in_order(units, rows, by_mean=is_sentence):
            room -= len(own)
            if room < 0:
                break
            kept |= set(own)
        competing += [own for own in units if not kept & set(own)]
    for own in in_order(competing, rows, by_mean=is_sentence):
        room = budget * len(rows) - len(kept)
        kept |= set(sorted(own, key=lambda token: -rows[token[0]][token[1]][1])[:room])
    return [[row[i][0] for i in range(len(row)) if (r, i) in kept] for r, row in enumerate(rows)]
