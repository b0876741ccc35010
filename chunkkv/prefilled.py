"""What a prefill leaves: the full KV cache of a span, and what scorers need beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chunkkv.attention import QueryProbe
from chunkkv.cache import KVCache


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt's full KV cache and what is needed to compress it.

    Attributes:
        cache: Holds, for each row, the sequence's prefix, then the span, right-aligned.
        probe: Queries of the last tokens.
        first_token: Position of the span's first token (0 unless there is a prefix).
        num_tokens: For each row, tokens of the span; shorter rows are padded on the left.
        fingerprint: Of the model.
        reconstruction: By index of each full-attention layer: the most attention that a token
            received while the text was repeated, ``(batch, num_kv_heads, longest)`` float32;
            ``None`` if it was not.
        sentence_ends: ``(batch, longest)`` bool: the token ends a sentence; ``None`` if nobody
            said. Policies of unit ``sentence`` need it.
    """

    cache: KVCache
    probe: QueryProbe
    first_token: int
    num_tokens: tuple[int, ...]
    fingerprint: str
    reconstruction: dict[int, torch.Tensor] | None = None
    sentence_ends: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row's span."""
        return max(self.num_tokens)

    @property
    def num_padding(self) -> torch.Tensor:
        """``(batch,)``: leading tokens of each row that are padding."""
        return self.longest - torch.tensor(self.num_tokens)
