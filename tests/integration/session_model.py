"""What each session must contain, in memory, and which keys the store may hold for that."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis
import torch

from chunkserve.v1 import inference_pb2, manifest_pb2, session_pb2
from services.models.loader import LoadedModel
from services.store import keys

TENANT: Final = "default"

MIN_COMPRESS_TOKENS: Final = 16
MAX_ANSWER_TOKENS: Final = 7
SEGMENT_LEASE_S: Final = 0.3

# What rounding may change in a logit: the model sees the same tokens in other pieces.
_LOGIT_TOLERANCE: Final = 1e-3


@dataclass
class Answer:
    """What a client received of a turn.

    Attributes:
        info: The first event; ``None`` if there was none.
        finish: The last one; ``None`` if the stream was cut off.
        error: With what it was refused or cut off.
    """

    info: inference_pb2.PromptInfo | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Any = None
    error: Any = None

    @property
    def is_whole(self) -> bool:
        return self.finish is not None


@dataclass
class Conversation:
    """A session.

    Attributes:
        session_id: Its id.
        ttl_s: How long it lives after each use.
        is_exact: Nothing of its KV was ever dropped or rounded.
        version: Of its manifest.
        segments: As they were last seen; nobody may change them but this session's own turns.
        turns: Requests that were answered, oldest first.
    """

    session_id: str
    ttl_s: int
    is_exact: bool
    token_ids: list[int] = field(default_factory=list)
    num_turns: int = 0
    version: int = 1
    segments: list[session_pb2.Segment] = field(default_factory=list)
    turns: list[tuple[inference_pb2.GenerateRequest, Answer]] = field(default_factory=list)

    def copied(self, session_id: str, ttl_s: int) -> Conversation:
        """Return what a fork or an import of it must contain."""
        return Conversation(
            session_id,
            ttl_s,
            self.is_exact,
            token_ids=list(self.token_ids),
            num_turns=self.num_turns,
            segments=list(self.segments),
        )

    def check(self, session: session_pb2.Session, manifest: manifest_pb2.Manifest) -> None:
        """Compare with what is stored."""
        assert session.session_id == manifest.session_id == self.session_id
        assert session.version == manifest.version == self.version
        assert session.num_turns == manifest.num_turns == self.num_turns
        assert list(manifest.token_ids) == self.token_ids
        assert session.num_tokens == len(self.token_ids)
        assert list(session.segments) == list(manifest.segments)
        assert session.num_kept_tokens == sum(s.num_kept_tokens for s in manifest.segments)
        assert session.stored_bytes == sum(s.size_bytes for s in manifest.segments)
        assert session.ttl.seconds == self.ttl_s
        end = 0
        for segment in manifest.segments:
            assert segment.first_token == end
            assert 0 < segment.num_kept_tokens <= segment.num_tokens
            if self.is_exact:
                assert segment.num_kept_tokens == segment.num_tokens
            end += segment.num_tokens
        # The last token of an answer is left to the next turn; of an answer that one worker
        # generated and another one committed, all of it, and a prompt too short to be prefilled.
        assert 0 <= len(self.token_ids) - end <= MIN_COMPRESS_TOKENS + MAX_ANSWER_TOKENS

    def check_unchanged_segments(self, manifest: manifest_pb2.Manifest) -> None:
        """A turn adds segments behind those that there are, which stay as they are."""
        assert list(manifest.segments[: len(self.segments)]) == self.segments


def check_is_greedy(loaded: LoadedModel, token_ids: Sequence[int], num_answered: int) -> None:
    """The last tokens are the model's greedy answer to those before, with full attention."""
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([token_ids])).logits[0, -num_answered - 1 : -1]
    answered = torch.tensor(token_ids[-num_answered:])
    chosen = logits.gather(1, answered[:, None])[:, 0]
    assert (chosen >= logits.amax(1) - _LOGIT_TOLERANCE).all()


