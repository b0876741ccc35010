"""What the store says when the server is away, full, hung or wrong. Nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from services.runtime.errors import NotFoundError, OverloadedError, UnavailableError
from services.store import Store, keys, open_store
from services.store.base import WorkerInfo
from services.store.embedded import EmbeddedOptions, EmbeddedValkey
from services.store.heartbeat import keep_announced

MIB = 1 << 20
WORKER = WorkerInfo("w", "decode", "127.0.0.1:1", "m", "f", 8, 0, 1)

CALLS: dict[str, Callable[[Store], object]] = {
    "has_segment": lambda s: s.has_segment("s", ttl_s=9),
    "put_segment": lambda s: s.put_segment("s", b"h", [b"part"], ttl_s=9),
    "get_header": lambda s: s.get_header("s"),
    "fetch_parts": lambda s: list(s.fetch_parts("s", [4], memoryview(bytearray(4)))),
    "delete_segments": lambda s: s.delete_segments(["s"]),
    "create_manifest": lambda s: s.create_manifest("t", "s", b"", ttl_s=9),
    "get_manifest": lambda s: s.get_manifest("t", "s"),
    "commit_manifest": lambda s: s.commit_manifest(
        "t", "s", b"", expected_version=1, ttl_s=9, segment_ids=["s"]
    ),
    "delete_manifest": lambda s: s.delete_manifest("t", "s"),
    "list_sessions": lambda s: s.list_sessions("t", page_size=1, page_token=""),
    "acquire_lease": lambda s: s.acquire_lease("t", "s", ttl_s=9),
    "renew_lease": lambda s: s.renew_lease("t", "s", "token", ttl_s=9),
    "release_lease": lambda s: s.release_lease("t", "s", "token"),
    "announce": lambda s: s.announce(WORKER, ttl_s=9),
    "withdraw": lambda s: s.withdraw(WORKER),
    "workers": lambda s: s.workers(),
    "ping": lambda s: s.ping(),
}


async def call(name: str, store: Store) -> object:
    """Call a method as its users do: blocking ones in a thread."""
    if asyncio.iscoroutinefunction(getattr(store, name)):
        return await CALLS[name](store)
    return await asyncio.to_thread(CALLS[name], store)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = open_store(url)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server of this test alone, to be killed."""
    with EmbeddedValkey(EmbeddedOptions(directory=tmp_path)) as server:
        yield server


@pytest.fixture
def hung_url() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        yield f"redis://:secret-password@127.0.0.1:{port}/0?socket_timeout=0.2"


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
@pytest.mark.parametrize("name", CALLS)
async def test_nobody_listens(scheme: str, name: str, unused_tcp_port: int):
    url = f"{scheme}://:secret-password@127.0.0.1:{unused_tcp_port}/0"
    async with opened(url) as store:
        with pytest.raises(UnavailableError) as caught:
            await call(name, store)

    message = caught.value.message
    assert f"127.0.0.1:{unused_tcp_port}" in message
    assert "check that it runs" in message
    assert "secret-password" not in message
    assert caught.value.retry_after_s


@pytest.mark.parametrize("name", CALLS)
async def test_a_server_that_does_not_answer_is_given_up(name: str, hung_url: str):
    start = time.monotonic()
    async with opened(hung_url) as store:
        with pytest.raises(UnavailableError, match="imeout"):
            await call(name, store)

    assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", CALLS)
async def test_killed_server_is_unavailable_and_works_again_when_it_is_back(
    name: str, own_server: EmbeddedValkey, tmp_path: Path
):
    async with opened(own_server.url) as store:
        await store.ping()
        await call("put_segment", store)
        os.kill(own_server.pid, signal.SIGKILL)
        own_server.stop()

        with pytest.raises(UnavailableError):
            await call(name, store)

        with EmbeddedValkey(EmbeddedOptions(directory=tmp_path)):
            await store.create_manifest("t", "new", b"body", ttl_s=60)
            assert (await store.get_manifest("t", "new")).body == b"body"
            await call("put_segment", store)
            assert await asyncio.to_thread(store.get_header, "s") == b"h"


