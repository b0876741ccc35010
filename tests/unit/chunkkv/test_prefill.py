"""Prefill and generation against transformers' own, for every family of models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, VOCAB_SIZE, prompts, tiny_model
from transformers import DynamicCache

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache

WHOLE = CompressionPolicy(keep_ratio=1.0)
SCOPES = ("head", "layer", "group", "global")
SMALL: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 5, "window_size": 8}
NUM_NEW = 20
LENGTHS = (60, 37)


def generate(model: Any, inputs: dict[str, Any], num_tokens: int = NUM_NEW) -> torch.Tensor:
    """Return what greedy generation adds, ``(batch, num_tokens)``."""
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    return output[:, inputs["input_ids"].shape[1] :]


def plain(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return transformers' own greedy answer."""
    return generate(model, {"input_ids": ids, "attention_mask": mask})


def rows_of(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return each row without its padding."""
    return [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]


def kept_cache(cache: KVCache) -> DynamicCache:
    """Return transformers' own cache of the same keys and values; it knows of no dropped ones."""
    plain_cache = DynamicCache()
    for index, layer in enumerate(cache.layers):
        plain_cache.update(layer.keys.clone(), layer.values.clone(), index)
    return plain_cache


@pytest.mark.parametrize("piece", [None, 7], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_generates_what_transformers_does(family: str, piece: int | None):
    model = tiny_model(family)
    ids, mask = prompts(*LENGTHS)
    expected = plain(model, ids, mask)
    assert len(set(expected[0].tolist())) > 5, "an answer that repeats itself proves little"

    spans = chunkkv.prefill(
        model, ids[:, :-1], WHOLE, attention_mask=mask[:, :-1], prefill_chunk_tokens=piece
    )
    rows = rows_of(ids, mask)
    together = generate(model, chunkkv.generation_inputs(model, [[s] for s in spans], rows))
    alone = [
        generate(model, chunkkv.generation_inputs(model, [[span]], [row]))
        for span, row in zip(spans, rows, strict=True)
    ]

    assert torch.equal(together, expected)
    assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_sliding"])
def test_keeping_everything_works_with_eager_attention(family: str):
    model = tiny_model(family, attention="eager")
    ids, mask = prompts(*LENGTHS)

    spans = chunkkv.prefill(
        model, ids[:, :-1], WHOLE, attention_mask=mask[:, :-1], prefill_chunk_tokens=11
    )
    inputs = chunkkv.generation_inputs(model, [[s] for s in spans], rows_of(ids, mask))

    assert torch.equal(generate(model, inputs), plain(model, ids, mask))


@pytest.mark.parametrize("lengths", [(1, 30), (2, 3), (16, 17), (33, 5)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_shorter_than_the_window_work(family: str, lengths: tuple[int, int]):
    model = tiny_model(family)
    ids, mask = prompts(*(n + 1 for n in lengths))

    spans = chunkkv.prefill(model, ids[:, :-1], WHOLE, attention_mask=mask[:, :-1])
    inputs = chunkkv.generation_inputs(model, [[s] for s in spans], rows_of(ids, mask))

    assert [span.num_tokens for span in spans] == list(lengths)
    assert torch.equal(generate(model, inputs), plain(model, ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_spans_that_keep_everything_equal_one(family: str):
    model = tiny_model(family)
    ids, mask = prompts(60)
    first = chunkkv.prefill(model, ids[:, :33], WHOLE)[0]
    past = KVCache.from_segments(model.config, [first])

    second = chunkkv.compress(
        chunkkv.run_prefill(model, ids[:, 33:-1], window_size=16, past=past), WHOLE
    )[0]
    answer = generate(model, chunkkv.generation_inputs(model, [[first, second]], [ids[0]]))

    assert (second.first_token, second.num_tokens) == (33, 26)
    assert torch.equal(answer, plain(model, ids, mask))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FULL_ATTENTION_FAMILIES)
def test_generation_from_kept_tokens_equals_transformers_on_the_same_keys(family: str, scope: Any):
    model = tiny_model(family)
    ids, _ = prompts(60)
    policy = CompressionPolicy(scope=scope, **SMALL)
    span = chunkkv.prefill(model, ids[:, :-1], policy)[0]
    inputs = chunkkv.generation_inputs(model, [[span]], [ids[0]])
    reference = kept_cache(inputs["past_key_values"])

    answer = generate(model, inputs)[0].tolist()

    expected: list[int] = []
    token = ids[:, -1:]
    with torch.no_grad():
        for position in range(59, 59 + NUM_NEW):
            logits = model(
                token, position_ids=torch.tensor([[position]]), past_key_values=reference
            ).logits
            token = logits[:, -1:].argmax(-1)
            expected.append(int(token))
    assert answer == expected


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FULL_ATTENTION_FAMILIES)
def test_next_span_is_computed_on_top_of_the_kept_prefix(family: str, scope: Any):
    model = tiny_model(family)
    ids, _ = prompts(60)
    policy = CompressionPolicy(scope=scope, **SMALL)
    first = chunkkv.prefill(model, ids[:, :35], policy)[0]
    past = KVCache.from_segments(model.config, [first])
    reference, prefix = kept_cache(past), kept_cache(past)

    prefilled = chunkkv.run_prefill(
        model, ids[:, 35:], window_size=16, past=past, prefill_chunk_tokens=9
    )
    second = chunkkv.compress(prefilled, WHOLE)[0]

    with torch.no_grad():
        model(ids[:, 35:], position_ids=torch.arange(35, 60)[None], past_key_values=reference)
    assert prefilled.first_token == second.first_token == 35
    assert past.get_seq_length() == 60
    for index, layer in enumerate(second.layers):
        kept = first.layers[index].lengths[0]
        keys, values = layer.by_head()
        assert layer.positions.tolist() == list(range(35, 60)) * (len(layer.positions) // 25)
        expected = reference.layers[index]
        torch.testing.assert_close(keys, expected.keys[0, :, kept:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, expected.values[0, :, kept:], atol=1e-4, rtol=1e-4)
        held = past.layers[index]
        assert torch.equal(held.keys[:, :, :kept], prefix.layers[index].keys), "prefix untouched"
        assert torch.equal(held.values[:, :, :kept], prefix.layers[index].values)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_later_spans_run_on_every_family_and_keep_their_budget(family: str, scope: Any):
    model = tiny_model(family)
    ids, _ = prompts(90)
    policy = CompressionPolicy(scope=scope, **SMALL)
    spans = []
    for start, stop in ((0, 41), (41, 47), (47, 89)):
        past = KVCache.from_segments(model.config, spans)
        prefilled = chunkkv.run_prefill(model, ids[:, start:stop], window_size=8, past=past)
        spans += chunkkv.compress(prefilled, policy)

    answer = generate(model, chunkkv.generation_inputs(model, [spans], [ids[0]]), 5)

    assert answer.shape == (1, 5)
    if family != "mistral_sliding":
        assert [span.num_kept_tokens for span in spans] == [20, 3, 21]


@pytest.mark.parametrize("unit", ["chunk", "token"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_compressed_rows_generates_as_each_alone(family: str, scope: Any, unit: Any):
    model = tiny_model(family)
    ids, mask = prompts(*LENGTHS)
    policy = CompressionPolicy(scope=scope, unit=unit, **SMALL)
    spans = chunkkv.prefill(model, ids[:, :-1], policy, attention_mask=mask[:, :-1])
    rows = rows_of(ids, mask)

    together = generate(model, chunkkv.generation_inputs(model, [[s] for s in spans], rows))

    alone = [
        generate(model, chunkkv.generation_inputs(model, [[span]], [row]))
        for span, row in zip(spans, rows, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_several_pending_tokens_are_run_on_top_of_kept_ones():
    model = tiny_model()
    ids, _ = prompts(60)
    span = chunkkv.prefill(model, ids[:, :50], CompressionPolicy(**SMALL))[0]
    one_by_one = KVCache.from_segments(model.config, [span])
    with torch.no_grad():
        for position in range(50, 60):
            logits = model(ids[:, position : position + 1], past_key_values=one_by_one).logits

    answer = generate(model, chunkkv.generation_inputs(model, [[span]], [ids[0]]), 1)

    assert int(answer) == int(logits[0, -1].argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_kept_tokens_have_the_models_dtype_and_its_very_values(family: str, dtype: torch.dtype):
    model = tiny_model(family, dtype=dtype)
    ids, mask = prompts(*LENGTHS)
    expected = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=expected)

    spans = chunkkv.prefill(model, ids, WHOLE, attention_mask=mask)

    for row, span in enumerate(spans):
        assert span.shape.torch_dtype == dtype
        for index, layer in enumerate(span.layers):
            keys, values = layer.by_head()
            kept = layer.lengths[0]
            assert torch.equal(keys, expected.layers[index].keys[row, :, -kept:])
            assert torch.equal(values, expected.layers[index].values[row, :, -kept:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_from_kept_tokens(dtype: torch.dtype):
    model = tiny_model(dtype=dtype)
    ids, mask = prompts(*LENGTHS)
    policy = CompressionPolicy(**SMALL)
    spans = chunkkv.prefill(model, ids[:, :-1], policy, attention_mask=mask[:, :-1])

    inputs = chunkkv.generation_inputs(model, [[s] for s in spans], rows_of(ids, mask))

    assert generate(model, inputs, 5).shape == (2, 5)


def test_spans_of_inference_mode_are_used_outside_of_it():
    model = tiny_model()
    ids, mask = prompts(60)
    with torch.inference_mode():
        span = chunkkv.prefill(model, ids[:, :-1], WHOLE)[0]

    answer = generate(model, chunkkv.generation_inputs(model, [[span]], [ids[0]]))

    assert torch.equal(answer, plain(model, ids, mask))


def test_a_hook_runs_before_each_piece():
    calls: list[int] = []
    model = tiny_model()
    ids, _ = prompts(30)

    chunkkv.run_prefill(
        model, ids, window_size=8, prefill_chunk_tokens=8, before_chunk=lambda: calls.append(1)
    )

    assert len(calls) == 4


def test_what_the_hook_raises_ends_the_prefill_and_leaves_the_model_as_it_was():
    model = tiny_model()
    ids, _ = prompts(30)
    calls: list[int] = []

    def stop_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunkkv.run_prefill(
            model, ids, window_size=8, prefill_chunk_tokens=5, before_chunk=stop_at_third
        )

    assert len(calls) == 3
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_as_it_was_afterwards(attention: str):
    model = tiny_model(attention=attention)

    chunkkv.prefill(model, prompts(30)[0], WHOLE)

    assert model.config._attn_implementation == attention


def test_given_fingerprint_is_kept_and_a_missing_one_computed():
    model = tiny_model()
    ids, _ = prompts(30)

    given = chunkkv.run_prefill(model, ids, window_size=8, fingerprint="mine")
    computed = chunkkv.run_prefill(model, ids, window_size=8)

    assert chunkkv.compress(given, CompressionPolicy(window_size=8))[0].shape.fingerprint == "mine"
    assert computed.fingerprint == chunkkv.model_fingerprint(model)


def test_padding_on_the_right_is_refused():
    ids, mask = prompts(*LENGTHS)

    with pytest.raises(InvalidInputError, match="padding must be on the left"):
        chunkkv.prefill(tiny_model(), ids.flip(1), WHOLE, attention_mask=mask.flip(1))


def test_gap_in_the_mask_is_refused():
    ids, mask = prompts(20)
    mask[0, 7] = 0

    with pytest.raises(InvalidInputError, match="padding must be on the left"):
        chunkkv.prefill(tiny_model(), ids, WHOLE, attention_mask=mask)


def test_boolean_mask_is_taken():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)

    spans = chunkkv.prefill(model, ids, WHOLE, attention_mask=mask.bool())

    assert [span.num_tokens for span in spans] == list(LENGTHS)


def test_row_of_nothing_but_padding_is_refused():
    ids, mask = prompts(*LENGTHS)
    mask[1] = 0

    with pytest.raises(InvalidInputError, match="nothing but padding"):
        chunkkv.prefill(tiny_model(), ids, WHOLE, attention_mask=mask)


def test_empty_prompt_is_refused():
    with pytest.raises(InvalidInputError, match="no tokens"):
        chunkkv.prefill(tiny_model(), torch.zeros(1, 0, dtype=torch.int64), WHOLE)


def test_mask_of_another_shape_is_refused():
    ids, mask = prompts(*LENGTHS)

    with pytest.raises(InvalidInputError, match="attention_mask is"):
        chunkkv.prefill(tiny_model(), ids, WHOLE, attention_mask=mask[:, :-1])


@pytest.mark.parametrize("sizes", [{"prefill_chunk_tokens": 0}, {"prefill_chunk_tokens": -3}])
def test_piece_of_no_tokens_is_refused(sizes: dict[str, int]):
    with pytest.raises(InvalidInputError, match="at least 1"):
        chunkkv.prefill(tiny_model(), prompts(20)[0], WHOLE, **sizes)


def test_window_of_no_tokens_is_refused():
    with pytest.raises(InvalidInputError, match="window_size is 0"):
        chunkkv.run_prefill(tiny_model(), prompts(20)[0], window_size=0)


def test_batch_on_top_of_earlier_tokens_is_refused():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)
    past = KVCache.from_segments(model.config, chunkkv.prefill(model, ids[:1], WHOLE))

    with pytest.raises(InvalidInputError, match="one row without padding"):
        chunkkv.run_prefill(model, ids, window_size=8, past=past)
    with pytest.raises(InvalidInputError, match="one row without padding"):
        chunkkv.run_prefill(model, ids[1:], window_size=8, past=past, attention_mask=mask[1:])


def test_text_that_ends_with_its_spans_leaves_nothing_to_run():
    model = tiny_model()
    ids, _ = prompts(30)
    span = chunkkv.prefill(model, ids, WHOLE)[0]

    with pytest.raises(InvalidInputError, match=r"\[0\] tokens behind their kept KV"):
        chunkkv.generation_inputs(model, [[span]], [ids[0]])


def test_rows_with_different_numbers_of_pending_tokens_are_refused():
    model = tiny_model()
    ids, _ = prompts(30)
    spans = [chunkkv.prefill(model, ids[:, :n], WHOLE) for n in (20, 25)]

    with pytest.raises(InvalidInputError, match=r"\[5, 10\] tokens"):
        chunkkv.generation_inputs(model, spans, [ids[0], ids[0]])


def test_token_ids_of_the_vocabulary_are_generated():
    model = tiny_model()
    ids, _ = prompts(30)
    span = chunkkv.prefill(model, ids[:, :-1], CompressionPolicy(max_kept_tokens=1))[0]

    answer = generate(model, chunkkv.generation_inputs(model, [[span]], [ids[0]]))

    assert span.num_kept_tokens == 1
    assert ((answer >= 0) & (answer < VOCAB_SIZE)).all()


def test_sentences_are_kept_whole_in_rows_of_a_batch():
    model = tiny_model()
    ids, mask = prompts(*LENGTHS)
    ends = torch.arange(VOCAB_SIZE) % 5 == 0
    policy = CompressionPolicy(keep_ratio=0.5, unit="sentence", chunk_size=12)

    kept = chunkkv.prefill(model, ids, policy, attention_mask=mask, sentence_ends=ends)

    for span, row in zip(kept, rows_of(ids, mask), strict=True):
        prefilled = chunkkv.run_prefill(model, row[None], window_size=policy.window_size)
        prefilled = dataclasses.replace(prefilled, sentence_ends=ends[row[None]])
        [expected] = chunkkv.compress(prefilled, policy)
        for layer, other in zip(span.layers, expected.layers, strict=True):
            assert torch.equal(layer.positions, other.positions)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (None, "sentence_ending_tokens"),
        (torch.zeros(VOCAB_SIZE), "give a bool"),
        (torch.zeros(1, VOCAB_SIZE, dtype=torch.bool), "give a bool"),
        (torch.zeros(2, dtype=torch.bool), "knows 2 tokens"),
    ],
)
def test_sentences_that_cannot_be_told_are_refused_before_the_model_runs(
    ends: torch.Tensor | None, said: str
):
    ids, _ = prompts(9)

    with pytest.raises(InvalidInputError, match=said):
        chunkkv.prefill(object(), ids, CompressionPolicy(unit="sentence"), sentence_ends=ends)
