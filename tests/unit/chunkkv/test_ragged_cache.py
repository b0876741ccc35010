"""Heads and layers that keep different numbers of tokens read what they keep, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, prompts, tiny_model
from ragged_spans import ragged_span, random_rows
from transformers.models.gemma3 import modeling_gemma3

import chunkkv
from chunkkv import CompressedKV, CompressionPolicy, InvalidInputError, KVCache, attention
from chunkkv.scoring.expected_attention import expected_attention_scores
from chunkkv.scoring.heavy_hitter import accumulated_attention
from chunkkv.scoring.reconstruction import most_attention

WHOLE = CompressionPolicy(keep_ratio=1.0, scope="head", window_size=4)
NUM_TOKENS = 40
LENGTHS = {
    "adaptive": [[5, 20], [9, 1], [0, 30], [17, 17]],
    "pyramid": [[20, 20], [14, 14], [9, 9], [3, 3]],
    "empty heads": [[0, 0], [0, 7], [40, 0], [1, 0]],
}


def lengths_of(kind: str, model: Any) -> Sequence[Sequence[int]]:
    """Return lengths for the model's full-attention layers."""
    slides = [layer.is_sliding for layer in KVCache(model.config).layers]
    return [kept for kept, is_sliding in zip(LENGTHS[kind], slides, strict=True) if not is_sliding]


def cut(model: Any, whole: CompressedKV, kind: str, *, seed: int = 0) -> CompressedKV:
    return ragged_span(whole, random_rows(lengths_of(kind, model), whole.num_tokens, seed=seed))


def ragged_prefix(model: Any, ids: torch.Tensor, kind: str, *, seed: int = 0) -> CompressedKV:
    """Return what is kept of ``ids`` ``(1, 30 to 40)``."""
    return cut(model, chunkkv.prefill(model, ids, WHOLE)[0], kind, seed=seed)


def generate(model: Any, inputs: dict[str, Any], num_tokens: int = 12) -> torch.Tensor:
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
    answer: torch.Tensor = output[:, inputs["input_ids"].shape[1] :]
    return answer


