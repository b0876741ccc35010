"""Scores: how important is each token to the ones that ask.

Tensors in, tensors out; knows nothing of budgets or caches.
"""

from __future__ import annotations

import torch


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
    batch, num_heads, window, head_dim = queries.shape
    num_kv_heads, seq_len = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(batch, num_kv_heads, -1, head_dim)  # (batch, kv, group * window, d)
    # Scaled before the product, as models do it: unscaled, it leaves the range of float16.
    logits = ((grouped * scaling) @ keys.transpose(-1, -2)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(batch, num_kv_heads, num_heads // num_kv_heads, window, seq_len)

    visible = _visible(window, seq_len, num_padding, keys.device)  # (batch or 1, window, seq_len)
    logits = logits.masked_fill(~visible[:, None, None], float("-inf"))
    votes = visible.any(dim=-1)  # (batch or 1, window); a query that is padding sees nothing
    attention = logits.softmax(dim=-1)
    if num_padding is not None:
        attention = attention.masked_fill(~votes[:, None, None, :, None], 0.0)
    num_voters = votes.sum(dim=-1)[:, None, None] * attention.shape[2]
    return attention.sum(dim=(2, 3)) / num_voters


def _visible(
    window: int, seq_len: int, num_padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    positions = torch.arange(seq_len, device=device)
    asking = positions[-window:, None]
    visible = (positions <= asking)[None]  # (1, window, seq_len)
    if num_padding is not None:
        padding = num_padding.to(device)[:, None, None]
        visible = visible & (positions >= padding) & (asking >= padding)
    return visible
