"""Fidelity agrees with slow references, and costs are what storing takes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError
from chunkkv.evaluation.cost import measure_cost
from chunkkv.evaluation.fidelity import (
    Fidelity,
    Reference,
    jaccard,
    mean,
    measure,
    pieces,
    reference,
    restored,
)
from tests.models import prompts, tiny_model

CONTEXT, CONTINUATION = 50, 6
POLICY = CompressionPolicy(keep_ratio=0.4, chunk_size=5, window_size=6, scope="head")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def text(model: Any) -> Reference:
    ids, _ = prompts(CONTEXT + CONTINUATION)
    policies = [POLICY, CompressionPolicy(scorer="heavy_hitter")]
    return reference(model, ids[0].tolist(), num_continuation=CONTINUATION, policies=policies)


def test_all_kept_changes_nothing(model: Any, text: Reference) -> None:
    [found] = measure(model, text, [replace(POLICY, keep_ratio=1.0)])

    assert found.agreement == 1
    assert found.layer_jaccard == 1
    assert found.l1_loss == 0
    assert found.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.attention_cosine == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_next_tokens_are_those_of_reading_one_by_one(model: Any, text: Reference) -> None:
    [found] = measure(model, text, [POLICY])

    ids = torch.tensor([text.token_ids])
    expected = model(input_ids=ids).logits[0, CONTEXT:].log_softmax(-1)
    cache = chunkkv.KVCache.from_segments(
        model.config, chunkkv.prefill(model, ids[:, :CONTEXT], POLICY)
    )
    divergences, same = [], 0
    for place in range(CONTEXT, CONTEXT + CONTINUATION):
        seen = model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits[0, -1]
        seen = seen.log_softmax(-1)
        full = expected[place - CONTEXT]
        divergences.append(sum(math.exp(p) * (p - q) for p, q in zip(full, seen, strict=True)))
        same += int(full.argmax() == seen.argmax())
    assert found.kl_divergence == pytest.approx(float(sum(divergences)) / CONTINUATION, rel=1e-3)
    assert found.agreement == pytest.approx(same / CONTINUATION)


def test_loss_and_cosine_are_those_of_loops_over_tokens(model: Any, text: Reference) -> None:
    [found] = measure(model, text, [POLICY])

    [span] = chunkkv.compress(text.context.prefilled, POLICY)
    lost, cosines = [], []
    for index, layer in enumerate(text.context.prefilled.cache.layers):
        kept = span.layers[index].positions.view(2, -1).tolist()
        for head in range(2):
            for full in (layer.keys[0, head], layer.values[0, head]):
                lost += [
                    float(full[n].abs().mean()) if n not in kept[head] else 0.0
                    for n in range(CONTEXT)
                ]
        for head in range(4):
            keys, values = layer.keys[0, head // 2, :CONTEXT], layer.values[0, head // 2, :CONTEXT]
            rows = kept[head // 2]
            for query in text.probe.queries[index][0, head]:
                logits = keys @ query * text.probe.scaling[index]
                full = logits.softmax(0) @ values
                cosines.append(
                    torch.cosine_similarity(full, logits[rows].softmax(0) @ values[rows], 0)
                )
    assert found.l1_loss == pytest.approx(sum(lost) / len(lost), rel=1e-4)
    assert found.attention_cosine == pytest.approx(float(sum(cosines)) / len(cosines), rel=1e-4)


def test_jaccard_is_that_of_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(2, 9, generator=generator) < 0.5 for _ in range(3)]

    sets = [[set(row.nonzero().flatten().tolist()) for row in mask] for mask in masks]
    expected = [
        len(a[head] & b[head]) / len(a[head] | b[head])
        for a, b in ((sets[0], sets[1]), (sets[1], sets[2]))
        for head in range(2)
    ]
    assert jaccard(masks) == pytest.approx(sum(expected) / 4)
    assert jaccard(masks[:1]) == 1


def test_layers_that_share_a_list_are_alike(model: Any, text: Reference) -> None:
    [shared, own] = measure(
        model, text, [replace(POLICY, scope="global"), replace(POLICY, unit="token")]
    )

    assert shared.layer_jaccard == 1
    assert own.layer_jaccard < 1


def test_restored_layer_has_zeros_where_something_was_dropped(text: Reference) -> None:
    [span] = chunkkv.compress(text.context.prefilled, replace(POLICY, scope="layer"))

    keys, values, kept = restored(span, 1)

    full = text.context.prefilled.cache.layers[1]
    assert torch.equal(keys, full.keys[0, :, :CONTEXT] * kept[..., None])
    assert torch.equal(values, full.values[0, :, :CONTEXT] * kept[..., None])
    assert kept.sum(-1).tolist() == [20, 20]


def test_fewer_bits_are_seen_in_bytes_and_loss(model: Any, text: Reference) -> None:
    everything = replace(POLICY, keep_ratio=1.0)
    exact, rounded = measure(model, text, [everything, replace(everything, precision="int4")])

    assert rounded.stored_share < exact.stored_share / 2
    assert rounded.l1_loss > 0


def test_measuring_many_is_measuring_each(model: Any, text: Reference) -> None:
    policies = [replace(POLICY, keep_ratio=n / 10) for n in range(1, 10)]  # more than one batch

    together = measure(model, text, policies)

    for policy, found in zip(policies, together, strict=True):
        [alone] = measure(model, text, [policy])
        assert alone.agreement == found.agreement
        assert alone.kl_divergence == pytest.approx(found.kl_divergence, abs=1e-4)


def test_mean_is_of_each_field() -> None:
    one = Fidelity(0.0, 0.5, 1.0, 1.0, 0.0, 0.1)
    other = Fidelity(1.0, 1.0, 2.0, 0.0, 1.0, 0.3)

    assert mean([one, other]) == Fidelity(0.5, 0.75, 1.5, 0.5, 0.5, 0.2)


def test_pieces_spread_over_the_text_and_do_not_overlap() -> None:
    assert list(pieces(range(10), size=3, num_pieces=2)) == [(0, 1, 2), (5, 6, 7)]
    assert list(pieces(range(7), size=3, num_pieces=9)) == [(0, 1, 2), (3, 4, 5)]
    with pytest.raises(InvalidInputError, match="2 tokens; one piece takes 3"):
        list(pieces(range(2), size=3, num_pieces=1))


def test_text_without_a_first_part_is_refused(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="no continuation"):
        reference(model, [3, 4], num_continuation=2, policies=[])


def test_cost_counts_stored_bytes_and_times_everything(model: Any) -> None:
    ids, _ = prompts(CONTEXT)

    [cost] = measure_cost(model, ids[0].tolist(), [POLICY], repeats=1)

    [span] = chunkkv.prefill(model, ids, POLICY)
    assert cost.stored_bytes["native"] == span.size_bytes
    assert cost.stored_bytes["int4"] < cost.stored_bytes["int8"] < cost.stored_bytes["native"]
    assert cost.full_bytes == 4 * 2 * CONTEXT * 2 * 16 * 4
    assert cost.prefill_ms > 0
    assert cost.select_ms > 0
    assert cost.share_of_prefill > 0
