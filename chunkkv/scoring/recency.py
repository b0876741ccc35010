"""``recency``: the later a token, the higher its score.

Sees neither keys nor queries: the baseline that every other scorer must beat. Costs nothing.
"""

from __future__ import annotations

import torch

from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled


def recency_scores(num_tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Return for each token which part of its row has been read with it.

    Args:
        num_tokens: ``(batch,)``: tokens of each row, the last of ``seq_len``; those before are
            padding.
        seq_len: Tokens of the longest row.

    Returns:
        ``(batch, seq_len)`` float32: ``1 / n`` for the first of ``n`` tokens to 1 for the last,
        strictly rising (up to 16 million tokens). Padding has score 0.

    Source: StreamingLLM (https://arxiv.org/abs/2309.17453): attention sinks and the most recent
    tokens. The sinks are the policy's ``sink_tokens``. Deviations: keys stay rotated to their
    positions in the text, where the paper counts positions in the cache; and with whole chunks
    (``unit`` other than ``token``) a chunk that the window cuts short may rank behind the full one
    before it.
    """
    padding = seq_len - num_tokens[:, None]
    order = torch.arange(1, seq_len + 1, device=num_tokens.device) - padding
    return order.clamp(min=0) / num_tokens[:, None].float()


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores of one layer's span; see ``chunkkv.scoring.layer_scores``."""
    keys = prefilled.cache.layers[layer].keys
    num_tokens = torch.tensor(prefilled.num_tokens, device=keys.device)
    scores = recency_scores(num_tokens, prefilled.longest)
    return scores[:, None].expand(-1, keys.shape[1], -1)
