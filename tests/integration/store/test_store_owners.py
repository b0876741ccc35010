"""Who names a segment keeps it; who names it last frees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import redis

from services.runtime.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptError,
    NotFoundError,
    UnavailableError,
)
from services.store import Store, keys, segments
from services.store.base import SegmentOwner, TurnRecord
from services.store.connect import parse_store_url
from services.store.redis import RedisStore

TTL_S = 60.0


def put(store: Store, *segment_ids: str, session_id: str = "", ttl_s: float = TTL_S) -> None:
    owner = SegmentOwner("default", session_id) if session_id else None
    for segment_id in segment_ids:
        store.put_segment(segment_id, b"h", [b"aa", b"bb"], ttl_s=ttl_s, owner=owner)


def has(store: Store, segment_id: str) -> bool:
    return store.has_segment(segment_id, ttl_s=1)


async def create(store: Store, session_id: str, *segment_ids: str, ttl_s: float = TTL_S) -> None:
    await store.create_manifest("default", session_id, b"v1", ttl_s=ttl_s, segment_ids=segment_ids)


async def commit(
    store: Store, session_id: str, *segment_ids: str, dropped: Sequence[str] = (), version: int = 1
) -> int:
    return await store.commit_manifest(
        "default",
        session_id,
        b"v2",
        expected_version=version,
        ttl_s=TTL_S,
        segment_ids=segment_ids,
        dropped_segment_ids=dropped,
    )


def names(server, segment_id: str) -> list[str]:
    return [key for key in server.holders() if f"{{{segment_id}}}" in key]


async def test_a_deleted_session_frees_its_segments_at_once(store: Store, server):
    await create(store, "s")
    put(store, "a", "b", session_id="s")
    await commit(store, "s", "a", "b")

    await store.delete_manifest("default", "s")

    assert server.holders() == {}


async def test_what_another_session_names_stays_until_that_is_deleted(store: Store, server):
    put(store, "a")
    await create(store, "s", "a")
    await create(store, "other", "a")

    await store.delete_manifest("default", "s")
    assert has(store, "a")
    await store.delete_manifest("default", "other")

    assert server.holders() == {}


async def test_segments_of_sessions_of_other_tenants_are_kept_apart(store: Store):
    put(store, "a")
    await create(store, "s", "a")
    await store.create_manifest("other", "s", b"", ttl_s=TTL_S, segment_ids=["a"])

    await store.delete_manifest("default", "s")

    assert has(store, "a")


async def test_owners_and_segments_outlive_the_session(store: Store, server):
    put(store, "a", ttl_s=1)

    await create(store, "s", "a", ttl_s=10)

    assert server.ttl_s(ending="{a}:owners") > 60
    assert server.ttl_s(ending="{a}:header") > 60


async def test_an_expired_owner_keeps_nothing(store: Store, server):
    put(store, "a")
    await create(store, "s", "a")
    await create(store, "dead", "a")
    key, node = server.only_key(ending=":owners")
    node.zadd(key, {keys.owner("default", "dead"): 1})

    await store.delete_manifest("default", "s")

    assert names(server, "a") == []


async def test_a_new_owner_removes_expired_ones(store: Store, server):
    put(store, "a")
    await create(store, "dead", "a")
    key, node = server.only_key(ending=":owners")
    node.zadd(key, {keys.owner("default", "dead"): 1})

    await create(store, "s", "a")

    assert node.zrange(key, 0, -1) == [b"default/s"]


async def test_a_dropped_segment_is_freed_at_once_unless_another_session_names_it(
    store: Store, server
):
    put(store, "a", "shared", "new")
    await create(store, "s", "a", "shared")
    await create(store, "other", "shared")

    await commit(store, "s", "new", dropped=["a", "shared"])

    assert names(server, "a") == []
    assert has(store, "shared")
    assert has(store, "new")


async def test_a_dropped_segment_that_the_version_names_stays(store: Store):
    put(store, "a")
    await create(store, "s", "a")

    await commit(store, "s", "a", dropped=["a"])

    assert has(store, "a")


@pytest.mark.parametrize("how", ["found", "stored"])
async def test_a_reserved_segment_is_not_freed_between_find_and_commit(store: Store, how: str):
    put(store, "a")
    await create(store, "s", "a")
    await create(store, "next")
    if how == "found":
        owner = SegmentOwner("default", "next")
        assert store.has_segment("a", ttl_s=TTL_S, owner=owner)
    else:
        put(store, "a", session_id="next")

    await store.delete_manifest("default", "s")

    assert await commit(store, "next", "a") == 2


async def test_a_segment_that_is_missing_is_not_reserved(store: Store, server):
    owner = SegmentOwner("default", "s")

    assert not store.has_segment("a", ttl_s=TTL_S, owner=owner)

    assert server.holders() == {}


async def test_a_failed_commit_leaves_the_session_owner_of_what_it_names(store: Store, server):
    put(store, "a", "new")
    await create(store, "s", "a")
    put(store, "new", session_id="s")

    with pytest.raises(ConflictError):
        await commit(store, "s", "a", "new", version=7)

    assert has(store, "a")
    assert names(server, "new") == []


async def test_a_commit_that_misses_a_segment_frees_what_it_brought(store: Store, server):
    await create(store, "s")
    put(store, "new", session_id="s")

    with pytest.raises(NotFoundError):
        await commit(store, "s", "new", "missing")

    assert names(server, "new") == names(server, "missing") == []


async def test_a_commit_on_a_deleted_session_leaves_nothing(store: Store, server):
    put(store, "new", session_id="s")

    with pytest.raises(NotFoundError, match="session s"):
        await commit(store, "s", "new")

    assert server.holders() == {}


async def test_a_session_that_exists_keeps_what_it_names(store: Store):
    put(store, "a", "b")
    await create(store, "s", "a")
    await create(store, "other", "b")

    with pytest.raises(AlreadyExistsError):
        await create(store, "s", "a", "b")

    await store.delete_manifest("default", "other")
    assert has(store, "a")
    assert not has(store, "b")


async def test_segments_of_a_turn_that_was_not_committed_can_be_released(store: Store, server):
    put(store, "a")
    await create(store, "s", "a")
    put(store, "new", session_id="s")

    await store.release_reserved("default", "s")

    assert has(store, "a")
    assert names(server, "new") == []


async def test_what_a_worker_stores_after_its_turn_was_given_up_is_freed_by_the_next(
    store: Store, server
):
    put(store, "a")
    await create(store, "s", "a")
    put(store, "late", session_id="s")
    await store.release_reserved("default", "s")
    put(store, "late", session_id="s")

    await commit(store, "s", "a")

    assert names(server, "late") == []
    assert not [key for key in server.holders() if key.endswith(":reserved")]


async def test_a_deleted_session_frees_what_its_turns_reserved(store: Store, server):
    await create(store, "s")
    put(store, "new", session_id="s")

    await store.delete_manifest("default", "s")

    assert server.holders() == {}


async def test_what_is_committed_is_not_freed_by_who_gives_the_turn_up(store: Store):
    await create(store, "s")
    put(store, "new", session_id="s")
    await commit(store, "s", "new")
    put(store, "new", session_id="s")

    await store.release_reserved("default", "s")

    assert has(store, "new")


async def test_a_commit_frees_what_the_version_before_named(store: Store):
    put(store, "a", "b")
    await create(store, "s", "a", "b")

    await commit(store, "s", "b")

    assert not has(store, "a")
    assert has(store, "b")


async def test_a_damaged_header_of_a_deleted_session_is_freed(store: Store, server):
    put(store, "a")
    await create(store, "s", "a")
    key, node = server.only_key(ending="{a}:header")
    node.set(key, b"damaged, and longer than a record", keepttl=True)

    await store.delete_manifest("default", "s")

    assert [name for name in names(server, "a") if name.endswith((":header", ":owners"))] == []


async def test_a_copy_that_replaces_a_lost_one_is_found_and_freed(store: Store, server):
    put(store, "a")
    await create(store, "s", "a")
    [part] = [name for name in names(server, "a") if name.endswith(":0")]
    server.holders()[part].delete(part)
    put(store, "a", session_id="s")

    await store.delete_manifest("default", "s")

    assert not has(store, "a")


async def test_a_fork_and_the_deletion_of_its_original_never_lose_a_segment(store: Store, server):
    for i in range(20):
        put(store, "a", "b")
        await create(store, "s", "a", "b")

        forked, _ = await asyncio.gather(
            create(store, "fork", "a", "b"),
            store.delete_manifest("default", "s"),
            return_exceptions=True,
        )

        if forked is None:
            assert has(store, "a"), i
            assert has(store, "b"), i
            await store.delete_manifest("default", "fork")
        else:
            assert isinstance(forked, NotFoundError)
        assert server.holders() == {}


async def test_of_deletes_beside_commits_nothing_is_left(store: Store, server):
    for _ in range(20):
        put(store, "old")
        await create(store, "s", "old")
        put(store, "new", session_id="s")

        outcomes = await asyncio.gather(
            commit(store, "s", "old", "new"),
            store.delete_manifest("default", "s"),
            return_exceptions=True,
        )

        assert outcomes[1] is None
        assert outcomes[0] == 2 or isinstance(outcomes[0], NotFoundError)
        assert server.holders() == {}


async def test_a_put_beside_the_deletion_of_the_last_owner_is_never_half_there(
    store: Store, server
):
    for _ in range(20):
        put(store, "a")
        await create(store, "s", "a")
        await create(store, "next")

        await asyncio.gather(
            asyncio.to_thread(put, store, "a", session_id="next"),
            store.delete_manifest("default", "s"),
        )

        assert await commit(store, "next", "a") == 2
        await store.delete_manifest("default", "next")
        assert server.holders() == {}


async def test_sessions_come_and_go_around_one_segment(store: Store, server):
    session_ids = [f"s{i}" for i in range(12)]
    put(store, "a")
    await create(store, session_ids[0], "a")

    for older, newer in pairwise(session_ids):
        await create(store, newer, "a")
        await store.delete_manifest("default", older)
        assert has(store, "a")

    await store.delete_manifest("default", session_ids[-1])
    assert server.holders() == {}


class StaleStore(RedisStore):
    """A store that reads headers as they were a moment ago, once."""

    stale: dict[str, bytes | None] | None = None

    async def _segment_headers(self, segment_ids: Sequence[str]) -> dict[str, bytes | None]:
        headers = await super()._segment_headers(segment_ids)
        stale, self.stale = self.stale, None
        return headers if stale is None else stale


async def replaced(store: Store, server) -> dict[str, bytes | None]:
    """Store another copy of ``a``; return what its header's key held before."""
    put(store, "a")
    key, node = server.only_key(ending="{a}:header")
    before = node.get(key)
    store.delete_segments(["a"])
    put(store, "a")
    return {"a": before}


