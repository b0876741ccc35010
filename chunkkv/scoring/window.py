"""``window``: the attention that the last tokens of the text pay to each token.

Sees the question if the text ends in it. Costs no forward pass.
"""

from __future__ import annotations

import torch

from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_logits, by_kv_head, visible_keys


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
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
        hidden: ``(batch, num_kv_heads)``: leading keys of each head that hold nothing.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 1]``; each row sums to 1. Padding and
        what holds nothing have score 0.

    Source: ChunkKV, Algorithm 1, "observe"; SnapKV (https://arxiv.org/abs/2404.14469), eq. 5.
    """
    batch, window = queries.shape[0], queries.shape[2]
    num_kv_heads, seq_len = keys.shape[1], keys.shape[2]
    grouped = by_kv_head(queries, num_kv_heads, scaling)
    visible = visible_keys(window, seq_len, num_padding, keys.device)

    scores = torch.zeros(batch, num_kv_heads, seq_len, device=keys.device)
    for start in range(0, window, QUERIES_AT_ONCE):
        asking = slice(start, start + QUERIES_AT_ONCE)
        scores += _attention_paid(
            grouped[:, :, :, asking], keys, visible[:, asking], softcap, hidden
        )
    num_voters = visible.any(dim=-1).sum(dim=-1)[:, None, None] * grouped.shape[2]
    return scores / num_voters


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the window scores of one layer's span; see ``chunkkv.scoring.layer_scores``.

    Raises:
        InvalidInputError: The probe saw no queries of the layer, or too few for the policy's
            window.
    """
    probe, padding = prefilled.probe, prefilled.num_padding
    if policy.window_size > probe.window_size:
        raise InvalidInputError(
            f"the policy's window has {policy.window_size} tokens; queries of the last "
            f"{probe.window_size} were kept"
        )
    if layer not in probe.queries:
        raise InvalidInputError(f"no queries of layer {layer} were seen; was the model run?")
    held = prefilled.cache.layers[layer]
    scores = window_scores(
        probe.queries[layer][:, :, -policy.window_size :],
        held.keys,
        scaling=probe.scaling[layer],
        softcap=probe.softcap[layer],
        num_padding=padding if padding.any() else None,
        hidden=held.hidden,
    )
    return scores[..., -prefilled.longest :]


def _attention_paid(
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    softcap: float | None,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``(batch, num_kv_heads, seq_len)``: what each key gets of all queries together."""
    attention = attention_logits(queries, keys, visible, softcap, hidden).softmax(dim=-1)
    # A query that is padding sees nothing and must not vote (its softmax is NaN). Other NaN stays:
    # an overflow must be seen.
    is_padding = ~visible.any(dim=-1)  # (batch or 1, window)
    if is_padding.any():
        attention.masked_fill_(is_padding[:, None, None, :, None], 0.0)
    return attention.sum(dim=(2, 3))
