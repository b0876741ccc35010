"""What a prefill leaves: the full KV cache of a span, and what scorers need beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from chunkkv.attention import QueryProbe
from chunkkv.cache import KVCache
from chunkkv.errors import InvalidInputError
from chunkkv.policy import Scorer


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt's full KV cache and what is needed to compress it.

    Attributes:
        cache: Holds, for each row, the sequence's prefix, then the span, right-aligned.
        probe: Queries of the last tokens.
        first_token: Position of the span's first token (0 unless there is a prefix).
        num_tokens: For each row, tokens of the span; shorter rows are padded on the left.
        fingerprint: Of the model.
        observed: Scores that only a running model gives, by their scorer, then by index of each
            full-attention layer: ``(batch, num_kv_heads, longest)`` float32, padding 0. Holds what
            the prefill was asked to observe, and ``reconstruction`` and ``recall`` once the text
            was repeated for them.
        sentence_ends: ``(batch, longest)`` bool: the token ends a sentence; ``None`` if nobody
            said. Policies of unit ``sentence`` need it.
    """

    cache: KVCache
    probe: QueryProbe
    first_token: int
    num_tokens: tuple[int, ...]
    fingerprint: str
    observed: Mapping[Scorer, Mapping[int, torch.Tensor]] = field(default_factory=dict)
    sentence_ends: torch.Tensor | None = None

    def check_is_whole(self, input_ids: torch.Tensor) -> None:
        """Check that the cache ends with the span, and that the span is these tokens.

        Raises:
            InvalidInputError: The shapes differ, or tokens followed.
        """
        expected = (len(self.num_tokens), self.longest)
        if tuple(input_ids.shape) != expected:
            raise InvalidInputError(f"input_ids is {tuple(input_ids.shape)}; {expected} were run")
        end, seen = self.first_token + self.longest, self.cache.get_seq_length()
        if seen != end:
            raise InvalidInputError(f"the text ends at {end}, but its cache has seen {seen} tokens")

    @property
    def longest(self) -> int:
        """Tokens of the longest row's span."""
        return max(self.num_tokens)

    @property
    def num_padding(self) -> torch.Tensor:
        """``(batch,)``: leading tokens of each row that are padding."""
        return self.longest - torch.tensor(self.num_tokens)
