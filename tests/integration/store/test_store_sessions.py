"""Manifests, leases and lists of sessions on every kind of server."""

from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    InvalidRequestError,
    NotFoundError,
)
from services.store import Store, keys, open_store


async def create(store: Store, *session_ids: str, tenant: str = "default", ttl_s: float = 60):
    for session_id in session_ids:
        await store.create_manifest(tenant, session_id, b"v1", ttl_s=ttl_s)


async def commit(
    store: Store, body: bytes = b"v2", *, version: int = 1, ttl_s: float = 60, segments=()
) -> int:
    return await store.commit_manifest(
        "default", "s", body, expected_version=version, ttl_s=ttl_s, segment_ids=segments
    )


async def all_pages(store: Store, page_size: int, tenant: str = "default") -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = await store.list_sessions(tenant, page_size=page_size, page_token=token)
        pages.append(list(page.session_ids))
        token = page.next_page_token
        if not token:
            return pages


def put_segments(store: Store, *segment_ids: str, ttl_s: float = 60) -> None:
    for segment_id in segment_ids:
        store.put_segment(segment_id, b"h", [b"aa", b"bb"], ttl_s=ttl_s)


async def test_store_answers(store: Store):
    await store.ping()


# Manifests


async def test_a_new_session_has_version_1(store: Store):
    await store.create_manifest("default", "s", b"\x00\xff body", ttl_s=60)

    manifest = await store.get_manifest("default", "s")

    assert (manifest.body, manifest.version) == (b"\x00\xff body", 1)
    assert 50 < manifest.expires_in_s <= 60


async def test_an_existing_session_is_not_created_again(store: Store):
    await create(store, "s")

    with pytest.raises(AlreadyExistsError, match="session s exists"):
        await store.create_manifest("default", "s", b"other", ttl_s=600)

    assert (await store.get_manifest("default", "s")).body == b"v1"
    assert await all_pages(store, 10) == [["s"]]


async def test_sessions_of_other_tenants_are_other_sessions(store: Store):
    await create(store, "s", tenant="a")

    with pytest.raises(NotFoundError) as caught:
        await store.get_manifest("b", "s")

    assert caught.value.error_reason == "SESSION_NOT_FOUND"
    assert caught.value.resource == ("session", "s")
    await create(store, "s", tenant="b")
    await store.delete_manifest("a", "s")
    assert (await store.get_manifest("b", "s")).version == 1


async def test_names_with_separators_are_kept_apart(store: Store):
    tenants_and_sessions = [
        ("a/b", "c"),
        ("a", "b/c"),
        ("a}", "{b"),
        ("a", "b:manifest"),
        ("ä", "é"),
    ]
    for i, (tenant, session_id) in enumerate(tenants_and_sessions):
        await store.create_manifest(tenant, session_id, str(i).encode(), ttl_s=60)

    for i, (tenant, session_id) in enumerate(tenants_and_sessions):
        assert (await store.get_manifest(tenant, session_id)).body == str(i).encode()
    assert await all_pages(store, 10, tenant="ä") == [["é"]]


async def test_a_commit_replaces_the_version_it_expects(store: Store):
    await create(store, "s")

    version = await commit(store, b"new", ttl_s=600)

    manifest = await store.get_manifest("default", "s")
    assert version == manifest.version == 2
    assert manifest.body == b"new"
    assert manifest.expires_in_s > 590


async def test_a_commit_on_another_version_changes_nothing(store: Store):
    await create(store, "s")
    await commit(store, b"theirs")

    with pytest.raises(ConflictError, match="version 2 is stored, 1 was expected"):
        await commit(store, b"ours", version=1, ttl_s=600)

    manifest = await store.get_manifest("default", "s")
    assert (manifest.body, manifest.version) == (b"theirs", 2)
    assert manifest.expires_in_s <= 60


async def test_of_many_commits_on_one_version_exactly_one_wins(store: Store, server):
    await create(store, "s")
    other = open_store(server.url)
    bodies = [str(i).encode() for i in range(20)]

    outcomes = await asyncio.gather(
        *(commit(store if i % 2 else other, body) for i, body in enumerate(bodies)),
        return_exceptions=True,
    )

    await other.close()
    [winner] = [body for body, outcome in zip(bodies, outcomes, strict=True) if outcome == 2]
    assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == 19
    manifest = await store.get_manifest("default", "s")
    assert (manifest.body, manifest.version) == (winner, 2)


async def test_a_commit_on_a_session_that_is_gone_is_not_found(store: Store, server):
    with pytest.raises(NotFoundError) as caught:
        await commit(store)

    assert caught.value.error_reason == "SESSION_NOT_FOUND"
    assert server.holders() == {}


