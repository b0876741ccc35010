"""What is added to, subtracted from and divided out of single logits before anything else.

Only the logits of the tokens concerned are read and written, never the whole conversation. The
tensors live where the first logits do. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


class LogitBias:
    """Adds to the logits of some tokens.

    As transformers' ``SequenceBiasLogitsProcessor`` with single tokens. ``-inf`` forbids a token.

    Args:
        bias: By token id.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._bias = bias
        self._token_ids = self._values = torch.empty(0)
        self._is_ready = False

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the biased logits; ``logits`` itself without a bias.

        Args:
            logits: ``(vocab_size,)`` float32; left as they are.
        """
        if not self._bias:
            return logits
        if not self._is_ready:
            self._token_ids = torch.tensor(list(self._bias), device=logits.device)
            self._values = torch.tensor(
                list(self._bias.values()), dtype=torch.float32, device=logits.device
            )
            self._is_ready = True
        return logits.index_add(0, self._token_ids, self._values)


class Penalties:
    """Makes the tokens that were there already less likely (or more).

    Args:
        repetition: Divides positive and multiplies negative logits of all tokens of prompt and
            answer, as transformers' ``RepetitionPenaltyLogitsProcessor``; 1 is none.
        presence: Then subtracted from the logits of the answer's tokens.
        frequency: The same, as often as the token is in the answer.
        prompt_token_ids: Looked at only if there is a repetition penalty.
    """

    def __init__(
        self,
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        prompt_token_ids: Iterable[int] = (),
    ) -> None:
        self._repetition = repetition
        self._presence = presence
        self._frequency = frequency
        # How often the answer has each token that is penalized, until the logits' size and device
        # are known.
        self._counts = dict.fromkeys(prompt_token_ids if repetition != 1 else (), 0)
        self._table: _CountTable | None = None

    def add(self, token_id: int) -> None:
        """Take one more token of the answer into account."""
        if self._table is not None:
            self._table.add(token_id)
        elif self._repetition != 1 or self._presence != 0 or self._frequency != 0:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the penalized logits; ``logits`` itself if no token is penalized.

        Args:
            logits: ``(vocab_size,)`` float32; left as they are.
        """
        if not self._counts:
            return logits
        if self._table is None:
            # Some embeddings have more rows than there are logits.
            counts = {i: n for i, n in self._counts.items() if i < logits.shape[-1]}
            self._table = _CountTable(counts, logits.device)
        token_ids, counts_of = self._table.token_ids, self._table.counts
        penalized = logits[token_ids]
        if self._repetition != 1:
            penalized = torch.where(
                penalized < 0, penalized * self._repetition, penalized / self._repetition
            )
        penalized = penalized - self._frequency * counts_of
        penalized = penalized - self._presence * (counts_of > 0)
        return logits.index_copy(0, token_ids, penalized)


class _CountTable:
    """Counts by token id, as two tensors that grow at the end."""

    def __init__(self, counts: Mapping[int, int], device: torch.device) -> None:
        self._places = {token_id: place for place, token_id in enumerate(counts)}
        self._token_ids = torch.tensor(list(counts), dtype=torch.int64, device=device)
        self._counts = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)

    @property
    def token_ids(self) -> torch.Tensor:
        """``(num_distinct,)`` int64."""
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> torch.Tensor:
        """``(num_distinct,)`` float32."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Count a token once more."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            # Twice the room, so that a token costs the same however many there are.
            self._token_ids = _with_room(self._token_ids)
            self._counts = _with_room(self._counts)
        self._token_ids[place] = token_id
        self._counts[place] += 1


def _with_room(column: torch.Tensor) -> torch.Tensor:
    return torch.cat([column, column.new_zeros(max(16, len(column)))])
