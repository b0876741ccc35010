"""Prefill: prompts in, compressed KV caches out, through any transformers decoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from chunkkv.attention import PROBE_ARGUMENT, Probes, QueryProbe, make_observable, observable
from chunkkv.cache import KVCache
from chunkkv.compressed import CompressedKV
from chunkkv.compressor import compress
from chunkkv.errors import InvalidInputError
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy, Scorer
from chunkkv.prefilled import Prefilled
from chunkkv.scoring import ObservedSpan, observers, repeat
from chunkkv.sentence_ends import ends_of


def prefill(
    model: Any,
    input_ids: torch.Tensor,
    policy: CompressionPolicy,
    *,
    attention_mask: torch.Tensor | None = None,
    prefill_chunk_tokens: int | None = None,
    sentence_ends: torch.Tensor | None = None,
) -> list[CompressedKV]:
    """Run a model over prompts and keep what ``policy`` says of their KV cache.

    Args:
        model: A transformers decoder for causal language modelling.
        input_ids: ``(batch, seq_len)`` int64. All of them are run: to go on generating, hold the
            last token of each prompt back (see ``generation_inputs``).
        policy: What to keep.
        attention_mask: ``(batch, seq_len)``, 0 for padding, which must be on the left.
        prefill_chunk_tokens: Run the prompt in pieces of so many tokens, to bound memory.
        sentence_ends: ``(vocab_size,)`` bool: the token ends a sentence, as
            ``sentence_ending_tokens(tokenizer)`` gives it. Policies of unit ``sentence`` need it.

    Returns:
        One span for each row. Rows do not influence each other.

    Raises:
        InvalidInputError: Shapes do not fit, a row is empty, padding is not on the left, or the
            policy cuts at sentences and nothing says where they end.
    """
    ends = ends_of(input_ids, sentence_ends, (policy,))
    prefilled = run_prefill(
        model,
        input_ids,
        window_size=policy.num_queries,
        scorers=(policy.scorer,),
        attention_mask=attention_mask,
        prefill_chunk_tokens=prefill_chunk_tokens,
    )
    prefilled = repeat(model, prefilled, input_ids, (policy.scorer,))
    return compress(replace(prefilled, sentence_ends=ends), policy)


@torch.no_grad()
def run_prefill(
    model: Any,
    input_ids: torch.Tensor,
    *,
    window_size: int,
    scorers: Collection[Scorer] = (),
    attention_mask: torch.Tensor | None = None,
    past: KVCache | None = None,
    prefill_chunk_tokens: int | None = None,
    fingerprint: str | None = None,
    before_chunk: Callable[[], None] = lambda: None,
) -> Prefilled:
    """Run a model over prompts and return the full KV cache with the last tokens' queries.

    Args:
        model: A transformers decoder.
        input_ids: ``(batch, seq_len)`` int64, at least one token each.
        window_size: Tokens whose queries are kept: the largest window of the policies to come
            that score by it (``CompressionPolicy.num_queries``).
        scorers: Those of the policies to come. ``heavy_hitter`` and ``expected_attention`` watch
            the forward passes, which costs time, and must be named; ``reconstruction`` and
            ``recall`` need :func:`repeat` afterwards; the others need nothing.
        attention_mask: ``(batch, seq_len)``, 0 for padding, which must be on the left.
        past: The sequence's earlier KV, for a batch of one without padding; it is extended. Heads
            and layers may hold different numbers of tokens.
        prefill_chunk_tokens: Tokens in one forward pass at most; all at once if ``None``.
        fingerprint: Of the model; computed if not given.
        before_chunk: Called before each forward pass. What it raises ends the prefill.

    Raises:
        InvalidInputError: Shapes do not fit, a row is empty, padding is not on the left, a size is
            less than 1, or a scorer cannot watch this model.
    """
    if window_size < 1 or (prefill_chunk_tokens is not None and prefill_chunk_tokens < 1):
        raise InvalidInputError(
            f"window_size is {window_size}, prefill_chunk_tokens {prefill_chunk_tokens}; "
            "give at least 1"
        )
    batch, seq_len = input_ids.shape
    num_tokens = _row_lengths(input_ids, attention_mask)
    if past is not None and (batch > 1 or num_tokens != (seq_len,)):
        raise InvalidInputError("a prompt on top of earlier KV must be one row without padding")
    cache = past if past is not None else KVCache(model.config)
    first_token = cache.get_seq_length()
    cache.reserve(seq_len)

    padding = seq_len - torch.tensor(num_tokens, device=input_ids.device)
    positions = torch.arange(seq_len, device=input_ids.device) - padding[:, None]
    positions = positions.clamp(min=0) + first_token  # (batch, seq_len)
    span = ObservedSpan(
        layers=frozenset(cache.full_layers),
        first_token=first_token,
        num_tokens=seq_len,
        num_padding=padding,
    )
    probe, watching = QueryProbe(window_size), observers(model, scorers, span)
    probes = Probes((probe, *watching.values()))
    with observable(model):
        for start in range(0, seq_len, prefill_chunk_tokens or seq_len):
            before_chunk()
            stop = min(start + (prefill_chunk_tokens or seq_len), seq_len)
            # The model without its head: no logits are wanted.
            model.base_model(
                input_ids=input_ids[:, start:stop],
                attention_mask=None if attention_mask is None else attention_mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                **{PROBE_ARGUMENT: probes},
            )
    return Prefilled(
        cache=cache,
        probe=probe,
        first_token=first_token,
        num_tokens=num_tokens,
        fingerprint=model_fingerprint(model) if fingerprint is None else fingerprint,
        observed={scorer: observer.scores(cache) for scorer, observer in watching.items()},
    )


def generation_inputs(
    model: Any, segments: Sequence[Sequence[CompressedKV]], token_ids: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Return keyword arguments for transformers' ``model.generate`` that continue from kept KV.

    If heads or layers keep different numbers of tokens, or rows of a batch dropped tokens on a
    model with sliding-window layers, only attention of our own can read the cache: the model is
    made observable (``make_observable``), and stays so.

    Args:
        model: The model that computed the segments.
        segments: For each row, its spans in order.
        token_ids: For each row, ``(tokens,)``: the whole text, of which all rows must have
            equally many tokens behind their spans, at least one.

    Raises:
        InvalidInputError: Nothing is left to run, or rows do not fit together.
        MismatchError: Segments do not follow one another.
    """
    caches = [KVCache.from_segments(model.config, row, device=model.device) for row in segments]
    pending = {
        len(ids) - cache.get_seq_length() for ids, cache in zip(token_ids, caches, strict=True)
    }
    if len(pending) != 1 or min(pending) < 1:
        raise InvalidInputError(
            f"rows have {sorted(pending)} tokens behind their kept KV; "
            "they need equally many, at least one"
        )
    seen = [len(ids) for ids in token_ids]
    longest = max(seen)
    cache = caches[0] if len(caches) == 1 else KVCache.stack(model.config, caches)
    # Columns of a row that hold nothing: its padding, and the room of what it dropped.
    hidden = [longest - n + row.num_dropped_tokens for n, row in zip(seen, caches, strict=True)]
    if len(caches) == 1:
        hidden = [0]  # the cache itself tells the mask how much a single row dropped
    elif cache.is_ragged:
        hidden = [longest - n for n in seen]  # for sliding layers; attention knows of the others
    if cache.is_ragged:
        make_observable(model)
    columns = torch.arange(longest, device=model.device)
    left = torch.tensor([longest - n for n in seen], device=model.device)[:, None]
    ids = torch.zeros(len(seen), longest, dtype=torch.int64, device=model.device)
    for row, tokens in enumerate(token_ids):
        ids[row, longest - len(tokens) :] = tokens.to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": (columns >= torch.tensor(hidden, device=model.device)[:, None]).long(),
        "position_ids": (columns - left).clamp(min=0),
        "past_key_values": cache,
    }


def _row_lengths(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[int, ...]:
    batch, seq_len = input_ids.shape
    if seq_len == 0:
        raise InvalidInputError("prompt has no tokens; give at least one")
    if attention_mask is None:
        return (seq_len,) * batch
    if attention_mask.shape != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask is {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    lengths = attention_mask.long().sum(dim=1)
    if (attention_mask.long().diff(dim=1) < 0).any():
        raise InvalidInputError("padding must be on the left of every row")
    if (lengths == 0).any():
        raise InvalidInputError("a row is nothing but padding")
    return tuple(lengths.tolist())
