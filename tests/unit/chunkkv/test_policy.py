"""Policies: their ranges, their exact budgets, their canonical names."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkkv import ChunkKVError, CompressionPolicy, InvalidPolicyError

INFINITY = float("inf")


def test_defaults_are_the_documented_ones():
    policy = CompressionPolicy()

    assert policy.keep_ratio == 0.3
    assert policy.max_kept_tokens is None
    assert (policy.scorer, policy.unit, policy.scope) == ("window", "chunk", "layer")
    assert (policy.chunk_size, policy.window_size, policy.sink_tokens) == (20, 16, 4)
    assert policy.reuse_interval == 2


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, 1.0000001, math.nan, INFINITY, -INFINITY, 1e-9])
def test_ratio_out_of_range_is_refused(ratio: float):
    with pytest.raises(InvalidPolicyError, match=r"keep_ratio is .*; give a fraction"):
        CompressionPolicy(keep_ratio=ratio)


@pytest.mark.parametrize("ratio", ["0.5", [0.5], True])
def test_ratio_that_is_no_number_is_refused(ratio: Any):
    with pytest.raises(InvalidPolicyError, match="keep_ratio"):
        CompressionPolicy(keep_ratio=ratio)


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("max_kept_tokens", 1),
        ("chunk_size", 1),
        ("window_size", 1),
        ("sink_tokens", 0),
        ("reuse_interval", 1),
        ("vote_power", 1),
        ("pool_size", 1),
    ],
)
def test_integers_begin_at_their_least_value(field: str, least: int):
    accepted = CompressionPolicy(**{field: least})

    assert getattr(accepted, field) == least
    for wrong in (least - 1, -5, 2.0, 1.5, math.nan, INFINITY, "3", True):
        with pytest.raises(InvalidPolicyError, match=rf"{field} is .*at least {least}"):
            CompressionPolicy(**{field: wrong})


@pytest.mark.parametrize(
    "field", ["max_kept_tokens", "chunk_size", "window_size", "sink_tokens", "pool_size"]
)
def test_integers_end_where_the_wire_does(field: str):
    assert getattr(CompressionPolicy(**{field: 2**31 - 1}), field) == 2**31 - 1
    for wrong in (2**31 + 1, 2**64 + 1):
        with pytest.raises(InvalidPolicyError, match=rf"{field} is {wrong}; .*at most 2147483647"):
            CompressionPolicy(**{field: wrong})


@pytest.mark.parametrize("field", ["head_floor", "gating"])
@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, INFINITY, "0.5", None, True])
def test_a_fraction_that_is_none_is_refused(field: str, wrong: Any):
    with pytest.raises(InvalidPolicyError, match=f"{field} is .*a number from 0 to 1"):
        CompressionPolicy(**{field: wrong})


@pytest.mark.parametrize("wrong", ["false", 0, 1, None])
def test_merging_layers_is_true_or_false_and_no_word_for_it(wrong: Any):
    with pytest.raises(InvalidPolicyError, match=r"merge_layers is .*give true or false"):
        CompressionPolicy(merge_layers=wrong)


def test_only_the_window_asks_for_more_than_one_query():
    assert CompressionPolicy(scorer="window", window_size=9).num_queries == 9
    assert CompressionPolicy(scorer="heavy_hitter", window_size=9).num_queries == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scorer", "Window"),
        ("scorer", ""),
        ("unit", "word"),
        ("unit", 1),
        ("scope", "model"),
        ("scope", None),
        ("scope", ["layer"]),
    ],
)
def test_unknown_choice_is_refused_with_the_known_ones(field: str, value: Any):
    with pytest.raises(InvalidPolicyError, match=f"{field} is .*give one of"):
        CompressionPolicy(**{field: value})


def test_two_budgets_are_refused():
    with pytest.raises(InvalidPolicyError, match="both set"):
        CompressionPolicy(keep_ratio=0.5, max_kept_tokens=10)


def test_policy_error_is_a_library_error_and_a_value_error():
    with pytest.raises(InvalidPolicyError) as caught:
        CompressionPolicy(keep_ratio=2)

    assert isinstance(caught.value, ChunkKVError)
    assert isinstance(caught.value, ValueError)


def test_policy_cannot_be_changed():
    policy = CompressionPolicy()

    with pytest.raises(AttributeError):
        policy.chunk_size = 3  # type: ignore[misc]


@given(
    numerator=st.integers(1, 100),
    denominator=st.integers(1, 100),
    num_tokens=st.integers(1, 200_000),
    is_32_bit=st.booleans(),
)
def test_budget_is_the_floor_of_the_exact_fraction(
    numerator: int, denominator: int, num_tokens: int, is_32_bit: bool
):
    numerator = min(numerator, denominator)
    ratio = numerator / denominator
    if is_32_bit:
        ratio = float(np.float32(ratio))

    budget = CompressionPolicy(keep_ratio=ratio).budget(num_tokens)

    assert budget == max(1, numerator * num_tokens // denominator)


@pytest.mark.parametrize("percent", [10, 30, 70, 80, 90])
def test_ratio_from_a_32_bit_float_means_its_decimal(percent: int):
    ratio = float(np.float32(percent / 100))
    assert ratio != percent / 100, "only of interest where the 32-bit float differs"

    budgets = [CompressionPolicy(keep_ratio=ratio).budget(n) for n in range(1, 2000)]

    assert budgets == [max(1, percent * n // 100) for n in range(1, 2000)]


def test_least_ratio_may_come_from_a_32_bit_float():
    ratio = float(np.float32(0.0001))

    assert CompressionPolicy(keep_ratio=ratio).budget(20_000) == 2


def test_budget_of_a_ratio_is_at_least_one_token():
    assert CompressionPolicy(keep_ratio=0.1).budget(3) == 1


def test_whole_ratio_keeps_every_token():
    assert [CompressionPolicy(keep_ratio=1).budget(n) for n in (1, 7, 8192)] == [1, 7, 8192]


def test_budget_in_tokens_ends_at_the_prompt():
    policy = CompressionPolicy(max_kept_tokens=100)

    assert [policy.budget(n) for n in (1, 99, 100, 101, 8192)] == [1, 99, 100, 100, 100]


def test_tokens_are_ranked_alone_whatever_the_chunk_size():
    assert CompressionPolicy(unit="chunk", chunk_size=7).ranked_tokens == 7
    assert CompressionPolicy(unit="token", chunk_size=7).ranked_tokens == 1


EQUAL_CHOICES = [
    ({"keep_ratio": 0.3}, {}),
    ({"keep_ratio": float(np.float32(0.3))}, {"keep_ratio": 0.3}),
    ({"unit": "token", "chunk_size": 20}, {"unit": "token", "chunk_size": 5}),
    ({"unit": "token"}, {"unit": "chunk", "chunk_size": 1}),
    ({"scope": "layer", "reuse_interval": 2}, {"scope": "layer", "reuse_interval": 5}),
    ({"scope": "group", "reuse_interval": 1}, {"scope": "layer"}),
    ({"unit": "sentence", "chunk_size": 1}, {"unit": "token"}),
    ({"gating": 1e-9}, {}),
    ({"gating": float(np.float32(0.1))}, {"gating": 0.1}),
    ({"spread": "adaptive", "head_floor": 1e-9}, {"spread": "adaptive"}),
    (
        {"spread": "adaptive", "head_floor": float(np.float32(0.2))},
        {"spread": "adaptive", "head_floor": 0.2},
    ),
    ({"scorer": "recency", "vote_power": 2, "pool_size": 3}, {"scorer": "recency"}),
    ({"head_floor": 0.5}, {}),
]


@pytest.mark.parametrize(("one", "other"), EQUAL_CHOICES)
def test_equal_choices_have_one_canonical_name(one: dict[str, Any], other: dict[str, Any]):
    assert CompressionPolicy(**one).canonical() == CompressionPolicy(**other).canonical()


def test_precision_is_named_only_if_it_is_not_native():
    native, small = CompressionPolicy(), CompressionPolicy(precision="int8")

    assert native.canonical() == CompressionPolicy(precision="native").canonical()
    assert small.canonical() == f"{native.canonical()} precision=int8"


def test_different_choices_have_different_canonical_names():
    choices: list[dict[str, Any]] = [
        {},
        {"keep_ratio": 0.31},
        {"keep_ratio": 1.0},
        {"max_kept_tokens": 1},
        {"max_kept_tokens": 30},
        {"scorer": "reconstruction"},
        {"scorer": "key_diff"},
        {"unit": "token"},
        {"chunk_size": 10},
        {"scope": "head"},
        {"scope": "global"},
        {"scope": "group"},
        {"scope": "group", "reuse_interval": 3},
        {"window_size": 8},
        {"sink_tokens": 0},
    ]

    names = {CompressionPolicy(**choice).canonical() for choice in choices}

    assert len(names) == len(choices)


@given(one=st.fractions(0, 1, max_denominator=1000), other=st.fractions(0, 1, max_denominator=1000))
def test_ratios_have_one_name_exactly_if_they_are_equal(one: Fraction, other: Fraction):
    one, other = one or Fraction(1), other or Fraction(1)

    names = {CompressionPolicy(keep_ratio=float(ratio)).canonical() for ratio in (one, other)}

    assert (len(names) == 1) == (one == other)
