"""Which spans of a prompt become segments."""

from __future__ import annotations

import pytest

import chunkkv
from services.prefill.plan import plan_spans


def policy(num_tokens: int) -> chunkkv.CompressionPolicy:
    return chunkkv.CompressionPolicy(keep_ratio=0.5, window_size=num_tokens)


def prefix_policy(num_tokens: int) -> chunkkv.CompressionPolicy:
    return chunkkv.CompressionPolicy(keep_ratio=0.25, window_size=num_tokens)


@pytest.mark.parametrize(
    ("start", "end", "prefix_ends", "expected"),
    [
        (0, 99, [], [(0, 99, False)]),
        (0, 9, [], []),
        (0, 10, [], [(0, 10, False)]),
        (0, 99, [40], [(0, 40, True), (40, 99, False)]),
        (0, 99, [40, 60], [(0, 40, True), (40, 60, True), (60, 99, False)]),
        (0, 99, [5], [(0, 99, False)]),
        (0, 99, [40, 45], [(0, 40, True), (40, 99, False)]),
        (0, 99, [5, 40], [(0, 40, True), (40, 99, False)]),
        (0, 99, [90], [(0, 90, True)]),
        (0, 99, [100], [(0, 99, True)]),
        (0, 99, [40, 40], [(0, 40, True), (40, 99, False)]),
        (30, 99, [60], [(30, 60, True), (60, 99, False)]),
        (30, 99, [20, 35], [(30, 99, False)]),
    ],
    ids=[
        "one",
        "short",
        "just_long_enough",
        "prefix",
        "two_prefixes",
        "short_prefix_is_merged_into_the_rest",
        "short_second_prefix",
        "short_prefix_is_merged_into_the_next",
        "short_rest_stays_pending",
        "prefix_behind_the_end",
        "same_prefix_twice",
        "behind_earlier_segments",
        "prefix_within_earlier_segments",
    ],
)
def test_spans(start, end, prefix_ends, expected):
    spans = plan_spans(
        start, end, prefix_ends, policy=policy, prefix_policy=prefix_policy, min_tokens=10
    )

    assert [(span.start, span.end, span.is_prefix) for span in spans] == expected
    for span in spans:
        assert span.policy == (prefix_policy if span.is_prefix else policy)(span.num_tokens)
    assert sum(span.num_tokens for span in spans) == (spans[-1].end - start if spans else 0)