async def test_a_copy_that_was_replaced_meanwhile_is_looked_at_again(server):
    store = StaleStore(parse_store_url(server.url))
    await create(store, "s")

    store.stale = await replaced(store, server)
    assert await commit(store, "s", "a") == 2
    assert store.stale is None

    store.stale = await replaced(store, server)
    await store.delete_manifest("default", "s")
    assert names(server, "a") == []
    await store.close()


async def test_a_copy_that_was_replaced_meanwhile_is_found(
    store: Store, server, monkeypatch: pytest.MonkeyPatch
):
    stale = list((await replaced(store, server)).values())
    read = segments._read
    monkeypatch.setattr(segments, "_read", lambda *args: stale.pop() if stale else read(*args))

    assert has(store, "a")
    assert stale == []


class CutStore(RedisStore):
    """A store that goes away in the middle of a commit, once.

    Attributes:
        cut: The script, or the method, that finds nobody to talk to.
    """

    cut = ""

    async def commit_manifest(self, *args: Any, **options: Any) -> int:
        if not self.cut:
            return await super().commit_manifest(*args, **options)
        cut, self.cut = self.cut, ""
        whole = getattr(self, cut)
        setattr(self, cut, self._is_away)
        try:
            return await super().commit_manifest(*args, **options)
        finally:
            setattr(self, cut, whole)

    async def _is_away(self, *args: Any, **options: Any) -> None:
        raise redis.ConnectionError("away")


