"""How far a compressed cache strays from the full one, without any task: on plain text.

A text is cut in two. The first part is prefilled and compressed; the second, which no scorer has
seen, is read on top of the full cache and on top of what was kept, and both are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F

from chunkkv.attention import PROBE_ARGUMENT, QueryProbe, observable
from chunkkv.cache import KeptLayer
from chunkkv.compressed import CompressedKV
from chunkkv.compressor import compress
from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.contexts import Context, prefill_context
from chunkkv.evaluation.storing import Stored, stored
from chunkkv.policy import CompressionPolicy
from chunkkv.prefill import generation_inputs

ROWS_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What compression changed, averaged over the texts.

    Attributes:
        l1_loss: Mean absolute difference of keys and values, dropped ones counted as 0.
        attention_cosine: Cosine of attention's output with and without compression, for the same
            queries, averaged over them, query heads and layers.
        kl_divergence: Of the next token's distribution from the full cache's, in nats, at least 0.
        agreement: Share of tokens that both find most likely.
        layer_jaccard: Jaccard similarity of the positions kept by neighbouring layers.
        stored_share: Stored bytes per byte of the full cache's keys and values.
    """

    l1_loss: float
    attention_cosine: float
    kl_divergence: float
    agreement: float
    layer_jaccard: float
    stored_share: float


@dataclass(frozen=True, slots=True)
class Reference:
    """One text: its prefilled first part, and what the model makes of the second.

    Attributes:
        context: The first part.
        token_ids: Of both parts.
        log_probabilities: ``(continuation, vocab_size)`` float32, with the full cache.
        probe: Queries of the second part.
        keys: By full-attention layer: ``(num_kv_heads, num_tokens, head_dim)`` of both parts.
        values: The same.
    """

    context: Context
    token_ids: tuple[int, ...]
    log_probabilities: torch.Tensor
    probe: QueryProbe
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]

    @property
    def num_continuation(self) -> int:
        """Tokens of the second part."""
        return len(self.token_ids) - self.context.prefilled.longest


@torch.no_grad()
def reference(
    model: Any,
    token_ids: Sequence[int],
    *,
    num_continuation: int,
    policies: Collection[CompressionPolicy],
    fingerprint: str | None = None,
    sentence_ends: torch.Tensor | None = None,
) -> Reference:
    """Read a text with the full cache.

    Args:
        model: A transformers decoder.
        token_ids: The text.
        num_continuation: Its last so many tokens are the second part; at least one is left.
        policies: Those that will be measured on it.
        fingerprint: Of the model; computed if not given.
        sentence_ends: As in ``prefill``.

    Raises:
        InvalidInputError: The text is too short, or a policy cuts at sentences and nothing says
            where they end.
    """
    if not 0 < num_continuation < len(token_ids):
        raise InvalidInputError(
            f"a text of {len(token_ids)} tokens has no continuation of {num_continuation}"
        )
    ids = tuple(token_ids)
    context = prefill_context(
        model,
        ids[:-num_continuation],
        policies,
        fingerprint=fingerprint,
        sentence_ends=sentence_ends,
    )
    watching = _Continuation(QueryProbe(num_continuation))
    with observable(model):
        logits = model(
            input_ids=torch.tensor([ids[-num_continuation:]], device=model.device),
            position_ids=torch.arange(context.prefilled.longest, len(ids), device=model.device)[
                None
            ],
            past_key_values=context.prefilled.cache.lookahead(),
            use_cache=True,
            **{PROBE_ARGUMENT: watching},
        ).logits[0]
    layers: dict[int, Any] = {
        index: layer
        for index, layer in enumerate(context.prefilled.cache.layers)
        if isinstance(layer, KeptLayer)
    }
    return Reference(
        context=context,
        token_ids=ids,
        log_probabilities=logits.float().log_softmax(dim=-1),
        probe=watching.queries,
        keys={index: watching.keys[index] for index in layers},
        values={index: layer.values[0] for index, layer in layers.items()},
    )


@dataclass(slots=True)
class _Continuation:
    """Keeps the queries of the second part, and all keys that they see."""

    queries: QueryProbe
    keys: dict[int, torch.Tensor]

    def __init__(self, queries: QueryProbe) -> None:
        self.queries = queries
        self.keys = {}

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor,
        **more: Any,
    ) -> None:
        """Take what one layer computed in the pass over the second part."""
        self.queries.observe(layer, queries, scaling, softcap)
        self.keys[layer] = keys[0]


@torch.no_grad()
def measure(model: Any, text: Reference, policies: Sequence[CompressionPolicy]) -> list[Fidelity]:
    """Return how far each policy strays on one text.

    Args:
        model: The model that read it.
        text: See ``reference``.
        policies: With scorers that were named there.
    """
    measured: list[Fidelity] = []
    for start in range(0, len(policies), ROWS_AT_ONCE):
        kept = [
            stored(compress(text.context.prefilled, policy)[0], policy)
            for policy in policies[start : start + ROWS_AT_ONCE]
        ]
        logits = _logits(model, text, [each.span for each in kept])
        measured += [
            _fidelity(text, each, row.float().log_softmax(dim=-1))
            for each, row in zip(kept, logits, strict=True)
        ]
    return measured


def mean(measured: Sequence[Fidelity]) -> Fidelity:
    """Return the average over texts."""
    return Fidelity(
        **{
            field.name: sum(getattr(each, field.name) for each in measured) / len(measured)
            for field in fields(Fidelity)
        }
    )


