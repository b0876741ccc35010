"""``heavy_hitter``: the attention that each token receives from all tokens of the text.

Sees the question if it is in the text. Costs no forward pass, but every layer's attention a second
time, while the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from chunkkv.attention import scaling_of
from chunkkv.cache import KVCache
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_paid, by_kv_head, visible_keys
from chunkkv.scoring.observed import ObservedSpan


def accumulated_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that the queries pay to each key, summed over them.

    The mean over the query heads of each KV head; the sum over queries. Earlier tokens are seen by
    more queries and so tend to receive more, which is the paper's definition.

    Args:
        queries: ``(batch, num_heads, q_len, head_dim)``, of the last ``q_len`` tokens, after
            position encoding.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``, ``seq_len >= q_len``.
        scaling: Factor on the dot products, as the model uses it.
        softcap: Bound of the logits, if the model has one.
        num_padding: ``(batch,)``: leading keys of each row that are padding.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, q_len]``; each row sums to its number of
        queries. Padding has score 0.

    Source: H2O (https://arxiv.org/abs/2306.14048), Algorithm 1: the accumulated attention. One
    deviation: the paper drops tokens while it decodes, and what is dropped receives no more; here
    all tokens of the text are there until it ends, and each query sees all that the model sees.
    """
    q_len, num_kv_heads, seq_len = queries.shape[2], keys.shape[1], keys.shape[2]
    grouped = by_kv_head(queries, num_kv_heads, scaling)
    received = torch.zeros(keys.shape[0], num_kv_heads, seq_len, device=keys.device)
    for start in range(0, q_len, QUERIES_AT_ONCE):
        asking = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        seen = seq_len - q_len + start + asking.shape[3]  # keys up to the last query's own
        visible = visible_keys(asking.shape[3], seen, num_padding, keys.device)
        received[..., :seen] += attention_paid(asking, keys[:, :, :seen], visible, softcap)
    return received / grouped.shape[2]


@dataclass(slots=True)
class HeavyHitters:
    """Adds up what the text's keys receive as the queries come by, and keeps neither.

    Attributes:
        span: The text.
        received: By layer index: ``(batch, num_kv_heads, tokens so far)`` float32.
    """

    span: ObservedSpan
    received: dict[int, torch.Tensor] = field(default_factory=dict)

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor,
    ) -> None:
        """Score one layer's keys by the queries of one forward pass."""
        if layer not in self.span.layers:
            return
        padding = self.span.num_padding
        received = accumulated_attention(
            queries,
            keys,
            scaling=scaling_of(queries, scaling),
            softcap=softcap,
            num_padding=padding if padding.any() else None,
        )
        before = self.received.get(layer, received[..., :0])
        num_before = before.shape[-1]
        received = received[..., -(num_before + queries.shape[2]) :]  # without the prefix
        received[..., :num_before] += before
        self.received[layer] = received

    def scores(self, cache: KVCache) -> dict[int, torch.Tensor]:
        """Return what each key received; see ``chunkkv.scoring.observed.Observer``."""
        return self.received
