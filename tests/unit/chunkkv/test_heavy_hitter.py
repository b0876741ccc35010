"""Accumulated attention against what the model reports, seq x seq, and against explicit loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache
from chunkkv.cache import KeptLayer
from chunkkv.scoring import layer_scores
from chunkkv.scoring.heavy_hitter import accumulated_attention
from chunkkv.scoring.logits import QUERIES_AT_ONCE

POLICY = CompressionPolicy(scorer="heavy_hitter", keep_ratio=0.5, chunk_size=5, window_size=8)
LENGTHS = (2 * QUERIES_AT_ONCE + 13, 37)


def reported_scores(model: Any, text: torch.Tensor, cache: KVCache) -> dict[int, torch.Tensor]:
    """Return what eager attention reports for ``text`` ``(seq_len,)`` behind ``cache``.

    Returns:
        By full-attention layer: ``(num_kv_heads, seq_len)``.
    """
    first = cache.get_seq_length()
    with torch.no_grad():
        attentions = model(
            text[None],
            position_ids=torch.arange(first, first + len(text))[None],
            past_key_values=cache,
            output_attentions=True,
        ).attentions
    return {
        index: attentions[index][0, :, :, -len(text) :].unflatten(0, (2, -1)).sum(dim=2).mean(dim=1)
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, KeptLayer)
    }


@pytest.mark.parametrize("piece", [None, 29], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_sums_of_the_attention_that_the_model_reports(
    family: str, piece: int | None
):
    ids, mask = prompts(*LENGTHS)
    eager = tiny_model(family, dtype=torch.float64, attention="eager")

    prefilled = chunkkv.run_prefill(
        tiny_model(family, dtype=torch.float64),
        ids,
        window_size=8,
        scorers=["heavy_hitter"],
        attention_mask=mask,
        prefill_chunk_tokens=piece,
    )

    for row, length in enumerate(LENGTHS):
        expected = reported_scores(eager, ids[row, -length:], KVCache(eager.config))
        assert sorted(prefilled.observed["heavy_hitter"]) == sorted(expected)
        for layer, scores in expected.items():
            found = layer_scores(prefilled, POLICY, layer)
            assert found.shape == (2, 2, LENGTHS[0])
            assert found.dtype == torch.float32
            torch.testing.assert_close(found[row, :, -length:].double(), scores, atol=1e-4, rtol=0)
            assert (found[row, :, :-length] == 0).all(), "padding"


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_prefix_is_seen_and_not_scored(family: str, piece: int | None):
    ids, _ = prompts(100)
    model = tiny_model(family, dtype=torch.float64)
    eager = tiny_model(family, dtype=torch.float64, attention="eager")
    [first] = chunkkv.prefill(model, ids[:, :40], POLICY)
    past: Callable[[], KVCache] = lambda: KVCache.from_segments(model.config, [first])  # noqa: E731

    prefilled = chunkkv.run_prefill(
        model,
        ids[:, 40:],
        window_size=8,
        scorers=["heavy_hitter"],
        past=past(),
        prefill_chunk_tokens=piece,
    )

    for layer, scores in reported_scores(eager, ids[0, 40:], past()).items():
        found = layer_scores(prefilled, POLICY, layer)
        assert found.shape == (1, 2, 60)
        torch.testing.assert_close(found[0].double(), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (8, 1)])
def test_accumulated_attention_equals_explicit_loops(
    num_heads: int, num_kv_heads: int, softcap: float | None
):
    generator = torch.Generator().manual_seed(num_heads)
    num_queries, num_keys, padding = QUERIES_AT_ONCE + 6, QUERIES_AT_ONCE + 17, [0, 19]
    group = num_heads // num_kv_heads
    queries = torch.randn(2, num_heads, num_queries, 8, generator=generator)
    keys = torch.randn(2, num_kv_heads, num_keys, 8, generator=generator)
    expected = torch.zeros(2, num_kv_heads, num_keys, dtype=torch.float64)
    for row in range(2):
        for head in range(num_heads):
            for order in range(num_queries):
                position = num_keys - num_queries + order
                if position < padding[row]:
                    continue
                seen = keys[row, head // group, padding[row] : position + 1].double()
                logits = (0.3 * (seen @ queries[row, head, order].double())).tolist()
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                total = sum(math.exp(logit) for logit in logits)
                shares = [math.exp(logit) / total / group for logit in logits]
                expected[row, head // group, padding[row] : position + 1] += torch.tensor(
                    shares, dtype=torch.float64
                )

    found = accumulated_attention(
        queries, keys, scaling=0.3, softcap=softcap, num_padding=torch.tensor(padding)
    )

    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    num_voters = torch.tensor([num_queries, num_keys - 19]).float()[:, None].expand(2, num_kv_heads)
    torch.testing.assert_close(found.sum(dim=-1), num_voters, atol=1e-3, rtol=0)


def test_overflow_is_visible_in_the_scores():
    queries, keys = torch.randn(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    keys[0, 0, 3] = math.inf

    scores = accumulated_attention(queries, keys, scaling=1.0)

    assert not scores[0, 0].isfinite().all()
    assert scores[0, 1].isfinite().all()


def test_no_more_than_some_queries_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch):
    from chunkkv.scoring import logits

    most, original = 0, logits.attention_logits

    def noted(queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, queries.shape[3])
        return original(queries, *rest)

    monkeypatch.setattr(logits, "attention_logits", noted)
    queries, keys = torch.randn(2, 1, 2, 5 * QUERIES_AT_ONCE, 8)

    accumulated_attention(queries, keys, scaling=1.0)

    assert most == QUERIES_AT_ONCE


def test_prefill_that_was_not_watched_is_refused():
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(30)[0], window_size=8)

    with pytest.raises(InvalidInputError, match=r"run_prefill with scorers=\['heavy_hitter'\]"):
        chunkkv.compress(prefilled, POLICY)