def by_loops(
    query: torch.Tensor,
    heads: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return ``(q_len, num_heads, dim)``: each query's attention to what its KV head keeps.

    Args:
        query: ``(num_heads, q_len, dim)``.
        heads: For each KV head, keys and values ``(n, dim)``, the queries' own last.
        scaling: Factor on the dot products.
        softcap: Bound of the logits.
    """
    num_heads, q_len, dim = query.shape
    read = torch.zeros(q_len, num_heads, dim)
    for head in range(num_heads):
        keys, values = heads[head * len(heads) // num_heads]
        for i in range(q_len):
            stop = len(keys) - q_len + i + 1
            logits = (keys[:stop] @ query[head, i]) * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            read[i, head] = logits.softmax(0) @ values[:stop]
    return read


def span_of_noise(lengths: Sequence[int], *, first_token: int = 0, seed: int = 0) -> CompressedKV:
    """Return a span of one layer, ``lengths`` of its heads, width 8."""
    layer = chunkkv.LayerShape(tuple(lengths), 8, 8, 0)
    shape = chunkkv.SpanShape(
        "m", "p", first_token, NUM_TOKENS, "float32", (layer,), (sum(lengths),), False
    )
    span = CompressedKV.empty(shape)
    generator = torch.Generator().manual_seed(seed)
    span.layers[0].keys.normal_(generator=generator)
    span.layers[0].values.normal_(generator=generator)
    return span


ONE_LAYER = tiny_model(num_hidden_layers=1).config


@pytest.mark.parametrize(
    ("base", "softcap"),
    [("sdpa", None), ("eager", None), ("eager", 1.5)],  # transformers' sdpa has no softcap
)
@pytest.mark.parametrize("new", [1, 6])
def test_attention_is_that_of_a_loop_over_heads(new: int, base: str, softcap: float | None):
    lengths = [[[5, 0, 11], [2, 9, 1]], [[0, 0, 0], [7, 8, 3]]]  # by row, by span, by head
    spans = [
        [span_of_noise(kept, first_token=i * NUM_TOKENS, seed=9 * row + i) for i, kept in parts]
        for row, parts in enumerate(map(enumerate, lengths))
    ]
    rows = [KVCache.from_segments(ONE_LAYER, parts) for parts in spans]
    cache = KVCache.stack(ONE_LAYER, rows)
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 6, new, 8, generator=generator)
    key, value = torch.randn(2, 2, 3, new, 8, generator=generator)
    # Any attention module whose file has an eager attention.
    module = object.__new__(modeling_gemma3.Gemma3Attention)
    torch.nn.Module.__init__(module)
    module.num_key_value_groups, module.layer_idx, module.is_causal = 2, 0, True

    keys, values = cache.update(key, value, 0)
    read, _ = attention._probed(base)(
        module, query, keys, values, None, scaling=0.3, softcap=softcap
    )

    for row, parts in enumerate(spans):
        heads = [
            (
                torch.cat([*(split(s.layers[0], h)[0] for s in parts), key[row, h]]),
                torch.cat([*(split(s.layers[0], h)[1] for s in parts), value[row, h]]),
            )
            for h in range(3)
        ]
        expected = by_loops(query[row], heads, scaling=0.3, softcap=softcap)
        torch.testing.assert_close(read[row], expected, atol=1e-5, rtol=1e-5)


def split(layer: chunkkv.LayerKV, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one head's keys and values."""
    return (
        layer.keys.split(list(layer.lengths))[head],
        layer.values.split(list(layer.lengths))[head],
    )


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_tokens_run_at_once_in_pieces_or_one_by_one_give_the_same(family: str, kind: str):
    model = tiny_model(family)
    ids, _ = prompts(60)
    span = ragged_prefix(model, ids[:, :NUM_TOKENS], kind)
    chunkkv.make_observable(model)

    found = []
    for pieces in ([20], [7, 13], [1] * 20):
        cache = KVCache.from_segments(model.config, [span])
        with torch.no_grad():
            for piece in pieces:
                start = cache.get_seq_length()
                logits = model(ids[:, start : start + piece], past_key_values=cache).logits
        found.append(logits[0, -1])
        assert cache.get_seq_length() == 60

    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_lengths_read_by_either_way_give_the_same(family: str, attention: str):
    model = tiny_model(family, attention=attention)
    ids, _ = prompts(60)
    half = CompressionPolicy(keep_ratio=0.5, window_size=4)
    span = chunkkv.prefill(model, ids[:, :NUM_TOKENS], half)[0]
    chunkkv.make_observable(model)
    plain = KVCache.from_segments(model.config, [span])
    told = KVCache.from_segments(model.config, [span])
    for layer in told.layers:
        if not layer.is_sliding:
            layer.hide_nothing()

    with torch.no_grad():
        expected = model(ids[:, NUM_TOKENS:], past_key_values=plain).logits
        found = model(ids[:, NUM_TOKENS:], past_key_values=told).logits

    assert not plain.is_ragged
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_ragged_rows_generates_as_each_alone(family: str, kind: str):
    model = tiny_model(family)
    ids, _ = prompts(NUM_TOKENS + 3)
    texts = [ids[0], ids[0, 5:], ids[0, 9:]]
    spans = [
        [ragged_prefix(model, texts[0][None, :-3], kind)],
        [ragged_prefix(model, texts[1][None, :-3], "adaptive", seed=1)]
        if kind != "empty heads"
        else [ragged_prefix(model, texts[1][None, :-3], "pyramid", seed=1)],
        chunkkv.prefill(model, texts[2][None, :-3], CompressionPolicy(keep_ratio=0.5)),
    ]

    together = generate(model, chunkkv.generation_inputs(model, spans, texts))

    for row, (parts, text) in enumerate(zip(spans, texts, strict=True)):
        alone = generate(model, chunkkv.generation_inputs(model, [parts], [text]))
        assert torch.equal(together[row], alone[0])


def test_generation_makes_the_model_observable_and_says_so():
    model = tiny_model()
    ids, _ = prompts(NUM_TOKENS + 1)
    span = ragged_prefix(model, ids[:, :-1], "adaptive")

    chunkkv.generation_inputs(model, [[span]], [ids[0]])

    assert model.config._attn_implementation == "chunkkv_sdpa"


@pytest.mark.parametrize("kind", ["adaptive", "pyramid"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_that_is_not_ours_is_an_error(family: str, attention: str, kind: str):
    model = tiny_model(family, attention=attention)
    ids, _ = prompts(NUM_TOKENS + 1)
    cache = KVCache.from_segments(model.config, [ragged_prefix(model, ids[:, :-1], kind)])

    with pytest.raises(InvalidInputError, match=r"call chunkkv\.make_observable"), torch.no_grad():
        model(ids[:, -1:], past_key_values=cache)


def test_attention_that_takes_no_mask_is_an_error():
    keys = attention.RaggedKeys(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, dtype=torch.int64))

    with pytest.raises(InvalidInputError, match="load the model with sdpa or eager"):
        attention._ragged_mask("flash_attention_2", torch.zeros(1, 2, 1, 8), keys)


def test_keys_of_different_lengths_are_nothing_else():
    keys = attention.RaggedKeys(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, dtype=torch.int64))

    with pytest.raises(InvalidInputError, match="different numbers of tokens"):
        torch.matmul(torch.zeros(8), keys)
    with pytest.raises(InvalidInputError, match="different numbers of tokens"):
        _ = keys.shape
    assert not hasattr(keys, "__array__")


def test_heads_end_in_one_column_and_what_they_lack_is_zero():
    first, second = span_of_noise([2, 0, 3]), span_of_noise([1, 4, 0], first_token=NUM_TOKENS)

    at_once = KVCache.from_segments(ONE_LAYER, [first, second])
    one_by_one = KVCache(ONE_LAYER)
    one_by_one.append_segment(first)
    one_by_one.append_segment(second)

    for cache in (at_once, one_by_one):
        [layer] = cache.layers
        assert layer.hidden.tolist() == [[1, 0, 1]]
        assert (layer.kept_len, layer.seen_len) == (4, 2 * NUM_TOKENS)
        for head in range(3):
            for name, index in (("keys", 0), ("values", 1)):
                own = torch.cat([split(s.layers[0], head)[index] for s in (first, second)])
                held = getattr(layer, name)[0, head]
                assert torch.equal(held[4 - len(own) :], own)
                assert (held[: 4 - len(own)] == 0).all()


def test_seen_and_kept_are_counted_over_heads():
    cache = KVCache.from_segments(ONE_LAYER, [span_of_noise([2, 0, 4])])

    assert cache.is_ragged
    assert (cache.num_kept_tokens, cache.num_dropped_tokens) == (2, NUM_TOKENS - 2)
    assert cache.get_seq_length() == NUM_TOKENS
    assert cache.layers[0].get_mask_sizes(3) == (4 + 3, NUM_TOKENS - 4)


def new_tokens(count: int, fill: float) -> torch.Tensor:
    return torch.full((1, 3, count, 8), fill)


def test_tail_behind_ragged_heads_is_taken_and_cropped():
    cache = KVCache.from_segments(ONE_LAYER, [span_of_noise([2, 0, 4])])
    cache.update(new_tokens(5, 1.0), new_tokens(5, 2.0), 0)

    tail = cache.take_tail(NUM_TOKENS, fingerprint="mine")
    cache.crop(-2)

    assert tail.layers[0].lengths == (5, 5, 5)
    assert (tail.layers[0].keys == 1).all()
    assert (tail.layers[0].values == 2).all()
    assert cache.take_tail(NUM_TOKENS + 1, fingerprint="mine").num_tokens == 2
    assert cache.num_kept_tokens == 2 + 3
    with pytest.raises(InvalidInputError, match="tokens before 40 were compressed"):
        cache.take_tail(NUM_TOKENS - 1, fingerprint="mine")
    with pytest.raises(InvalidInputError, match="the last 3 of 43 were kept whole"):
        cache.crop(-4)


def test_whole_span_between_ragged_ones_ends_where_the_next_begins():
    spans = [
        span_of_noise([2, 0, 4]),
        span_of_noise([NUM_TOKENS] * 3, first_token=NUM_TOKENS),
    ]
    cache = KVCache.from_segments(ONE_LAYER, spans)
    assert cache.layers[0].whole_from == NUM_TOKENS
    cache.append_segment(span_of_noise([0, 3, 0], first_token=2 * NUM_TOKENS))

    assert cache.layers[0].whole_from == 3 * NUM_TOKENS
    assert cache.layers[0].hidden.tolist() == [[2, 1, 0]]


def test_lookahead_shows_ragged_heads_and_keeps_nothing():
    cache = KVCache.from_segments(ONE_LAYER, [span_of_noise([2, 0, 4])])
    before = cache.layers[0].keys.clone()

    keys, _ = cache.lookahead().update(new_tokens(2, 1.0), new_tokens(2, 2.0), 0)

    assert keys.keys.shape == (1, 3, 6, 8)
    assert keys.hidden.tolist() == [[2, 4, 0]]
    assert torch.equal(cache.layers[0].keys, before)


def test_rows_with_what_they_hide_are_repeated_and_reordered():
    rows = [
        KVCache.from_segments(ONE_LAYER, [span_of_noise(lengths)])
        for lengths in ([2, 0, 4], [1, 1, 0])
    ]
    cache = KVCache.stack(ONE_LAYER, rows)
    assert cache.layers[0].hidden.tolist() == [[2, 4, 0], [3, 3, 4]]

    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1]))
    assert cache.layers[0].hidden.tolist() == [[3, 3, 4], [2, 4, 0], [2, 4, 0]]
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].hidden.tolist() == [[2, 4, 0]]
    cache.reset()

    assert not cache.is_ragged