def pieces(token_ids: Sequence[int], *, size: int, num_pieces: int) -> Iterator[tuple[int, ...]]:
    """Yield pieces of a text, evenly spread over it, none overlapping another.

    Raises:
        InvalidInputError: The text is shorter than one piece.
    """
    fitting = min(num_pieces, len(token_ids) // size)
    if fitting < 1:
        raise InvalidInputError(
            f"the text has {len(token_ids)} tokens; one piece takes {size}: give a longer text, "
            "or ask for fewer tokens"
        )
    stride = len(token_ids) // fitting
    for index in range(fitting):
        yield tuple(token_ids[index * stride : index * stride + size])


def _logits(model: Any, text: Reference, spans: Sequence[CompressedKV]) -> torch.Tensor:
    """Return ``(spans, continuation, vocab_size)``: the second part read on what was kept."""
    ids = torch.tensor(text.token_ids)
    inputs = generation_inputs(model, [[span] for span in spans], [ids] * len(spans))
    pending = text.num_continuation
    logits: torch.Tensor = model(
        **{
            **inputs,
            "input_ids": inputs["input_ids"][:, -pending:],
            "position_ids": inputs["position_ids"][:, -pending:],
        },
        use_cache=True,
    ).logits
    return logits


def _fidelity(text: Reference, held: Stored, log_probabilities: torch.Tensor) -> Fidelity:
    expected = text.log_probabilities
    divergence = (expected.exp() * (expected - log_probabilities)).sum(dim=-1).mean()
    agreement = (expected.argmax(dim=-1) == log_probabilities.argmax(dim=-1)).float().mean()
    losses, cosines, masks = [], [], []
    for layer in text.keys:
        keys, values, kept = restored(held.span, layer)
        num_tokens = keys.shape[1]
        full_keys, full_values = text.keys[layer][:, :num_tokens], text.values[layer]
        losses.append(((keys - full_keys).abs().mean() + (values - full_values).abs().mean()) / 2)
        cosines.append(_attention_cosine(text, layer, keys, values, kept))
        masks.append(kept)
    return Fidelity(
        l1_loss=float(torch.stack(losses).mean()),
        attention_cosine=float(torch.stack(cosines).mean()),
        kl_divergence=max(0.0, float(divergence)),
        agreement=float(agreement),
        layer_jaccard=jaccard(masks),
        stored_share=held.size_bytes / _full_bytes(text),
    )


def restored(span: CompressedKV, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one layer as if nothing was dropped, with zeros where something was.

    Returns:
        Keys and values ``(num_kv_heads, num_tokens, dim)``, and ``(num_kv_heads, num_tokens)``
        bool: what was kept.
    """
    held = span.layers[layer]
    num_heads = len(held.lengths)
    keys = held.keys.new_zeros(num_heads, span.num_tokens, held.keys.shape[-1])
    values = held.values.new_zeros(num_heads, span.num_tokens, held.values.shape[-1])
    kept = torch.zeros(num_heads, span.num_tokens, dtype=torch.bool, device=keys.device)
    places = held.positions.long() - span.first_token
    if len(places) != sum(held.lengths):  # the heads share them
        places = places.repeat(num_heads)
    lengths = list(held.lengths)
    rows = zip(
        torch.split(places, lengths),
        torch.split(held.keys, lengths),
        torch.split(held.values, lengths),
        strict=True,
    )
    for head, (where, own_keys, own_values) in enumerate(rows):
        keys[head, where], values[head, where], kept[head, where] = own_keys, own_values, True
    return keys, values, kept


def jaccard(masks: Sequence[torch.Tensor]) -> float:
    """Return how alike neighbouring layers' positions are, averaged over pairs and KV heads.

    Args:
        masks: Of each layer, ``(num_kv_heads, num_tokens)`` bool. Of a single layer it is 1.
    """
    if len(masks) < 2:
        return 1.0
    both = torch.stack([(a & b).sum(dim=-1) for a, b in pairwise(masks)])
    any_ = torch.stack([(a | b).sum(dim=-1) for a, b in pairwise(masks)])
    return float((both / any_.clamp(min=1)).mean())


def _attention_cosine(
    text: Reference, layer: int, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return the mean cosine of attention's output with these keys and with all of them.

    Of what the context contributes: the continuation's own tokens, which nothing drops, take part
    in neither softmax.
    """
    queries = text.probe.queries[layer][0]  # (num_heads, continuation, head_dim)
    group = queries.shape[0] // keys.shape[0]
    outputs = []
    num_tokens = keys.shape[1]
    for some_keys, some_values, seen in (
        (text.keys[layer][:, :num_tokens], text.values[layer], None),
        (keys, values, kept),
    ):
        logits = queries @ some_keys.repeat_interleave(group, dim=0).mT * text.probe.scaling[layer]
        softcap = text.probe.softcap[layer]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if seen is not None:
            unseen = ~seen.repeat_interleave(group, dim=0)[:, None]
            logits = logits.masked_fill(unseen, float("-inf"))
        attention = logits.float().softmax(dim=-1).to(some_values.dtype)
        # A head that kept nothing gives nothing.
        attention = attention.nan_to_num(0.0)
        outputs.append(attention @ some_values.repeat_interleave(group, dim=0))
    return F.cosine_similarity(outputs[0], outputs[1], dim=-1).float().mean()


def _full_bytes(text: Reference) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in text.context.prefilled.cache.layers
        for tensor in (layer.keys, layer.values)
    )
