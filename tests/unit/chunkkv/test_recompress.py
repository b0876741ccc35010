"""Compressing a compressed span further chooses what compressing once would have chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_pruning import always_kept, slow_adaptive
from slow_selection import slow_rows

from chunkkv import (
    CompressedKV,
    CompressionPolicy,
    InvalidInputError,
    InvalidPolicyError,
    LayerShape,
    SpanShape,
    decode,
    encode,
    is_prunable,
    recompress,
    select,
)
from chunkkv.selection import scored_layers

FIRST_TOKEN = 1000
NUM_LAYERS, NUM_HEADS, DIM = 4, 2, 3


def integer_scores(num_tokens: int, seed: int, *, layers: int = NUM_LAYERS) -> torch.Tensor:
    """Return scores whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (layers, NUM_HEADS, num_tokens), generator=generator).float()


def span_of(scores: torch.Tensor, policy: CompressionPolicy) -> CompressedKV:
    """Return what ``policy`` keeps; keys and values say which layer, head and token they are of."""
    num_tokens = scores.shape[-1]
    read = scores[list(scored_layers(policy, NUM_LAYERS))]
    selection = select(read, policy, num_layers=NUM_LAYERS)
    shared = {
        "head": read,
        "layer": read.sum(1, keepdim=True),
        "group": read.sum(1, keepdim=True),
        "global": read.sum((0, 1))[None, None],
    }[policy.scope]
    by_head = [list(rows) * (NUM_HEADS // len(rows)) for rows in selection.lists]
    span = CompressedKV.empty(
        SpanShape(
            fingerprint="model-a",
            policy=policy.canonical(),
            first_token=FIRST_TOKEN,
            num_tokens=num_tokens,
            dtype="float32",
            layers=tuple(
                LayerShape(tuple(map(len, by_head[which])), DIM, DIM, which)
                for which in selection.list_of_layer
            ),
            index_lengths=tuple(sum(map(len, rows)) for rows in selection.lists),
            has_scores=True,
        )
    )
    for index, view in enumerate(span.layers):
        which = selection.list_of_layer[index]
        rows = selection.lists[which]
        view.positions.copy_(torch.cat(rows) + FIRST_TOKEN)
        assert view.scores is not None
        view.scores.copy_(
            torch.cat([own[row] for own, row in zip(shared[which], rows, strict=True)])
        )
        places = [row.float() for row in by_head[which]]
        keys = [own + 10_000 * index + 0.5 * head for head, own in enumerate(places)]
        view.keys.copy_(torch.cat(keys)[:, None])
        view.values.copy_(-torch.cat(places)[:, None])
    return span


def assert_same(found: CompressedKV, expected: CompressedKV) -> None:
    assert replace(found.shape, policy="") == replace(expected.shape, policy="")
    assert torch.equal(found.memory, expected.memory)


policies = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["chunk", "token"]),
        "scope": st.sampled_from(["head", "layer", "group", "global"]),
        "chunk_size": st.integers(1, 12),
        "window_size": st.integers(1, 12),
        "sink_tokens": st.integers(0, 6),
    }
)


@given(
    choices=policies,
    num_tokens=st.integers(1, 90),
    budgets=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 999),
)
def test_twice_chooses_what_once_chooses(
    choices: dict[str, Any], num_tokens: int, budgets: tuple[int, int], seed: int
):
    scores = integer_scores(num_tokens, seed)
    large, small = max(budgets), min(budgets)
    once = span_of(scores, CompressionPolicy(max_kept_tokens=small, **choices))

    found = recompress(
        span_of(scores, CompressionPolicy(max_kept_tokens=large, **choices)), max_kept_tokens=small
    )

    assert_same(found, once)


@given(
    choices=policies,
    scope=st.sampled_from(["head", "layer"]),
    floor=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.7, 1.0]),
    num_tokens=st.integers(1, 90),
    budgets=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 999),
)
def test_twice_chooses_what_once_chooses_where_lists_compete(
    choices: dict[str, Any],
    scope: Any,
    floor: float,
    num_tokens: int,
    budgets: tuple[int, int],
    seed: int,
):
    scores = integer_scores(num_tokens, seed)
    large, small = max(budgets), min(budgets)
    choices |= {"scope": scope, "spread": "adaptive", "head_floor": floor}
    once = span_of(scores, CompressionPolicy(max_kept_tokens=small, **choices))

    found = recompress(
        span_of(scores, CompressionPolicy(max_kept_tokens=large, **choices)), max_kept_tokens=small
    )

    assert_same(found, once)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_pyramid_cut_again_is_the_smaller_pyramid(scope: Any):
    scores = integer_scores(200, 3)
    choices: dict[str, Any] = {"scope": scope, "spread": "pyramid", "unit": "token"}
    once = span_of(scores, CompressionPolicy(max_kept_tokens=40, **choices))

    found = recompress(
        span_of(scores, CompressionPolicy(max_kept_tokens=80, **choices)), max_kept_tokens=40
    )

    assert found.num_kept_tokens == once.num_kept_tokens == 40
    for one, other in zip(found.layers, once.layers, strict=True):
        assert all(abs(n - m) <= 1 for n, m in zip(one.lengths, other.lengths, strict=True))