async def test_connections_from_before_a_restart_are_not_used(
    own_server: EmbeddedValkey, tmp_path: Path
):
    async with opened(own_server.url) as store:
        await store.ping()
        await call("put_segment", store)
        os.kill(own_server.pid, signal.SIGKILL)
        own_server.stop()
        with EmbeddedValkey(EmbeddedOptions(directory=tmp_path)):
            await asyncio.to_thread(lambda: None)  # the event loop sees the closed connection

            await store.ping()
            await call("put_segment", store)


async def test_server_killed_in_the_middle_of_a_fetch(own_server: EmbeddedValkey):
    async with opened(own_server.url) as store:
        sizes = [4 * MIB] * 8
        store.put_segment("s", b"h", [bytes(size) for size in sizes], ttl_s=60)
        fetching = iter(store.fetch_parts("s", sizes, memoryview(bytearray(sum(sizes)))))
        next(fetching)
        os.kill(own_server.pid, signal.SIGKILL)

        with pytest.raises(UnavailableError):
            list(fetching)


async def test_server_that_stalls_in_the_middle_of_a_fetch_is_given_up(
    own_server: EmbeddedValkey,
):
    async with (
        opened(own_server.url) as patient,
        opened(f"{own_server.url}?socket_timeout=2") as store,
    ):
        sizes = [4 * MIB] * 8
        patient.put_segment("s", b"h", [bytes(size) for size in sizes], ttl_s=60)
        fetching = iter(store.fetch_parts("s", sizes, memoryview(bytearray(sum(sizes)))))
        next(fetching)
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnavailableError, match="timed out"):
                list(fetching)
        finally:
            os.kill(own_server.pid, signal.SIGCONT)

        assert store.get_header("s") == b"h"