def test_memory_of_inference_mode_is_writable_outside_of_it():
    with torch.inference_mode():
        cache = KVCache.from_segments(ONE_LAYER, [span_of_noise([2, 0, 4])], extra_tokens=9)

    cache.update(new_tokens(2, 1.0), new_tokens(2, 2.0), 0)

    assert not cache.layers[0].hidden.is_inference()
    assert cache.layers[0]._keys.shape[2] == 4 + 9, "reserved once"


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
@pytest.mark.parametrize("piece", [None, 7])
def test_span_on_top_is_scored_by_what_each_head_sees(family: str, kind: str, piece: int | None):
    model = tiny_model(family)
    ids, _ = prompts(70)
    past = KVCache.from_segments(model.config, [ragged_prefix(model, ids[:, :NUM_TOKENS], kind)])
    policy = CompressionPolicy(window_size=6)

    prefilled = chunkkv.run_prefill(
        model, ids[:, NUM_TOKENS:], window_size=6, past=past, prefill_chunk_tokens=piece
    )

    probe = prefilled.probe
    for index, layer in enumerate(past.layers):
        if layer.is_sliding:
            continue
        scores = chunkkv.scoring.layer_scores(prefilled, policy, index)
        assert scores.shape == (1, 2, 30)
        for head, start in enumerate(layer.hidden[0].tolist()):
            expected = chunkkv.window_scores(
                probe.queries[index][:, 2 * head : 2 * head + 2],
                layer.keys[:, head : head + 1, start:],
                scaling=probe.scaling[index],
                softcap=probe.softcap[index],
            )
            torch.testing.assert_close(scores[:, head : head + 1], expected[..., -30:])


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("piece", [None, 7])
def test_heavy_hitters_on_top_are_those_of_what_each_head_sees(
    family: str, kind: str, piece: int | None
):
    model = tiny_model(family)
    ids, _ = prompts(70)
    past = KVCache.from_segments(model.config, [ragged_prefix(model, ids[:, :NUM_TOKENS], kind)])
    policy = CompressionPolicy(scorer="heavy_hitter")

    prefilled = chunkkv.run_prefill(
        model,
        ids[:, NUM_TOKENS:],
        window_size=30,
        scorers=[policy.scorer],
        past=past,
        prefill_chunk_tokens=piece,
    )

    probe = prefilled.probe
    for index, layer in enumerate(past.layers):
        if layer.is_sliding:
            continue
        scores = chunkkv.scoring.layer_scores(prefilled, policy, index)
        for head, start in enumerate(layer.hidden[0].tolist()):
            expected = accumulated_attention(
                probe.queries[index][:, 2 * head : 2 * head + 2],
                layer.keys[:, head : head + 1, start:],
                scaling=probe.scaling[index],
                softcap=probe.softcap[index],
            )
            torch.testing.assert_close(scores[:, head : head + 1], expected[..., -30:])