# In the order in which a commit comes to them.
CUTS = ["_commit", "_enlist", "_release"]


@pytest.mark.parametrize("cut", CUTS)
async def test_a_deleted_session_frees_what_a_commit_that_was_cut_off_had_owned(server, cut: str):
    store = CutStore(parse_store_url(server.url))
    await create(store, "s")
    put(store, "new", session_id="s")
    store.cut = cut
    with pytest.raises(UnavailableError):
        await commit(store, "s", "new")

    await store.delete_manifest("default", "s")

    assert server.holders() == {}
    await store.close()


@pytest.mark.parametrize("cut", CUTS)
async def test_the_next_commit_frees_what_one_that_was_cut_off_had_owned(server, cut: str):
    store = CutStore(parse_store_url(server.url))
    put(store, "a")
    await create(store, "s", "a")
    put(store, "new", session_id="s")
    store.cut = cut
    with pytest.raises(UnavailableError):
        await commit(store, "s", "a", "new")

    await commit(store, "s", "a", version=1 if cut == "_commit" else 2)

    assert names(server, "new") == []
    assert not [key for key in server.holders() if key.endswith(":reserved")]
    await store.close()


# Results of turns


async def commit_result(store: Store, version: int, request_id: str, body: bytes) -> int:
    return await store.commit_manifest(
        "default",
        "s",
        b"",
        expected_version=version,
        ttl_s=TTL_S,
        segment_ids=[],
        result=TurnRecord(request_id, body),
    )


async def test_a_result_is_found_under_its_request(store: Store):
    await create(store, "s")
    await commit_result(store, 1, "r-1", b"\x00one")

    assert await store.get_turn_result("default", "s", "r-1") == b"\x00one"
    assert await store.get_turn_result("default", "s", "r-2") is None
    assert await store.get_turn_result("other", "s", "r-1") is None


