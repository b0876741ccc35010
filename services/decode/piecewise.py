"""Softmax attention over keys and values that lie in several pieces of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

# Matrix products of four rows read memory faster than those of three (MKL).
_ROWS: Final = 4


def attention(
    query: torch.Tensor,
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(query keys) values, without copying keys or values.

    The last keys are the queries' own: a query sees none behind its own, and of those before it
    all that the window reaches.

    Args:
        query: ``(new, num_kv_heads, group, key_dim)``, scaled.
        pieces: Keys ``(num_kv_heads, length, key_dim)`` and values ``(num_kv_heads, length,
            value_dim)``.
        window: Keys that a query sees at most, its own included.
        softcap: Bound of the logits: ``softcap * tanh(logits / softcap)``.
        sinks: ``(num_kv_heads, group)``: logits of a key that takes weight and gives nothing.

    Returns:
        ``(new, num_kv_heads, group, value_dim)``.
    """
    new, num_heads, group, _ = query.shape
    if new == 1:
        rows = F.pad(query[0], (0, 0, 0, -group % _ROWS))  # (num_heads, rows, key_dim)
    else:
        rows = query.permute(1, 2, 0, 3).reshape(num_heads, group * new, -1)
    # Keys times queries, not queries times keys: a third faster on a CPU, for the same numbers.
    scores = torch.cat(
        [
            torch.bmm(keys, rows.to(keys.dtype).transpose(1, 2)).transpose(1, 2)
            for keys, _ in pieces
        ],
        dim=2,
    ).float()  # (num_heads, rows, length)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if new > 1:
        by_query = scores.view(num_heads, group, new, -1)
        by_query.masked_fill_(_hidden(new, scores.shape[-1], window, scores.device), float("-inf"))
    if sinks is not None:
        sink = F.pad(sinks.repeat_interleave(new, dim=1), (0, rows.shape[1] - group * new))
        scores = torch.cat([scores, sink[:, :, None].float()], dim=2)
    read = _read(scores.softmax(dim=-1), [values for _, values in pieces])
    read = read[:, : group * new].to(query.dtype)
    return read.view(num_heads, group, new, -1).permute(2, 0, 1, 3)


def _read(weights: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return weights ``(num_heads, rows, length)`` times values, piece by piece."""
    read: torch.Tensor | None = None
    start = 0
    for values in pieces:
        stop = start + values.shape[1]
        part = torch.bmm(weights[:, :, start:stop].to(values.dtype), values)
        read = part if read is None else read + part
        start = stop
    assert read is not None
    return read


def _hidden(new: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return ``(new, length)``: which keys each of the last ``new`` positions may not see."""
    own = torch.arange(length - new, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    hidden = key > own
    return hidden if window is None else hidden | (key <= own - window)