async def test_a_commit_extends_its_segments(store: Store, server):
    await create(store, "s")
    put_segments(store, "a", "b")
    put_segments(store, "long", ttl_s=6000)

    await commit(store, ttl_s=600, segments=["a", "b", "a", "long"])

    for key, node in server.holders().items():
        is_long = "{long}" in key and not key.endswith(":owners")
        assert node.ttl(key) > (5900 if is_long else 590)


async def test_a_commit_that_names_a_segment_with_a_damaged_header_key_is_refused(
    store: Store, server
):
    await create(store, "s")
    put_segments(store, "a")
    key, node = server.only_key(ending=":header")
    intact = node.get(key)

    for i, byte in enumerate(intact):
        for damaged in (intact[:i], intact[:i] + bytes([byte ^ 0x10]) + intact[i + 1 :]):
            node.set(key, damaged, keepttl=True)
            with pytest.raises(CorruptError, match="segment a"):
                await commit(store, segments=["a"])

    assert (await store.get_manifest("default", "s")).version == 1


async def test_segments_outlive_the_session_that_names_them(store: Store, server):
    await create(store, "s")
    put_segments(store, "a", ttl_s=20)

    await commit(store, ttl_s=10, segments=["a"])

    assert server.ttl_s(ending=":manifest") <= 10
    assert server.ttl_s(ending="{a}:header") > 30


@pytest.mark.parametrize("lost", [":header", ":1"], ids=["whole", "one_part"])
async def test_a_commit_that_names_a_lost_segment_changes_nothing(store: Store, server, lost: str):
    await create(store, "s")
    put_segments(store, "a", "b")
    [(key, node)] = [
        (key, node) for key, node in server.holders().items() if "{b}" in key and key.endswith(lost)
    ]
    node.delete(key)

    with pytest.raises(NotFoundError, match="segment b") as caught:
        await commit(store, segments=["a", "b"])

    assert caught.value.error_reason == "SEGMENT_NOT_FOUND"
    assert caught.value.resource == ("segment", "b")
    assert (await store.get_manifest("default", "s")).version == 1


async def test_a_deleted_session_is_gone_and_can_be_created_again(store: Store):
    await create(store, "s")

    await store.delete_manifest("default", "s")

    with pytest.raises(NotFoundError):
        await store.get_manifest("default", "s")
    with pytest.raises(NotFoundError):
        await store.delete_manifest("default", "s")
    assert await all_pages(store, 10) == [[]]
    await create(store, "s")
    assert await all_pages(store, 10) == [["s"]]


async def test_an_expired_session_is_gone_and_can_be_created_again(store: Store, server, until):
    await create(store, "s", ttl_s=0.05)
    until(lambda: not any(key.endswith(":manifest") for key in server.holders()))

    with pytest.raises(NotFoundError):
        await store.get_manifest("default", "s")
    with pytest.raises(NotFoundError):
        await commit(store)

    await create(store, "s")
    assert (await store.get_manifest("default", "s")).version == 1
    assert await all_pages(store, 1) == [["s"]]


async def test_scripts_that_the_server_forgot_are_loaded_again(store: Store, server):
    await create(store, "s")
    for node in server.nodes:
        node.script_flush()

    assert await commit(store) == 2


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
async def test_a_ttl_that_is_not_positive_is_refused(store: Store, ttl_s: float):
    with pytest.raises(InvalidRequestError, match="greater than 0"):
        await create(store, "s", ttl_s=ttl_s)
    await create(store, "s")
    with pytest.raises(InvalidRequestError, match="greater than 0"):
        await commit(store, ttl_s=ttl_s)
    with pytest.raises(InvalidRequestError, match="greater than 0"):
        await store.acquire_lease("default", "s", ttl_s=ttl_s)


# List


async def test_sessions_are_listed_by_creation(store: Store):
    session_ids = [f"s{i}" for i in (3, 1, 4, 0, 5, 9, 2)]
    await create(store, *session_ids)
    await create(store, "foreign", tenant="other")
    await commit_of(store, "s4")

    assert await all_pages(store, 100) == [session_ids]
    assert await all_pages(store, 3) == [session_ids[:3], session_ids[3:6], session_ids[6:]]
    assert await all_pages(store, 7) == [session_ids]
    assert await all_pages(store, 1) == [[session_id] for session_id in session_ids]


async def commit_of(store: Store, session_id: str) -> None:
    await store.commit_manifest(
        "default", session_id, b"", expected_version=1, ttl_s=60, segment_ids=[]
    )


async def test_no_sessions_are_one_empty_page(store: Store):
    assert await all_pages(store, 1) == [[]]


async def test_a_page_is_full_although_sessions_before_it_expired(store: Store, server):
    session_ids = [f"s{i:03}" for i in range(150)]
    await create(store, *session_ids)
    # More of them than are read at once.
    for key, node in server.holders().items():
        if key.endswith(":manifest") and not key.endswith(("5}:manifest", "9}:manifest")):
            node.delete(key)
    live = [session_id for session_id in session_ids if session_id.endswith(("5", "9"))]

    first = await store.list_sessions("default", page_size=2, page_token="")
    assert list(first.session_ids) == live[:2]
    assert await all_pages(store, 7) == [live[i : i + 7] for i in range(0, len(live), 7)]

    index, node = server.only_key(ending=":sessions")
    assert node.zcard(index) == len(live), "entries of expired sessions are removed"


