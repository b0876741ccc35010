"""``key_norm``: the smaller a token's key, the higher its score.

Sees no question and no query. Costs no forward pass.
"""

from __future__ import annotations

import torch

from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled


def key_norm_scores(keys: torch.Tensor, *, num_padding: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``1 / (1 + norm)`` of each key.

    Args:
        keys: ``(batch, num_kv_heads, seq_len, head_dim)`` of one span.
        num_padding: ``(batch,)``: leading positions of each row that are padding.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 1]``, not finite where the norm is not.
        Padding has score 0.

    Source: https://arxiv.org/abs/2406.11430: keys of small L2 norm receive much attention.
    Deviations: the paper's score is the norm's negative; this one is in the same order, is positive
    (a chunk's sum grows with its tokens), has no pole at 0, and depends on no other token, as the
    difference from the head's largest norm would. The paper spares the first two layers; here all
    are treated alike.
    """
    norms = keys.float().norm(dim=-1)
    # What overflowed must be seen, and not score 0.
    scores = torch.where(norms.isfinite(), 1 / (1 + norms), norms)
    if num_padding is None:
        return scores
    positions = torch.arange(keys.shape[2], device=keys.device)
    is_padding = positions < num_padding.to(keys.device)[:, None]  # (batch, seq_len)
    return scores.masked_fill(is_padding[:, None], 0.0)


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores of one layer's span; see ``chunkkv.scoring.layer_scores``."""
    keys = prefilled.cache.layers[layer].keys[:, :, -prefilled.longest :]
    return key_norm_scores(keys, num_padding=prefilled.num_padding)
