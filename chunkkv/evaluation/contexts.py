"""One context, prefilled once: compressed alone, or together with a question that follows it.

Everything that scorers want to observe is observed on the way. A question runs on top of a copy of
the full cache, and the observers of the copy go on where those of the context stopped, so the
result is what a prefill of context and question in one piece would have left.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F

from chunkkv.attention import PROBE_ARGUMENT, Probes, QueryProbe, observable
from chunkkv.cache import KVCache
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy, Scorer
from chunkkv.prefilled import Prefilled
from chunkkv.scoring import ObservedSpan, observers, repeat
from chunkkv.scoring.observed import Observer
from chunkkv.sentence_ends import ends_of

PREFILL_TOKENS: Final = 2048
"""Tokens of one forward pass at most."""


@dataclass(frozen=True, slots=True)
class Context:
    """A prefilled text and the observers that watched.

    Attributes:
        model: The model.
        prefilled: What the prefill left.
        observers: By scorer.
        span: What they were told.
        sentence_ends: ``(vocab_size,)`` bool: the token ends a sentence; ``None`` if nobody said.
    """

    model: Any
    prefilled: Prefilled
    observers: Mapping[Scorer, Observer]
    span: ObservedSpan
    sentence_ends: torch.Tensor | None = None

    def followed_by(self, token_ids: Sequence[int]) -> Prefilled:
        """Return the prefill of the context and tokens that follow it. This one stays as it is.

        Scores of a repetition, which sees no question, stay what they were; the tokens that follow
        are given the highest there is, so that they are kept. To repeat context and question anew
        for each question would cost more than the prefill of both.
        """
        if not token_ids:
            return self.prefilled
        before = self.prefilled
        cache, watching = copy.deepcopy(before.cache), copy.deepcopy(dict(self.observers))
        probe = replace(
            before.probe,
            queries=dict(before.probe.queries),
            scaling=dict(before.probe.scaling),
            softcap=dict(before.probe.softcap),
        )
        span = replace(self.span, num_tokens=self.span.num_tokens + len(token_ids))
        for observer in watching.values():
            observer.span = span  # type: ignore[attr-defined]  # told how long the text became
        _run(self.model, token_ids, cache, Probes((probe, *watching.values())))
        observed: dict[Scorer, Mapping[int, torch.Tensor]] = {
            scorer: observer.scores(cache) for scorer, observer in watching.items()
        }
        for scorer in before.observed.keys() - observed.keys():
            observed[scorer] = {
                layer: F.pad(scores, (0, len(token_ids)), value=float(scores.max()))
                for layer, scores in before.observed[scorer].items()
            }
        ids = torch.tensor([token_ids], device=self.model.device)
        ends = (before.sentence_ends, ends_of(ids, self.sentence_ends, ()))
        known = [each for each in ends if each is not None]  # both or neither
        return Prefilled(
            cache=cache,
            probe=probe,
            first_token=0,
            num_tokens=(span.num_tokens,),
            fingerprint=before.fingerprint,
            observed=observed,
            sentence_ends=torch.cat(known, dim=1) if known else None,
        )


@torch.no_grad()
def prefill_context(
    model: Any,
    token_ids: Sequence[int],
    policies: Collection[CompressionPolicy],
    *,
    fingerprint: str | None = None,
    sentence_ends: torch.Tensor | None = None,
) -> Context:
    """Run a model over a text once, observing what all of ``policies`` need.

    Args:
        model: A transformers decoder.
        token_ids: The text, at least one token.
        policies: Those that will compress it, alone or with what follows.
        fingerprint: Of the model; computed if not given.
        sentence_ends: As in ``prefill``.

    Raises:
        InvalidInputError: A policy cuts at sentences and nothing says where they end.
    """
    ids = torch.tensor([token_ids], device=model.device)
    ends = ends_of(ids, sentence_ends, policies)
    cache = KVCache(model.config)
    cache.reserve(len(token_ids))
    span = ObservedSpan(
        layers=frozenset(cache.full_layers),
        first_token=0,
        num_tokens=len(token_ids),
        num_padding=torch.zeros(1, dtype=torch.int64),
    )
    scorers = {policy.scorer for policy in policies}
    probe = QueryProbe(max((policy.num_queries for policy in policies), default=1))
    watching = observers(model, scorers, span)
    _run(model, token_ids, cache, Probes((probe, *watching.values())))
    prefilled = Prefilled(
        cache=cache,
        probe=probe,
        first_token=0,
        num_tokens=(len(token_ids),),
        fingerprint=model_fingerprint(model) if fingerprint is None else fingerprint,
        observed={scorer: observer.scores(cache) for scorer, observer in watching.items()},
        sentence_ends=ends,
    )
    prefilled = repeat(model, prefilled, ids, scorers)
    return Context(model, prefilled, watching, span, sentence_ends)


@torch.no_grad()
def _run(model: Any, token_ids: Sequence[int], cache: KVCache, probes: Probes) -> None:
    """Append tokens to a cache of one row, in pieces, and show the probes each of them."""
    start = cache.get_seq_length()
    ids = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(start, start + len(token_ids), device=model.device)[None]
    with observable(model):
        for piece in range(0, len(token_ids), PREFILL_TOKENS):
            model.base_model(
                input_ids=ids[:, piece : piece + PREFILL_TOKENS],
                position_ids=positions[:, piece : piece + PREFILL_TOKENS],
                past_key_values=cache,
                use_cache=True,
                **{PROBE_ARGUMENT: probes},
            )
