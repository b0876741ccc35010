"""Window scores, plain and pooled, against explicit loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from models import FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import CompressionPolicy, KVCache, window_scores
from chunkkv.scoring import layer_scores
from chunkkv.scoring.window import pooled

SCALING = 0.3
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def slow_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    softcap: float | None = None,
    padding: Sequence[int] = (0, 0),
    power: int = 1,
    scaling: float = SCALING,
) -> torch.Tensor:
    """Return what the window pays to each token, one query, one head and one key at a time."""
    batch, num_heads, window, _ = queries.shape
    num_kv_heads, seq_len = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    scores = torch.zeros(batch, num_kv_heads, seq_len, dtype=torch.float64)
    for row in range(batch):
        asking = [p for p in range(seq_len - window, seq_len) if p >= padding[row]]
        for head in range(num_heads):
            for position in asking:
                seen = range(padding[row], position + 1)
                query = queries[row, head, position - (seq_len - window)].double()
                logits = [float(query @ keys[row, head // group, p].double()) for p in seen]
                logits = [logit * scaling for logit in logits]
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                total = sum(math.exp(logit) for logit in logits)
                for p, logit in zip(seen, logits, strict=True):
                    vote = (math.exp(logit) / total) ** power
                    scores[row, head // group, p] += vote / group / len(asking)
    return scores


def tensors(
    num_heads: int, num_kv_heads: int, *, window: int = 5, seq_len: int = 13, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_kv_heads)
    queries = torch.randn(batch, num_heads, window, 8, generator=generator)
    keys = torch.randn(batch, num_kv_heads, seq_len, 8, generator=generator)
    return queries * 2, keys * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 3), (9, 3), (8, 1)])
def test_scores_equal_the_slow_reference(
    num_heads: int, num_kv_heads: int, softcap: float | None, dtype: torch.dtype
):
    queries, keys = (t.to(dtype) for t in tensors(num_heads, num_kv_heads))

    scores = window_scores(queries, keys, scaling=SCALING, softcap=softcap)

    assert scores.dtype == torch.float32
    expected = slow_scores(queries, keys, softcap=softcap)
    torch.testing.assert_close(scores.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("power", [2, 3, 8])
def test_powers_of_attention_equal_the_slow_reference(power: int):
    queries, keys = tensors(6, 3)
    padding = (0, 4)

    scores = window_scores(
        queries, keys, scaling=SCALING, num_padding=torch.tensor(padding), power=power
    )

    expected = slow_scores(queries, keys, padding=padding, power=power)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=1e-4)


def test_a_policy_names_the_power_of_its_votes():
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(40)[0], window_size=8)
    policy = CompressionPolicy(keep_ratio=0.5, window_size=8, vote_power=2)

    scores = layer_scores(prefilled, policy, 1)

    probe, layer = prefilled.probe, prefilled.cache.layers[1]
    expected = slow_scores(
        probe.queries[1], layer.keys, padding=(0,), power=2, scaling=probe.scaling[1]
    )
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=1e-4)
    assert " power=2" in policy.canonical()


@pytest.mark.parametrize(
    "padding", [(0, 3), (3, 0), (0, 8), (0, 10), (2, 12)], ids=lambda p: f"padding{p}"
)
def test_padding_neither_asks_nor_is_seen(padding: tuple[int, int]):
    queries, keys = tensors(4, 2)

    scores = window_scores(queries, keys, scaling=SCALING, num_padding=torch.tensor(padding))

    expected = slow_scores(queries, keys, padding=padding)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)
    assert all((scores[row, :, :n] == 0).all() for row, n in enumerate(padding))


def test_padding_may_hold_anything():
    queries, keys = tensors(4, 2)
    expected = slow_scores(queries, keys, padding=(0, 10))
    keys[1, :, :10] = math.nan
    queries[1, :, :2] = math.nan

    scores = window_scores(queries, keys, scaling=SCALING, num_padding=torch.tensor([0, 10]))

    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 13])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 11])])
def test_scores_of_a_row_sum_to_one(window: int, padding: torch.Tensor | None):
    queries, keys = tensors(6, 3, window=window)

    scores = window_scores(queries, keys, scaling=SCALING, num_padding=padding)

    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(2, 3), atol=1e-5, rtol=0)
    assert (scores >= 0).all()


def test_window_as_long_as_the_row_is_plain_causal_attention():
    queries, keys = tensors(2, 2, window=13)

    scores = window_scores(queries, keys, scaling=SCALING)

    logits = (queries @ keys.mT * SCALING).masked_fill(
        torch.ones(13, 13).triu(1).bool(), float("-inf")
    )
    torch.testing.assert_close(scores, logits.softmax(-1).mean(dim=2), atol=1e-6, rtol=0)


def test_query_does_not_see_what_follows_it():
    queries, keys = tensors(2, 2, window=2, batch=1)
    keys[:, :, -1] = 100 * queries[:, :, 0]

    scores = window_scores(queries, keys, scaling=SCALING)

    assert (scores[:, :, :-1].sum(dim=-1) >= 0.5 - 1e-6).all(), "the first query sees only these"


def test_product_outside_the_range_of_float16_is_scaled_before():
    queries = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)
    keys = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)
    assert (queries @ keys.mT).isinf().all(), "only of interest where the product overflows"

    scores = window_scores(queries, keys, scaling=0.125)

    expected = torch.tensor([1 / 3 + 1 / 4] * 3 + [1 / 4]) / 2
    torch.testing.assert_close(scores[0, 0], expected, atol=1e-6, rtol=0)


def test_overflow_is_visible_in_the_scores():
    queries, keys = tensors(2, 2)
    keys[0, 0, 3] = math.inf

    scores = window_scores(queries, keys, scaling=SCALING)

    assert not scores[0, 0].isfinite().all()


def test_long_window_is_the_mean_of_its_queries():
    queries, keys = tensors(2, 1, window=300, seq_len=400, batch=1)
    blocks = [
        window_scores(queries[:, :, i : i + 1], keys[:, :, : 101 + i], scaling=SCALING)
        for i in range(300)
    ]

    scores = window_scores(queries, keys, scaling=SCALING)

    expected = torch.stack(
        [torch.nn.functional.pad(block, (0, 400 - block.shape[-1])) for block in blocks]
    ).mean(dim=0)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def slow_pooled(scores: list[float], pool_size: int, window: int) -> list[float]:
    """Return one row's scores ``(num_tokens,)``, one average at a time."""
    before, own = scores[:-window], scores[-window:]
    reach = pool_size // 2
    means = [sum(before[max(i - reach, 0) : i + reach + 1]) / pool_size for i in range(len(before))]
    return means + own