@contextlib.asynccontextmanager
async def cut_off_after(num_bytes: int, server: EmbeddedValkey) -> AsyncIterator[str]:
    """A way to a server, by its URL, that breaks once so many bytes were sent."""
    [path] = re.findall(r"unix://([^?]+)", server.url)

    async def answer(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(MIB):
            sink.write(data)

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        answers, to_server = await asyncio.open_unix_connection(path)
        answering = asyncio.create_task(answer(answers, sink))
        left = num_bytes
        while left and (data := await source.read(min(left, MIB))):
            to_server.write(data)
            await to_server.drain()
            left -= len(data)
        answering.cancel()
        for end in (sink, to_server):
            end.transport.abort()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"redis://127.0.0.1:{port}/0"


async def test_a_put_that_is_cut_off_leaves_nothing_visible(own_server: EmbeddedValkey):
    parts = [bytes(MIB) for _ in range(16)]
    async with cut_off_after(8 * MIB, own_server) as url, opened(url) as cut_off:
        with pytest.raises(UnavailableError):
            await asyncio.to_thread(cut_off.put_segment, "s", b"h", parts, ttl_s=60)

    with redis.Redis.from_url(own_server.url) as client:
        assert 0 < client.dbsize() < len(parts)
        assert all(client.ttl(key) > 0 for key in client.scan_iter())
    async with opened(own_server.url) as store:
        assert not store.has_segment("s", ttl_s=60)
        with pytest.raises(NotFoundError):
            store.get_header("s")
        store.put_segment("s", b"h", parts[:2], ttl_s=60)
        assert store.has_segment("s", ttl_s=60)


# Full


@pytest.fixture
def full_server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(EmbeddedOptions(maxmemory_bytes=16 * MIB)) as server:
        yield server


async def test_a_full_store_refuses_a_segment_and_shows_nothing_of_it(full_server: EmbeddedValkey):
    parts = [bytes(MIB) for _ in range(40)]
    async with opened(full_server.url) as store:
        with pytest.raises(OverloadedError) as caught:
            store.put_segment("s", b"h", parts, ttl_s=60)

        assert "full" in caught.value.message
        assert caught.value.error_reason == "STORE_FULL"
        assert not store.has_segment("s", ttl_s=60)
        with pytest.raises(NotFoundError):
            store.get_header("s")
        with redis.Redis.from_url(full_server.url) as client:
            assert client.dbsize() == 0, "what was written of it is removed"
        store.put_segment("small", b"h", [bytes(MIB)], ttl_s=60)
        assert store.has_segment("small", ttl_s=60)


async def test_a_full_store_refuses_sessions(full_server: EmbeddedValkey):
    async with opened(full_server.url) as store:
        await store.create_manifest("t", "s", b"v1", ttl_s=60)
        with redis.Redis.from_url(full_server.url) as client:
            client.config_set("maxmemory", 1)

        for name in ("acquire_lease", "announce"):
            with pytest.raises(OverloadedError):
                await call(name, store)
        with pytest.raises(OverloadedError):
            await store.create_manifest("t", "new", b"v1", ttl_s=60)
        with pytest.raises(OverloadedError):
            await store.commit_manifest(
                "t", "s", b"v2", expected_version=1, ttl_s=60, segment_ids=[]
            )

        assert (await store.get_manifest("t", "s")).version == 1
        await store.delete_manifest("t", "s")


# Wrong


async def test_a_wrong_password_is_named_but_not_shown():
    with EmbeddedValkey(EmbeddedOptions(port=0, password="right-password")) as server:
        wrong = server.url.replace("right-", "wrong-")
        async with opened(wrong) as store:
            for name in ("ping", "has_segment"):
                with pytest.raises(
                    UnavailableError, match="check the user, its password"
                ) as caught:
                    await call(name, store)
                assert "wrong-password" not in caught.value.message

        async with opened(server.url.replace(":right-password@", "")) as store:
            with pytest.raises(UnavailableError, match="check the user, its password"):
                await store.ping()


async def test_a_user_without_permission_is_told_so(acl_server):
    acl_server.nodes[0].acl_setuser(
        "reader", enabled=True, nopass=True, keys=["cs2:*"], categories=["+@read", "+@connection"]
    )
    url = acl_server.url.split("@")[1]
    async with opened(f"redis://reader:any@{url}") as store:
        with pytest.raises(UnavailableError, match="its permissions"):
            await call("acquire_lease", store)


async def test_a_plain_url_to_a_cluster_names_the_right_scheme(cluster_server):
    [elsewhere] = [
        name
        for name in ("a", "b", "c", "d", "e", "f", "g", "h")
        if _node_of(cluster_server, keys.segment_header(name)) != cluster_server.nodes[0]
    ][:1]
    async with opened(cluster_server.url.replace("redis+cluster://", "redis://")) as store:
        with pytest.raises(UnavailableError, match=r"must begin with redis\+cluster://"):
            store.has_segment(elsewhere, ttl_s=1)


def _node_of(cluster, key: str) -> redis.Redis:
    """Return the node that does not send us elsewhere."""
    for node in cluster.nodes:
        with contextlib.suppress(redis.ResponseError):
            node.exists(key)
            return node
    raise AssertionError("no node holds the slot")


async def test_a_cluster_url_to_a_plain_server_is_unavailable():
    with EmbeddedValkey(EmbeddedOptions(port=0)) as server:
        async with opened(server.url.replace("redis://", "redis+cluster://")) as store:
            for name in ("ping", "has_segment"):
                with pytest.raises(UnavailableError, match=r"[Cc]luster"):
                    await call(name, store)


async def test_a_key_of_another_type_is_no_crash(store: Store, server):
    """Somebody else's data under our names."""
    holder = server.nodes[0]
    for node in server.nodes:
        with contextlib.suppress(redis.ResponseError):
            node.rpush(keys.segment_header("s"), b"x")
            node.expire(keys.segment_header("s"), 60)
            holder = node
    assert holder.type(keys.segment_header("s")) == b"list"

    with pytest.raises(UnavailableError, match="WRONGTYPE"):
        store.get_header("s")
    with pytest.raises(UnavailableError, match="WRONGTYPE"):
        list(store.fetch_parts("s", [1], memoryview(bytearray(1))))


async def test_an_error_in_the_middle_of_a_fetch_leaves_no_stale_answer(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb", b"cc"], ttl_s=60)
    key, node = server.only_key(ending=":1")
    node.delete(key)
    node.rpush(key, b"x")
    node.expire(key, 60)

    with pytest.raises(UnavailableError, match="WRONGTYPE"):
        list(store.fetch_parts("s", [2, 2, 2], memoryview(bytearray(6))))

    assert store.get_header("s") == b"h"


# Cluster


async def test_slots_that_moved_are_found_again(cluster_server):
    """Moves a slot while the store knows its old place."""
    async with opened(cluster_server.url) as store:
        store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)
        await store.create_manifest("t", "s", b"v1", ttl_s=60)
        for name in ("cs2:{s}:header", "cs2:{t/s}:manifest"):
            _move_slot(cluster_server, name)

        assert store.get_header("s") == b"h"
        out = bytearray(4)
        list(store.fetch_parts("s", [2, 2], memoryview(out)))
        assert out == b"aabb"
        assert (await store.get_manifest("t", "s")).version == 1
        assert (
            await store.commit_manifest(
                "t", "s", b"v2", expected_version=1, ttl_s=60, segment_ids=["s"]
            )
            == 2
        )
    cluster_server.flush()


def _move_slot(cluster, key: str) -> None:
    """Move the slot of a key, with its keys, to another node."""
    slot = int(cluster.nodes[0].execute_command("CLUSTER KEYSLOT", key))
    ids = [node.execute_command("CLUSTER MYID").decode() for node in cluster.nodes]
    source = cluster.holders()[key]
    i = cluster.nodes.index(source)
    j = (i + 1) % len(cluster.nodes)
    target = cluster.nodes[j]
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[i])
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[j])
    names = source.execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
    to = target.connection_pool.connection_kwargs
    source.execute_command("MIGRATE", to["host"], to["port"], "", 0, 5000, "KEYS", *names)
    for node in (target, source):
        node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[j])
    for node in cluster.nodes:
        if node not in (target, source):
            node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[j])


