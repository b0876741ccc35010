"""``expected_attention``: the attention of queries to come, judged by those that were seen.

Sees no question. Costs no forward pass, but the covariance of every layer's queries, while the
model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch

from chunkkv.attention import scaling_of
from chunkkv.cache import KVCache
from chunkkv.scoring.observed import ObservedSpan
from chunkkv.scoring.rotary import Rotary

# All are part of what the scorer's name means: other values choose other tokens.
FUTURE_POSITIONS: Final = 512
"""Positions after the text that queries are expected at."""
SINK_TOKENS: Final = 4
"""First tokens, which attract attention whatever they say: they neither vote nor compete."""
EPSILON: Final = 0.01
"""Attention that every key is sure of, so that large values count where little is expected."""

_TOKENS_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True)
class QueryStatistics:
    """Mean and spread of each head's queries.

    Attributes:
        count: ``(batch,)`` queries, float32.
        mean: ``(batch, num_heads, head_dim)`` float32; 0 where there is no query.
        scatter: ``(batch, num_heads, head_dim, head_dim)`` float32: the sum of the outer products
            of the differences from the mean.
    """

    count: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, queries: torch.Tensor, voting: torch.Tensor) -> QueryStatistics:
        """Return the statistics of some of the queries.

        Args:
            queries: ``(batch, num_heads, q_len, head_dim)`` float32.
            voting: ``(batch, q_len)`` bool: which of them count.
        """
        is_silent = ~voting[:, None, :, None]
        count = voting.sum(dim=1).float()
        total = queries.masked_fill(is_silent, 0.0).sum(dim=2)
        mean = total / count.clamp(min=1)[:, None, None]
        apart = (queries - mean[:, :, None]).masked_fill(is_silent, 0.0)
        return cls(count, mean, apart.mT @ apart)

    def merged(self, other: QueryStatistics) -> QueryStatistics:
        """Return the statistics of both sets of queries.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances", 1979. Sums of plain products would cancel where a mean is large.
        """
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[:, None, None]
        step = other.mean - self.mean
        between = (
            step[..., :, None] * step[..., None, :] * (self.count[:, None, None] * share)[..., None]
        )
        return QueryStatistics(
            count, self.mean + step * share, self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> torch.Tensor:
        """``(batch, num_heads, head_dim, head_dim)`` float32; 0 where there is no query."""
        return self.scatter / self.count.clamp(min=1)[:, None, None, None]


def expected_attention_scores(
    mean: torch.Tensor,
    covariance: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention that normally distributed queries pay to each key, times its value.

    The logarithm of the expected exponential of a logit is ``mean @ key * scaling + key @
    covariance @ key * scaling**2 / 2``. It is softmaxed over keys and averaged over the query heads
    of each KV head; ``EPSILON`` is added, and the sum multiplied with the value's L2 norm.

    Args:
        mean: ``(batch, num_heads, head_dim)`` float32 of the queries, after position encoding.
        covariance: ``(batch, num_heads, head_dim, head_dim)`` float32.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``, from the beginning of the text on.
        values: ``(batch, num_kv_heads, seq_len, value_dim)``.
        scaling: Factor on the dot products, as the model uses it.
        softcap: Bound of the logits, if the model has one; bounds the expected ones.
        num_padding: ``(batch,)``: leading positions of each row that are padding.
        hidden: ``(batch, num_kv_heads)``: leading keys of each head that hold nothing.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32, at least 0. Padding and what holds nothing have
        score 0. The first ``SINK_TOKENS`` that a head holds, if it holds more, take no part in the
        softmax and have the highest score of the head.

    Source: Expected Attention (https://arxiv.org/abs/2510.00636), and kvpress's
    ``ExpectedAttentionPress``, whose rule for first tokens, ``SINK_TOKENS`` and
    ``FUTURE_POSITIONS`` these are; ``EPSILON`` is the one of kvpress's benchmark.
    """
    batch, num_kv_heads, seq_len, head_dim = keys.shape
    mean = mean.view(batch, num_kv_heads, -1, head_dim)
    covariance = covariance.view(batch, num_kv_heads, -1, head_dim, head_dim)
    logits = torch.cat(
        [
            _expected_logits(mean, covariance, keys[:, :, block].float() * scaling)
            for block in _blocks(seq_len)
        ],
        dim=-1,
    )  # (batch, num_kv_heads, group, seq_len)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)

    padding = torch.zeros(batch, dtype=torch.int64) if num_padding is None else num_padding
    first = padding.to(keys.device)[:, None]  # (batch, 1 or num_kv_heads)
    if hidden is not None:
        first = torch.maximum(first, hidden)
    order = torch.arange(seq_len, device=keys.device) - first[..., None]
    is_padding = order < 0  # (batch, 1 or num_kv_heads, seq_len)
    is_short = order[..., -1:] < SINK_TOKENS
    is_sink = (order < SINK_TOKENS) & ~is_short & ~is_padding
    attention = logits.masked_fill((is_padding | is_sink)[:, :, None], float("-inf")).softmax(
        dim=-1
    )
    scores = (attention.mean(dim=2) + EPSILON) * values.float().norm(dim=-1)
    scores = scores.masked_fill(is_padding | is_sink, 0.0)
    return torch.where(is_sink, scores.amax(dim=-1, keepdim=True), scores)