@given(
    unit=st.integers(1, 9),
    window=st.integers(1, 9),
    sink=st.integers(0, 6),
    num_tokens=st.integers(2, 60),
    budget=st.integers(1, 60),
    seed=st.integers(0, 999),
)
def test_a_whole_list_is_chosen_from_as_the_slow_reference_does(
    unit: int, window: int, sink: int, num_tokens: int, budget: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-50, 50, (num_tokens,), generator=generator).float()
    policy = CompressionPolicy(
        keep_ratio=1.0, scope="layer", chunk_size=unit, window_size=window, sink_tokens=sink
    )
    span = hand_made([range(num_tokens)], [scores.tolist()], policy.canonical(), num_tokens)

    found = recompress(span, max_kept_tokens=budget)

    [expected] = slow_rows(
        [scores.tolist()], [budget], unit_tokens=unit, window_size=window, sink_tokens=sink
    )
    assert (found.layers[0].positions - FIRST_TOKEN).tolist() == expected


def hand_made(
    rows: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    policy: str,
    num_tokens: int,
) -> CompressedKV:
    """Return a span of one layer, each head with its own row, and a sliding layer."""
    lengths = tuple(map(len, rows))
    span = CompressedKV.empty(
        SpanShape(
            fingerprint="model-a",
            policy=policy,
            first_token=FIRST_TOKEN,
            num_tokens=num_tokens,
            dtype="float32",
            layers=(
                LayerShape(lengths, DIM, DIM, 0),
                LayerShape((7, 7), DIM, DIM, 1, is_sliding=True),
            ),
            index_lengths=(sum(lengths), 7),
            has_scores=True,
        )
    )
    full, sliding = span.layers
    assert full.scores is not None
    places = torch.tensor([place for row in rows for place in row])
    full.positions.copy_(places + FIRST_TOKEN)
    full.scores.copy_(torch.tensor([score for row in scores for score in row]))
    full.keys.copy_(places[:, None].float())
    full.values.copy_(-places[:, None].float())
    for tensor in (sliding.keys, sliding.values, sliding.positions, sliding.scores):
        assert tensor is not None
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return span


def test_ragged_heads_are_each_cut_to_the_budget_and_sliding_layers_are_not():
    rules = "keep_ratio=1/2 scorer=window unit=1 scope=head window=1 sink=1"
    rows = [[0, 3, 5, 9], [2], [0, 1, 2, 3, 4, 9]]
    scores = [[9.0, 1, 2, 9], [1.0], [9.0, 5, 1, 2, 3, 9]]
    span = hand_made(rows, scores, rules, num_tokens=10)

    found = recompress(span, max_kept_tokens=3, precision="int8")

    assert found.shape.precision == "int8"
    assert found.shape.layers[0].lengths == (3, 1, 3)
    assert (found.layers[0].positions - FIRST_TOKEN).tolist() == [0, 5, 9, 2, 0, 1, 9]
    assert found.layers[0].keys[:, 0].tolist() == [0, 5, 9, 2, 0, 1, 9]
    assert found.layers[0].values[:, 0].tolist() == [0, -5, -9, -2, 0, -1, -9]
    for name in ("keys", "values", "positions", "scores"):
        assert torch.equal(getattr(found.layers[1], name), getattr(span.layers[1], name))


def test_cutting_half_to_a_fifth_keeps_some_of_the_half():
    scores = torch.rand(NUM_LAYERS, NUM_HEADS, 200, generator=torch.Generator().manual_seed(1))
    half = span_of(scores, CompressionPolicy(keep_ratio=0.5))

    fifth = recompress(half, keep_ratio=0.2)

    assert fifth.num_kept_tokens == 40
    assert fifth.size_bytes < half.size_bytes / 2
    assert fifth.shape.policy == half.shape.policy
    for one, other in zip(fifth.layers, half.layers, strict=True):
        assert set(one.positions.tolist()) < set(other.positions.tolist())
        own = {tuple(key) for key in other.keys.tolist()}
        assert all(tuple(key) in own for key in one.keys.tolist())


