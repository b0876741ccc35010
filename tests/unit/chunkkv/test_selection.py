"""Selection against a slow reference, on integers, so that sums are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_selection import slow_positions, slow_select

from chunkkv import CompressionPolicy, InvalidInputError, Selection, select, select_positions
from chunkkv.selection import scored_layers

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
        lists = selection.lists[which].tolist()
        kept.append(lists if len(lists) == num_kv_heads else lists * num_kv_heads)
    return kept


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

    positions = select_positions(scores, budget, **sizes)

    assert positions.tolist() == [slow_positions(row, budget, **sizes) for row in scores.tolist()]
    assert positions.shape == (rows, min(budget, num_tokens))
    assert (positions.diff(dim=-1) > 0).all(), "ascending, each once"


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
    assert {kept.shape[-1] for kept in selection.lists} == {policy.budget(num_tokens)}


def test_rows_are_chosen_one_by_one():
    scores = torch.zeros(2, 3, 50)
    scores[0, 0, 10:15] = 1
    scores[1, 2, 30:35] = 1

    positions = select_positions(scores, 6, unit_tokens=5, window_size=1, sink_tokens=0)

    assert positions.shape == (2, 3, 6)
    assert positions[0, 0].tolist() == [10, 11, 12, 13, 14, 49]
    assert positions[1, 2].tolist() == [30, 31, 32, 33, 34, 49]
    assert positions[0, 1].tolist() == [0, 1, 2, 3, 4, 49]


def test_equal_chunks_go_to_the_earlier():
    scores = torch.tensor([[0.0, 0, 1, 1, 2, 0, 1, 1, 0, 0, 0, 0]])

    positions = select_positions(scores, 6, unit_tokens=2, window_size=2, sink_tokens=0)

    assert positions.tolist() == [[2, 3, 4, 5, 10, 11]]


def test_equal_tokens_of_the_chunk_that_is_cut_go_to_the_earlier():
    scores = torch.ones(1, 10)

    positions = select_positions(scores, 4, unit_tokens=5, window_size=1, sink_tokens=0)

    assert positions.tolist() == [[0, 1, 2, 9]]


def test_chunk_that_is_cut_gives_its_best_tokens():
    scores = torch.tensor([[0.0, 3, 1, 2, 0, 0, 0, 0, 0]])

    positions = select_positions(scores, 3, unit_tokens=4, window_size=1, sink_tokens=0)

    assert positions.tolist() == [[1, 3, 8]]


def test_a_chunk_counts_with_its_sum_not_with_its_best_token():
    scores = torch.tensor([[9.0, 0, 0, 4, 4, 4, 0, 0]])

    positions = select_positions(scores, 4, unit_tokens=3, window_size=1, sink_tokens=0)

    assert positions.tolist() == [[3, 4, 5, 7]]


def test_chunk_that_overlaps_the_window_is_not_kept_twice():
    scores = torch.arange(10.0)[None]

    positions = select_positions(scores, 5, unit_tokens=4, window_size=4, sink_tokens=0)

    assert positions.tolist() == [[5, 6, 7, 8, 9]]


def test_budget_smaller_than_the_window_keeps_its_end():
    scores = torch.ones(1, 40)

    positions = select_positions(scores, 3, unit_tokens=10, window_size=16, sink_tokens=4)

    assert positions.tolist() == [[37, 38, 39]]


def test_what_the_window_leaves_goes_to_the_sink_first():
    scores = torch.ones(1, 40)

    positions = select_positions(scores, 6, unit_tokens=10, window_size=4, sink_tokens=4)

    assert positions.tolist() == [[0, 1, 36, 37, 38, 39]]


def test_chunk_larger_than_memory_is_one_chunk():
    scores = torch.tensor([[1.0, 3, 2, 0, 0]])

    positions = select_positions(scores, 3, unit_tokens=2**31, window_size=1, sink_tokens=0)

    assert positions.tolist() == [[1, 2, 4]]


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
