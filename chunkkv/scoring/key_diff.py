"""``key_diff``: how little a token's key resembles the average key of its head.

Sees no question and no query. Costs no forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled


def key_diff_scores(keys: torch.Tensor, *, num_padding: torch.Tensor | None = None) -> torch.Tensor:
    """Return one minus the cosine of each key with the mean of its head's normalised keys.

    Args:
        keys: ``(batch, num_kv_heads, seq_len, head_dim)`` of one span, as they are cached: after
            position encoding.
        num_padding: ``(batch,)``: leading positions of each row that are padding.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 2]``. Padding has score 0.

    Source: KeyDiff (https://arxiv.org/abs/2504.15364), whose anchor is the mean of the normalised
    cached keys. One deviation: the paper's score is the cosine's negative; the 1 changes no order
    of tokens, and lets a chunk's sum grow with its tokens, as every other scorer's does.
    """
    unit = F.normalize(keys.float(), dim=-1)
    if num_padding is not None:
        positions = torch.arange(keys.shape[2], device=keys.device)
        is_padding = (positions < num_padding.to(keys.device)[:, None])[:, None, :, None]
        unit = unit.masked_fill(is_padding, 0.0)
    # Of the sum, not the mean: the cosine does not see the difference, nor how much is padding.
    anchor = F.normalize(unit.sum(dim=2, keepdim=True), dim=-1)
    scores = 1 - (unit * anchor).sum(dim=-1)
    return scores if num_padding is None else scores.masked_fill(is_padding.squeeze(-1), 0.0)


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores of one layer's span; see ``chunkkv.scoring.layer_scores``."""
    keys = prefilled.cache.layers[layer].keys[:, :, -prefilled.longest :]
    return key_diff_scores(keys, num_padding=prefilled.num_padding)
