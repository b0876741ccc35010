"""Scorers that watch the model run: what they are told, and where all their scores are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from chunkkv.attention import AttentionProbe
from chunkkv.cache import KVCache
from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled


@dataclass(frozen=True, slots=True)
class ObservedSpan:
    """What a prefill is about to run over.

    Attributes:
        layers: Indices of the full-attention layers: those that are scored.
        first_token: Position of the first token (0 unless there is a prefix).
        num_tokens: Columns of the batch, padding included.
        num_padding: ``(batch,)``: leading columns of each row that are padding.
    """

    layers: frozenset[int]
    first_token: int
    num_tokens: int
    num_padding: torch.Tensor


class Observer(AttentionProbe, Protocol):
    """A scorer that sees every forward pass of a prefill."""

    def scores(self, cache: KVCache) -> dict[int, torch.Tensor]:
        """Return the span's scores once all of it was run.

        Args:
            cache: What the passes filled.

        Returns:
            By index of each full-attention layer: ``(batch, num_kv_heads, num_tokens)`` float32,
            at least 0, padding 0.
        """


def score_layer(prefilled: Prefilled, policy: CompressionPolicy, layer: int) -> torch.Tensor:
    """Return the scores of one layer's span; see ``chunkkv.scoring.layer_scores``.

    Raises:
        InvalidInputError: The scorer did not watch the prefill, or the text was not repeated.
    """
    if policy.scorer not in prefilled.observed:
        raise InvalidInputError(
            f"there are no scores of {policy.scorer}; call run_prefill with "
            f"scorers=[{policy.scorer!r}], then repeat with the same"
        )
    return prefilled.observed[policy.scorer][layer]
