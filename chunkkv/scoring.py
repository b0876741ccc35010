"""Scores: how important is each token to the ones that ask.

Tensors in, tensors out; knows nothing of budgets or caches.
"""

from __future__ import annotations

from typing import Final

import torch

# Bounds the memory of a long window: so many queries' attention is held at a time.
_QUERIES_AT_ONCE: Final = 64


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that the observation window pays to each token.

    The softmaxed attention of the last ``window`` tokens, averaged over them and over the query
    heads of each KV head. The window's own tokens are scored like all others; a query sees the
    tokens up to its own.

    Args:
        queries: ``(batch, num_heads, window, head_dim)``, of the last ``window`` tokens, after
            position encoding.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``, ``seq_len >= window``.
        scaling: Factor on the dot products, as the model uses it.
        softcap: Bound of the logits (``softcap * tanh(logits / softcap)``), if the model has one.
        num_padding: ``(batch,)``: leading positions of each row that are padding.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 1]``; each row sums to 1. Padding has
        score 0.

    Source: ChunkKV, Algorithm 1, "observe"; SnapKV (https://arxiv.org/abs/2404.14469), eq. 5.
    """
    batch, _, window, head_dim = queries.shape
    num_kv_heads, seq_len = keys.shape[1], keys.shape[2]
    # Scaled before the product, as models do it: unscaled, it leaves the range of float16.
    grouped = (queries * scaling).view(batch, num_kv_heads, -1, window, head_dim)
    visible = _visible(window, seq_len, num_padding, keys.device)

    scores = torch.zeros(batch, num_kv_heads, seq_len, device=keys.device)
    for start in range(0, window, _QUERIES_AT_ONCE):
        asking = slice(start, start + _QUERIES_AT_ONCE)
        scores += _attention_paid(grouped[:, :, :, asking], keys, visible[:, asking], softcap)
    num_voters = visible.any(dim=-1).sum(dim=-1)[:, None, None] * grouped.shape[2]
    return scores / num_voters


def _attention_paid(
    queries: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return ``(batch, num_kv_heads, seq_len)``: what each key gets of all queries together.

    Args:
        queries: ``(batch, num_kv_heads, group, window, head_dim)``, scaled.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``.
        visible: ``(batch or 1, window, <= seq_len)``: which query sees which of the last keys; all
            see those before them.
        softcap: Bound of the logits.
    """
    logits = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(*queries.shape[:4], keys.shape[2])
    logits[..., -visible.shape[-1] :].masked_fill_(~visible[:, None, None], float("-inf"))
    attention = logits.softmax(dim=-1)
    # A query that is padding sees nothing and must not vote (its softmax is NaN). Other NaN stays:
    # an overflow must be seen.
    is_padding = ~visible.any(dim=-1)  # (batch or 1, window)
    if is_padding.any():
        attention.masked_fill_(is_padding[:, None, None, :, None], 0.0)
    return attention.sum(dim=(2, 3))


def _visible(
    window: int, seq_len: int, num_padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    # Without padding, whatever lies before the window is seen by all of it: a mask of the window
    # against itself is enough, and spares a pass over all logits.
    first = seq_len - window if num_padding is None else 0
    positions = torch.arange(first, seq_len, device=device)
    asking = positions[-window:, None]
    visible = (positions <= asking)[None]  # (1, window, seq_len - first)
    if num_padding is not None:
        padding = num_padding.to(device)[:, None, None]
        visible = visible & (positions >= padding) & (asking >= padding)
    return visible
