"""The store's errors, and a circuit breaker that keeps callers from waiting for a dead server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    RedisClusterException,
    RedisError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from services.runtime.errors import UnavailableError
from services.runtime.telemetry import get_logger
from services.store.failures import RETRY_AFTER_S, service_error

# Failures in a row after which the server counts as away.
FAILURES_TO_OPEN: Final = 3

_log = get_logger()


class CircuitBreaker:
    """Runs what talks to the server; while that is away, refuses at once instead of waiting.

    It opens after a few commands in a row found nobody to talk to. Then one command in a second is
    let through to look; the first that succeeds closes it. An error that the server answers is a
    sign of life. Thread-safe.

    Args:
        where: Address of the server, without credentials, for messages.
        retry_s: Seconds between two looks at a server that is away.
    """

    def __init__(self, where: str, *, retry_s: float = RETRY_AFTER_S) -> None:
        self._where = where
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._num_failures = 0
        self._next_look = 0.0  # time.monotonic(), while it is open
        self._last_error: UnavailableError | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server counts as away."""
        return self._num_failures >= FAILURES_TO_OPEN

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the block, its errors of redis-py and of sockets turned into service errors.

        Raises:
            UnavailableError: The server is away; at once if that was known before.
        """
        self._admit()
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as error:
            found = service_error(error, self._where)
            if _is_silence(error) and isinstance(found, UnavailableError):
                self._failed(found)
            else:
                self._succeeded()
            raise found from error
        else:
            self._succeeded()

    def _admit(self) -> None:
        with self._lock:
            if not self.is_open:
                return
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + self._retry_s  # this one looks; the others wait for it
                return
            error = self._last_error
        assert error is not None
        raise UnavailableError(
            error.message, reason=error.error_reason, retry_after_s=error.retry_after_s
        )

    def _failed(self, error: UnavailableError) -> None:
        with self._lock:
            was_open = self.is_open
            self._num_failures += 1
            self._last_error = error
            self._next_look = time.monotonic() + self._retry_s
            opens = self.is_open and not was_open
        if opens:
            _log.warning("store.away", where=self._where, error=error.message)

    def _succeeded(self) -> None:
        with self._lock:
            was_open = self.is_open
            self._num_failures = 0
        if was_open:
            _log.info("store.back", where=self._where)


def _is_silence(error: Exception) -> bool:
    """Whether nobody answered, or not as a server that can serve."""
    return isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)