async def test_a_commit_that_fails_stores_no_result(store: Store):
    await create(store, "s")

    with pytest.raises(ConflictError):
        await commit_result(store, 7, "r-1", b"one")

    assert await store.get_turn_result("default", "s", "r-1") is None


async def test_the_newest_64_results_are_kept(store: Store):
    await create(store, "s")

    for i in range(66):
        await commit_result(store, i + 1, f"r-{i}", str(i).encode())
    await commit_result(store, 67, "r-65", b"again")

    found = [await store.get_turn_result("default", "s", f"r-{i}") for i in range(66)]
    assert found == [None, None, *(str(i).encode() for i in range(2, 65)), b"again"]


async def test_results_are_deleted_with_their_session(store: Store, server):
    await create(store, "s")
    await commit_result(store, 1, "r-1", b"one")

    await store.delete_manifest("default", "s")

    assert server.holders() == {}


async def test_a_new_session_has_no_results_of_an_expired_namesake(store: Store, server):
    await create(store, "s")
    await commit_result(store, 1, "r-1", b"one")
    key, node = server.only_key(ending=":manifest")
    node.delete(key)

    await create(store, "s")

    assert await store.get_turn_result("default", "s", "r-1") is None


# Leases that outlive their session


async def test_a_renewed_lease_keeps_its_session_its_results_and_its_segments(store: Store, server):
    put(store, "a")
    await create(store, "s")
    await commit_result(store, 1, "r-1", b"one")
    await commit(store, "s", "a", version=2)
    token = await store.acquire_lease("default", "s", ttl_s=600)

    assert await store.renew_lease("default", "s", token, ttl_s=600)

    for key, node in server.holders().items():
        if "{default}" not in key:
            assert node.ttl(key) > 590, key


async def test_a_renewed_lease_does_not_shorten_its_session(store: Store, server):
    await create(store, "s", ttl_s=600)
    token = await store.acquire_lease("default", "s", ttl_s=10)

    assert await store.renew_lease("default", "s", token, ttl_s=10)

    assert server.ttl_s(ending=":manifest") > 590


def lose(server, key: str) -> None:
    server.holders()[key].delete(key)


def damage(server, key: str) -> None:
    server.holders()[key].set(key, b"damaged", keepttl=True)


@pytest.mark.parametrize("harm", [lose, damage])
async def test_a_lease_is_renewed_although_a_segment_is_lost(
    store: Store, server, harm: Callable[..., None]
):
    put(store, "a")
    await create(store, "s", "a")
    token = await store.acquire_lease("default", "s", ttl_s=600)
    key, _ = server.only_key(ending="{a}:header")
    harm(server, key)

    assert await store.renew_lease("default", "s", token, ttl_s=600)

    with pytest.raises((NotFoundError, CorruptError)):
        await commit(store, "s", "a")


# Segments part by part


async def write(store: Store, segment_id: str) -> bool:
    copy = store.new_copy(segment_id)
    for index, part in enumerate([b"aa", b"bb"]):
        await store.write_part(copy, index, part, ttl_s=TTL_S)
    owner = SegmentOwner("default", "s")
    return await store.publish_copy(copy, b"h", 2, ttl_s=TTL_S, owner=owner)


async def test_what_is_written_part_by_part_is_a_segment(store: Store, server):
    assert await write(store, "a")

    found = await store.open_segment("a")
    parts = [await store.read_part(found.copy, index) for index in range(found.num_parts)]
    assert (found.header, parts) == (b"h", [b"aa", b"bb"])
    assert has(store, "a")
    await store.release_segments("default", "s", ["a"])
    assert server.holders() == {}


async def test_a_copy_does_not_replace_the_one_that_is_there(store: Store, server):
    put(store, "a")
    first = await store.open_segment("a")

    assert not await write(store, "a")

    assert await store.open_segment("a") == first


async def test_a_copy_that_is_discarded_leaves_nothing(store: Store, server):
    copy = store.new_copy("a")
    await store.write_part(copy, 0, b"aa", ttl_s=TTL_S)

    await store.discard_copy(copy, 1)
    await store.discard_copy(store.new_copy("a"), 0)

    assert server.holders() == {}


async def test_a_segment_or_a_part_that_is_gone_is_not_found(store: Store, server):
    with pytest.raises(NotFoundError, match="segment a"):
        await store.open_segment("a")
    put(store, "a")
    found = await store.open_segment("a")
    server.flush()

    with pytest.raises(NotFoundError, match="segment a"):
        await store.read_part(found.copy, 0)