class Keys:
    """The keys in the store, and who may have left them there.

    Parts whose header the test has damaged are not looked at: no header names them, so they expire.

    Args:
        client: Of the store's server.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._stray: set[bytes] = set()

    def check(
        self,
        conversations: Collection[Conversation],
        abandoned: Collection[str],
    ) -> None:
        """Every key is named by a session that lives, and every one that a session names is there.

        Beside them, only these are allowed: the registry's, the tenant's list and account, segments
        that are reserved for a session by a turn that failed, until its next turn or its deletion,
        and segments of one-off requests that were cut off, which expire soon.

        Args:
            conversations: All that live, with their segments as they are stored.
            abandoned: Segments that were stored for one-off requests that were cut off.
        """
        found = self._found()
        alive = {keys.owner(TENANT, c.session_id): c for c in conversations}
        named: dict[str, set[str]] = defaultdict(set)
        for owner, conversation in alive.items():
            for segment in conversation.segments:
                named[segment.segment_id].add(owner)
        left = {
            (segment_id, keys.reserver(TENANT, c.session_id))
            for c in conversations
            for segment_id in self._reserved(c)
        }
        left_ids = {segment_id for segment_id, _ in left} | {*abandoned}
        for tag, kinds in found.items():
            if tag in ("workers", TENANT):
                continue
            if "/" in tag:
                assert tag in alive, f"session {tag} is gone and left {kinds}"
                expected = {"manifest", "results", "turns", "reserved"}
                assert kinds <= expected, f"session {tag} left {kinds}"
                continue
            assert tag in named or tag in left_ids, (
                f"no session names segment {tag}: {kinds}, owned by {self._owners(tag)}"
            )
            self._check_owners(tag, named[tag], left)
            if named[tag] and tag not in left_ids:
                self._check_parts(tag, kinds)
        for owner, conversation in alive.items():
            assert "manifest" in found.get(owner, ()), f"session {owner} is not stored"
            self._check_lifetimes(conversation)

    def check_nothing_left(self, abandoned: Collection[str]) -> None:
        """No session is there, and no segment but those of one-off requests that were cut off."""
        for tag, kinds in self._found().items():
            assert tag in ("workers", TENANT) or tag in abandoned, f"{tag} left {kinds}"

    def expire(self, conversation: Conversation) -> None:
        """Do to a session and its segments what time does to them: let their time be over."""
        owner = keys.owner(TENANT, conversation.session_id)
        for name in (keys.manifest, keys.turn_results, keys.turn_order):
            self._client.pexpireat(name(TENANT, conversation.session_id), 1)
        self._client.zadd(keys.account_ends(TENANT), {conversation.session_id: 1}, xx=True)
        for segment_id in {segment.segment_id for segment in conversation.segments}:
            self._end_ownership(segment_id, owner)
        for segment_id in self._reserved(conversation):
            self._end_ownership(segment_id, keys.reserver(TENANT, conversation.session_id))
        self._client.pexpireat(keys.reserved_segments(TENANT, conversation.session_id), 1)

    def _end_ownership(self, segment_id: str, owner: str) -> None:
        """Let the time of an ownership be over, and of the segment if it was the last."""
        owners = keys.segment_owners(segment_id)
        self._client.zadd(owners, {owner: 1}, xx=True)
        if not self._client.zcount(owners, time.time() * 1000, "+inf"):
            for name in self._of_segment(segment_id):
                self._client.pexpireat(name, 1)

    def damage(self, segment_id: str, kind: str, index: int) -> None:
        """Lose something of a segment: ``lost``: delete a key; ``flipped``: turn a byte."""
        stored = [
            name
            for name in self._of_segment(segment_id)
            if not name.endswith((b":owners", b":lease")) and name not in self._stray
        ]
        name = sorted(stored)[index % len(stored)]
        if name.endswith(b":header"):
            # Nobody knows any more which parts there are: they expire.
            self._stray |= set(stored) - {name}
        if kind == "lost":
            self._client.delete(name)
            return
        offset = index % int(self._client.strlen(name))
        byte = self._client.getrange(name, offset, offset)
        self._client.setrange(name, offset, bytes([byte[0] ^ 0x55]))

    def release_lease(self, session_id: str) -> None:
        """Let a turn lease run out whose holder was killed."""
        self._client.delete(keys.lease(TENANT, session_id))

    def _found(self) -> dict[str, set[str]]:
        """Return what kinds of keys there are, by what stands in the braces of their names."""
        found: dict[str, set[str]] = defaultdict(set)
        for key in set(self._client.scan_iter(count=1000)) - self._stray:
            tag, _, kind = key.decode().partition("{")[2].partition("}")
            # A killed worker's lease on a segment that it was computing ends by itself.
            if "/" in tag or kind != ":lease" or self._client.pttl(key) > SEGMENT_LEASE_S * 1000:
                found[tag].add(kind.removeprefix(":"))
        return found

    def _of_segment(self, segment_id: str) -> list[bytes]:
        return list(self._client.scan_iter(f"cs2:{{{segment_id}}}:*", count=1000))

    def _check_owners(
        self, segment_id: str, naming: Collection[str], left: Collection[tuple[str, str]]
    ) -> None:
        owners = self._owners(segment_id)
        assert set(naming) <= owners, f"{naming} name {segment_id}, {owners} own it"
        for owner in owners - set(naming):
            assert (segment_id, owner) in left, f"{owner} owns {segment_id} and names it not"

    def _reserved(self, conversation: Conversation) -> set[str]:
        """Return what turns of a session reserved and did not commit."""
        name = keys.reserved_segments(TENANT, conversation.session_id)
        return {segment_id.decode() for segment_id in self._client.smembers(name)}

    def _owners(self, segment_id: str) -> set[str]:
        """Return the sessions that own a segment now."""
        name, now = keys.segment_owners(segment_id), time.time() * 1000
        return {owner.decode() for owner in self._client.zrangebyscore(name, now, "+inf")}

    def _check_parts(self, segment_id: str, kinds: Collection[str]) -> None:
        value = self._client.get(keys.segment_header(segment_id))
        num_parts, copy = keys.segment_copy(segment_id, value)
        parts = {f"{copy.hex()}:{index}" for index in range(num_parts)}
        assert kinds == {"header", "owners"} | parts, f"segment {segment_id}: {kinds}"

    def _check_lifetimes(self, conversation: Conversation) -> None:
        """Segments live longer than the sessions that name them."""
        for segment_id in {segment.segment_id for segment in conversation.segments}:
            value = self._client.get(keys.segment_header(segment_id))
            names = [keys.segment_header(segment_id), *keys.segment_parts(segment_id, value)]
            remaining = self._client.pttl(keys.manifest(TENANT, conversation.session_id))
            assert min(map(self._client.pttl, names)) > remaining
