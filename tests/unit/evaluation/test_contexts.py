"""A question on top of a prefilled context scores as both in one piece do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError
from chunkkv.evaluation.contexts import prefill_context
from tests.models import VOCAB_SIZE, prompts, tiny_model

CONTEXT, WHOLE = 60, 75


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("scorer", ["window", "heavy_hitter", "expected_attention", "key_diff"])
def test_question_after_a_context_is_compressed_as_one_text(family: str, scorer: str) -> None:
    model = tiny_model(family)
    ids, _ = prompts(WHOLE)
    policy = CompressionPolicy(keep_ratio=0.4, scorer=scorer, chunk_size=4, window_size=20)  # type: ignore[arg-type]
    context = prefill_context(model, ids[0, :CONTEXT].tolist(), [policy])

    [kept] = chunkkv.compress(context.followed_by(ids[0, CONTEXT:].tolist()), policy)

    [expected] = chunkkv.prefill(model, ids, policy)
    assert kept.shape == expected.shape
    for layer, other in zip(kept.layers, expected.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.scores, other.scores, rtol=1e-3, atol=1e-5)


def test_context_stays_as_it_is_under_its_questions() -> None:
    model = tiny_model()
    ids, _ = prompts(WHOLE)
    policies = [CompressionPolicy(scorer="heavy_hitter"), CompressionPolicy(window_size=20)]
    context = prefill_context(model, ids[0, :CONTEXT].tolist(), policies)
    before = [chunkkv.compress(context.prefilled, policy)[0].memory for policy in policies]

    context.followed_by(ids[0, CONTEXT:].tolist())

    after = [chunkkv.compress(context.prefilled, policy)[0].memory for policy in policies]
    assert all(map(torch.equal, before, after))
    assert context.prefilled.cache.get_seq_length() == CONTEXT


def test_repetition_that_saw_no_question_keeps_the_question() -> None:
    model = tiny_model()
    ids, _ = prompts(WHOLE)
    policy = CompressionPolicy(
        max_kept_tokens=20, scorer="reconstruction", unit="token", window_size=1, sink_tokens=0
    )
    context = prefill_context(model, ids[0, :CONTEXT].tolist(), [policy])

    [kept] = chunkkv.compress(context.followed_by(ids[0, CONTEXT:].tolist()), policy)

    for layer in kept.layers:
        assert set(range(CONTEXT, WHOLE)) <= set(layer.positions.tolist())


def test_sentences_of_context_and_question_are_those_of_one_text() -> None:
    model = tiny_model()
    ids, _ = prompts(WHOLE)
    policy = CompressionPolicy(keep_ratio=0.4, unit="sentence", chunk_size=12)
    ends = torch.arange(VOCAB_SIZE) % 5 == 0
    context = prefill_context(model, ids[0, :CONTEXT].tolist(), [policy], sentence_ends=ends)

    [kept] = chunkkv.compress(context.followed_by(ids[0, CONTEXT:].tolist()), policy)

    [expected] = chunkkv.prefill(model, ids, policy, sentence_ends=ends)
    assert [layer.positions.tolist() for layer in kept.layers] == [
        layer.positions.tolist() for layer in expected.layers
    ]


def test_context_refuses_to_be_cut_at_sentences_that_nobody_told() -> None:
    cannot_run = SimpleNamespace(device="cpu")
    with pytest.raises(InvalidInputError, match="sentence_ending_tokens"):
        prefill_context(cannot_run, [3, 4], [CompressionPolicy(unit="sentence")])
