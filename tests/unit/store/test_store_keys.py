"""Key names: versioned, in the right slot, and never another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from services.runtime.errors import CorruptError
from services.store import keys

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


def slot(name: str) -> int:
    return key_slot(name.encode())


@given(tenant=NAMES, session_id=NAMES)
def test_a_sessions_keys_share_a_slot(tenant: str, session_id: str):
    names = (keys.manifest, keys.lease, keys.turn_results, keys.turn_order)

    assert len({slot(name(tenant, session_id)) for name in names}) == 1


@given(tenant=NAMES)
def test_a_tenants_account_shares_a_slot_with_its_list(tenant: str):
    names = (keys.session_index, keys.account_ends, keys.account_bytes)

    assert len({slot(name(tenant)) for name in names}) == 1


@given(segment_id=NAMES, index=st.integers(0, 9999))
def test_a_segments_keys_share_a_slot(segment_id: str, index: int):
    part = keys.segment_part(segment_id, b"copyname", index)

    assert slot(part) == slot(keys.segment_header(segment_id))
    assert slot(part) == slot(keys.segment_owners(segment_id))
    assert slot(part) == slot(keys.segment_lease(segment_id))


@given(worker_id=NAMES)
def test_workers_share_a_slot_with_their_index(worker_id: str):
    assert slot(keys.worker(worker_id)) == slot(keys.worker_index())


@given(a=st.tuples(NAMES, NAMES), b=st.tuples(NAMES, NAMES))
def test_names_of_different_things_differ(a: tuple[str, str], b: tuple[str, str]):
    def names(tenant: str, other: str) -> list[str]:
        return [
            keys.manifest(tenant, other),
            keys.lease(tenant, other),
            keys.turn_results(tenant, other),
            keys.turn_order(tenant, other),
            keys.session_index(tenant),
            keys.account_ends(tenant),
            keys.account_bytes(tenant),
            keys.running_turns(tenant),
            keys.segment_header(other),
            keys.segment_owners(other),
            keys.segment_part(other, b"copyname", 0),
            keys.worker(other),
            keys.worker_index(),
        ]

    assert len(set(names(*a))) == 13
    if a != b:
        assert keys.manifest(*a) != keys.manifest(*b)
        assert keys.lease(*a) != keys.lease(*b)
        assert keys.owner(*a) != keys.owner(*b)


@given(tenant=NAMES, session_id=NAMES)
def test_every_name_is_plain_ascii_with_the_version(tenant: str, session_id: str):
    name = keys.manifest(tenant, session_id)

    assert name.isascii()
    assert name.startswith("cs2:{")
    assert name.count("{") == name.count("}") == 1


def test_names_as_an_operator_sees_them():
    assert keys.manifest("default", "chat-1") == "cs2:{default/chat-1}:manifest"
    assert keys.lease("default", "chat-1") == "cs2:{default/chat-1}:lease"
    assert keys.session_index("default") == "cs2:{default}:sessions"
    assert keys.segment_header("9f") == "cs2:{9f}:header"
    assert keys.segment_part("9f", bytes(8), 2) == "cs2:{9f}:0000000000000000:2"
    assert keys.worker("w-1") == "cs2:{workers}:w-1"


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


def test_the_header_key_names_the_parts_and_holds_the_header():
    value = keys.segment_value("s", b"copyname", 2, b"header")

    assert keys.segment_parts("s", value) == [
        keys.segment_part("s", b"copyname", 0),
        keys.segment_part("s", b"copyname", 1),
    ]
    assert keys.stored_header("s", value) == value[keys.RECORD_SIZE :] == b"header"


def test_neither_parts_nor_header_are_needed():
    value = keys.segment_value("s", b"copyname", 0, b"")

    assert keys.segment_parts("s", value) == []
    assert keys.stored_header("s", value) == b""


@pytest.mark.parametrize("read", [keys.segment_parts, keys.stored_header])
def test_every_flipped_byte_and_every_truncation_is_corrupt(
    read: Callable[[str, bytes], object],
):
    value = keys.segment_value("s", b"copyname", 2, b"header")
    flipped = [
        value[:i] + bytes([value[i] ^ flip]) + value[i + 1 :]
        for i in range(len(value))
        for flip in range(1, 256)
    ]
    cut = [value[:length] for length in range(len(value))]

    for damaged in (*flipped, *cut, value + b"\0"):
        with pytest.raises(CorruptError, match=f"the {len(damaged)} bytes of its header key"):
            read("s", damaged)


def test_a_value_under_another_segments_key_is_corrupt():
    value = keys.segment_value("s", b"copyname", 2, b"header")

    with pytest.raises(CorruptError, match="segment other") as caught:
        keys.segment_parts("other", value)

    assert caught.value.resource == ("segment", "other")
