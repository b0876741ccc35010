"""The circuit breaker: who is refused when, and what closes it."""

from __future__ import annotations

import pytest
from redis import exceptions

from services.runtime.errors import OverloadedError, UnavailableError
from services.store.breaker import FAILURES_TO_OPEN, CircuitBreaker


def fail(breaker: CircuitBreaker, error: Exception) -> bool:
    """Return whether the server was asked; it fails with this error."""
    asked: list[str] = []

    def ask() -> None:
        with breaker.guard():
            asked.append("once")
            raise error

    with pytest.raises((UnavailableError, OverloadedError)):
        ask()
    return bool(asked)


def opened() -> CircuitBreaker:
    """Return an open one that lets the next one look."""
    breaker = CircuitBreaker("example:7000", retry_s=0)
    for _ in range(FAILURES_TO_OPEN):
        assert fail(breaker, exceptions.ConnectionError("refused"))
    return breaker


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("refused"),
        exceptions.TimeoutError("slow"),
        OSError("reset"),
        exceptions.AuthenticationError("no"),
    ],
)
def test_failures_in_a_row_open_it(error: Exception):
    breaker = CircuitBreaker("example:7000", retry_s=60)
    for _ in range(FAILURES_TO_OPEN):
        assert not breaker.is_open
        assert fail(breaker, error)

    assert breaker.is_open
    with pytest.raises(UnavailableError) as caught, breaker.guard():
        ...
    assert "example:7000" in caught.value.message
    assert caught.value.error_reason == "STORE_UNAVAILABLE"
    assert caught.value.retry_after_s is not None


def test_a_success_in_between_keeps_it_closed():
    breaker = CircuitBreaker("example:7000", retry_s=60)
    for _ in range(3 * FAILURES_TO_OPEN):
        assert fail(breaker, exceptions.ConnectionError("refused"))
        with breaker.guard():
            pass

    assert not breaker.is_open


def test_an_answer_that_is_an_error_is_a_sign_of_life():
    breaker = CircuitBreaker("example:7000", retry_s=60)
    for _ in range(3 * FAILURES_TO_OPEN):
        assert fail(breaker, exceptions.OutOfMemoryError("full"))

    assert not breaker.is_open


def test_one_looks_and_its_success_closes_it():
    breaker = opened()

    with breaker.guard():
        assert breaker.is_open

    assert not breaker.is_open


def test_a_look_that_fails_keeps_it_open():
    breaker = opened()

    assert fail(breaker, exceptions.ConnectionError("refused"))

    assert breaker.is_open


def test_others_are_refused_while_one_looks():
    breaker = opened()
    breaker._retry_s = 60  # the look lasts

    with breaker.guard():
        assert not fail(breaker, exceptions.ConnectionError("refused"))


def test_what_is_not_the_servers_fault_passes_and_says_nothing():
    breaker = CircuitBreaker("example:7000")
    for _ in range(2 * FAILURES_TO_OPEN):
        with pytest.raises(ZeroDivisionError), breaker.guard():
            _ = 1 / 0

    assert not breaker.is_open
