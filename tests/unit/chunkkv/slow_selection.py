"""Selection as Algorithms 1 and 2 of ChunkKV say it, token by token: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from chunkkv import CompressionPolicy

Scores = Sequence[float]


@dataclass(frozen=True)
class Unit:
    """Tokens of one row that are kept or dropped together; lower tiers come first."""

    row: int
    tier: int
    score: float
    tokens: Sequence[int]


def slow_rows(
    rows: Sequence[Scores],
    budgets: Sequence[int],
    *,
    unit_tokens: int,
    window_size: int,
    sink_tokens: int,
    is_shared: bool = False,
    floor: float = 0.0,
    gating: float = 0.0,
    ends: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Return the positions that each row keeps."""
    num_tokens = len(rows[0])
    kept: list[list[int]] = []
    rooms: list[int] = []
    units: list[list[Unit]] = []
    for row, (scores, budget) in enumerate(zip(rows, budgets, strict=True)):
        budget = min(budget, num_tokens)
        window = [p for p in range(num_tokens) if p >= num_tokens - window_size]
        sink = [p for p in range(num_tokens) if p < sink_tokens and p not in window]
        kept.append((list(reversed(window)) + sink)[:budget])
        rooms.append(budget - len(kept[-1]))
        cut = _cut(num_tokens, unit_tokens, ends)
        body = [[p for p in unit if p not in kept[-1]] for unit in cut]
        units.append(_units(row, scores, body, gating=gating, by_mean=ends is not None))
    if is_shared:
        joined = []
        for own, room in zip(units, rooms, strict=True):
            joined += _with_floor(own, math.floor(room * Fraction(str(floor))))
        _take(joined, sum(rooms), rows, kept)
    else:
        for own, room in zip(units, rooms, strict=True):
            _take(own, room, rows, kept)
    return [sorted(own) for own in kept]


def _cut(num_tokens: int, unit_tokens: int, ends: Sequence[bool] | None) -> list[list[int]]:
    units: list[list[int]] = [[]]
    for p in range(num_tokens):
        units[-1].append(p)
        if len(units[-1]) == unit_tokens or (ends is not None and ends[p]):
            units.append([])
    return [unit for unit in units if unit]


def _units(
    row: int, scores: Scores, body: Sequence[Sequence[int]], *, gating: float, by_mean: bool
) -> list[Unit]:
    """Return the units in their order, then what gating took from them, in the same order."""
    best, others = [], []
    for tokens in body:
        held = len(tokens)
        total = sum(scores[p] for p in tokens)
        if gating > 0 and held > 0 and total > 0:
            shares = [scores[p] / total for p in tokens if scores[p] > 0]
            entropy = -sum(share * math.log(share) for share in shares)
            if entropy < gating * math.log(held):
                held = min(held, math.ceil(math.exp(entropy) - 1e-3))
        elif gating > 0 and held > 0:  # nothing scores: as concentrated as can be
            held = 1 if held > 1 else held
        by_score = sorted(tokens, key=lambda p: -scores[p])
        best.append(sorted(by_score[:held]))
        others.append(sorted(by_score[held:]))
    return [
        Unit(row, tier, _score([scores[p] for p in tokens], by_mean=by_mean), tokens)
        for tier, group in enumerate([best, others])
        for tokens in group
        if tokens
    ]


def _score(scores: Scores, *, by_mean: bool) -> float:
    return sum(scores) / len(scores) if by_mean else sum(scores)


def _in_order(units: Sequence[Unit]) -> list[Unit]:
    # Python's sort is stable: of equals, the earlier stays in front.
    return sorted(units, key=lambda unit: (unit.tier, -unit.score))


def _with_floor(units: Sequence[Unit], room: int) -> list[Unit]:
    first = set()
    for unit in _in_order(units):
        room -= len(unit.tokens)
        if room < 0:
            break
        first.add(id(unit))
    return [replace(unit, tier=-1) if id(unit) in first else unit for unit in units]


def _take(units: Sequence[Unit], room: int, rows: Sequence[Scores], kept: list[list[int]]) -> None:
    for unit in _in_order(units):
        scores = rows[unit.row]
        kept[unit.row] += sorted(unit.tokens, key=lambda p: -scores[p])[:room]
        room -= len(unit.tokens)
        if room <= 0:
            return


def slow_select(
    scores: Sequence[Sequence[Scores]],
    policy: CompressionPolicy,
    ends: Sequence[bool] | None = None,
) -> list[list[list[int]]]:
    """Return the positions that each KV head of each layer keeps.

    Args:
        scores: By layer, by KV head, by token: of all layers.
        policy: What to keep.
        ends: Which tokens end a sentence.
    """
    num_layers, num_heads, num_tokens = len(scores), len(scores[0]), len(scores[0][0])

    def summed(voters: Sequence[Scores]) -> Scores:
        return [sum(voter[p] for voter in voters) for p in range(num_tokens)]

    rows: list[Scores]
    if policy.scope == "head":
        rows = [head for heads in scores for head in heads]
    elif policy.scope == "global":
        rows = [summed([head for heads in scores for head in heads])]
    else:
        rows = [summed(heads) for heads in scores]
    shares = slow_shares(policy, num_tokens, num_layers)
    if policy.scope == "global":
        shares = shares[:1]
    kept = slow_rows(
        rows,
        [share for share in shares for _ in range(len(rows) // len(shares))],
        unit_tokens=1 if policy.unit == "token" else policy.chunk_size,
        window_size=policy.window_size,
        sink_tokens=policy.sink_tokens,
        is_shared=policy.spread == "adaptive",
        floor=policy.head_floor,
        gating=policy.gating,
        ends=ends if policy.unit == "sentence" else None,
    )
    if policy.scope == "head":
        return [kept[layer * num_heads : (layer + 1) * num_heads] for layer in range(num_layers)]
    interval = {"group": policy.reuse_interval, "global": num_layers}.get(policy.scope, 1)
    return [[kept[layer - layer % interval]] * num_heads for layer in range(num_layers)]


def slow_shares(policy: CompressionPolicy, num_tokens: int, num_layers: int) -> list[int]:
    """Return the tokens that a list of each layer keeps."""
    budget = policy.budget(num_tokens)
    if policy.spread != "pyramid" or num_layers == 1:
        return [budget] * num_layers
    always = min(budget, policy.window_size + policy.sink_tokens)
    share = Fraction(budget - always)
    most = min(2 * share - share / 20, Fraction(num_tokens - always))
    least = 2 * share - most
    ideal = [most + (least - most) * layer / (num_layers - 1) for layer in range(num_layers)]
    shares, given = [], 0
    for layer in range(num_layers):
        upto = math.floor(sum(ideal[: layer + 1]))
        shares.append(always + upto - given)
        given = upto
    return shares
