"""Selection against a slow reference, on integers, so that sums are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_selection import slow_rows, slow_select

from chunkkv import CompressionPolicy, InvalidInputError, Selection, select, select_positions
from chunkkv.selection import scored_layers
from chunkkv.units import chunks, sentences

exact = settings(deadline=None, max_examples=300)

SCOPES = ("head", "layer", "group", "global")


def integer_scores(*shape: int, seed: int, spread: int) -> torch.Tensor:
    """Return whole numbers in ``[-spread, spread]``: few different ones, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-spread, spread + 1, shape, generator=generator).float()


def lists_by_head(selection: Selection, num_kv_heads: int) -> list[list[list[int]]]:
    """Return what each KV head of each layer keeps."""
    kept = []
    for which in selection.list_of_layer:
        lists = [row.tolist() for row in selection.lists[which]]
        kept.append(lists if len(lists) == num_kv_heads else lists * num_kv_heads)
    return kept


def chosen(
    scores: torch.Tensor, budget: int | list[int], *, unit_tokens: int, **sizes: Any
) -> list[list[int]]:
    """Return what ``select_positions`` keeps of rows cut into chunks."""
    budgets = budget if isinstance(budget, list) else [budget] * len(scores)
    units = chunks(scores.shape[-1], unit_tokens, scores.device)
    return [row.tolist() for row in select_positions(scores, budgets, units, **sizes)]


@exact
@given(
    rows=st.integers(1, 4),
    num_tokens=st.integers(1, 70),
    budget=st.integers(1, 80),
    unit_tokens=st.integers(1, 90),
    window_size=st.integers(1, 80),
    sink_tokens=st.integers(0, 80),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0, 1, 3, 1000]),
)
def test_positions_equal_the_slow_reference(
    rows: int,
    num_tokens: int,
    budget: int,
    unit_tokens: int,
    window_size: int,
    sink_tokens: int,
    seed: int,
    spread: int,
):
    scores = integer_scores(rows, num_tokens, seed=seed, spread=spread)
    sizes = {
        "unit_tokens": unit_tokens,
        "window_size": window_size,
        "sink_tokens": sink_tokens,
    }

    positions = chosen(scores, budget, **sizes)

    assert positions == slow_rows(scores.tolist(), [budget] * rows, **sizes)
    assert {len(row) for row in positions} == {min(budget, num_tokens)}


@exact
@given(
    rows=st.integers(1, 5),
    num_tokens=st.integers(1, 70),
    data=st.data(),
    unit_tokens=st.integers(1, 30),
    window_size=st.integers(1, 30),
    sink_tokens=st.integers(0, 10),
    is_shared=st.booleans(),
    floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    gating=st.sampled_from([0.0, 0.5, 0.9]),
    cuts_sentences=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_budgets_that_differ_and_compete_equal_the_slow_reference(
    rows: int,
    num_tokens: int,
    data: st.DataObject,
    unit_tokens: int,
    cuts_sentences: bool,
    seed: int,
    **sizes: Any,
):
    # Powers of two: their sums are exact, and so are shares of few of them.
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 ** torch.randint(0, 6, (rows, num_tokens), generator=generator)
    budgets = data.draw(st.lists(st.integers(1, 80), min_size=rows, max_size=rows))
    ends = torch.rand(num_tokens, generator=generator) < 0.2
    units = (
        sentences(ends, unit_tokens)
        if cuts_sentences
        else chunks(num_tokens, unit_tokens, scores.device)
    )

    kept = select_positions(scores, budgets, units, **sizes)

    assert [row.tolist() for row in kept] == slow_rows(
        scores.tolist(),
        budgets,
        unit_tokens=unit_tokens,
        ends=ends.tolist() if cuts_sentences else None,
        **sizes,
    )
    assert sum(map(len, kept)) == sum(min(budget, num_tokens) for budget in budgets)


@exact
@given(
    num_layers=st.integers(1, 9),
    num_kv_heads=st.sampled_from([1, 2, 3, 8]),
    num_tokens=st.integers(1, 60),
    scope=st.sampled_from(SCOPES),
    reuse_interval=st.sampled_from([1, 2, 3, 7]),
    unit=st.sampled_from(["chunk", "token"]),
    chunk_size=st.integers(1, 70),
    window_size=st.integers(1, 70),
    sink_tokens=st.integers(0, 8),
    budget=st.one_of(
        st.builds(lambda n: {"max_kept_tokens": n}, st.integers(1, 70)),
        st.builds(lambda n: {"keep_ratio": n / 20}, st.integers(1, 20)),
    ),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0, 2, 1000]),
)
def test_selection_equals_the_slow_reference_in_every_scope(
    num_layers: int,
    num_kv_heads: int,
    num_tokens: int,
    budget: dict[str, Any],
    seed: int,
    spread: int,
    **choices: Any,
):
    policy = CompressionPolicy(**budget, **choices)
    scores = integer_scores(num_layers, num_kv_heads, num_tokens, seed=seed, spread=spread)
    seen = scores[list(scored_layers(policy, num_layers))]

    selection = select(seen, policy, num_layers=num_layers)

    assert lists_by_head(selection, num_kv_heads) == slow_select(scores.tolist(), policy)
    kept = {len(row) for rows in selection.lists for row in rows}
    assert kept == {policy.budget(num_tokens)}


