"""``window``: the attention that the last tokens of the text pay to each token.

Sees the question if the text ends in it. Costs no forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_paid, by_kv_head, visible_keys


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    power: int = 1,
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
        power: What attention is raised to before it is averaged.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 1]``; with a power of 1, each row sums
        to 1. Padding and what holds nothing have score 0.

    Source: ChunkKV, Algorithm 1, "observe"; SnapKV (https://arxiv.org/abs/2404.14469), eq. 5. The
    power is ours.
    """
    batch, window = queries.shape[0], queries.shape[2]
    num_kv_heads, seq_len = keys.shape[1], keys.shape[2]
    grouped = by_kv_head(queries, num_kv_heads, scaling)
    visible = visible_keys(window, seq_len, num_padding, keys.device)

    scores = torch.zeros(batch, num_kv_heads, seq_len, device=keys.device)
    for start in range(0, window, QUERIES_AT_ONCE):
        asking = slice(start, start + QUERIES_AT_ONCE)
        scores += attention_paid(
            grouped[:, :, :, asking], keys, visible[:, asking], softcap, hidden, power=power
        )
    num_voters = visible.any(dim=-1).sum(dim=-1)[:, None, None] * grouped.shape[2]
    return scores / num_voters


def pooled(
    scores: torch.Tensor, pool_size: int, *, window_size: int, num_padding: torch.Tensor
) -> torch.Tensor:
    """Return each score averaged with its neighbours', the window's own as they are.

    Neighbours are the ``pool_size // 2`` tokens on either side, as far as they belong to the span
    and lie before the window; those that are missing count as 0.

    Args:
        scores: ``(batch, num_kv_heads, seq_len)`` float32 of one span, padding 0.
        pool_size: Tokens to average over, odd; 1 leaves the scores as they are.
        window_size: Trailing tokens that are neither averaged nor anyone's neighbours.
        num_padding: ``(batch,)``: leading positions of each row that are padding.

    Returns:
        The same shape and dtype. Padding has score 0.

    Source: SnapKV (https://arxiv.org/abs/2404.14469), Listing 1, with average pooling, a stride of
    1 and zeros beyond the edges, as kvpress has it. One deviation: pooled after the mean over the
    query heads of a KV head, which is the same, as both are linear.
    """
    num_pooled = scores.shape[-1] - window_size
    if pool_size == 1 or num_pooled < 1:
        return scores
    # Differences of running sums, so that the time does not depend on the size of the pool; in
    # float64, where what they lose is far below float32's own rounding.
    sums = F.pad(scores[..., :num_pooled].double().cumsum(dim=-1), (1, 0))
    order = torch.arange(num_pooled, device=scores.device)
    reach = min(pool_size // 2, num_pooled)
    until, since = (order + reach + 1).clamp(max=num_pooled), (order - reach).clamp(min=0)
    means = ((sums[..., until] - sums[..., since]) / pool_size).to(scores.dtype)
    is_padding = order < num_padding.to(scores.device)[:, None]  # (batch, num_pooled)
    means = means.masked_fill(is_padding[:, None], 0.0)
    return torch.cat([means, scores[..., num_pooled:]], dim=-1)


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the window scores of one layer's span; see ``chunkkv.scoring.layer_scores``.

    Pooled if the policy says so.

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
        power=policy.vote_power,
    )
    return pooled(
        scores[..., -prefilled.longest :],
        policy.pool_size,
        window_size=policy.window_size,
        num_padding=padding,
    )
