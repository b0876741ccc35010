"""Every scorer through the whole library; ``key_diff`` against explicit loops."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache, key_diff_scores
from chunkkv.policy import Scorer
from chunkkv.scoring import layer_scores

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


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_key_diff_equals_the_slow_reference(family: str, piece: int | None):
    ids, mask = prompts(*LENGTHS)
    prefilled = chunkkv.run_prefill(
        tiny_model(family), ids, window_size=8, attention_mask=mask, prefill_chunk_tokens=piece
    )

    for index, layer in enumerate(prefilled.cache.layers):
        if layer.is_sliding:
            continue
        scores = layer_scores(prefilled, CompressionPolicy(scorer="key_diff"), index)
        assert scores.shape == (2, 2, 60)
        assert scores.dtype == torch.float32
        for row, length in enumerate(LENGTHS):
            assert (scores[row, :, :-length] == 0).all(), "padding"
            for head in range(2):
                torch.testing.assert_close(
                    scores[row, head, -length:].double(),
                    slow_key_diff(layer.keys[row, head, -length:]),
                    atol=1e-5,
                    rtol=0,
                )


@pytest.mark.parametrize("family", FULL_ATTENTION_FAMILIES)
def test_key_diff_compares_with_the_spans_own_keys_only(family: str):
    model = tiny_model(family)
    ids, _ = prompts(60)
    first = chunkkv.prefill(model, ids[:, :30], CompressionPolicy(**SMALL))
    past = KVCache.from_segments(model.config, first)

    prefilled = chunkkv.run_prefill(model, ids[:, 30:], window_size=8, past=past)

    for index, layer in enumerate(past.layers):
        scores = layer_scores(prefilled, CompressionPolicy(scorer="key_diff"), index)
        expected = torch.stack([slow_key_diff(keys) for keys in layer.keys[0, :, -30:]])
        torch.testing.assert_close(scores[0].double(), expected, atol=1e-5, rtol=0)


def test_padding_of_key_diff_may_hold_anything():
    keys = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0))
    expected = key_diff_scores(keys[1:, :, 6:])
    keys[1, :, :6] = math.nan

    scores = key_diff_scores(keys, num_padding=torch.tensor([0, 6]))

    torch.testing.assert_close(scores[1:, :, 6:], expected, atol=1e-6, rtol=0)
    assert (scores[1, :, :6] == 0).all()


def test_key_that_overflowed_is_refused():
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(30)[0], window_size=8)
    prefilled.cache.layers[2].keys[0, 0, 4] = torch.inf

    with pytest.raises(InvalidInputError, match="scores are not finite"):
        chunkkv.compress(prefilled, CompressionPolicy(scorer="key_diff", **SMALL))


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
