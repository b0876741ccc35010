"""The registry of workers on every kind of server, and the heartbeat that feeds it."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from services.store import Store, keys
from services.store.base import WorkerInfo
from services.store.heartbeat import keep_announced


def worker(worker_id: str = "w-1", *, num_active: int = 0) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role="decode",
        address="127.0.0.1:5000",
        model="smollm2",
        fingerprint="f",
        max_model_len=8192,
        num_active=num_active,
        num_slots=4,
        default_policy=b"\x00\xff\n",
    )


async def test_no_workers(store: Store):
    assert list(await store.workers()) == []


async def test_announced_workers_are_listed(store: Store):
    await store.announce(worker("b"), ttl_s=60)
    await store.announce(worker("a"), ttl_s=60)

    assert list(await store.workers()) == [worker("a"), worker("b")]


async def test_a_heartbeat_replaces_the_entry(store: Store):
    await store.announce(worker(), ttl_s=60)
    await store.announce(worker(num_active=3), ttl_s=60)

    assert list(await store.workers()) == [worker(num_active=3)]


async def test_a_withdrawn_worker_is_gone(store: Store, server):
    await store.announce(worker("a"), ttl_s=60)
    await store.announce(worker("b"), ttl_s=60)

    await store.withdraw(worker("a"))
    assert list(await store.workers()) == [worker("b")]

    await store.withdraw(worker("b"))
    await store.withdraw(worker("never announced"))
    assert server.holders() == {}


async def test_a_worker_without_heartbeat_is_gone(store: Store, server, until):
    await store.announce(worker("dead"), ttl_s=0.05)
    await store.announce(worker("alive"), ttl_s=60)
    until(lambda: keys.worker("dead") not in server.holders())

    assert list(await store.workers()) == [worker("alive")]

    index, node = server.only_key(ending=keys.worker_index())
    assert node.smembers(index) == {b"alive"}
    await store.announce(worker("dead"), ttl_s=60)
    assert list(await store.workers()) == [worker("alive"), worker("dead")]


async def test_the_index_lives_as_long_as_its_longest_worker(store: Store, server):
    await store.announce(worker("long"), ttl_s=600)
    await store.announce(worker("short"), ttl_s=6)

    assert server.ttl_s(ending=keys.worker_index()) > 590


@pytest.mark.parametrize(
    "entry",
    [b"no json", b"[]", b"{}", json.dumps({"default_policy": "!"}).encode()],
    ids=["text", "list", "no_fields", "no_base64"],
)
async def test_an_entry_that_cannot_be_read_is_passed_over(store: Store, server, entry: bytes):
    await store.announce(worker("ours"), ttl_s=60)
    await store.announce(worker("theirs"), ttl_s=60)
    key, node = server.only_key(ending=keys.worker("theirs"))
    node.set(key, entry, keepttl=True)

    assert list(await store.workers()) == [worker("ours")]


async def test_fields_of_a_later_release_are_ignored(store: Store, server):
    await store.announce(worker(), ttl_s=60)
    key, node = server.only_key(ending=keys.worker("w-1"))
    node.set(key, json.dumps(json.loads(node.get(key)) | {"zone": "a"}), keepttl=True)

    assert list(await store.workers()) == [worker()]


async def test_a_heartbeat_keeps_a_worker_listed_until_it_is_cancelled(store: Store):
    num_described = 0
    is_beating = asyncio.Event()

    def describe() -> WorkerInfo:
        nonlocal num_described
        num_described += 1
        if num_described == 5:
            is_beating.set()
        return dataclasses.replace(worker(), num_active=num_described)

    beating = asyncio.create_task(keep_announced(store, describe, interval_s=0.02, ttl_s=60))
    await asyncio.wait_for(is_beating.wait(), 30)
    [listed] = await store.workers()
    beating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beating

    assert listed.num_active >= 4
    assert list(await store.workers()) == []
