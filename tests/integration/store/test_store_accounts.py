"""What a tenant uses, counted on every kind of server."""

from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import ConflictError
from services.store import Store
from services.store.base import TenantUsage

TTL_S = 60.0


async def create(store: Store, session_id: str, *segment_ids: str, tenant: str = "default") -> None:
    await store.create_manifest(tenant, session_id, b"", ttl_s=TTL_S, segment_ids=segment_ids)


def put(store: Store, segment_id: str, size_bytes: int) -> None:
    """Store a segment that takes so many bytes, header included."""
    store.put_segment(segment_id, b"h" * 10, [b"p" * (size_bytes - 10)], ttl_s=TTL_S)


async def test_sessions_and_the_bytes_that_they_name_are_counted(store: Store):
    put(store, "a", 100)
    put(store, "b", 1000)

    await create(store, "s-1", "a")
    await create(store, "s-2", "a", "b")
    await create(store, "s-3")
    await create(store, "foreign", "a", tenant="other")

    assert await store.usage("default") == TenantUsage(3, 1200)
    assert await store.usage("other") == TenantUsage(1, 100)
    assert await store.usage("nobody") == TenantUsage(0, 0)


async def test_a_commit_changes_what_its_session_counts(store: Store):
    put(store, "a", 100)
    put(store, "b", 1000)
    await create(store, "s", "a")

    for version, segment_ids in ((1, ["a", "b"]), (2, ["b"])):
        await store.commit_manifest(
            "default",
            "s",
            b"",
            expected_version=version,
            ttl_s=TTL_S,
            segment_ids=segment_ids,
        )
    with pytest.raises(ConflictError):
        await store.commit_manifest(
            "default", "s", b"", expected_version=9, ttl_s=TTL_S, segment_ids=["b"]
        )

    assert await store.usage("default") == TenantUsage(1, 1000)


async def test_a_deleted_session_counts_no_more(store: Store, server):
    put(store, "a", 100)
    await create(store, "s-1", "a")
    await create(store, "s-2", "a")

    await store.delete_manifest("default", "s-1")
    assert await store.usage("default") == TenantUsage(1, 100)
    await store.delete_manifest("default", "s-2")

    assert await store.usage("default") == TenantUsage(0, 0)
    assert server.holders() == {}


async def test_an_expired_session_counts_no_more(store: Store, server):
    put(store, "a", 100)
    await create(store, "dead", "a")
    await create(store, "s", "a")
    key, node = server.only_key(ending=":account")
    node.zadd(key, {"dead": 1})

    assert await store.usage("default") == TenantUsage(1, 100)

    bytes_key, node = server.only_key(ending="{default}:bytes")
    assert node.hgetall(bytes_key) == {b"": b"100", b"s": b"100"}


async def test_a_session_that_is_made_again_is_counted_once(store: Store, server):
    put(store, "a", 100)
    await create(store, "s", "a")
    key, node = server.only_key(ending=":manifest")
    node.delete(key)

    await create(store, "s", "a")

    assert await store.usage("default") == TenantUsage(1, 100)


async def test_no_more_turns_run_than_the_limit(store: Store):
    tokens = await asyncio.gather(
        *(store.begin_turn("default", limit=3, ttl_s=TTL_S) for _ in range(10))
    )

    running = [token for token in tokens if token is not None]
    assert len(running) == 3
    assert await store.begin_turn("other", limit=3, ttl_s=TTL_S) is not None

    await store.end_turn("default", running[0])
    await store.end_turn("default", "nobody")
    assert await store.begin_turn("default", limit=3, ttl_s=TTL_S) is not None
    assert await store.begin_turn("default", limit=3, ttl_s=TTL_S) is None


async def test_a_turn_counts_until_its_time_is_over_unless_it_is_renewed(store: Store, server):
    dead = await store.begin_turn("default", limit=2, ttl_s=TTL_S)
    renewed = await store.begin_turn("default", limit=2, ttl_s=TTL_S)
    assert dead is not None
    assert renewed is not None
    key, node = server.only_key(ending=":running")
    node.zadd(key, {dead: 1, renewed: 1})

    await store.renew_turn("default", renewed, ttl_s=600)

    assert server.ttl_s(ending=":running") > 590
    assert await store.begin_turn("default", limit=2, ttl_s=TTL_S) is not None
    assert await store.begin_turn("default", limit=2, ttl_s=TTL_S) is None
