"""The cache: spans in, tails out, and memory that grows seldom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, SLIDING_WINDOW, prompts, tiny_model
from transformers import Cache, DynamicCache, LlamaConfig, Qwen3NextConfig

import chunkkv
from chunkkv import (
    CompressionPolicy,
    InvalidInputError,
    KVCache,
    MismatchError,
)

WHOLE = CompressionPolicy(keep_ratio=1.0)
HALF = CompressionPolicy(keep_ratio=0.5, chunk_size=5, window_size=8)
CONFIG = LlamaConfig(num_hidden_layers=2)


def tokens(num_tokens: int, *, num_heads: int = 2, fill: float = 1.0) -> torch.Tensor:
    return torch.full((1, num_heads, num_tokens, 4), fill)


def seen_cache(num_tokens: int, *, extra: int = 0) -> KVCache:
    """Return a cache of two layers that saw and kept so many tokens."""
    cache = KVCache(CONFIG)
    cache.reserve(num_tokens + extra)
    for layer in cache.layers:
        layer.update(tokens(num_tokens), tokens(num_tokens))
    return cache


def test_cache_is_one_of_transformers():
    assert isinstance(KVCache(CONFIG), Cache)


def test_seen_and_kept_are_two_numbers():
    model = tiny_model()
    span = chunkkv.prefill(model, prompts(60)[0], HALF)[0]

    cache = KVCache.from_segments(model.config, [span])

    assert cache.get_seq_length() == 60
    assert cache.num_kept_tokens == 30
    assert cache.num_dropped_tokens == 30
    assert cache.layers[0].get_mask_sizes(3) == (33, 30)


def test_empty_cache_has_seen_nothing():
    cache = KVCache(CONFIG)

    assert (cache.get_seq_length(), cache.num_kept_tokens, cache.nbytes) == (0, 0, 0)
    assert cache.layers[0].keys is None
    assert cache.layers[0].values is None


def test_no_segments_make_an_empty_cache():
    assert KVCache.from_segments(CONFIG, []).get_seq_length() == 0


def test_gap_between_spans_is_refused():
    model = tiny_model()
    ids, _ = prompts(60)
    late = chunkkv.compress(
        chunkkv.run_prefill(
            model,
            ids[:, 30:],
            window_size=8,
            past=KVCache.from_segments(model.config, chunkkv.prefill(model, ids[:, :30], HALF)),
        ),
        HALF,
    )[0]
    early = chunkkv.prefill(model, ids[:, :29], HALF)[0]

    with pytest.raises(MismatchError, match="starts at token 30, the cache ends at token 29"):
        KVCache.from_segments(model.config, [early, late])
    with pytest.raises(MismatchError, match="starts at token 30, the cache ends at token 0"):
        KVCache.from_segments(model.config, [late])


def test_span_given_twice_is_refused():
    model = tiny_model()
    span = chunkkv.prefill(model, prompts(30)[0], HALF)[0]

    with pytest.raises(MismatchError, match="starts at token 0, the cache ends at token 30"):
        KVCache.from_segments(model.config, [span, span])


def test_span_of_another_number_of_layers_is_refused():
    span = chunkkv.prefill(tiny_model(), prompts(30)[0], HALF)[0]

    with pytest.raises(MismatchError, match="span has 4 layers, the model has 2"):
        KVCache.from_segments(CONFIG, [span])


def test_model_that_keeps_another_kind_of_state_is_refused():
    config = Qwen3NextConfig(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )

    with pytest.raises(InvalidInputError, match="layer 0 of the model keeps its state as"):
        KVCache(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_tail_is_what_the_model_computed(family: str):
    model = tiny_model(family)
    ids, _ = prompts(60)
    span = chunkkv.prefill(model, ids[:, :40], WHOLE)[0]
    cache = KVCache.from_segments(model.config, [span], extra_tokens=20)
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=expected)
        for position in range(40, 60):
            model(ids[:, position : position + 1], past_key_values=cache)

    tail = cache.take_tail(40, fingerprint="mine")

    assert (tail.first_token, tail.num_tokens) == (40, 20)
    assert (tail.shape.fingerprint, tail.shape.policy) == ("mine", "whole")
    for layer, full in zip(tail.layers, expected.layers, strict=True):
        held = SLIDING_WINDOW - 1 if layer.is_sliding else 20
        keys, values = layer.by_head()
        assert layer.scores is None
        assert layer.positions.tolist() == list(range(60 - held, 60))
        torch.testing.assert_close(keys, full.keys[0, :, -held:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, full.values[0, :, -held:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_span_and_tail_together_are_the_cache_again(family: str):
    model = tiny_model(family)
    ids, _ = prompts(60)
    span = chunkkv.prefill(model, ids[:, :40], HALF)[0]
    cache = KVCache.from_segments(model.config, [span])
    with torch.no_grad():
        model(ids[:, 40:], past_key_values=cache)
    tail = cache.take_tail(40, fingerprint="mine")

    again = KVCache.from_segments(model.config, [span, tail])

    assert again.get_seq_length() == cache.get_seq_length() == 60
    for one, other in zip(again.layers, cache.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_tail_is_a_copy():
    cache = seen_cache(10)
    tail = cache.take_tail(4, fingerprint="mine")

    cache.layers[0].keys[:] = 9

    assert (tail.layers[0].keys == 1).all()


@pytest.mark.parametrize("first_token", [10, 11, -1])
def test_tail_of_no_tokens_is_refused(first_token: int):
    with pytest.raises(InvalidInputError, match="token"):
        seen_cache(10).take_tail(first_token, fingerprint="mine")


def test_tail_that_reaches_into_compressed_tokens_is_refused():
    model = tiny_model()
    ids, _ = prompts(60)
    cache = KVCache.from_segments(model.config, chunkkv.prefill(model, ids[:, :40], HALF))
    with torch.no_grad():
        model(ids[:, 40:], past_key_values=cache)

    with pytest.raises(InvalidInputError, match="tokens before 40 were compressed"):
        cache.take_tail(39, fingerprint="mine")


def test_growth_keeps_what_is_there_and_is_seldom():
    cache, reference = KVCache(CONFIG), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    sizes = set()

    for _ in range(100):
        for index in range(2):
            keys, values = torch.randn(2, 1, 2, 1, 4, generator=generator)
            ours = cache.update(keys, values, index)
            theirs = reference.update(keys, values, index)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        sizes.add(cache.nbytes)

    assert len(sizes) == 8, "doubled from 1 to 128"


def test_reserved_memory_is_not_allocated_again():
    cache = seen_cache(10, extra=6)
    before = cache.nbytes

    for layer in cache.layers:
        layer.update(tokens(6), tokens(6))

    assert cache.nbytes == before == 2 * 2 * tokens(16).nbytes


def test_bytes_are_those_of_the_model_in_its_dtype():
    model = tiny_model("gemma3", dtype=torch.bfloat16)
    span = chunkkv.prefill(model, prompts(60)[0], WHOLE)[0]

    cache = KVCache.from_segments(model.config, [span], extra_tokens=4)

    per_token = 2 * 2 * 16 * 2  # keys and values, heads, head_dim, bytes
    assert cache.nbytes == 2 * (60 + 4) * per_token + 2 * (SLIDING_WINDOW - 1) * per_token


def test_crop_forgets_the_last_tokens():
    cache = seen_cache(10)
    cache.crop(-3)

    for layer in cache.layers:
        layer.update(tokens(1, fill=2.0), tokens(1, fill=2.0))

    assert cache.get_seq_length() == cache.num_kept_tokens == 8
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [1.0] * 7 + [2.0]


@pytest.mark.parametrize("tokens_to_remove", [3, -11])
def test_crop_of_what_is_not_there_is_refused(tokens_to_remove: int):
    with pytest.raises(InvalidInputError, match="cannot forget"):
        seen_cache(10).crop(tokens_to_remove)


def test_crop_into_compressed_tokens_is_refused():
    model = tiny_model()
    ids, _ = prompts(42)
    cache = KVCache.from_segments(model.config, chunkkv.prefill(model, ids[:, :40], HALF))
    with torch.no_grad():
        model(ids[:, 40:], past_key_values=cache)
    cache.crop(-2)

    with pytest.raises(InvalidInputError, match="the last 0 of 40 were kept whole"):
        cache.crop(-1)


def test_reset_forgets_everything_but_the_memory():
    cache = seen_cache(10)
    before = cache.nbytes

    cache.reset()

    assert (cache.get_seq_length(), cache.num_kept_tokens) == (0, 0)
    assert cache.nbytes == before


def test_rows_can_be_repeated_and_reordered():
    cache = seen_cache(3, extra=5)
    cache.batch_repeat_interleave(2)
    cache.layers[0].keys[1] = 7.0

    cache.reorder_cache(torch.tensor([1, 0]))

    assert cache.layers[0].keys.shape == (2, 2, 3, 4)
    assert (cache.layers[0].keys[0] == 7).all()
    assert (cache.layers[0].values == 1).all()


def test_memory_of_inference_mode_is_writable_outside_of_it():
    model = tiny_model()
    ids, _ = prompts(60)
    with torch.inference_mode():
        span = chunkkv.prefill(model, ids[:, :40], HALF)[0]
        cache = KVCache.from_segments(model.config, [span])
        model(ids[:, 40:50], past_key_values=cache)

    with torch.no_grad():
        model(ids[:, 50:], past_key_values=cache)

    assert cache.get_seq_length() == 60
    assert not cache.layers[0].keys.is_inference()


def test_stacked_rows_are_padded_on_the_left():
    rows = [seen_cache(4), seen_cache(2)]

    stacked = KVCache.stack(CONFIG, rows)

    keys = stacked.layers[0].keys
    assert stacked.get_seq_length() == 4
    assert (keys[0] == 1).all()
    assert (keys[1, :, :2] == 0).all()
    assert (keys[1, :, 2:] == 1).all()


@pytest.mark.parametrize("family", ["gemma3", "mistral_sliding"])
def test_models_that_slide_count_only_their_full_layers(family: str):
    model = tiny_model(family)
    span = chunkkv.prefill(model, prompts(60)[0], HALF)[0]

    cache = KVCache.from_segments(model.config, [span])

    expected: dict[str, Any] = {"gemma3": (30, 30), "mistral_sliding": (0, 0)}
    assert (cache.num_kept_tokens, cache.num_dropped_tokens) == expected[family]
    assert cache.get_seq_length() == 60
