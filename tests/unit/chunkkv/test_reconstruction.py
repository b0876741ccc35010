"""Reconstruction scores against the attention that the model reports, seq x seq in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache, Prefilled
from chunkkv.cache import KeptLayer
from chunkkv.scoring import layer_scores
from chunkkv.scoring.reconstruction import PROMPT_TOKENS, REPEATED_TOKENS, most_attention

POLICY = CompressionPolicy(scorer="reconstruction", keep_ratio=0.5, chunk_size=5, window_size=8)
LONG = REPEATED_TOKENS + 21  # two pieces
LENGTHS = (LONG, 37)


def reported_scores(
    model: Any, text: torch.Tensor, *, past: Callable[[], KVCache] | None = None
) -> dict[int, torch.Tensor]:
    """Return what eager attention reports for ``text`` ``(seq_len,)`` and its repetition behind it.

    The repetition of each piece is run with the whole text before it, in one pass.

    Returns:
        By full-attention layer: ``(num_kv_heads, seq_len)``.
    """
    scores: dict[int, torch.Tensor] = {}
    for start in range(0, len(text), REPEATED_TOKENS):
        piece = text[max(start - PROMPT_TOKENS, 0) : start + REPEATED_TOKENS]
        cache = KVCache(model.config) if past is None else past()
        first = cache.get_seq_length()
        ids = torch.cat([text, piece])[None]
        with torch.no_grad():
            attentions = model(
                ids,
                position_ids=torch.arange(first, first + ids.shape[1])[None],
                past_key_values=cache,
                output_attentions=True,
            ).attentions
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, KeptLayer):
                continue
            end = layer.kept_len - len(piece)
            paid = attentions[index][0, :, -len(piece) :, end - len(text) : end]
            most = paid.unflatten(0, (2, -1)).amax(dim=(1, 2))
            scores[index] = torch.maximum(scores.get(index, most), most)
    return scores


def repeated(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    past: KVCache | None = None,
    piece: int | None = None,
) -> Prefilled:
    prefilled = chunkkv.run_prefill(
        model, ids, window_size=8, attention_mask=mask, past=past, prefill_chunk_tokens=piece
    )
    return chunkkv.reconstruct(model, prefilled, ids)


@pytest.mark.parametrize("piece", [None, 200], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_most_attention_that_the_model_reports(family: str, piece: int | None):
    ids, mask = prompts(*LENGTHS)
    eager = tiny_model(family, dtype=torch.float64, attention="eager")

    prefilled = repeated(tiny_model(family, dtype=torch.float64), ids, mask, piece=piece)

    for row, length in enumerate(LENGTHS):
        expected = reported_scores(eager, ids[row, -length:])
        assert sorted(prefilled.observed["reconstruction"]) == sorted(expected)
        for layer, scores in expected.items():
            found = layer_scores(prefilled, POLICY, layer)
            assert found.shape == (2, 2, LONG)
            torch.testing.assert_close(found[row, :, -length:].double(), scores, atol=1e-5, rtol=0)
            assert (found[row, :, :-length] == 0).all(), "padding"


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_prefix_is_seen_and_not_scored(family: str, piece: int | None):
    ids, _ = prompts(100)
    model = tiny_model(family, dtype=torch.float64)
    eager = tiny_model(family, dtype=torch.float64, attention="eager")
    [first] = chunkkv.prefill(model, ids[:, :40], POLICY)

    def past() -> KVCache:
        return KVCache.from_segments(model.config, [first])

    prefilled = repeated(model, ids[:, 40:], past=past(), piece=piece)

    for layer, scores in reported_scores(eager, ids[0, 40:], past=past).items():
        found = layer_scores(prefilled, POLICY, layer)
        assert found.shape == (1, 2, 60)
        torch.testing.assert_close(found[0].double(), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_is_the_same_bit_for_bit_after_the_repetition(family: str):
    ids, mask = prompts(*LENGTHS)
    model = tiny_model(family)
    prefilled = chunkkv.run_prefill(model, ids, window_size=8, attention_mask=mask)
    cache = prefilled.cache
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    seen, nbytes = cache.get_seq_length(), cache.nbytes

    again = chunkkv.reconstruct(model, prefilled, ids)

    assert again.cache is cache
    assert (cache.get_seq_length(), cache.nbytes) == (seen, nbytes)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert "reconstruction" not in prefilled.observed


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (8, 1)])
def test_most_attention_equals_explicit_loops(
    num_heads: int, num_kv_heads: int, softcap: float | None
):
    generator = torch.Generator().manual_seed(num_heads)
    queries = torch.randn(2, num_heads, 5, 8, generator=generator)
    keys = torch.randn(2, num_kv_heads, 17, 8, generator=generator)
    padding, voting = [0, 7], [5, 3]
    expected = torch.zeros(2, num_kv_heads, 17, dtype=torch.float64)
    for row in range(2):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            for order in range(voting[row]):
                seen = range(padding[row], 12 + order + 1)
                query = queries[row, head, order].double()
                logits = [0.3 * float(query @ keys[row, kv_head, p].double()) for p in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                total = sum(math.exp(logit) for logit in logits)
                for p, logit in zip(seen, logits, strict=True):
                    share = math.exp(logit) / total
                    expected[row, kv_head, p] = max(float(expected[row, kv_head, p]), share)

    found = most_attention(
        queries,
        keys,
        scaling=0.3,
        softcap=softcap,
        num_padding=torch.tensor(padding),
        num_queries=torch.tensor(voting),
    )

    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_overflow_is_visible_in_the_scores():
    queries, keys = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 9, 8)
    keys[0, 0, 3] = math.inf

    scores = most_attention(queries, keys, scaling=1.0)

    assert not scores[0, 0].isfinite().all()
    assert scores[0, 1].isfinite().all()


def test_a_hook_runs_before_each_piece_and_may_end_the_pass():
    ids, _ = prompts(2 * REPEATED_TOKENS + 1)
    model = tiny_model()
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)
    calls: list[int] = []

    def stop_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunkkv.reconstruct(model, prefilled, ids, before_chunk=stop_at_third)

    assert len(calls) == 3
    assert prefilled.cache.get_seq_length() == ids.shape[1]
    assert model.config._attn_implementation == "sdpa"


def test_text_that_was_not_repeated_is_refused():
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(30)[0], window_size=8)

    with pytest.raises(InvalidInputError, match=r"scorers=\['reconstruction'\], then repeat"):
        chunkkv.compress(prefilled, POLICY)


def test_token_ids_of_another_shape_are_refused():
    model = tiny_model()
    ids, _ = prompts(30)
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)

    with pytest.raises(InvalidInputError, match=r"input_ids is \(1, 29\); \(1, 30\) were run"):
        chunkkv.reconstruct(model, prefilled, ids[:, 1:])


def test_cache_that_has_grown_since_is_refused():
    model = tiny_model()
    ids, _ = prompts(30)
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)
    chunkkv.run_prefill(model, ids, window_size=8, past=prefilled.cache)

    with pytest.raises(InvalidInputError, match="ends at 30, but its cache has seen 60"):
        chunkkv.reconstruct(model, prefilled, ids)
