"""Keeps the KV of a long answer bounded: what is generated is compressed as it accumulates.

The policy that compressed the prompt, applied again and again: the latest tokens ask, whole chunks
are kept. Tensors in, indices out; knows no memory and no sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

import chunkkv
from chunkkv.selection import scored_layers
from services.compress import policy as policies

# Of the tokens that may be dropped, so much is dropped at a time: often enough that the KV stays
# near its bound, rarely enough that scoring costs little.
_STEP_SHARE: Final = 8


@dataclass(frozen=True, slots=True)
class KVLimit:
    """How much KV a sequence may come to while it is answered.

    Attributes:
        max_kv_tokens: Kept tokens at most, those of earlier spans included.
        policy: How tokens are scored and chosen; its budget is not used.
    """

    max_kv_tokens: int
    policy: chunkkv.CompressionPolicy

    def step(self, num_droppable: int) -> int:
        """Return how many of so many tokens are dropped at a time."""
        return max(self.policy.window_size, num_droppable // _STEP_SHARE)

    def check(self, num_kept: int) -> None:
        """Raise ``InvalidInputError`` unless there is room to choose in.

        Args:
            num_kept: Tokens that the conversation keeps before this turn.
        """
        needed = num_kept + 2 * self.policy.window_size
        if self.max_kv_tokens < needed:
            raise chunkkv.InvalidInputError(
                f"max_kv_tokens is {self.max_kv_tokens} and the conversation keeps {num_kept} "
                f"before this turn; send at least {needed}, or compress more"
            )

    def choosing(self, num_kept: int) -> chunkkv.CompressionPolicy:
        """Return the policy that keeps so many tokens."""
        return policies.of_answer(self.policy, num_kept)

    def canonical(self) -> str:
        """Return what names the choice in a stored span."""
        return f"{self.policy.canonical()} max_kv_tokens={self.max_kv_tokens}"


class RecentQueries:
    """The queries of a sequence's latest tokens, layer by layer.

    Args:
        window_size: Tokens to keep.
    """

    def __init__(self, window_size: int) -> None:
        self.softcap: float | None = None
        self._window_size = window_size
        self._queries: dict[int, torch.Tensor] = {}

    def add(self, layer: int, query: torch.Tensor, softcap: float | None) -> None:
        """Take scaled queries ``(new, num_kv_heads, group, key_dim)``."""
        self.softcap = softcap
        recent = query[-self._window_size :]
        if layer in self._queries:
            recent = torch.cat([self._queries[layer], recent])[-self._window_size :]
        self._queries[layer] = recent.clone()

    def of(self, layer: int) -> torch.Tensor:
        """Return ``(num_kv_heads, group, <= window_size, key_dim)``."""
        return self._queries[layer].permute(1, 2, 0, 3)


def chosen_tokens(
    queries: RecentQueries,
    keys: Sequence[Sequence[torch.Tensor]],
    layers: Sequence[int],
    policy: chunkkv.CompressionPolicy,
    *,
    num_candidates: int,
) -> list[torch.Tensor]:
    """Return which of the last tokens to keep.

    Args:
        queries: Of the latest tokens.
        keys: For each full-attention layer, for each KV head, ``(length, key_dim)``: all keys that
            are attended to. Heads may differ in length.
        layers: Indices of these layers.
        policy: How many are kept, and how they are scored and chosen.
        num_candidates: Of the last so many keys of each head, some are dropped.

    Returns:
        For each layer ``(1 or num_kv_heads, budget)`` indices among the candidates, ascending.
    """
    scores = torch.stack(
        [
            _scores(
                queries.of(layers[ordinal]),
                keys[ordinal],
                queries.softcap,
                num_candidates,
                power=policy.vote_power,
            )
            for ordinal in scored_layers(policy, len(layers))
        ]
    )
    selection = chunkkv.select(scores, policy, num_layers=len(layers))
    return [torch.stack(selection.lists[which]) for which in selection.list_of_layer]


def _scores(
    queries: torch.Tensor,
    keys: Sequence[torch.Tensor],
    softcap: float | None,
    num_candidates: int,
    *,
    power: int,
) -> torch.Tensor:
    """Return ``(num_kv_heads, num_candidates)``: attention paid to the candidates of one layer."""
    rows = [
        chunkkv.window_scores(
            queries[head][None], own[None, None], scaling=1.0, softcap=softcap, power=power
        )[0, 0, -num_candidates:]
        for head, own in enumerate(keys)
    ]
    return torch.stack(rows)
