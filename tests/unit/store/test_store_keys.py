"""Key names: versioned, in the right slot, and never another's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from services.store import keys

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def slot(name: str) -> int:
    return key_slot(name.encode())


@given(tenant=NAMES, session_id=NAMES)
def test_a_sessions_keys_share_a_slot(tenant: str, session_id: str):
    assert slot(keys.manifest(tenant, session_id)) == slot(keys.lease(tenant, session_id))


@given(segment_id=NAMES, index=st.integers(0, 9999))
def test_a_segments_keys_share_a_slot(segment_id: str, index: int):
    part = keys.segment_part(segment_id, b"copyname", index)

    assert slot(part) == slot(keys.segment_header(segment_id))


@given(worker_id=NAMES)
def test_workers_share_a_slot_with_their_index(worker_id: str):
    assert slot(keys.worker(worker_id)) == slot(keys.worker_index())


@given(a=st.tuples(NAMES, NAMES), b=st.tuples(NAMES, NAMES))
def test_names_of_different_things_differ(a: tuple[str, str], b: tuple[str, str]):
    def names(tenant: str, other: str) -> list[str]:
        return [
            keys.manifest(tenant, other),
            keys.lease(tenant, other),
            keys.session_index(tenant),
            keys.segment_header(other),
            keys.segment_part(other, b"copyname", 0),
            keys.worker(other),
            keys.worker_index(),
        ]

    assert len(set(names(*a))) == 7
    if a != b:
        assert keys.manifest(*a) != keys.manifest(*b)
        assert keys.lease(*a) != keys.lease(*b)


@given(tenant=NAMES, session_id=NAMES)
def test_every_name_is_plain_ascii_with_the_version(tenant: str, session_id: str):
    name = keys.manifest(tenant, session_id)

    assert name.isascii()
    assert name.startswith("cs1:{")
    assert name.count("{") == name.count("}") == 1


def test_names_as_an_operator_sees_them():
    assert keys.manifest("default", "chat-1") == "cs1:{default/chat-1}:manifest"
    assert keys.lease("default", "chat-1") == "cs1:{default/chat-1}:lease"
    assert keys.session_index("default") == "cs1:{default}:sessions"
    assert keys.segment_header("9f") == "cs1:{9f}:header"
    assert keys.segment_part("9f", bytes(8), 2) == "cs1:{9f}:0000000000000000:2"
    assert keys.worker("w-1") == "cs1:{workers}:w-1"


@given(created_us=st.integers(0, 10**16 - 1), session_id=NAMES)
def test_index_members_are_read_back(created_us: int, session_id: str):
    member = keys.index_member(created_us, session_id)

    assert keys.parse_index_member(member) == (created_us, session_id)


@given(older=st.integers(0, 10**16 - 2), session_id=NAMES, other=NAMES)
def test_index_members_sort_by_creation(older: int, session_id: str, other: str):
    assert keys.index_member(older, session_id) < keys.index_member(older + 1, other)


@pytest.mark.parametrize(
    "member", [b"", b"1:s", b"0000000000000001", b"0000000000000001:", b"x" * 16 + b":s", b"\xff"]
)
def test_other_text_is_no_index_member(member: bytes):
    with pytest.raises(ValueError, match=r"member|decode"):
        keys.parse_index_member(member)


def test_a_record_names_the_parts():
    record = keys.segment_record(2, b"copyname")

    assert keys.segment_parts("s", record + b"header") == [
        keys.segment_part("s", b"copyname", 0),
        keys.segment_part("s", b"copyname", 1),
    ]
    assert keys.segment_parts("s", keys.segment_record(0, b"copyname")) == []


def test_a_record_cut_short_is_refused():
    with pytest.raises(ValueError, match="11 bytes; it has 12"):
        keys.segment_parts("s", keys.segment_record(2, b"copyname")[:-1])
