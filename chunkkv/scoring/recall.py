"""``recall``: what the model draws on each token while it repeats the few hundred around it.

Sees no question, so it suits text that will be asked about later. Costs a second pass over the
text, but no more attention than a prefill in short pieces: a piece is repeated from itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from chunkkv.attention import PROBE_ARGUMENT, observable, scaling_of
from chunkkv.prefilled import Prefilled
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_paid, by_kv_head, visible_keys

# All are part of what the scorer's name means: other values choose other tokens.
REPEATED_TOKENS: Final = 512
"""Tokens of the text that one forward pass repeats at most."""
LEAD_TOKENS: Final = 8
"""Tokens before them that lead into the repetition, and say where it begins."""
SINK_TOKENS: Final = 4
"""First tokens of the text, which every piece sees too: attention rests on them."""
VOTE_POWER: Final = 2
"""What attention is raised to before it is summed: one sure vote outweighs many vague ones."""


@torch.no_grad()
def recollect(
    model: Any,
    prefilled: Prefilled,
    input_ids: torch.Tensor,
    *,
    before_chunk: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Let the model repeat the text piece by piece; return the prefill with what its keys received.

    Each piece of ``REPEATED_TOKENS`` follows, as if at the end of the text, on a cache that holds
    its own tokens, those that lead into it, and the text's first ones. The score of a token is the
    sum over all repeating queries of their squared attention, averaged over the query heads of
    each KV head. The cache stays as it is. Rows of a batch are repeated one by one.

    Args:
        model: The model that was run. Positions reach ``REPEATED_TOKENS + LEAD_TOKENS`` beyond the
            end of the text.
        prefilled: What it left. Its cache must not have grown since.
        input_ids: ``(batch, seq_len)`` int64: what it was run over, padding included.
        before_chunk: Called before each piece. What it raises ends the pass.

    Raises:
        InvalidInputError: The token ids are not those of the prefill, by their shape, or tokens
            followed in its cache.

    Source: the repetition is KVzip's (https://arxiv.org/abs/2505.23416). What differs is ours: a
    piece does not see the rest of the text, which costs attention and tells its heads nothing, and
    votes are summed squares, where KVzip takes the largest.
    """
    prefilled.check_is_whole(input_ids)
    layers = prefilled.cache.layers
    full = prefilled.cache.full_layers
    scores = {
        index: torch.zeros(
            (*layers[index].keys.shape[:2], prefilled.longest), device=input_ids.device
        )
        for index in full
    }
    with observable(model):
        for row, num_tokens in enumerate(prefilled.num_tokens if full else ()):
            ids = input_ids[row, prefilled.longest - num_tokens :]
            for source, repeated in _pieces(num_tokens):
                before_chunk()
                count = len(repeated)
                end = prefilled.first_token + num_tokens
                columns = source.to(ids.device) - num_tokens  # from the end, which rows share
                probe = RecallProbe(frozenset(full), len(source))
                model.base_model(
                    input_ids=ids[None, repeated],
                    position_ids=torch.arange(end, end + count, device=ids.device)[None],
                    past_key_values=prefilled.cache.excerpt(row, columns, seen=end),
                    use_cache=True,
                    **{PROBE_ARGUMENT: probe},
                )
                for index, received in probe.scores.items():
                    scores[index][row, :, columns] += received
    return replace(prefilled, observed={**prefilled.observed, "recall": scores})


def _pieces(num_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tokens that each piece sees, and those that it repeats: positions, ascending."""
    for start in range(0, num_tokens, REPEATED_TOKENS):
        first, stop = max(start - LEAD_TOKENS, 0), min(start + REPEATED_TOKENS, num_tokens)
        repeated = torch.arange(first, stop)
        yield torch.cat([torch.arange(min(SINK_TOKENS, first)), repeated]), repeated


@dataclass(frozen=True, slots=True)
class RecallProbe:
    """Scores what a piece sees by its queries.

    Attributes:
        layers: Indices of the layers that are scored.
        num_seen: Keys before those of the pass itself.
        scores: By layer index: ``(num_kv_heads, num_seen)`` float32.
    """

    layers: frozenset[int]
    num_seen: int
    scores: dict[int, torch.Tensor] = field(default_factory=dict)

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Score one layer's keys ``(1, num_kv_heads, num_seen + q_len, head_dim)``."""
        if layer not in self.layers:
            return
        q_len = queries.shape[2]
        grouped = by_kv_head(queries, keys.shape[1], scaling_of(queries, scaling))
        received = torch.zeros(keys.shape[1], self.num_seen, device=keys.device)
        for start in range(0, q_len, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, q_len)
            seen = keys[:, :, : self.num_seen + stop]
            visible = visible_keys(stop - start, seen.shape[2], None, keys.device)
            asking = grouped[:, :, :, start:stop]
            paid = attention_paid(asking, seen, visible, softcap, power=VOTE_POWER)
            received += paid[0, :, : self.num_seen]
        self.scores[layer] = received / grouped.shape[2]
