from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.decode.pacing import Pace

MAX_TOKENS = 256
MILLISECONDS = st.floats(0.01, 200)


def step(pace: Pace, *, plain_ms: float, token_ms: float, num_streams: int = 3) -> int:
    """Take a step with as many known tokens as may be, on a machine of known speed."""
    known = pace.known_tokens(num_streams=num_streams)
    pace.observe(
        (plain_ms if num_streams else 0) + token_ms * known,
        num_streams=num_streams,
        num_known_tokens=known,
    )
    return known


def learned(*, max_stall_ms: float, plain_ms: float, token_ms: float) -> Pace:
    pace = Pace(max_stall_ms, MAX_TOKENS)
    pace.observe(plain_ms, num_streams=3, num_known_tokens=0)
    step(pace, plain_ms=plain_ms, token_ms=token_ms)
    return pace


@given(max_stall_ms=MILLISECONDS, plain_ms=MILLISECONDS, token_ms=MILLISECONDS)
def test_what_known_tokens_add_to_a_step_stays_under_the_bound(
    max_stall_ms: float, plain_ms: float, token_ms: float
) -> None:
    pace = learned(max_stall_ms=max_stall_ms, plain_ms=plain_ms, token_ms=token_ms)

    for _ in range(20):
        known = step(pace, plain_ms=plain_ms, token_ms=token_ms)

        assert 1 <= known <= MAX_TOKENS
        assert known == 1 or known * token_ms <= max_stall_ms * 1.001
        # Not fewer than may be, either.
        assert known == MAX_TOKENS or (known + 1) * token_ms >= max_stall_ms * 0.999


@given(max_stall_ms=MILLISECONDS, before_ms=MILLISECONDS, after_ms=MILLISECONDS)
def test_a_machine_whose_speed_changes_is_followed(
    max_stall_ms: float, before_ms: float, after_ms: float
) -> None:
    pace = learned(max_stall_ms=max_stall_ms, plain_ms=5, token_ms=before_ms)

    for _ in range(100):
        known = step(pace, plain_ms=5, token_ms=after_ms)

    assert known == 1 or known * after_ms <= max_stall_ms * 1.01
    assert known == MAX_TOKENS or (known + 1) * after_ms >= max_stall_ms * 0.99


def test_one_slow_step_is_forgotten() -> None:
    pace = learned(max_stall_ms=50, plain_ms=5, token_ms=1)
    pace.observe(10_000, num_streams=3, num_known_tokens=16)
    assert pace.known_tokens(num_streams=3) == 1

    for _ in range(60):
        known = step(pace, plain_ms=5, token_ms=1)

    assert known >= 49


@pytest.mark.parametrize("max_stall_ms", [1e-9, 50.0])
def test_where_no_stream_runs_a_step_takes_all_that_it_may(max_stall_ms: float) -> None:
    pace = Pace(max_stall_ms, MAX_TOKENS)
    assert pace.known_tokens(num_streams=0) == MAX_TOKENS

    assert step(pace, plain_ms=5, token_ms=100, num_streams=0) == MAX_TOKENS

    assert pace.known_tokens(num_streams=0) == MAX_TOKENS


def test_a_prompt_that_ran_alone_tells_what_tokens_cost() -> None:
    pace = Pace(50, MAX_TOKENS)

    step(pace, plain_ms=5, token_ms=2, num_streams=0)
    pace.observe(5, num_streams=1, num_known_tokens=0)

    assert pace.known_tokens(num_streams=1) == 25


def test_a_short_prompt_alone_does_not_make_tokens_look_dear() -> None:
    pace = learned(max_stall_ms=50, plain_ms=40, token_ms=2)

    pace.observe(60, num_streams=0, num_known_tokens=10)

    assert pace.known_tokens(num_streams=3) == 25


def test_sequences_that_join_one_after_another_are_not_blamed_for_each_other() -> None:
    pace = learned(max_stall_ms=50, plain_ms=60, token_ms=2)

    for num_streams in range(3, 12):
        for _ in range(2):
            known = step(pace, plain_ms=20 * num_streams, token_ms=2, num_streams=num_streams)

        assert known == 25


@pytest.mark.parametrize("period", [2, 3, 5])
def test_streams_that_come_and_go_leave_every_other_step_to_known_tokens(period: int) -> None:
    pace = learned(max_stall_ms=50, plain_ms=5, token_ms=2)

    taken = [step(pace, plain_ms=5, token_ms=2, num_streams=4 + i % period) for i in range(20)]

    assert set(taken) == {0, 25}
    assert (0, 0) not in itertools.pairwise(taken)


@pytest.mark.parametrize("max_tokens", [1, 8, 16, 256])
def test_an_unknown_machine_is_given_few_tokens(max_tokens: int) -> None:
    assert Pace(50, max_tokens).known_tokens(num_streams=1) == min(16, max_tokens)


def test_tokens_that_seem_to_cost_nothing_are_taken_up_to_the_limit() -> None:
    pace = Pace(50, MAX_TOKENS)
    pace.observe(10, num_streams=1, num_known_tokens=0)

    pace.observe(9, num_streams=1, num_known_tokens=16)

    assert pace.known_tokens(num_streams=1) == MAX_TOKENS
