"""Selection: scores in, positions to keep out. Exact budgets, no loops over chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions to keep in every layer of one sequence.

    Attributes:
        lists: ``(num_lists, budget)`` int64 each, ascending; ``num_lists`` is 1 (the layer's heads
            share it) or ``num_kv_heads``.
        list_of_layer: For each layer, which of ``lists`` it keeps. Layers that share positions
            share the list.
    """

    lists: tuple[torch.Tensor, ...]
    list_of_layer: tuple[int, ...]


def scored_layers(policy: CompressionPolicy, num_layers: int) -> range:
    """Return the layers whose scores the policy reads; the others copy a neighbour's positions.

    Source: ChunkKV, Algorithm 2: layers with ``l mod reuse_interval == 0``.
    """
    return range(0, num_layers, policy.reuse_interval if policy.scope == "group" else 1)


def select(scores: torch.Tensor, policy: CompressionPolicy, *, num_layers: int) -> Selection:
    """Choose the positions of one sequence.

    Args:
        scores: ``(num_scored_layers, num_kv_heads, seq_len)``, of ``scored_layers(policy, ...)``;
            higher is more important.
        policy: What to keep.
        num_layers: Layers of the model that take part.

    Raises:
        InvalidInputError: Scores are not finite, or of another number of layers.
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
    positions = select_positions(
        scores,
        policy.budget(scores.shape[-1]),
        unit_tokens=policy.ranked_tokens,
        window_size=policy.window_size,
        sink_tokens=policy.sink_tokens,
    )
    interval = {"group": policy.reuse_interval, "global": num_layers}.get(policy.scope, 1)
    return Selection(positions.unbind(0), tuple(i // interval for i in range(num_layers)))


def select_positions(
    scores: torch.Tensor, budget: int, *, unit_tokens: int, window_size: int, sink_tokens: int
) -> torch.Tensor:
    """Return exactly ``budget`` positions for each row of scores, ascending.

    The last ``window_size`` tokens are kept, then the first ``sink_tokens``, as far as the budget
    goes. What is left goes to whole chunks ``[i * unit_tokens, (i + 1) * unit_tokens)``, cut where
    they meet sink or window, in the order of their summed scores (of equals the earlier); the
    first chunk that does not fit any more gives its best tokens.

    Args:
        scores: ``(..., seq_len)``, finite.
        budget: Positions to keep; all are kept if it is ``seq_len`` or more.
        unit_tokens: Tokens in a chunk; 1 selects single tokens.
        window_size: See above.
        sink_tokens: See above.

    Returns:
        ``(..., min(budget, seq_len))`` int64.

    Source: ChunkKV, Algorithm 1. Deviations: the budget is exact, where the paper keeps whole
    chunks only; chunks that overlap the window are cut, not kept twice.
    """
    seq_len = scores.shape[-1]
    budget = min(budget, seq_len)
    # One chunk holds everything; its size must not cost memory.
    unit_tokens = min(unit_tokens, seq_len)
    num_window = min(window_size, budget)
    num_sink = min(sink_tokens, budget - num_window)
    num_ranked = budget - num_window - num_sink

    rows = scores.reshape(-1, seq_len)
    keep = torch.zeros(rows.shape, dtype=torch.bool, device=scores.device)
    keep[:, seq_len - num_window :] = True
    keep[:, :num_sink] = True
    if num_ranked > 0:
        body = rows[:, num_sink : seq_len - num_window]
        chosen = _best_of_body(
            body, num_ranked, unit_tokens, first_chunk_cut=num_sink % unit_tokens
        )
        keep[:, num_sink : seq_len - num_window] = chosen
    positions = keep.nonzero()[:, 1]
    return positions.view(*scores.shape[:-1], budget)


def _best_of_body(
    body: torch.Tensor, num_ranked: int, unit_tokens: int, *, first_chunk_cut: int
) -> torch.Tensor:
    """Return a mask over ``body`` ``(rows, length)`` with ``num_ranked`` tokens in each row."""
    rows, length = body.shape
    num_chunks = -(-(first_chunk_cut + length) // unit_tokens)
    padded = body.new_zeros(rows, num_chunks * unit_tokens)
    padded[:, first_chunk_cut : first_chunk_cut + length] = body
    chunk_scores = padded.view(rows, num_chunks, unit_tokens).sum(dim=-1)

    sizes = torch.full((num_chunks,), unit_tokens, device=body.device)
    sizes[0] -= first_chunk_cut
    sizes[-1] -= num_chunks * unit_tokens - first_chunk_cut - length
    order = chunk_scores.sort(dim=-1, descending=True, stable=True).indices  # (rows, num_chunks)
    filled = sizes[order].cumsum(dim=-1)
    whole = torch.zeros(rows, num_chunks, dtype=torch.bool, device=body.device)
    whole.scatter_(1, order, filled <= num_ranked)
    mask = whole.repeat_interleave(unit_tokens, dim=1)

    # At most one chunk a row is cut: the first, in rank, that overflows the budget.
    num_whole = (filled <= num_ranked).sum(dim=-1, keepdim=True)  # (rows, 1)
    taken = filled.gather(1, (num_whole - 1).clamp(min=0)) * (num_whole > 0)
    missing = num_ranked - taken  # (rows, 1), tokens that the cut chunk gives
    cut_chunk = order.gather(1, num_whole.clamp(max=num_chunks - 1))
    inside = cut_chunk * unit_tokens + torch.arange(unit_tokens, device=body.device)
    is_body = (inside >= first_chunk_cut) & (inside < first_chunk_cut + length)
    token_scores = padded.gather(1, inside).masked_fill(~is_body, float("-inf"))
    rank = token_scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    mask.scatter_(1, inside, mask.gather(1, inside) | (rank < missing))
    return mask[:, first_chunk_cut : first_chunk_cut + length]