@exact
@given(
    num_layers=st.integers(1, 9),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    num_tokens=st.integers(1, 60),
    scope=st.sampled_from(["head", "layer"]),
    spread=st.sampled_from(["pyramid", "adaptive"]),
    unit=st.sampled_from(["chunk", "token", "sentence"]),
    chunk_size=st.integers(1, 20),
    window_size=st.integers(1, 20),
    sink_tokens=st.integers(0, 8),
    head_floor=st.sampled_from([0.0, 0.3]),
    keep_ratio=st.integers(1, 20).map(lambda n: n / 20),
    seed=st.integers(0, 10_000),
)
def test_spreads_equal_the_slow_reference_and_keep_the_exact_total(
    num_layers: int, num_kv_heads: int, num_tokens: int, seed: int, **choices: Any
):
    policy = CompressionPolicy(**choices)
    scores = integer_scores(num_layers, num_kv_heads, num_tokens, seed=seed, spread=1000).abs()
    ends = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.2

    selection = select(scores, policy, num_layers=num_layers, sentence_ends=ends)

    kept = lists_by_head(selection, num_kv_heads)
    assert kept == slow_select(scores.tolist(), policy, ends.tolist())
    total = sum(len(row) for layer in kept for row in layer)
    assert total == policy.budget(num_tokens) * num_layers * num_kv_heads


def test_a_pyramid_keeps_less_in_each_deeper_layer():
    policy = CompressionPolicy(keep_ratio=0.3, spread="pyramid", window_size=10, sink_tokens=0)

    selection = select(torch.rand(5, 2, 400), policy, num_layers=5)

    lengths = [len(rows[0]) for rows in selection.lists]
    assert lengths == [224, 172, 120, 68, 16]  # 10 of the window, and 110 on average


def test_a_pyramid_that_the_text_is_too_short_for_is_flatter():
    policy = CompressionPolicy(keep_ratio=0.8, spread="pyramid", window_size=10, sink_tokens=0)

    selection = select(torch.rand(3, 2, 100), policy, num_layers=3)

    assert [len(rows[0]) for rows in selection.lists] == [100, 80, 60]


def test_heads_that_score_higher_get_more_of_an_adaptive_budget():
    policy = CompressionPolicy(
        max_kept_tokens=20,
        spread="adaptive",
        scope="head",
        window_size=1,
        sink_tokens=0,
        chunk_size=5,
    )
    scores = torch.rand(2, 2, 100)
    scores[1, 0] += 10

    selection = select(scores, policy, num_layers=2)

    assert [len(row) for rows in selection.lists for row in rows] == [1, 1, 77, 1]