@pytest.mark.parametrize("hidden", [[0, 0], [0, 9], [5, 17], [20, 18]])
def test_expected_attention_is_that_of_what_each_head_holds(hidden: list[int]):
    torch.manual_seed(0)
    mean, covariance = torch.randn(1, 4, 8), torch.randn(1, 4, 8, 8)
    covariance = covariance @ covariance.mT / 8
    keys, values = torch.randn(1, 2, 21, 8), torch.randn(1, 2, 21, 6)

    scores = expected_attention_scores(
        mean, covariance, keys, values, scaling=0.3, hidden=torch.tensor([hidden])
    )

    for head, start in enumerate(hidden):
        own, group = slice(head, head + 1), slice(2 * head, 2 * head + 2)
        expected = expected_attention_scores(
            mean[:, group],
            covariance[:, group],
            keys[:, own, start:],
            values[:, own, start:],
            scaling=0.3,
        )
        torch.testing.assert_close(scores[:, own, start:], expected)
        assert not scores[:, own, :start].any()


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_expected_attention_runs_on_top_of_what_each_head_sees(family: str, kind: str):
    model = tiny_model(family)
    ids, _ = prompts(70)
    past = KVCache.from_segments(model.config, [ragged_prefix(model, ids[:, :NUM_TOKENS], kind)])
    policy = CompressionPolicy(keep_ratio=0.5, scorer="expected_attention", window_size=4)

    prefilled = chunkkv.run_prefill(
        model, ids[:, NUM_TOKENS:], window_size=4, scorers=[policy.scorer], past=past
    )

    [span] = chunkkv.compress(prefilled, policy)
    assert (span.num_tokens, span.num_kept_tokens) == (30, 15)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_repetition_on_top_is_scored_by_what_each_head_sees(family: str):
    model = tiny_model(family)
    ids, _ = prompts(70)
    span = ragged_prefix(model, ids[:, :NUM_TOKENS], "adaptive")
    past = KVCache.from_segments(model.config, [span])
    text = ids[:, NUM_TOKENS:]
    prefilled = chunkkv.run_prefill(model, text, window_size=6, past=past)
    seen: dict[int, Any] = {}

    class Recorder:
        """Keeps what one pass showed."""

        def observe(self, layer: int, *shown: Any, **keywords: Any) -> None:
            seen[layer] = (shown, keywords)

    found = chunkkv.reconstruct(model, prefilled, text)
    with chunkkv.observable(model), torch.no_grad():
        model.base_model(
            input_ids=text,
            position_ids=torch.arange(70, 100)[None],
            past_key_values=past.lookahead(),
            **{attention.PROBE_ARGUMENT: Recorder()},
        )

    for index, scores in found.observed["reconstruction"].items():
        (queries, scaling, softcap), keywords = seen[index]
        for head, start in enumerate(keywords["hidden"][0].tolist()):
            expected = most_attention(
                queries[:, 2 * head : 2 * head + 2],
                keywords["keys"][:, head : head + 1, start:],
                scaling=scaling,
                softcap=softcap,
            )[..., -60:-30]
            torch.testing.assert_close(scores[:, head : head + 1], expected)