def test_result_is_stored_and_compressed_again():
    scores = integer_scores(100, 3)
    policy = CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4)
    smaller = recompress(span_of(scores, policy), max_kept_tokens=30)
    encoded = encode(smaller, identity="object-1")

    opened = decode(encoded.header, bytearray(b"".join(encoded.parts)))

    assert_same(opened, smaller)
    again = replace(policy, keep_ratio=None, max_kept_tokens=11)
    assert_same(recompress(opened, max_kept_tokens=11), span_of(scores, again))


@pytest.mark.parametrize("change", [{"policy": "whole"}, {"policy": "by hand"}, {"unit": 0}])
def test_span_whose_rules_are_unknown_keeps_all_tokens(change: dict[str, Any]):
    span = span_of(integer_scores(40, 0), CompressionPolicy(keep_ratio=0.5))
    policy = change.get("policy", span.shape.policy.replace("unit=20", "unit=0"))
    span = CompressedKV(replace(span.shape, policy=policy), span.memory)

    found = recompress(span, max_kept_tokens=1, precision="int4")

    assert not is_prunable(span.shape)
    assert found.shape == replace(span.shape, precision="int4")
    assert torch.equal(found.memory, span.memory)


def test_span_without_scores_keeps_all_tokens():
    span = span_of(integer_scores(40, 0), CompressionPolicy(keep_ratio=0.5))
    shape = replace(span.shape, has_scores=False)
    bare = CompressedKV.empty(shape)

    assert not is_prunable(shape)
    assert recompress(bare, keep_ratio=0.1).num_kept_tokens == 20


def test_no_budget_or_a_large_one_changes_nothing_but_the_precision():
    span = span_of(integer_scores(40, 0), CompressionPolicy(keep_ratio=0.5))

    assert recompress(span).memory is span.memory
    assert recompress(span, max_kept_tokens=20).shape == span.shape
    assert recompress(span, precision="fp8").shape == replace(span.shape, precision="fp8")


@pytest.mark.parametrize(
    "budget",
    [{"max_kept_tokens": 0}, {"keep_ratio": 0.0}, {"keep_ratio": 0.5, "max_kept_tokens": 3}],
)
def test_budget_out_of_range_is_refused(budget: dict[str, Any]):
    span = span_of(integer_scores(40, 0), CompressionPolicy(keep_ratio=0.5))

    with pytest.raises(InvalidPolicyError):
        recompress(span, **budget)


def test_scores_that_are_not_finite_are_refused():
    span = span_of(integer_scores(40, 0), CompressionPolicy(keep_ratio=0.5))
    assert span.layers[0].scores is not None
    span.layers[0].scores[3] = float("nan")

    with pytest.raises(InvalidInputError, match="not finite"):
        recompress(span, max_kept_tokens=5)


def places_of(span: CompressedKV) -> list[list[int]]:
    """Return the places that each head of the first layer keeps."""
    rows = torch.split(span.layers[0].positions - FIRST_TOKEN, list(span.layers[0].lengths))
    return [row.tolist() for row in rows]


@st.composite
def stored_rows(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, float]]]]:
    """Return tokens of a span, and rows of some of them with scores whose sums are exact."""
    num_tokens = draw(st.integers(1, 40))
    places = st.sets(st.integers(0, num_tokens - 1)).map(sorted)
    rows = draw(st.lists(places, min_size=1, max_size=4))
    random = draw(st.randoms(use_true_random=False))
    return num_tokens, [[(p, float(random.randint(0, 30))) for p in row] for row in rows]


def span_of_rows(
    rows: Sequence[Sequence[tuple[int, float]]], rules: str, num_tokens: int
) -> CompressedKV:
    return hand_made(
        [[place for place, _ in row] for row in rows],
        [[score for _, score in row] for row in rows],
        rules,
        num_tokens,
    )


@given(
    stored=stored_rows(),
    unit=st.integers(1, 7),
    window=st.integers(1, 6),
    sink=st.integers(0, 4),
    floor=st.sampled_from(["", "1/5", "1/2", "1"]),
    is_sentence=st.booleans(),
    budget=st.integers(1, 40),
)
def test_units_of_all_lists_compete_as_the_slow_reference_does(
    stored: tuple[int, list[list[tuple[int, float]]]],
    unit: int,
    window: int,
    sink: int,
    floor: str,
    is_sentence: bool,
    budget: int,
):
    num_tokens, rows = stored
    rules = (
        f"keep_ratio=1 scorer=window unit={unit} scope=head window={window} sink={sink}"
        f"{' cut=sentence' if is_sentence else ''} spread=adaptive"
        f"{f' floor={floor}' if floor else ''} precision=int8"
    )
    span = span_of_rows(rows, rules, num_tokens)

    found = recompress(span, max_kept_tokens=budget)

    assert places_of(found) == slow_adaptive(
        rows,
        budget,
        num_tokens,
        unit=unit,
        window=window,
        sink=sink,
        floor=Fraction(floor or 0),
        is_sentence=is_sentence,
    )
    assert sum(found.layers[0].lengths) == min(budget * len(rows), sum(map(len, rows)))
    assert found.shape.policy == rules
    assert found.layers[0].keys[:, 0].tolist() == [p for row in places_of(found) for p in row]


