"""``recall``: what the model draws on each token while it repeats the few hundred around it.

Sees no question, so it suits text that will be asked about later. Costs a second pass over the
text, but no more attention than a prefill in short pieces: a piece is repeated from itself and a
sample of the rest, each token of which stands for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from chunkkv.attention import ATTENTION_ARGUMENT, observable, scaling_of
from chunkkv.prefilled import Prefilled
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_logits, by_kv_head, visible_keys

# All are part of what the scorer's name means: other values choose other tokens.
REPEATED_TOKENS: Final = 512
"""Tokens of the text that one forward pass repeats at most."""
LEAD_TOKENS: Final = 8
"""Tokens before them that lead into the repetition, and say where it begins."""
SINK_TOKENS: Final = 4
"""First tokens of the text, which every piece sees too: attention rests on them."""
SAMPLED_TOKENS: Final = 512
"""Tokens of the rest of the text that every piece sees at most, evenly spread: its competition."""
HEAD_EXPONENT: Final = 1 / 3
"""What the sum of a head's votes is raised to before it divides them."""


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
    its own tokens, those that lead into it, the text's first ones, and a sample of the others. A
    sampled token draws the attention of all those that it stands for: their number is a factor on
    its exponential.

    A query's vote is its squared attention, since one sure vote outweighs many vague ones, times
    the information of the token that it has to come up with next: ``log(1 + n / count)`` nats for
    a token that ``count`` of the text's ``n`` are. The score of a token is the sum of the votes of
    all queries that repeat its piece (for the first ones: of all), averaged over the query heads of
    its KV head. Heads that draw on everything would outbid those that draw on little: all scores of
    a head are divided by the cube root of their sum.

    The cache stays as it is. Rows of a batch are repeated one by one.

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
    piece sees a weighted sample of the rest of the text, and votes are weighted, summed and
    levelled between heads, where KVzip takes the largest attention.
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
            information = _information_of_next(ids)
            for piece in _pieces(num_tokens):
                before_chunk()
                end = prefilled.first_token + num_tokens
                count = len(piece.repeated)
                seen = torch.cat([piece.sample, piece.source]).to(ids.device)
                voted = piece.source.to(ids.device) - num_tokens  # from the end, which rows share
                attention = RecallAttention(
                    layers=frozenset(full),
                    num_sampled=len(piece.sample),
                    num_voted=len(piece.source),
                    stands_for=piece.stands_for,
                    query_weights=information[piece.repeated],
                )
                model.base_model(
                    input_ids=ids[None, piece.repeated],
                    position_ids=torch.arange(end, end + count, device=ids.device)[None],
                    past_key_values=prefilled.cache.excerpt(row, seen - num_tokens, seen=end),
                    use_cache=True,
                    **{ATTENTION_ARGUMENT: attention},
                )
                for index, received in attention.scores.items():
                    scores[index][row, :, voted] += received
    for votes in scores.values():
        total = votes.sum(dim=-1, keepdim=True)
        votes /= total.clamp(min=torch.finfo(votes.dtype).tiny) ** HEAD_EXPONENT
    return replace(prefilled, observed={**prefilled.observed, "recall": scores})


def _information_of_next(ids: torch.Tensor) -> torch.Tensor:
    """Return the information of the token after each of ``(tokens,)``, nats; 0 at the last."""
    _, which, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    information = (len(ids) / counts[which]).log1p()
    return torch.cat([information[1:], information.new_zeros(1)])


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one pass repeats, and what it sees: positions in the text, each ``(tokens,)`` int64.

    Attributes:
        repeated: The tokens, and those that lead into them.
        source: The same and the text's first ones: what is voted on.
        sample: Of the others.
        stands_for: How many tokens each of the sample stands for, at least 1.
    """

    repeated: torch.Tensor
    source: torch.Tensor
    sample: torch.Tensor
    stands_for: float


def _pieces(num_tokens: int) -> Iterator[_Piece]:
    for start in range(0, num_tokens, REPEATED_TOKENS):
        first, stop = max(start - LEAD_TOKENS, 0), min(start + REPEATED_TOKENS, num_tokens)
        sinks = min(SINK_TOKENS, first)
        others = torch.cat([torch.arange(sinks, first), torch.arange(stop, num_tokens)])
        num_sampled = min(SAMPLED_TOKENS, len(others))
        middles = 2 * torch.arange(num_sampled) + 1  # of equal parts, in halves of one
        repeated = torch.arange(first, stop)
        yield _Piece(
            repeated,
            torch.cat([torch.arange(sinks), repeated]),
            others[middles * len(others) // (2 * max(num_sampled, 1))],
            len(others) / num_sampled if num_sampled else 1.0,
        )


@dataclass(frozen=True, slots=True)
class RecallAttention:
    """The attention of a piece, which also scores what it sees.

    One softmax serves both: on a CPU, to compute it once more costs as much as the attention.

    Attributes:
        layers: Indices of the layers that are scored.
        num_sampled: First keys, which compete and are not scored.
        num_voted: Keys behind them, which are scored; then come those of the pass itself.
        stands_for: How many tokens each of the first keys stands for.
        query_weights: ``(q_len,)`` float32: what the vote of each query counts.
        scores: By layer index: ``(num_kv_heads, num_voted)`` float32.
    """

    layers: frozenset[int]
    num_sampled: int
    num_voted: int
    stands_for: float
    query_weights: torch.Tensor
    scores: dict[int, torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return ``(1, q_len, num_heads, value_dim)``, and keep the layer's scores.

        Arguments are those of ``LayerAttention``, of a batch of one.
        """
        num_heads, q_len = queries.shape[1:3]
        num_kv_heads = keys.shape[1]
        grouped = by_kv_head(queries, num_kv_heads, scaling_of(queries, scaling))
        first, last = self.num_sampled, self.num_sampled + self.num_voted
        attended = values.new_empty(q_len, num_kv_heads, num_heads // num_kv_heads, values.shape[3])
        # In float32: what many tokens weigh together may be past what float16 holds.
        values = values[0].to(torch.float32, copy=True)
        values[:, :first] *= self.stands_for
        scores = torch.zeros(num_kv_heads, self.num_voted, device=keys.device)
        for start in range(0, q_len, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, q_len)
            seen = keys[:, :, : last + stop]
            visible = visible_keys(stop - start, seen.shape[2], None, keys.device)
            logits = attention_logits(grouped[:, :, :, start:stop], seen, visible, softcap)
            shares = logits.softmax(dim=-1)[0]  # (num_kv_heads, group, queries, seen)
            # What the softmax would have been divided by more, had each of the sample come often.
            total = 1 + (self.stands_for - 1) * shares[..., :first].sum(dim=-1)
            mixed = shares.flatten(1, 2) @ values[:, : last + stop]
            mixed = mixed.view(*total.shape, -1) / total[..., None]
            attended[start:stop] = mixed.permute(2, 0, 1, 3)
            weights = self.query_weights[start:stop] / total.square()
            votes = weights[..., None, :] @ shares[..., first:last].square_()
            scores += votes.squeeze(2).sum(dim=1)
        self.scores[layer] = scores / grouped.shape[2]
        return attended.flatten(1, 2)[None]
