"""The compression stage: what is kept of a prefilled cache, and with which scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, SLIDING_WINDOW, prompts, tiny_model
from slow_selection import slow_select
from transformers import DynamicCache, LlamaConfig

import chunkkv
from chunkkv import (
    CompressedKV,
    CompressionPolicy,
    InvalidInputError,
    KVCache,
    Prefilled,
    QueryProbe,
    compress,
    prefill,
    run_prefill,
    window_scores,
)

SCOPES = ("head", "layer", "group", "global")
UNITS = ("chunk", "token")
SMALL: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 5, "window_size": 8}
LENGTHS = (60, 37)


def positions_by_head(span: CompressedKV) -> list[list[list[int]]]:
    """Return what each KV head of each layer keeps."""
    kept = []
    for layer in span.layers:
        lists = layer.positions.view(-1, layer.lengths[0]).tolist()
        kept.append(lists if len(lists) == len(layer.lengths) else lists * len(layer.lengths))
    return kept


def made_up(
    *lengths: int, num_heads: int, num_kv_heads: int, num_layers: int = 3, window_size: int = 8
) -> Prefilled:
    """Return a prefilled batch whose keys and queries are whole numbers."""
    config = LlamaConfig(num_hidden_layers=num_layers)
    generator = torch.Generator().manual_seed(sum(lengths) + num_heads)
    cache, probe = KVCache(config), QueryProbe(window_size)
    longest = max(lengths)
    for index, layer in enumerate(cache.layers):
        keys, values = torch.randn(2, len(lengths), num_kv_heads, longest, 4, generator=generator)
        layer.append(keys, values, seen=longest)
        queries = torch.randn(len(lengths), num_heads, longest, 4, generator=generator)
        probe.observe(index, queries, None, None)
    return Prefilled(cache, probe, first_token=0, num_tokens=lengths, fingerprint="made up")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 1), (4, 2), (9, 3), (8, 8)])
@pytest.mark.parametrize("lengths", [(43,), (43, 17), (6, 31), (3, 1)], ids=str)
def test_kept_positions_equal_the_slow_reference(
    lengths: tuple[int, ...], num_heads: int, num_kv_heads: int, scope: Any, unit: Any
):
    prefilled = made_up(*lengths, num_heads=num_heads, num_kv_heads=num_kv_heads)
    policy = CompressionPolicy(scope=scope, unit=unit, sink_tokens=2, **SMALL)

    spans = compress(prefilled, policy)

    for row, (num_tokens, span) in enumerate(zip(lengths, spans, strict=True)):
        scores = [
            window_scores(
                prefilled.probe.queries[index][row : row + 1, :, -min(8, num_tokens) :],
                layer.keys[row : row + 1, :, -num_tokens:],
                scaling=0.5,
            )[0].tolist()
            for index, layer in enumerate(prefilled.cache.layers)
        ]
        assert span.num_tokens == num_tokens
        assert positions_by_head(span) == slow_select(scores, policy)
        assert span.num_kept_tokens == max(1, num_tokens // 2)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_compressed_as_alone(family: str, scope: Any, unit: Any):
    model = tiny_model(family)
    ids, mask = prompts(*LENGTHS)
    policy = CompressionPolicy(scope=scope, unit=unit, **SMALL)

    together = prefill(model, ids, policy, attention_mask=mask)

    alone = [prefill(model, ids[row : row + 1, -n:], policy)[0] for row, n in enumerate(LENGTHS)]
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        assert positions_by_head(one) == positions_by_head(other)
        for mine, its in zip(one.layers, other.layers, strict=True):
            torch.testing.assert_close(mine.keys, its.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, its.values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.scores, its.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_keys_and_values_are_the_models_at_these_positions(family: str, scope: Any):
    model = tiny_model(family)
    ids, _ = prompts(60)
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=expected)

    span = prefill(model, ids, CompressionPolicy(scope=scope, **SMALL))[0]

    for layer, full, lists in zip(
        span.layers, expected.layers, positions_by_head(span), strict=True
    ):
        keys, values = layer.by_head()
        missing = 60 - full.keys.shape[2]  # what the model itself let slide out
        for head, positions in enumerate(lists):
            held = [p - missing for p in positions]
            assert torch.equal(keys[head], full.keys[0, head, held])
            assert torch.equal(values[head], full.values[0, head, held])


@pytest.mark.parametrize("family", ["gemma3", "mistral_sliding"])
@pytest.mark.parametrize("length", [9, SLIDING_WINDOW - 1, SLIDING_WINDOW, 60])
def test_sliding_layers_are_left_as_the_model_keeps_them(family: str, length: int):
    model = tiny_model(family)
    ids, _ = prompts(length)
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=expected)

    span = prefill(model, ids, CompressionPolicy(max_kept_tokens=4))[0]

    held = min(length, SLIDING_WINDOW - 1)
    sliding = [i for i, layer in enumerate(span.layers) if layer.is_sliding]
    assert sliding == [i for i, layer in enumerate(expected.layers) if layer.is_sliding]
    for index in sliding:
        layer = span.layers[index]
        assert layer.lengths == (held, held)
        assert layer.positions.tolist() == list(range(length - held, length))
        assert torch.equal(layer.by_head()[0], expected.layers[index].keys[0])
        assert torch.equal(layer.by_head()[1], expected.layers[index].values[0])


@pytest.mark.parametrize("piece", [None, 6])
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_scores_are_the_attention_that_the_model_itself_reports(family: str, piece: int | None):
    model = tiny_model(family, attention="eager")
    ids, _ = prompts(60)
    with torch.no_grad():
        reported = model(ids, output_attentions=True).attentions

    policy = CompressionPolicy(keep_ratio=1, scope="head", window_size=8)
    span = prefill(model, ids, policy, prefill_chunk_tokens=piece)[0]

    for layer, attention in zip(span.layers, reported, strict=True):
        if layer.is_sliding:
            continue
        expected = attention[0, :, -8:].view(2, 2, 8, 60).mean(dim=(1, 2))
        torch.testing.assert_close(layer.scores, expected.flatten(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_stored_scores_are_those_that_chose(scope: Any):
    model = tiny_model()
    ids, _ = prompts(60)
    prefilled = run_prefill(model, ids, window_size=8)
    whole = CompressionPolicy(**(SMALL | {"keep_ratio": 1}), scope="head")
    scores = torch.stack(
        [layer.scores.view(2, 60) for layer in compress(prefilled, whole)[0].layers]
    )
    voted = {
        "head": scores,
        "layer": scores.sum(1, keepdim=True).expand(-1, 2, -1),
        "group": scores[[0, 0, 2, 2]].sum(1, keepdim=True).expand(-1, 2, -1),
        "global": scores.sum((0, 1)).expand(4, 2, -1),
    }[scope]

    span = compress(prefilled, CompressionPolicy(scope=scope, **SMALL))[0]

    for layer, votes in zip(span.layers, voted, strict=True):
        positions = layer.positions.view(-1, 30).long()
        expected = votes[: len(positions)].gather(1, positions)
        torch.testing.assert_close(layer.scores, expected.flatten(), atol=1e-6, rtol=1e-5)


def test_layers_that_share_positions_store_them_once():
    model = tiny_model()
    ids, _ = prompts(60)

    lists = {
        scope: prefill(model, ids, CompressionPolicy(scope=scope, **SMALL))[0].shape.index_lengths
        for scope in SCOPES
    }

    assert lists == {
        "head": (60, 60, 60, 60),
        "layer": (30, 30, 30, 30),
        "group": (30, 30),
        "global": (30,),
    }


def test_one_prefill_serves_many_policies():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)
    prefilled = run_prefill(model, ids, window_size=16, attention_mask=mask)

    for scope in SCOPES:
        policy = CompressionPolicy(scope=scope, **SMALL)
        for one, other in zip(
            compress(prefilled, policy),
            prefill(model, ids, policy, attention_mask=mask),
            strict=True,
        ):
            assert torch.equal(one.memory, other.memory)


def test_prefix_is_seen_but_neither_ranked_nor_kept_again():
    model = tiny_model()
    ids, _ = prompts(60)
    policy = CompressionPolicy(scope="head", **SMALL)
    first = prefill(model, ids[:, :30], policy)[0]
    past = KVCache.from_segments(model.config, [first])

    prefilled = run_prefill(model, ids[:, 30:], window_size=8, past=past)
    span = compress(prefilled, policy)[0]

    assert span.num_kept_tokens == 15
    for index, (layer, lists) in enumerate(zip(span.layers, positions_by_head(span), strict=True)):
        assert all(30 <= p < 60 for positions in lists for p in positions)
        whole = window_scores(
            prefilled.probe.queries[index], past.layers[index].keys, scaling=16**-0.5
        )[0, :, 15:]
        assert torch.equal(
            layer.scores.view(2, 15), whole.gather(1, layer.positions.view(2, 15).long() - 30)
        )
        assert (whole.sum(-1) < 1).all(), "the prefix has its share"


def test_span_names_what_made_it():
    model = tiny_model()
    ids, _ = prompts(60)
    policy = CompressionPolicy(**SMALL)

    shape = prefill(model, ids, policy)[0].shape

    assert shape.policy == policy.canonical()
    assert shape.fingerprint == chunkkv.model_fingerprint(model)
    assert (shape.first_token, shape.num_tokens) == (0, 60)
    assert shape.has_scores


def test_window_larger_than_the_queries_that_were_kept_is_refused():
    prefilled = run_prefill(tiny_model(), prompts(60)[0], window_size=8)

    with pytest.raises(InvalidInputError, match="window has 9 tokens; queries of the last 8"):
        compress(prefilled, CompressionPolicy(window_size=9))


def test_cache_whose_queries_were_not_seen_is_refused():
    prefilled = replace(
        run_prefill(tiny_model(), prompts(60)[0], window_size=8), probe=QueryProbe(8)
    )

    with pytest.raises(InvalidInputError, match="no queries of layer 0"):
        compress(prefilled, CompressionPolicy(window_size=8))


def test_attention_that_overflowed_is_refused():
    prefilled = made_up(30, num_heads=4, num_kv_heads=2)
    prefilled.cache.layers[1].keys[0, 0, 4] = torch.inf

    with pytest.raises(InvalidInputError, match="scores are not finite"):
        compress(prefilled, CompressionPolicy(**SMALL))