# Heartbeat


async def test_a_heartbeat_survives_an_outage(own_server: EmbeddedValkey, tmp_path: Path):
    beats: asyncio.Queue[None] = asyncio.Queue()

    def describe() -> WorkerInfo:
        beats.put_nowait(None)
        return WORKER

    async def several_beats() -> None:
        for _ in range(beats.qsize() + 3):
            await asyncio.wait_for(beats.get(), 30)

    async with opened(own_server.url) as store:
        with capture_logs() as logs:
            beating = asyncio.create_task(
                keep_announced(store, describe, interval_s=0.02, ttl_s=60)
            )
            await several_beats()
            os.kill(own_server.pid, signal.SIGKILL)
            own_server.stop()
            await several_beats()
            with EmbeddedValkey(EmbeddedOptions(directory=tmp_path)):
                while "heartbeat.recovered" not in {entry["event"] for entry in logs}:
                    await several_beats()
                assert list(await store.workers()) == [WORKER]
                beating.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await beating
                assert list(await store.workers()) == []

    events = [entry["event"] for entry in logs]
    assert events == ["heartbeat.failing", "store.away", "store.back", "heartbeat.recovered"]


async def test_a_heartbeat_ends_although_the_store_is_away(own_server: EmbeddedValkey):
    async with opened(own_server.url) as store:
        await store.ping()
        os.kill(own_server.pid, signal.SIGKILL)
        own_server.stop()
        beating = asyncio.create_task(
            keep_announced(store, lambda: WORKER, interval_s=0.02, ttl_s=5)
        )
        await asyncio.wait([beating], timeout=0.1)
        beating.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(beating, 30)


@pytest.mark.parametrize(("interval_s", "ttl_s"), [(0, 5), (5, 5), (-1, 5)])
async def test_a_heartbeat_slower_than_its_ttl_is_refused(interval_s: float, ttl_s: float):
    async with opened("redis://127.0.0.1:1/0") as store:
        with pytest.raises(ValueError, match="heartbeat"):
            await keep_announced(store, lambda: WORKER, interval_s=interval_s, ttl_s=ttl_s)