@dataclass(slots=True)
class ExpectedAttention:
    """Gathers the statistics of the text's queries as they come by, and keeps none of them.

    Of each query head by itself. Queries are taken as they were before position encoding, those of
    models that normalise them included.

    Attributes:
        span: The text.
        rotary: The model's position encoding.
        statistics: By layer index.
        num_seen: By layer index: columns of the batch so far.
        scaling: By layer index: factor on the dot products.
        softcap: By layer index: bound of the logits, or ``None``.
    """

    span: ObservedSpan
    rotary: Rotary
    statistics: dict[int, QueryStatistics] = field(default_factory=dict)
    num_seen: dict[int, int] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    softcap: dict[int, float | None] = field(default_factory=dict)

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
        """Take the queries of one forward pass."""
        if layer not in self.span.layers:
            return
        for block in _blocks(queries.shape[2]):
            self._take(layer, queries[:, :, block])
        self.scaling[layer] = scaling_of(queries, scaling)
        self.softcap[layer] = softcap

    def scores(self, cache: KVCache) -> dict[int, torch.Tensor]:
        """Return the scores of all layers; see ``chunkkv.scoring.observed.Observer``."""
        return {layer: self._scores(layer, cache) for layer in self.statistics}

    def _take(self, layer: int, queries: torch.Tensor) -> None:
        start = self.num_seen.get(layer, 0)
        stop = self.num_seen[layer] = start + queries.shape[2]
        order = torch.arange(start, stop, device=queries.device)
        order = order - self.span.num_padding.to(queries.device)[:, None]  # (batch, q_len)
        positions = self.span.first_token + order
        plain = self.rotary.undone(queries, layer, positions.clamp(min=0))
        taken = QueryStatistics.of(plain, (order >= 0) & (positions >= SINK_TOKENS))
        if layer in self.statistics:
            taken = self.statistics[layer].merged(taken)
        self.statistics[layer] = taken

    def _scores(self, layer: int, cache: KVCache) -> torch.Tensor:
        statistics, span = self.statistics[layer], self.span
        held = cache.layers[layer]
        keys, values = held.keys, held.values
        padding = span.num_padding.to(keys.device)
        ends = span.first_token + span.num_tokens - padding  # (batch,)
        future = ends[:, None] + torch.arange(FUTURE_POSITIONS, device=keys.device)
        mean = self.rotary.averaged(statistics.mean[:, :, None], layer, future)[:, :, 0]
        # R covariance R^T: once on its rows, once on its columns.
        turned = self.rotary.averaged(statistics.covariance, layer, future).mT
        scores = expected_attention_scores(
            mean,
            self.rotary.averaged(turned, layer, future),
            keys,
            values,
            scaling=self.scaling[layer],
            softcap=self.softcap[layer],
            num_padding=padding,
            hidden=held.hidden,
        )
        return scores[..., -span.num_tokens :]


def _blocks(num_tokens: int) -> list[slice]:
    """Return slices of all tokens: bounds the memory of what has a row for each of them."""
    return [slice(i, i + _TOKENS_AT_ONCE) for i in range(0, num_tokens, _TOKENS_AT_ONCE)]


def _expected_logits(
    mean: torch.Tensor, covariance: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Return ``(batch, num_kv_heads, group, seq_len)`` for scaled keys, before any bound."""
    spread = ((keys[:, :, None] @ covariance) * keys[:, :, None]).sum(dim=-1)
    return mean @ keys.mT + spread / 2
