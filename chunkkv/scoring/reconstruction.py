"""``reconstruction``: the attention that each token receives while the model repeats the text.

Sees no question, so it suits text that will be asked about later. Costs a second pass over the
text, each token of which attends to all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from chunkkv.attention import PROBE_ARGUMENT, observable, scaling_of
from chunkkv.prefilled import Prefilled
from chunkkv.scoring.logits import QUERIES_AT_ONCE, attention_logits, by_kv_head, visible_keys

# Both are part of what the scorer's name means: other values choose other tokens.
REPEATED_TOKENS: Final = 512
"""Tokens of the text that one forward pass repeats at most."""
PROMPT_TOKENS: Final = 8
"""Tokens before them that lead into the repetition, and say where it begins."""


@torch.no_grad()
def reconstruct(
    model: Any,
    prefilled: Prefilled,
    input_ids: torch.Tensor,
    *,
    before_chunk: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Let the model repeat the text; return the prefill with what its keys received.

    The text is repeated in pieces of ``REPEATED_TOKENS``, each on top of the whole cache, as if
    it followed the text, and forgotten again. The last ``PROMPT_TOKENS`` of the piece before lead
    in, and their attention counts; nothing leads into the first piece but the text's own end. The
    cache stays as it is.

    Args:
        model: The model that was run. Positions reach ``REPEATED_TOKENS + PROMPT_TOKENS`` beyond
            the end of the text.
        prefilled: What it left. Its cache must not have grown since.
        input_ids: ``(batch, seq_len)`` int64: what it was run over, padding included.
        before_chunk: Called before each piece. What it raises ends the pass.

    Raises:
        InvalidInputError: The token ids are not those of the prefill, by their shape, or tokens
            followed in its cache.

    Source: KVzip (https://arxiv.org/abs/2505.23416), section 3. Deviations: no instruction comes
    before the repetition, so that no tokenizer is needed; a piece votes on all keys of the text
    and not on its own piece alone, and shares its attention between all keys that the model sees
    (those of a prefix included) and not a sample of them: scores are the model's own attention.
    """
    prefilled.check_is_whole(input_ids)
    full = frozenset(prefilled.cache.full_layers)
    padding = prefilled.num_padding if prefilled.num_padding.any() else None
    probe = ReconstructionProbe(full, prefilled.longest, padding)
    if full:
        with observable(model):
            for piece in _pieces(prefilled, input_ids):
                before_chunk()
                probe.num_queries = None if padding is None else piece.num_tokens
                model.base_model(
                    input_ids=piece.input_ids,
                    attention_mask=_mask(prefilled, piece.input_ids),
                    position_ids=piece.position_ids,
                    past_key_values=prefilled.cache.lookahead(),
                    use_cache=True,
                    **{PROBE_ARGUMENT: probe},
                )
    return replace(prefilled, observed={**prefilled.observed, "reconstruction": probe.scores})


def most_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    num_padding: torch.Tensor | None = None,
    num_queries: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the most attention that one query pays to each key.

    The largest softmaxed attention over queries and over the query heads of each KV head.

    Args:
        queries: ``(batch, num_heads, q_len, head_dim)``, of the last ``q_len`` tokens, after
            position encoding.
        keys: ``(batch, num_kv_heads, seq_len, head_dim)``, ``seq_len >= q_len``.
        scaling: Factor on the dot products, as the model uses it.
        softcap: Bound of the logits, if the model has one.
        num_padding: ``(batch,)``: leading keys of each row that are padding, none of the last
            ``q_len``.
        num_queries: ``(batch,)``: the first so many queries of each row vote; all if ``None``.
        hidden: ``(batch, num_kv_heads)``: leading keys of each head that hold nothing.

    Returns:
        ``(batch, num_kv_heads, seq_len)`` float32 in ``[0, 1]``. Padding and what holds nothing
        have score 0.
    """
    q_len, num_kv_heads, seq_len = queries.shape[2], keys.shape[1], keys.shape[2]
    grouped = by_kv_head(queries, num_kv_heads, scaling)
    visible = visible_keys(q_len, seq_len, num_padding, keys.device)
    most = torch.full((keys.shape[0], num_kv_heads, seq_len), float("-inf"), device=keys.device)
    for start in range(0, q_len, QUERIES_AT_ONCE):
        asking = slice(start, start + QUERIES_AT_ONCE)
        logits = attention_logits(
            grouped[:, :, :, asking], keys, visible[:, asking], softcap, hidden
        )
        shares = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))  # logarithms of attention
        if num_queries is not None:
            order = torch.arange(start, start + logits.shape[3], device=keys.device)
            is_silent = order >= num_queries.to(keys.device)[:, None]  # (batch, queries)
            shares.masked_fill_(is_silent[:, None, None, :, None], float("-inf"))
        most = torch.maximum(most, shares.amax(dim=(2, 3)))
    return most.exp()


@dataclass(slots=True)
class ReconstructionProbe:
    """Scores the text's keys as the repeating queries come by, and keeps neither.

    Attributes:
        layers: Indices of the layers that are scored.
        span: Tokens of the text, directly before each pass's own.
        num_padding: ``(batch,)`` leading keys that are padding, or ``None``.
        num_queries: ``(batch,)`` queries of the next pass that vote, or ``None`` for all.
        scores: By layer index: ``(batch, num_kv_heads, span)`` float32.
    """

    layers: frozenset[int]
    span: int
    num_padding: torch.Tensor | None = None
    num_queries: torch.Tensor | None = None
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
        """Score one layer's keys by the queries of one forward pass."""
        if layer not in self.layers:
            return
        most = most_attention(
            queries,
            keys,
            scaling=scaling_of(queries, scaling),
            softcap=softcap,
            num_padding=self.num_padding,
            num_queries=self.num_queries,
            hidden=hidden,
        )
        end = keys.shape[2] - queries.shape[2]
        received = most[..., end - self.span : end]
        if layer in self.scores:
            received = torch.maximum(self.scores[layer], received)
        self.scores[layer] = received


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is repeated in one pass: ``(batch, tokens)`` each, rows that have less padded behind."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    num_tokens: torch.Tensor  # (batch,), 0 for rows that have ended


def _pieces(prefilled: Prefilled, input_ids: torch.Tensor) -> Iterator[_Piece]:
    device = input_ids.device
    lengths = torch.tensor(prefilled.num_tokens, device=device)
    padding = prefilled.num_padding.to(device)
    # From the beginning of each row's own text, so that rows do not influence each other.
    for start in range(0, prefilled.longest, REPEATED_TOKENS):
        first = max(start - PROMPT_TOKENS, 0)
        stop = min(start + REPEATED_TOKENS, prefilled.longest)
        order = torch.arange(first, stop, device=device)
        columns = (padding[:, None] + order).clamp(max=prefilled.longest - 1)
        yield _Piece(
            input_ids=input_ids.gather(1, columns),
            position_ids=prefilled.first_token + lengths[:, None] + order - first,
            num_tokens=(lengths.clamp(max=stop) - first) * (lengths > start),
        )


def _mask(prefilled: Prefilled, input_ids: torch.Tensor) -> torch.Tensor | None:
    if not prefilled.num_padding.any():
        return None
    width = prefilled.longest + input_ids.shape[1]
    columns = torch.arange(width, device=input_ids.device)
    return (columns >= prefilled.num_padding.to(input_ids.device)[:, None]).long()
