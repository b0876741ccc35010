"""Scores: how important is each token of a prefilled span. One file for each method.

Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import torch

from chunkkv.policy import CompressionPolicy, Scorer
from chunkkv.prefilled import Prefilled
from chunkkv.scoring import key_diff, key_norm, observed, recency, window
from chunkkv.scoring.expected_attention import ExpectedAttention
from chunkkv.scoring.heavy_hitter import HeavyHitters
from chunkkv.scoring.key_diff import key_diff_scores
from chunkkv.scoring.observed import ObservedSpan, Observer
from chunkkv.scoring.recall import recollect
from chunkkv.scoring.reconstruction import reconstruct
from chunkkv.scoring.rotary import Rotary
from chunkkv.scoring.window import window_scores

__all__ = [
    "ObservedSpan",
    "key_diff_scores",
    "layer_scores",
    "observers",
    "recollect",
    "reconstruct",
    "repeat",
    "window_scores",
]

_SCORERS: Final[dict[Scorer, Callable[[Prefilled, CompressionPolicy, int], torch.Tensor]]] = {
    "window": window.score_layer,
    "reconstruction": observed.score_layer,
    "recall": observed.score_layer,
    "key_diff": key_diff.score_layer,
    "heavy_hitter": observed.score_layer,
    "recency": recency.score_layer,
    "expected_attention": observed.score_layer,
    "key_norm": key_norm.score_layer,
}
_OBSERVERS: Final[dict[Scorer, Callable[[Any, ObservedSpan], Observer]]] = {
    "heavy_hitter": lambda model, span: HeavyHitters(span),
    "expected_attention": lambda model, span: ExpectedAttention(span, Rotary.of(model)),
}

_REPETITIONS: Final[dict[Scorer, Callable[..., Prefilled]]] = {
    "reconstruction": reconstruct,
    "recall": recollect,
}


def repeat(
    model: Any,
    prefilled: Prefilled,
    input_ids: torch.Tensor,
    scorers: Collection[Scorer],
    *,
    before_chunk: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Let the model repeat the text for those of the scorers that need it: one pass for each.

    Arguments and errors are those of ``reconstruct`` and ``recollect``.
    """
    for scorer, run in _REPETITIONS.items():
        if scorer in scorers:
            prefilled = run(model, prefilled, input_ids, before_chunk=before_chunk)
    return prefilled


def observers(
    model: Any, scorers: Collection[Scorer], span: ObservedSpan
) -> dict[Scorer, Observer]:
    """Return those of the scorers that must watch the model run over ``span``.

    Raises:
        InvalidInputError: One of them cannot watch this model.
    """
    return {name: make(model, span) for name, make in _OBSERVERS.items() if name in scorers}


def layer_scores(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores that the policy's scorer gives to one full-attention layer's span.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32, at least 0, of the span's tokens, padding
        included, which has score 0; higher is more important.

    Raises:
        InvalidInputError: The prefill lacks what the scorer needs.
    """
    return _SCORERS[policy.scorer](prefilled, policy, layer)
