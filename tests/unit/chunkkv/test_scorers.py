"""Every scorer through the whole library; those that need no query against explicit loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache, key_diff_scores
from chunkkv.policy import Scorer
from chunkkv.scoring import layer_scores
from chunkkv.scoring.key_norm import key_norm_scores
from chunkkv.scoring.recency import recency_scores

SCORERS = get_args(Scorer)
SCOPES = ("head", "layer", "group", "global")
UNITS = ("chunk", "token")
SMALL: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 5, "window_size": 8}
LENGTHS = (60, 37)


def slow_key_diff(keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of one head ``(seq_len, head_dim)``, one key at a time."""
    unit = [[x / math.hypot(*key) for x in key] for key in keys.double().tolist()]
    anchor = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    length = math.hypot(*anchor)
    cosines = [sum(x * a for x, a in zip(key, anchor, strict=True)) / length for key in unit]
    return torch.tensor([1 - cosine for cosine in cosines], dtype=torch.float64)


def slow_key_norm(keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of one head ``(seq_len, head_dim)``, one key at a time."""
    return torch.tensor(
        [1 / (1 + math.hypot(*key)) for key in keys.double().tolist()], dtype=torch.float64
    )


def slow_recency(keys: torch.Tensor) -> torch.Tensor:
    """Return the scores of one head ``(seq_len, head_dim)``, one key at a time."""
    return torch.tensor([(i + 1) / len(keys) for i in range(len(keys))], dtype=torch.float64)


SLOW: dict[Scorer, Callable[[torch.Tensor], torch.Tensor]] = {
    "key_diff": slow_key_diff,
    "key_norm": slow_key_norm,
    "recency": slow_recency,
}


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("scorer", SLOW)
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_scores_equal_the_slow_reference(family: str, scorer: Scorer, piece: int | None):
    ids, mask = prompts(*LENGTHS)
    prefilled = chunkkv.run_prefill(
        tiny_model(family), ids, window_size=8, attention_mask=mask, prefill_chunk_tokens=piece
    )

    for index, layer in enumerate(prefilled.cache.layers):
        if layer.is_sliding:
            continue
        scores = layer_scores(prefilled, CompressionPolicy(scorer=scorer), index)
        assert scores.shape == (2, 2, 60)
        assert scores.dtype == torch.float32
        for row, length in enumerate(LENGTHS):
            assert (scores[row, :, :-length] == 0).all(), "padding"
            for head in range(2):
                torch.testing.assert_close(
                    scores[row, head, -length:].double(),
                    SLOW[scorer](layer.keys[row, head, -length:]),
                    atol=1e-5,
                    rtol=0,
                )


@pytest.mark.parametrize("scorer", SLOW)
@pytest.mark.parametrize("family", FULL_ATTENTION_FAMILIES)
def test_keys_are_compared_with_the_spans_own_only(family: str, scorer: Scorer):
    model = tiny_model(family)
    ids, _ = prompts(60)
    first = chunkkv.prefill(model, ids[:, :30], CompressionPolicy(**SMALL))
    past = KVCache.from_segments(model.config, first)

    prefilled = chunkkv.run_prefill(model, ids[:, 30:], window_size=8, past=past)

    for index, layer in enumerate(past.layers):
        scores = layer_scores(prefilled, CompressionPolicy(scorer=scorer), index)
        expected = torch.stack([SLOW[scorer](keys) for keys in layer.keys[0, :, -30:]])
        torch.testing.assert_close(scores[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("score", [key_diff_scores, key_norm_scores])
def test_padding_may_hold_anything(score: Any):
    keys = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0))
    expected = score(keys[1:, :, 6:])
    keys[1, :, :6] = math.nan

    scores = score(keys, num_padding=torch.tensor([0, 6]))

    torch.testing.assert_close(scores[1:, :, 6:], expected, atol=1e-6, rtol=0)
    assert (scores[1, :, :6] == 0).all()


@pytest.mark.parametrize("scorer", ["key_diff", "key_norm"])
def test_key_that_overflowed_is_refused(scorer: Scorer):
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(30)[0], window_size=8)
    prefilled.cache.layers[2].keys[0, 0, 4] = torch.inf

    with pytest.raises(InvalidInputError, match="scores are not finite"):
        chunkkv.compress(prefilled, CompressionPolicy(scorer=scorer, **SMALL))


def test_key_of_norm_zero_has_the_highest_score():
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]]]])

    assert key_norm_scores(keys)[0, 0].tolist() == pytest.approx([1 / 6, 1, 1 / 2])


def test_recency_rises_strictly_over_a_long_text():
    scores = recency_scores(torch.tensor([1_000_000]), 1_000_000)

    assert (scores.diff() > 0).all()
    assert float(scores.min()) > 0
    assert float(scores.max()) == 1


def test_recency_keeps_sinks_and_the_most_recent_tokens():
    policy = CompressionPolicy(
        scorer="recency", unit="token", max_kept_tokens=20, window_size=1, sink_tokens=4
    )

    [span] = chunkkv.prefill(tiny_model(), prompts(60)[0], policy)

    for layer in span.layers:
        assert layer.positions.tolist() == [*range(4), *range(44, 60)]


def test_one_prefill_serves_policies_of_all_scorers():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)

    prefilled = chunkkv.run_prefill(
        model, ids, window_size=8, scorers=SCORERS, attention_mask=mask, prefill_chunk_tokens=16
    )
    prefilled = chunkkv.repeat(model, prefilled, ids, SCORERS)

    for scorer in SCORERS:
        policy = CompressionPolicy(scorer=scorer, **SMALL)
        alone = chunkkv.prefill(model, ids, policy, attention_mask=mask, prefill_chunk_tokens=16)
        for mine, its in zip(chunkkv.compress(prefilled, policy), alone, strict=True):
            assert torch.equal(mine.memory, its.memory)


def test_watching_scorers_change_nothing_of_what_is_cached():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)

    plain, watched = (
        chunkkv.run_prefill(model, ids, window_size=8, scorers=scorers, attention_mask=mask).cache
        for scorers in ((), SCORERS)
    )

    for mine, its in zip(plain.layers, watched.layers, strict=True):
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_exact_and_rows_are_compressed_as_alone(
    family: str, scorer: Scorer, scope: Any, unit: Any
):
    model = tiny_model(family)
    ids, mask = prompts(*LENGTHS)
    policy = CompressionPolicy(scorer=scorer, scope=scope, unit=unit, **SMALL)

    together = chunkkv.prefill(model, ids, policy, attention_mask=mask)

    for row, length in enumerate(LENGTHS):
        [alone] = chunkkv.prefill(model, ids[row : row + 1, -length:], policy)
        assert together[row].shape == alone.shape
        for mine, its in zip(together[row].layers, alone.layers, strict=True):
            assert mine.is_sliding or mine.lengths == (length // 2,) * 2
            assert torch.equal(mine.positions, its.positions)
            torch.testing.assert_close(mine.scores, its.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scorer", SCORERS)
def test_window_and_sink_are_kept_whatever_scores(scorer: Scorer):
    ids, _ = prompts(60)
    policy = CompressionPolicy(scorer=scorer, max_kept_tokens=12, window_size=8, sink_tokens=4)

    [span] = chunkkv.prefill(tiny_model(), ids, policy)

    for layer in span.layers:
        assert layer.positions.tolist() == [*range(4), *range(52, 60)]


@pytest.mark.parametrize("scorer", SCORERS)
def test_span_names_its_scorer(scorer: Scorer):
    policy = CompressionPolicy(scorer=scorer, **SMALL)

    [span] = chunkkv.prefill(tiny_model(), prompts(60)[0], policy)

    assert f" scorer={scorer} " in span.shape.policy
    assert span.shape.policy == policy.canonical()