async def test_expired_sessions_at_the_end_leave_no_next_page(store: Store, server):
    await create(store, "a", "b", "c")
    for name in ("b", "c"):
        key, node = server.only_key(ending=f"/{name}}}:manifest")
        node.delete(key)

    page = await store.list_sessions("default", page_size=1, page_token="")

    assert (list(page.session_ids), page.next_page_token) == (["a"], "")


async def test_a_page_begins_where_the_one_before_ended_although_that_session_is_gone(
    store: Store,
):
    await create(store, "a", "b", "c")
    page = await store.list_sessions("default", page_size=1, page_token="")
    await store.delete_manifest("default", "a")
    await create(store, "a")

    rest = await store.list_sessions("default", page_size=9, page_token=page.next_page_token)

    assert list(rest.session_ids) == ["b", "c", "a"]


async def test_a_session_created_again_is_listed_once(store: Store, server):
    await create(store, "a", "b")
    key, node = server.only_key(ending="/a}:manifest")
    node.delete(key)
    await create(store, "a")

    assert await all_pages(store, 10) == [["b", "a"]]


async def test_a_commit_puts_a_lost_entry_back(store: Store, server):
    await create(store, "first", "s", "last")
    index, node = server.only_key(ending=":sessions")
    [entry] = [member for member in node.zrange(index, 0, -1) if member.endswith(b":s")]
    node.zrem(index, entry)
    assert await all_pages(store, 10) == [["first", "last"]]

    await commit(store)

    assert await all_pages(store, 10) == [["first", "s", "last"]]


async def test_the_list_lives_as_long_as_its_longest_session(store: Store, server):
    await create(store, "long", ttl_s=600)
    await create(store, "s", ttl_s=60)
    assert 590 < server.ttl_s(ending=":sessions") <= 600

    await commit(store, ttl_s=6000)

    assert 5990 < server.ttl_s(ending=":sessions") <= 6000


@pytest.mark.parametrize(
    "page_token",
    ["x", "!!!!", "YWJj", "é", "AAAA", keys.index_member(1, "s").decode()],
    ids=["short", "no_base64", "other_text", "no_ascii", "zeros", "raw_member"],
)
async def test_a_foreign_page_token_is_invalid(store: Store, page_token: str):
    with pytest.raises(InvalidRequestError) as caught:
        await store.list_sessions("default", page_size=1, page_token=page_token)

    assert caught.value.field == "page_token"


@pytest.mark.parametrize("page_size", [0, -1])
async def test_a_page_size_below_1_is_invalid(store: Store, page_size: int):
    with pytest.raises(InvalidRequestError, match="send at least 1"):
        await store.list_sessions("default", page_size=page_size, page_token="")


# Leases


async def test_a_lease_is_one_turns_alone(store: Store):
    token = await store.acquire_lease("default", "s", ttl_s=60)

    with pytest.raises(ConflictError, match="session s is busy") as caught:
        await store.acquire_lease("default", "s", ttl_s=60)

    assert caught.value.error_reason == "SESSION_BUSY"
    assert token != await store.acquire_lease("default", "other", ttl_s=60)


async def test_of_many_that_want_a_lease_one_gets_it(store: Store):
    outcomes = await asyncio.gather(
        *(store.acquire_lease("default", "s", ttl_s=60) for _ in range(20)), return_exceptions=True
    )

    assert sum(isinstance(outcome, str) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == 19


async def test_a_lease_that_was_given_back_can_be_taken(store: Store):
    token = await store.acquire_lease("default", "s", ttl_s=60)

    await store.release_lease("default", "s", token)

    await store.acquire_lease("default", "s", ttl_s=60)


async def test_a_lease_is_renewed_and_given_back_by_its_owner_alone(store: Store, server):
    token = await store.acquire_lease("default", "s", ttl_s=60)

    assert not await store.renew_lease("default", "s", "other", ttl_s=600)
    await store.release_lease("default", "s", "other")
    assert 50 < server.ttl_s(ending=":lease") <= 60

    assert await store.renew_lease("default", "s", token, ttl_s=600)
    assert server.ttl_s(ending=":lease") > 590


async def test_an_expired_lease_is_not_ours_any_more(store: Store, server, until):
    token = await store.acquire_lease("default", "s", ttl_s=0.05)
    until(lambda: not server.holders())

    assert not await store.renew_lease("default", "s", token, ttl_s=60)
    successor = await store.acquire_lease("default", "s", ttl_s=60)
    await store.release_lease("default", "s", token)

    assert await store.renew_lease("default", "s", successor, ttl_s=60)