def test_what_is_hidden_gets_no_attention():
    queries, keys = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 12, 8)
    hidden = torch.tensor([[4, 0]])
    keys[0, 0, :4] = 0

    window = chunkkv.window_scores(queries, keys, scaling=0.5, hidden=hidden)
    most = most_attention(queries, keys, scaling=0.5, hidden=hidden)

    for scores in (window, most):
        assert (scores[0, 0, :4] == 0).all()
        assert (scores[0, 1] > 0).all()
    torch.testing.assert_close(window.sum(-1), torch.ones(1, 2))


def test_sessions_go_on_over_ragged_and_whole_spans_alike():
    model = tiny_model()
    ids, _ = prompts(130)
    first = ragged_prefix(model, ids[:, :NUM_TOKENS], "adaptive")
    spans = [first]
    chunkkv.make_observable(model)
    grown = KVCache.from_segments(model.config, spans)
    for start, kind in ((40, None), (70, "pyramid"), (100, "empty heads")):
        cache = KVCache.from_segments(model.config, spans)
        chunkkv.run_prefill(model, ids[:, start : start + 30], window_size=4, past=cache)
        tail = cache.take_tail(start, fingerprint=first.shape.fingerprint)
        kept = [[min(n, 30) for n in heads] for heads in LENGTHS[kind]] if kind else []
        spans.append(tail if kind is None else ragged_span(tail, random_rows(kept, 30)))
        grown.append_segment(spans[-1])

    fresh = KVCache.from_segments(model.config, spans)

    for one, other in zip(fresh.layers, grown.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.hidden, other.hidden)
        assert (one.seen_len, one.whole_from) == (other.seen_len, other.whole_from)