def test_a_floor_gives_every_head_its_own_best_units_first():
    policy = CompressionPolicy(
        max_kept_tokens=21,
        spread="adaptive",
        scope="head",
        window_size=1,
        sink_tokens=0,
        chunk_size=5,
        head_floor=0.5,
    )
    scores = torch.zeros(1, 2, 100)
    scores[0, 0] = 10
    scores[0, 1, 50:60] = 1

    selection = select(scores, policy, num_layers=1)

    assert selection.lists[0][1].tolist() == [*range(50, 60), 99]
    assert len(selection.lists[0][0]) == 31


def test_a_floor_is_exact_in_tokens():
    # A row's own best units are the first ones; the other row's tokens are better than all.
    scores = torch.stack([torch.full((200,), 9.0), 1 / torch.arange(1.0, 201.0)])
    for tenths in range(1, 10):
        for budget in range(2, 102):
            room = budget - 1
            floor = float(torch.tensor(tenths / 10))  # as it comes over the wire

            kept = select_positions(
                scores,
                [budget, budget],
                chunks(200, 1, scores.device),
                window_size=1,
                sink_tokens=0,
                is_shared=True,
                floor=floor,
            )

            assert len(kept[1]) == 1 + room * tenths // 10


def test_equal_names_choose_equal_tokens():
    scores = torch.rand(2, 2, 97, generator=torch.Generator().manual_seed(1))
    for gating in (1e-9, 0.00001, 0.00004):
        policy = CompressionPolicy(gating=gating, chunk_size=5, window_size=1)
        plain = CompressionPolicy(chunk_size=5, window_size=1)

        found, expected = (select(scores, p, num_layers=2).lists for p in (policy, plain))

        assert policy.canonical() == plain.canonical()
        assert all(
            torch.equal(a, b) for a, b in zip(sum(found, ()), sum(expected, ()), strict=True)
        )


def test_gating_spends_what_a_concentrated_chunk_does_not_need():
    scores = torch.zeros(1, 21)
    scores[0, 2] = 9  # the first chunk is one token
    scores[0, 5:10] = 1.6
    scores[0, 10:15] = 1

    assert chosen(scores, 7, unit_tokens=5, window_size=1, sink_tokens=0, gating=0.5) == [
        [2, 5, 6, 7, 8, 9, 20]
    ]
    assert chosen(scores, 7, unit_tokens=5, window_size=1, sink_tokens=0) == [
        [0, 1, 2, 3, 4, 5, 20]
    ]


def test_sentences_are_kept_whole_and_ranked_by_their_average_token():
    ends = torch.tensor([False, True, False, False, False, True, False, False, False])
    scores = torch.tensor([[5.0, 5, 3, 3, 3, 3, 0, 0, 0]])

    kept = select_positions(scores, [3], sentences(ends, 10), window_size=1, sink_tokens=0)

    assert kept[0].tolist() == [0, 1, 8]


def test_a_sentence_longer_than_a_chunk_makes_several():
    ends = torch.tensor([False, False, False, False, False, True, False])

    units = sentences(ends, 4)

    assert units.num_units == 3
    assert units.slots.tolist() == [0, 1, 2, 3, 4, 5, 8]


def test_short_sentences_take_no_room_for_a_long_chunk():
    ends = torch.arange(1000) % 4 == 3

    units = sentences(ends, 2**31 - 1)

    assert (units.num_units, units.unit_tokens) == (250, 4)


def test_sentences_without_their_ends_are_refused():
    with pytest.raises(InvalidInputError, match="sentence_ends"):
        select(torch.rand(2, 2, 30), CompressionPolicy(unit="sentence"), num_layers=2)


def test_rows_are_chosen_one_by_one():
    scores = torch.zeros(3, 50)
    scores[0, 10:15] = 1
    scores[2, 30:35] = 1

    positions = chosen(scores, 6, unit_tokens=5, window_size=1, sink_tokens=0)

    assert positions == [
        [10, 11, 12, 13, 14, 49],
        [0, 1, 2, 3, 4, 49],
        [30, 31, 32, 33, 34, 49],
    ]


