"""Attention logits for scorers: scaled, bounded and masked as the model does it."""

from __future__ import annotations

from typing import Final

import torch

QUERIES_AT_ONCE: Final = 64
"""Bounds the memory of scoring: so many queries' attention is held at a time."""


def by_kv_head(queries: torch.Tensor, num_kv_heads: int, scaling: float) -> torch.Tensor:
    """Return scaled queries ``(batch, num_kv_heads, group, q_len, head_dim)``.

    Scaled before the product, as models do it: unscaled, it leaves the range of float16.
    """
    batch, _, q_len, head_dim = queries.shape
    return (queries * scaling).view(batch, num_kv_heads, -1, q_len, head_dim)


def attention_logits(
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    softcap: float | None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``(batch, num_kv_heads, group, q_len, seq_len)`` float32, ``-inf`` where unseen.

    Args:
        queries: ``(batch, num_kv_heads, group, q_len, head_dim)``, scaled.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``.
        visible: ``(batch or 1, q_len, <= seq_len)``: which query sees which of the last keys; all
            see those before them.
        softcap: Bound of the logits.
        hidden: ``(batch, num_kv_heads)``: leading keys of each head that hold nothing: unseen.
    """
    logits = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(*queries.shape[:4], keys.shape[2])
    logits[..., -visible.shape[-1] :].masked_fill_(~visible[:, None, None], float("-inf"))
    if hidden is not None:
        is_hidden = torch.arange(keys.shape[2], device=keys.device) < hidden[..., None]
        logits.masked_fill_(is_hidden[:, :, None, None], float("-inf"))
    return logits


def attention_paid(
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    softcap: float | None,
    hidden: torch.Tensor | None = None,
    *,
    power: int = 1,
) -> torch.Tensor:
    """Return ``(batch, num_kv_heads, seq_len)``: what each key gets of all queries together.

    Arguments are those of ``attention_logits``, and what each query's attention is raised to. A
    query that sees nothing pays nothing.
    """
    attention = attention_logits(queries, keys, visible, softcap, hidden).softmax(dim=-1)
    # A query that is padding sees nothing and must not vote (its softmax is NaN). Other NaN stays:
    # an overflow must be seen.
    is_padding = ~visible.any(dim=-1)  # (batch or 1, q_len)
    if is_padding.any():
        attention.masked_fill_(is_padding[:, None, None, :, None], 0.0)
    if power > 1:
        attention.pow_(power)
    return attention.sum(dim=(2, 3))


def visible_keys(
    q_len: int, seq_len: int, num_padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return which key the last ``q_len`` of ``seq_len`` tokens see, as ``attention_logits`` wants.

    A token sees those up to its own. Padding, ``(batch,)`` leading tokens, neither sees nor is
    seen.
    """
    # Without padding, whatever lies before the queries is seen by all of them: a mask of the
    # queries against themselves is enough, and spares a pass over all logits.
    first = seq_len - q_len if num_padding is None else 0
    positions = torch.arange(first, seq_len, device=device)
    asking = positions[-q_len:, None]
    visible = (positions <= asking)[None]  # (1, q_len, seq_len - first)
    if num_padding is not None:
        padding = num_padding.to(device)[:, None, None]
        visible = visible & (positions >= padding) & (asking >= padding)
    return visible
