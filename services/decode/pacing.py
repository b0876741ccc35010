"""How many known tokens a step may take beside the running streams."""

from __future__ import annotations

from typing import Final

# Weight of the newest step: half of an estimate is younger than about four steps.
_NEWEST: Final = 0.2

# Taken while nothing is known of the machine.
_FIRST_TOKENS: Final = 16


class Pace:
    """Learns what steps cost, so that known tokens delay running streams by a bounded time.

    What the streams of a step cost is known from a step without known tokens. When their number
    has changed, such a step comes first: what a new stream costs would else be blamed on the
    known tokens beside it, and sequences that join one after another would get fewer and fewer.

    Args:
        max_stall_ms: Milliseconds by which a step with known tokens may last longer than one
            without, above 0.
        max_tokens: Known tokens in one step at most, at least 1.
    """

    def __init__(self, max_stall_ms: float, max_tokens: int) -> None:
        self._max_stall_ms = max_stall_ms
        self._max_tokens = max_tokens
        self._plain_ms: float | None = None
        self._plain_streams = 0
        self._token_ms: float | None = None
        self._is_plain_next = False

    def known_tokens(self, *, num_streams: int) -> int:
        """Return how many known tokens the next step may take.

        Args:
            num_streams: Sequences that get their next token in it.

        Returns:
            At least 1; or 0, but never for two steps in a row, to see what the streams cost alone.
        """
        if num_streams == 0:
            return self._max_tokens
        if self._is_plain_next and num_streams != self._plain_streams:
            return 0
        if self._token_ms is None:
            return min(_FIRST_TOKENS, self._max_tokens)
        affordable = int(self._max_stall_ms / max(self._token_ms, 1e-6))
        return max(1, min(affordable, self._max_tokens))

    def observe(self, step_ms: float, *, num_streams: int, num_known_tokens: int) -> None:
        """Take in what a step cost.

        Args:
            step_ms: Milliseconds that it lasted.
            num_streams: Sequences that got their next token in it.
            num_known_tokens: Known tokens in it.
        """
        # Streams that pause now and then change in number with every step.
        self._is_plain_next = num_known_tokens > 0
        if num_known_tokens == 0:
            before = self._plain_ms if num_streams == self._plain_streams else None
            self._plain_ms = _average(before, step_ms)
            self._plain_streams = num_streams
            return
        if num_streams == 0 and num_known_tokens < self._max_tokens:
            return  # mostly what any step costs
        shared_ms = (self._plain_ms or 0.0) if num_streams else 0.0
        added_ms = max(step_ms - shared_ms, 0.0) / num_known_tokens
        self._token_ms = _average(self._token_ms, added_ms)


def _average(average: float | None, newest: float) -> float:
    return newest if average is None else average + _NEWEST * (newest - average)
