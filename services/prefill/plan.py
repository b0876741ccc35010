"""Which spans of a prompt become segments, and under which policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import chunkkv


@dataclass(frozen=True, slots=True)
class PlannedSpan:
    """A span of the conversation.

    Attributes:
        start: Position of its first token.
        end: Position behind its last one.
        policy: What to keep of it.
        is_prefix: It ends with a ``cache_breakpoint``.
    """

    start: int
    end: int
    policy: chunkkv.CompressionPolicy
    is_prefix: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the span."""
        return self.end - self.start


def plan_spans(
    start: int,
    end: int,
    prefix_ends: Sequence[int],
    *,
    policy: Callable[[int], chunkkv.CompressionPolicy],
    prefix_policy: Callable[[int], chunkkv.CompressionPolicy],
    min_tokens: int,
) -> list[PlannedSpan]:
    """Return the spans to make segments of, in order; what is behind the last one stays pending.

    Args:
        start: Position of the first token that is in no segment.
        end: Position behind the last token that may be.
        prefix_ends: Positions behind the prefixes that are marked.
        policy: Of what follows the last prefix, by its number of tokens.
        prefix_policy: Of a prefix, by its number of tokens.
        min_tokens: A prefix of fewer tokens is merged into what follows it; a last span of fewer
            stays pending.
    """
    spans = []
    ends = [(min(prefix_end, end), True) for prefix_end in prefix_ends]
    for span_end, is_prefix in [*ends, (end, False)]:
        if span_end - start >= min_tokens:
            chosen = prefix_policy if is_prefix else policy
            spans.append(PlannedSpan(start, span_end, chosen(span_end - start), is_prefix))
            start = span_end
    return spans
