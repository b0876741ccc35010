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


def best(units: Sequence[Sequence[tuple[int, int]]], rows: Sequence[Row], budget: int) -> set:
    """Return ``budget`` of the tokens (row, index): whole units, then the best of the next."""

    def score(token: tuple[int, int]) -> float:
        return rows[token[0]][token[1]][1]

    taken: set[tuple[int, int]] = set()
    for own in sorted(units, key=lambda own: -sum(map(score, own))):
        room = budget - len(taken)
        taken |= set(own if len(own) <= room else sorted(own, key=lambda t: -score(t))[:room])
        if len(own) > room:
            break
    return taken


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
        last = [i for i in range(len(row)) if row[i][0] >= num_tokens - window]
        last = last[max(0, len(last) - budget) :]
        first = [i for i in range(len(row)) if row[i][0] < sink and i not in last]
        first = first[: budget - len(last)]
        always = set(first + last)
        body = [i for i in range(len(row)) if i not in always]
        units = [
            [(r, body[i]) for i in own]
            for own in slow_units([row[i][0] for i in body], unit=unit, is_sentence=is_sentence)
        ]
        own = best(units, rows, int(floor * (budget - len(always))))
        kept |= {(r, i) for i in always} | own
        competing += [[token for token in tokens if token not in own] for tokens in units]
    kept |= best([own for own in competing if own], rows, budget * len(rows) - len(kept))
    return [[row[i][0] for i in range(len(row)) if (r, i) in kept] for r, row in enumerate(rows)]
