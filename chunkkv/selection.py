"""Selection: scores in, positions to keep out. Exact budgets, no loops over chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import torch

from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy, fraction
from chunkkv.units import Units, chunks, sentences

# Of an equal share, what the last layer gets of a pyramid. As PyramidKV's default (beta = 20).
_LEAST_SHARE: Final = Fraction(1, 20)


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions to keep in every layer of one sequence.

    Attributes:
        lists: For each list its rows: one that the layer's heads share, or one for each KV head.
            A row is ``(kept,)`` int64, ascending.
        list_of_layer: For each layer, which of ``lists`` it keeps. Layers that share positions
            share the list.
    """

    lists: tuple[tuple[torch.Tensor, ...], ...]
    list_of_layer: tuple[int, ...]


def scored_layers(policy: CompressionPolicy, num_layers: int) -> range:
    """Return the layers whose scores the policy reads; the others copy a neighbour's positions.

    Source: ChunkKV, Algorithm 2: layers with ``l mod reuse_interval == 0``.
    """
    return range(0, num_layers, policy.reuse_interval if policy.scope == "group" else 1)


def select(
    scores: torch.Tensor,
    policy: CompressionPolicy,
    *,
    num_layers: int,
    sentence_ends: torch.Tensor | None = None,
) -> Selection:
    """Choose the positions of one sequence.

    Args:
        scores: ``(num_scored_layers, num_kv_heads, seq_len)``, of ``scored_layers(policy, ...)``;
            higher is more important.
        policy: What to keep.
        num_layers: Layers of the model that take part.
        sentence_ends: ``(seq_len,)`` bool: the token ends a sentence. For unit ``sentence``.

    Raises:
        InvalidInputError: Scores are not finite, or of another number of layers, or the policy
            cuts at sentences and nothing says where they end.
    """
    expected = len(scored_layers(policy, num_layers))
    if scores.shape[0] != expected:
        raise InvalidInputError(f"scores of {scores.shape[0]} layers; this policy reads {expected}")
    if policy.scope == "global":
        scores = scores.sum(dim=(0, 1), keepdim=True)
    elif policy.scope != "head":
        scores = scores.sum(dim=1, keepdim=True)
    # After the sums, which are smaller and keep what is not finite.
    if not math.isfinite(scores.sum()):
        raise InvalidInputError("scores are not finite: the model's attention overflowed")
    seq_len = scores.shape[-1]
    rows = select_positions(
        scores.flatten(0, 1),
        _budgets(policy, seq_len, num_layers=scores.shape[0], num_rows=scores.shape[1]),
        _units(policy, seq_len, sentence_ends, scores.device),
        window_size=policy.window_size,
        sink_tokens=policy.sink_tokens,
        is_shared=policy.spread == "adaptive",
        floor=policy.head_floor,
        gating=policy.gating,
    )
    per_list = scores.shape[1]
    lists = tuple(tuple(rows[i : i + per_list]) for i in range(0, len(rows), per_list))
    interval = {"group": policy.reuse_interval, "global": num_layers}.get(policy.scope, 1)
    return Selection(lists, tuple(i // interval for i in range(num_layers)))


def select_positions(
    scores: torch.Tensor,
    budgets: Sequence[int],
    units: Units,
    *,
    window_size: int,
    sink_tokens: int,
    is_shared: bool = False,
    floor: float = 0.0,
    gating: float = 0.0,
) -> list[torch.Tensor]:
    """Return the positions to keep of each row of scores, ascending.

    The last ``window_size`` tokens are kept, then the first ``sink_tokens``, as far as a row's
    budget goes. What is left goes to whole units, cut where they meet sink or window, in the order
    of their tokens' summed scores (of equals the earlier); the first unit that does not fit any
    more gives its best tokens.

    Args:
        scores: ``(rows, seq_len)``, finite.
        budgets: Positions to keep of each row; all are kept if it is ``seq_len`` or more.
        units: What is kept or dropped together.
        window_size: See above.
        sink_tokens: See above.
        is_shared: The rows share one budget, the sum of all: their units compete in one ranking.
        floor: If they do: the fraction of its own budget that goes to a row's best units first.
        gating: A unit whose scores have less than this fraction of the entropy that equal ones
            would have, is kept with its best tokens only: as many as its perplexity, rounded up.
            The others come last.

    Returns:
        ``(min(budget, seq_len),)`` int64 for each row; of rows that share, other numbers with the
        same sum.

    Source: ChunkKV, Algorithm 1. Deviations: the budget is exact, where the paper keeps whole
    chunks only; chunks that overlap the window are cut, not kept twice. AdaKV
    (https://arxiv.org/abs/2407.11550) for ``is_shared`` and ``floor``, on chunks, and over all
    layers as KVzip (https://arxiv.org/abs/2505.23416) does.
    """
    num_rows, seq_len = scores.shape
    kept = torch.zeros(num_rows, seq_len, dtype=torch.bool, device=scores.device)
    ranked: list[int] = []  # tokens of each row that the ranking chooses
    for budget, same in itertools.groupby(min(each, seq_len) for each in budgets):
        rows = slice(len(ranked), len(ranked) + len(list(same)))
        num_window = min(budget, window_size)
        num_sink = min(budget - num_window, sink_tokens)
        kept[rows, seq_len - num_window :] = True
        kept[rows, :num_sink] = True
        ranked += [budget - num_window - num_sink] * (rows.stop - rows.start)
    if sum(ranked) > 0:
        num_ranked = torch.tensor(ranked, device=scores.device)[:, None]  # (rows, 1)
        ranking = _Ranking.of(scores, ~kept, units, gating=float(fraction(gating)))
        if is_shared:
            # In integers: as the span's name says it, by which it is compressed further.
            share = fraction(floor)
            best = ranking.with_floor(num_ranked * share.numerator // share.denominator)
            chosen = best.joined().best(num_ranked.sum().view(1, 1))
        else:
            chosen = ranking.best(num_ranked)
        if ranking.tiers is not None:  # of gated units: their best tokens, and the others
            chosen = chosen.reshape(ranking.is_member.shape) & ranking.is_member
            chosen = chosen.view(num_rows, 2, *units.shape).any(dim=1)
        # Whatever else stands in a unit is sink or window, and kept already.
        kept |= units.tokens(chosen.reshape(num_rows, *units.shape))
    counts = kept.sum(dim=1).tolist()
    return list(torch.split(kept.nonzero()[:, 1], counts))


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The units of some rows, to be kept in the order of their tiers, then of their scores.

    Attributes:
        scores: ``(rows, units, unit_tokens)``: of each token.
        is_member: The same shape: the slot holds a token that may be chosen.
        tiers: ``(rows, units)`` int64: lower ones come first; ``None``: there is one.
        by_mean: Units are as good as their average token, not as the sum.
    """

    scores: torch.Tensor
    is_member: torch.Tensor
    tiers: torch.Tensor | None
    by_mean: bool

    @classmethod
    def of(
        cls, scores: torch.Tensor, is_body: torch.Tensor, units: Units, *, gating: float
    ) -> _Ranking:
        """Return the ranking of the body's units; both ``(rows, seq_len)``."""
        grid, is_member = units.grid(scores), units.grid(is_body)
        if gating == 0:
            return cls(grid, is_member, None, units.by_mean)
        is_best = is_member & _stands_out(grid * is_member, is_member, gating)
        first = torch.zeros(grid.shape[:2], dtype=torch.int64, device=scores.device)
        return cls(
            torch.cat([grid, grid], dim=1),
            torch.cat([is_best, is_member & ~is_best], dim=1),
            torch.cat([first, first + 1], dim=1),
            units.by_mean,
        )

    def joined(self) -> _Ranking:
        """Return one row of all rows' units."""
        return _Ranking(
            self.scores.flatten(0, 1)[None],
            self.is_member.flatten(0, 1)[None],
            None if self.tiers is None else self.tiers.flatten()[None],
            self.by_mean,
        )

    def with_floor(self, num_tokens: torch.Tensor) -> _Ranking:
        """Return it with each row's best units of ``num_tokens``, ``(rows, 1)``, before all."""
        order, filled = self._in_order()
        is_first = torch.zeros_like(order, dtype=torch.bool)
        is_first.scatter_(1, order, filled <= num_tokens)
        tiers = torch.zeros_like(order) if self.tiers is None else self.tiers
        return _Ranking(self.scores, self.is_member, tiers.masked_fill(is_first, -1), self.by_mean)

    def best(self, num_tokens: torch.Tensor) -> torch.Tensor:
        """Return the slots of the best ``num_tokens``, ``(rows, 1)``; all rows have so many.

        Of whole units also slots that hold no member.
        """
        order, filled = self._in_order()
        fits = filled <= num_tokens
        is_whole = torch.zeros_like(fits).scatter_(1, order, fits)
        chosen = is_whole[..., None].expand_as(self.is_member)

        # At most one unit a row is cut: the first, in rank, that overflows the budget.
        num_whole = fits.sum(dim=-1, keepdim=True)  # (rows, 1)
        taken = filled.gather(1, (num_whole - 1).clamp(min=0)) * (num_whole > 0)
        cut = order.gather(1, num_whole.clamp(max=order.shape[1] - 1))
        inside = cut[..., None].expand(-1, -1, self.scores.shape[2])  # (rows, 1, unit_tokens)
        is_member = self.is_member.gather(1, inside)
        token_scores = self.scores.gather(1, inside).masked_fill(~is_member, float("-inf"))
        rank = token_scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
        added = is_member & (rank < (num_tokens - taken)[..., None])
        return chosen.scatter(1, inside, chosen.gather(1, inside) | added)

    def _in_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the units by rank, and the tokens of all up to each: ``(rows, units)`` both."""
        sizes = self.is_member.count_nonzero(dim=-1)
        scores = (self.scores * self.is_member).sum(dim=-1)
        if self.by_mean:
            scores /= sizes.clamp(min=1)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        if self.tiers is not None:
            by_tier = self.tiers.gather(1, order).sort(dim=-1, stable=True).indices
            order = order.gather(1, by_tier)
        return order, sizes.gather(1, order).cumsum(dim=-1)


# Of 4 equal scores the perplexity is 4, and not the 5 that 4.0000005 rounded up would be.
_PERPLEXITY_ROUNDING: Final = 1e-3


def _stands_out(scores: torch.Tensor, is_member: torch.Tensor, gating: float) -> torch.Tensor:
    """Return which tokens of units ``(rows, units, unit_tokens)`` are kept with their unit."""
    shares = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    entropy = torch.special.entr(shares).sum(dim=-1)
    is_gated = entropy < gating * is_member.sum(dim=-1).clamp(min=1).log()
    rank = scores.masked_fill(~is_member, -1.0).sort(dim=-1, descending=True, stable=True)
    perplexity = entropy.exp() - _PERPLEXITY_ROUNDING
    is_best = rank.indices.argsort(dim=-1) < perplexity.ceil()[..., None]
    kept: torch.Tensor = is_best | ~is_gated[..., None]
    return kept


def _units(
    policy: CompressionPolicy,
    seq_len: int,
    sentence_ends: torch.Tensor | None,
    device: torch.device,
) -> Units:
    if policy.unit != "sentence":
        return chunks(seq_len, policy.ranked_tokens, device)
    if sentence_ends is None:
        raise InvalidInputError("unit is 'sentence'; say which tokens end one (sentence_ends)")
    return sentences(sentence_ends, policy.chunk_size)


def _budgets(
    policy: CompressionPolicy, seq_len: int, *, num_layers: int, num_rows: int
) -> list[int]:
    """Return the tokens that each row keeps, layer after layer."""
    budget = policy.budget(seq_len)
    always = min(budget, policy.window_size + policy.sink_tokens)
    if policy.spread != "pyramid" or num_layers < 2:
        return [budget] * (num_layers * num_rows)
    # A line from the first layer to the last, whose mean is an equal share.
    share = Fraction(budget - always)
    least = max(share * _LEAST_SHARE, 2 * share - (seq_len - always))
    step = 2 * (share - least) / (num_layers - 1)
    ends = [
        layer * (2 * share - least) - step * layer * (layer - 1) / 2
        for layer in range(num_layers + 1)
    ]
    ranked = [math.floor(end) - math.floor(start) for start, end in itertools.pairwise(ends)]
    return [always + tokens for tokens in ranked for _ in range(num_rows)]