@pytest.mark.parametrize("window", [1, 8, 60, 80])
@pytest.mark.parametrize("pool_size", [1, 3, 7, 61, 10**9 + 1])
def test_pooled_scores_equal_the_slow_reference(pool_size: int, window: int):
    scores = torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(0))
    lengths = (60, 37)
    scores[1, :, :-37] = 0

    found = pooled(scores, pool_size, window_size=window, num_padding=torch.tensor([0, 23]))

    assert found.dtype == torch.float32
    assert (found >= 0).all()
    for row, length in enumerate(lengths):
        assert (found[row, :, :-length] == 0).all(), "padding"
        for head in range(3):
            expected = slow_pooled(scores[row, head, -length:].tolist(), pool_size, window)
            assert found[row, head, -length:].tolist() == pytest.approx(expected, abs=1e-7)


def test_pooling_equals_average_pooling_with_zeros_beyond_the_edges():
    scores = torch.rand(1, 2, 60, generator=torch.Generator().manual_seed(0))

    found = pooled(scores, 5, window_size=8, num_padding=torch.tensor([0]))

    expected = torch.nn.functional.avg_pool1d(scores[..., :-8], 5, stride=1, padding=2)
    torch.testing.assert_close(found[..., :-8], expected, atol=1e-7, rtol=0)
    assert torch.equal(found[..., -8:], scores[..., -8:])


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_pools_the_spans_own_scores(family: str, piece: int | None):
    model, (ids, _) = tiny_model(family), prompts(100)
    policy = CompressionPolicy(window_size=8, pool_size=5)
    [first] = chunkkv.prefill(model, ids[:, :40], policy)
    prefilled = chunkkv.run_prefill(
        model,
        ids[:, 40:],
        window_size=8,
        past=KVCache.from_segments(model.config, [first]),
        prefill_chunk_tokens=piece,
    )

    for index, layer in enumerate(prefilled.cache.layers):
        if layer.is_sliding:
            continue
        plain = layer_scores(prefilled, CompressionPolicy(window_size=8), index)
        found = layer_scores(prefilled, policy, index)
        assert found.shape == (1, 2, 60)
        for head in range(2):
            expected = slow_pooled(plain[0, head].tolist(), 5, 8)
            assert found[0, head].tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_rows_are_compressed_as_alone(family: str):
    model, (ids, mask) = tiny_model(family), prompts(60, 37)
    policy = CompressionPolicy(
        keep_ratio=0.5, chunk_size=5, window_size=8, pool_size=7, scope="head"
    )

    together = chunkkv.prefill(model, ids, policy, attention_mask=mask)

    for row, length in enumerate((60, 37)):
        [alone] = chunkkv.prefill(model, ids[row : row + 1, -length:], policy)
        for mine, its in zip(together[row].layers, alone.layers, strict=True):
            assert mine.is_sliding or mine.lengths == (length // 2,) * 2
            assert torch.equal(mine.positions, its.positions)
            torch.testing.assert_close(mine.scores, its.scores, atol=1e-4, rtol=1e-4)
