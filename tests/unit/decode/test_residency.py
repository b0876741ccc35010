from __future__ import annotations

from dataclasses import dataclass

import pytest

from chunkserve.v1 import manifest_pb2, session_pb2
from services.decode.residency import ResidentSessions


@dataclass
class FakeCache:
    nbytes: int = 100


def committed(session_id: str = "s", *, tenant: str = "t") -> manifest_pb2.Manifest:
    """A session whose segment covers tokens 0 to 3; token 4 is pending."""
    return manifest_pb2.Manifest(
        tenant=tenant,
        session_id=session_id,
        version=7,
        token_ids=[1, 2, 3, 4, 5],
        segments=[session_pb2.Segment(segment_id="a", first_token=0, num_tokens=4)],
    )


def next_turn() -> manifest_pb2.Manifest:
    manifest = committed()
    manifest.token_ids.extend([6, 7, 8])
    manifest.segments.add(segment_id="b", first_token=4, num_tokens=3)
    return manifest


def test_a_session_that_goes_on_gets_its_cache_once():
    sessions, cache = ResidentSessions(1000), FakeCache()
    sessions.put(committed(), cache)

    assert sessions.take(next_turn()) is cache
    assert sessions.take(next_turn()) is None
    assert len(sessions) == 0


def test_a_turn_without_a_new_segment_goes_on_too():
    sessions, cache = ResidentSessions(1000), FakeCache()
    sessions.put(committed(), cache)
    manifest = committed()
    manifest.token_ids.append(6)

    assert sessions.take(manifest) is cache


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 8),
        ("token_ids", [1, 2, 3, 4, 9, 6]),
        ("token_ids", [1, 2, 3, 4]),
        ("segments", []),
        ("segments", [session_pb2.Segment(segment_id="x", first_token=0, num_tokens=4)]),
        ("segments", [session_pb2.Segment(segment_id="a", first_token=0, num_tokens=3)]),
    ],
)
def test_any_other_state_drops_the_cache(field, value):
    sessions = ResidentSessions(1000)
    sessions.put(committed(), FakeCache())
    manifest = next_turn()
    manifest.ClearField(field)
    if isinstance(value, list):
        getattr(manifest, field).extend(value)
    else:
        setattr(manifest, field, value)

    assert sessions.take(manifest) is None
    assert len(sessions) == 0


def test_tenants_do_not_see_each_other():
    sessions = ResidentSessions(1000)
    sessions.put(committed(tenant="one"), FakeCache())

    assert sessions.take(committed(tenant="two")) is None
    assert sessions.take(committed(tenant="one")) is not None


def test_the_least_recently_used_is_given_up_first():
    sessions = ResidentSessions(300)
    for name in ("a", "b", "c"):
        sessions.put(committed(name), FakeCache())
    sessions.put(committed("a"), FakeCache())

    sessions.put(committed("d"), FakeCache())

    assert sessions.num_bytes == 300
    assert sessions.take(committed("b")) is None
    assert sessions.take(committed("a")) is not None


def test_a_cache_that_is_too_large_is_not_kept():
    sessions = ResidentSessions(300)

    sessions.put(committed("a"), FakeCache(301))

    assert len(sessions) == 0