def test_equal_chunks_go_to_the_earlier():
    scores = torch.tensor([[0.0, 0, 1, 1, 2, 0, 1, 1, 0, 0, 0, 0]])

    positions = chosen(scores, 6, unit_tokens=2, window_size=2, sink_tokens=0)

    assert positions == [[2, 3, 4, 5, 10, 11]]


def test_equal_tokens_of_the_chunk_that_is_cut_go_to_the_earlier():
    scores = torch.ones(1, 10)

    positions = chosen(scores, 4, unit_tokens=5, window_size=1, sink_tokens=0)

    assert positions == [[0, 1, 2, 9]]


def test_chunk_that_is_cut_gives_its_best_tokens():
    scores = torch.tensor([[0.0, 3, 1, 2, 0, 0, 0, 0, 0]])

    positions = chosen(scores, 3, unit_tokens=4, window_size=1, sink_tokens=0)

    assert positions == [[1, 3, 8]]


def test_a_chunk_counts_with_its_sum_not_with_its_best_token():
    scores = torch.tensor([[9.0, 0, 0, 4, 4, 4, 0, 0]])

    positions = chosen(scores, 4, unit_tokens=3, window_size=1, sink_tokens=0)

    assert positions == [[3, 4, 5, 7]]


def test_chunk_that_overlaps_the_window_is_not_kept_twice():
    scores = torch.arange(10.0)[None]

    positions = chosen(scores, 5, unit_tokens=4, window_size=4, sink_tokens=0)

    assert positions == [[5, 6, 7, 8, 9]]


def test_budget_smaller_than_the_window_keeps_its_end():
    scores = torch.ones(1, 40)

    positions = chosen(scores, 3, unit_tokens=10, window_size=16, sink_tokens=4)

    assert positions == [[37, 38, 39]]


def test_what_the_window_leaves_goes_to_the_sink_first():
    scores = torch.ones(1, 40)

    positions = chosen(scores, 6, unit_tokens=10, window_size=4, sink_tokens=4)

    assert positions == [[0, 1, 36, 37, 38, 39]]


def test_chunk_larger_than_memory_is_one_chunk():
    scores = torch.tensor([[1.0, 3, 2, 0, 0]])

    positions = chosen(scores, 3, unit_tokens=2**31, window_size=1, sink_tokens=0)

    assert positions == [[1, 2, 4]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(scope: Any, wrong: float):
    scores = torch.zeros(4, 2, 30)
    scores[2, 1, 7] = wrong

    with pytest.raises(InvalidInputError, match="not finite"):
        select(scores, CompressionPolicy(scope=scope, reuse_interval=1), num_layers=4)


def test_scores_of_another_number_of_layers_are_refused():
    policy = CompressionPolicy(scope="group", reuse_interval=3)

    with pytest.raises(InvalidInputError, match="scores of 4 layers; this policy reads 2"):
        select(torch.zeros(4, 2, 30), policy, num_layers=4)


def test_group_reads_the_first_layer_of_each_and_the_last_group_may_be_short():
    policy = CompressionPolicy(scope="group", reuse_interval=3, keep_ratio=0.5)

    selection = select(torch.rand(3, 2, 30), policy, num_layers=8)

    assert list(scored_layers(policy, 8)) == [0, 3, 6]
    assert selection.list_of_layer == (0, 0, 0, 1, 1, 1, 2, 2)
    assert len(selection.lists) == 3


def test_group_larger_than_the_model_is_its_first_layer():
    policy = CompressionPolicy(scope="group", reuse_interval=7, keep_ratio=0.5)

    selection = select(torch.rand(1, 2, 30), policy, num_layers=4)

    assert selection.list_of_layer == (0, 0, 0, 0)


def test_global_reads_every_layer_and_makes_one_list():
    policy = CompressionPolicy(scope="global", keep_ratio=0.5)

    selection = select(torch.rand(5, 2, 30), policy, num_layers=5)

    assert list(scored_layers(policy, 5)) == [0, 1, 2, 3, 4]
    assert selection.list_of_layer == (0,) * 5
    assert len(selection.lists) == 1