@given(stored=stored_rows(), budget=st.integers(1, 40))
def test_lists_of_a_pyramid_shrink_in_proportion(
    stored: tuple[int, list[list[tuple[int, float]]]], budget: int
):
    num_tokens, rows = stored
    rules = "keep_ratio=1 scorer=window unit=3 scope=head window=2 sink=1 spread=pyramid"
    uniform = rules.removesuffix(" spread=pyramid")
    span = span_of_rows(rows, rules, num_tokens)

    found = recompress(span, max_kept_tokens=budget)

    held, kept = [len(row) for row in rows], found.layers[0].lengths
    assert sum(kept) == min(budget * len(rows), sum(held))
    always = [len(always_kept(row, budget, num_tokens, window=2, sink=1)) for row in rows]
    share = (sum(kept) - sum(always)) / max(1, sum(held) - sum(always))
    for own, row, least, places in zip(kept, rows, always, places_of(found), strict=True):
        assert least <= own <= len(row)
        assert abs(own - least - share * (len(row) - least)) < 1
        if own > 0:
            alone = span_of_rows([row], uniform, num_tokens)
            assert [places] == places_of(recompress(alone, max_kept_tokens=own))


def test_pyramid_keeps_its_proportions():
    rules = "keep_ratio=1 scorer=window unit=1 scope=head window=1 sink=0 spread=pyramid"
    rows = [[(place, 1.0) for place in [*range(n), 49]] for n in (40, 20, 10, 0)]

    found = recompress(span_of_rows(rows, rules, 50), max_kept_tokens=9)

    assert found.layers[0].lengths == (1 + 18, 1 + 9, 1 + 5, 1)


def test_neighbours_that_were_cut_at_sentences_are_one_unit():
    rules = "keep_ratio=1 scorer=window unit=4 scope=head window=1 sink=0 cut=sentence"
    scores = {2: 1.0, 3: 1, 7: 2, 8: 2, 9: 2, 10: 2, 11: 5, 12: 0, 19: 0}
    span = span_of_rows([list(scores.items())], rules, 20)

    # 11 and 12; 7 to 10, as many as a sentence has at most; 2 and 3, by their means; the window.
    assert places_of(recompress(span, max_kept_tokens=3)) == [[11, 12, 19]]
    assert places_of(recompress(span, max_kept_tokens=7)) == [[7, 8, 9, 10, 11, 12, 19]]
    assert places_of(recompress(span, max_kept_tokens=8)) == [[2, 7, 8, 9, 10, 11, 12, 19]]


@pytest.mark.parametrize(
    "word",
    [
        "spread=otherwise",
        "cut=verse",
        "spread=adaptive floor=many",
        "floor=1/0",
        "spread=adaptive floor=3/2",
        f"floor={'1' * 5000}",
        f"unit={'1' * 5000}",
        f"sink={2**70}",
    ],
)
def test_rules_of_a_kind_that_is_not_known_are_not_guessed(word: str):
    rules = f"keep_ratio=1 scorer=window unit=1 scope=head window=1 sink=0 {word}"
    span = span_of_rows([[(0, 1.0), (1, 2.0), (2, 0.0)]], rules, 3)

    assert not is_prunable(span.shape)
    assert recompress(span, max_kept_tokens=1).layers[0].lengths == (3,)


def test_lists_that_heads_share_compete_layer_against_layer():
    scores = torch.zeros(NUM_LAYERS, NUM_HEADS, 12)
    scores[2, :, 3:9] = 5.0
    policy = CompressionPolicy(keep_ratio=1.0, unit="token", window_size=1, sink_tokens=1)
    span = span_of(scores, policy)
    name = policy.canonical() + " spread=adaptive"
    span = CompressedKV(replace(span.shape, policy=name), span.memory)

    found = recompress(span, max_kept_tokens=3)

    kept = [layer.positions.sub(FIRST_TOKEN).tolist() for layer in found.layers]
    assert kept == [[0, 11], [0, 11], [0, 3, 4, 5, 6, 11], [0, 11]]
    assert found.layers[2].lengths == (6, 6)
    assert found.num_kept_tokens == 3
