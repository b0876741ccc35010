"""Many sessions over one long prefix: computed once, stored once."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import redis

from chunkserve_client import Message, SessionInfo
from services.store import keys
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

QUESTION_TOKENS = 20
ANSWER_TOKENS = 8

# A segment's header key holds a few bytes more than the header.
MOST_STORED = 1.001


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store's own keys say.

    Attributes:
        prefix_bytes: Bytes of the keys of the prefixes.
        prefix_copies: Copies of their parts.
        all_bytes: Bytes of the keys of all segments.
    """

    prefix_bytes: int
    prefix_copies: int
    all_bytes: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What the prefill worker's metrics say."""

    tokens: float
    shared_tokens: float
    computed: float
    found: float

    @classmethod
    def so_far(cls, stack: ServiceStack) -> Prefilled:
        """Read them."""
        segments = "chunkserve_prefill_segments_total"
        return cls(
            tokens=stack.metric("prefill", "chunkserve_prefill_tokens_total"),
            shared_tokens=stack.metric("prefill", "chunkserve_prefill_shared_tokens_total"),
            computed=stack.metric("prefill", segments, source="computed"),
            found=stack.metric("prefill", segments, source="found"),
        )

    def since(self, before: Prefilled) -> Prefilled:
        """Return what was added."""
        return Prefilled(
            self.tokens - before.tokens,
            self.shared_tokens - before.shared_tokens,
            self.computed - before.computed,
            self.found - before.found,
        )


def measure_prefix(
    model: str, documents: Documents, *, num_tokens: int, num_sessions: int
) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
        num_tokens: Tokens of the prefix, about.
        num_sessions: Sessions that begin with it.
    """
    with ServiceStack(model) as stack, stack.worker(kv_bytes=2 << 30):
        before = Prefilled.so_far(stack)
        infos, answers = asyncio.run(_sessions(stack, documents, num_tokens, num_sessions))
        prefilled = Prefilled.so_far(stack).since(before)
        prefixes = {s.segment_id: s for info in infos for s in info.segments if s.is_prefix}
        with redis.Redis.from_url(stack.store_url) as client:
            stored = _stored(client, prefixes)
    prefix_tokens = min(segment.num_tokens for segment in prefixes.values())
    prefix_bytes = min(segment.size_bytes for segment in prefixes.values())
    return [
        Figure("prefix: tokens", prefix_tokens),
        Figure("prefix: bytes that its segment names", prefix_bytes, "B"),
        *_stored_figures(stored, prefix_bytes, infos, len(prefixes)),
        *_prefilled_figures(prefilled, prefix_tokens),
        *_first_token_figures(answers),
    ]


async def _sessions(
    stack: ServiceStack, documents: Documents, num_tokens: int, num_sessions: int
) -> tuple[list[SessionInfo], list[Heard]]:
    """Ask each session its question; return what they are, and the answers."""
    infos, answers = [], []
    prefix = Message("system", documents.text(num_tokens), cache_breakpoint=True)
    async with stack.client() as client:
        for number in range(num_sessions):
            tell(f"session {number + 1} of {num_sessions}")
            session = await client.create_session()
            messages = [prefix, Message("user", documents.text(QUESTION_TOKENS))]
            answers.append(await listen(session, messages=messages, max_tokens=ANSWER_TOKENS))
            infos.append(await session.refresh())
    tell("\n")
    return infos, answers


def _stored(client: redis.Redis, prefixes: Collection[str]) -> Stored:
    """Count keys and bytes in the store."""
    names = [name.decode() for name in client.scan_iter()]
    headers = [name for name in names if name.endswith(":header")]
    parts = [name for name in names if name.rpartition(":")[2].isdigit()]
    own_headers = {keys.segment_header(segment_id) for segment_id in prefixes}
    own_tags = tuple(header.removesuffix("header") for header in own_headers)
    own_parts = [part for part in parts if part.startswith(own_tags)]
    return Stored(
        prefix_bytes=_bytes(client, [*own_headers, *own_parts]),
        prefix_copies=len({part.rpartition(":")[0] for part in own_parts}),
        all_bytes=_bytes(client, [*headers, *parts]),
    )


def _bytes(client: redis.Redis, names: Iterable[str]) -> int:
    return sum(int(client.strlen(name)) for name in names)


def _stored_figures(
    stored: Stored, prefix_bytes: int, infos: Sequence[SessionInfo], num_prefixes: int
) -> list[Figure]:
    told = sum(info.stored_bytes for info in infos)
    share = stored.prefix_bytes / prefix_bytes
    return [
        Figure("segments of the prefix that sessions name", num_prefixes, at_most=1),
        Figure("copies of the prefix in the store", stored.prefix_copies, at_most=1),
        Figure("bytes of the prefix in the store", stored.prefix_bytes, "B"),
        Figure("  over those of one segment", share, "x", at_most=MOST_STORED),
        Figure(f"bytes that {len(infos)} sessions name, added up", told, "B"),
        Figure("bytes of all segments in the store", stored.all_bytes, "B"),
    ]


def _prefilled_figures(prefilled: Prefilled, prefix_tokens: int) -> list[Figure]:
    share = prefilled.tokens / prefix_tokens
    return [
        Figure("tokens that the prefill worker ran over", prefilled.tokens),
        Figure("  over those of the prefix", share, "x", at_most=1),
        Figure("tokens that it found in the store", prefilled.shared_tokens),
        Figure("segments that it computed", prefilled.computed, at_most=1),
        Figure("segments that it found", prefilled.found),
    ]


def _first_token_figures(answers: Sequence[Heard]) -> list[Figure]:
    first, *others = [heard.first_token_ms for heard in answers]
    return [
        Figure("first session: first token", first, "ms"),
        Figure("the others: first token, median", statistics.median(others), "ms"),
        Figure("the others: first token, maximum", max(others), "ms"),
    ]
