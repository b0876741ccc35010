"""Scores: how important is each token of a prefilled span. One file for each method.

Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from chunkkv.policy import CompressionPolicy, Scorer
from chunkkv.prefilled import Prefilled
from chunkkv.scoring import key_diff, reconstruction, window
from chunkkv.scoring.key_diff import key_diff_scores
from chunkkv.scoring.reconstruction import reconstruct
from chunkkv.scoring.window import window_scores

__all__ = ["key_diff_scores", "layer_scores", "reconstruct", "window_scores"]

_SCORERS: Final[dict[Scorer, Callable[[Prefilled, CompressionPolicy, int], torch.Tensor]]] = {
    "window": window.score_layer,
    "reconstruction": reconstruction.score_layer,
    "key_diff": key_diff.score_layer,
}


def layer_scores(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores that the policy's scorer gives to one full-attention layer's span.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32, at least 0, of the span's tokens, padding
        included, which has score 0; higher is more important.

    Raises:
        InvalidInputError: The prefill lacks what the scorer needs.
    """
    return _SCORERS[policy.scorer](prefilled, policy, layer)
