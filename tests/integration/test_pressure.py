"""Memory pressure on a real store: sessions become smaller before any is evicted."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from prometheus_client import REGISTRY

from chunkserve.v1 import types_pb2
from services.compress.compaction import Compacted, Compactor
from services.compress.pressure import Marks, PressurePolicy, StoredBytes
from services.runtime.errors import NotFoundError, UnavailableError
from services.runtime.tasks import end_task
from services.store import Store
from services.store.base import StoredManifest
from tests.stored_sessions import HALF, WHOLE, open_spans, read_session, store_session

OFF = Marks(0, 0)


def policy(
    store: Store,
    high: int = 0,
    low: int = 0,
    *,
    tenant: Marks = OFF,
    tenants: tuple[str, ...] = ("default",),
    floor_ratio: float = 0.05,
) -> PressurePolicy:
    return PressurePolicy(
        store,
        Compactor(store, lease_ttl_s=30),
        tenants=tenants,
        total=Marks(high, low),
        tenant=tenant,
        floor_ratio=floor_ratio,
        lease_ttl_s=30,
    )


async def sizes(store: Store, *session_ids: str, tenant: str = "default") -> list[int]:
    manifests = [await read_session(store, name, tenant=tenant) for name in session_ids]
    return [sum(segment.size_bytes for segment in m.segments) for m in manifests]


async def exists(store: Store, session_id: str) -> bool:
    try:
        await store.get_manifest("default", session_id)
    except NotFoundError:
        return False
    return True


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_hundred_sessions_live_where_thirty_have_room(store: Store):
    names = [f"s-{number:03d}" for number in range(100)]
    spans = [(200, HALF.canonical()), (12, WHOLE)]
    manifests = [
        await store_session(store, name, spans, seed=number, updated_s=1000 + number)
        for number, name in enumerate(names)
    ]
    original = sum(await sizes(store, names[0]))
    high = 30 * original
    counted = metric("chunkserve_compacted_bytes_before_total", by="pressure", action="quantized")

    assert await policy(store, high, high * 9 // 10).relieve()

    stored = 0
    for name, before in zip(names, manifests, strict=True):
        after = await read_session(store, name)
        spans_now = open_spans(store, after.segments)
        assert [kv.num_tokens for kv in spans_now] == [200, 12]
        stored += sum(segment.size_bytes for segment in after.segments)
        for old, new in zip(before.segments, after.segments, strict=True):
            # What each gave up can be listed.
            done = new.recompression
            assert done.by_pressure
            assert done.precision in (types_pb2.PRECISION_INT8, types_pb2.PRECISION_INT4)
            assert done.original_segment_id == old.segment_id
            assert done.original_bytes == old.size_bytes > new.size_bytes
            assert done.original_kept_tokens == old.num_kept_tokens
    assert high // 2 < stored <= high * 9 // 10
    assert metric("chunkserve_stored_bytes", tenant="default") == stored
    assert (
        metric("chunkserve_compacted_bytes_before_total", by="pressure", action="quantized")
        >= counted + 100 * original
    )


async def test_nothing_happens_below_the_high_mark(store: Store):
    before = await store_session(store, "s-1")
    (size,) = await sizes(store, "s-1")

    assert await policy(store, size, size // 2).relieve()

    assert await read_session(store, "s-1") == before


async def test_the_coldest_give_first_and_no_more_than_is_needed(store: Store):
    for number in range(4):
        await store_session(store, f"s-{number}", seed=number, updated_s=1000 - number)
    (size,) = await sizes(store, "s-0")

    await policy(store, 4 * size - 1, 4 * size - 2).relieve()

    assert [s == size for s in await sizes(store, "s-0", "s-1", "s-2", "s-3")] == [
        True,
        True,
        True,
        False,
    ]


async def test_steps_go_from_mild_to_hard(store: Store):
    await store_session(store, "s-1", [(400, HALF.canonical())])
    (size,) = await sizes(store, "s-1")

    seen = []
    for divisor in (2, 4, 8, 16, 32):
        await policy(store, size // divisor, size // divisor).relieve()
        segment = (await read_session(store, "s-1")).segments[0]
        seen.append((segment.recompression.precision, segment.num_kept_tokens))

    int8, int4 = types_pb2.PRECISION_INT8, types_pb2.PRECISION_INT4
    assert seen[:2] == [(int8, 200), (int4, 200)]
    assert [kept for _, kept in seen[2:]] == sorted({kept for _, kept in seen[2:]}, reverse=True)
    assert all(precision == int4 and kept < 200 for precision, kept in seen[2:])


async def test_only_when_nothing_else_is_left_are_the_coldest_evicted(store: Store):
    for number in range(4):
        await store_session(store, f"s-{number}", seed=number, updated_s=1000 + number)
    evicted = metric("chunkserve_evicted_sessions_total", tenant="default")
    relief = policy(store, 1, 2500, floor_ratio=0.2)

    await relief.relieve()

    left = [name for name in ("s-0", "s-1", "s-2", "s-3") if await exists(store, name)]
    assert left == ["s-3"] or left == ["s-2", "s-3"]
    assert sum(await sizes(store, *left)) <= 2500
    assert (await read_session(store, "s-3")).segments[0].num_kept_tokens == 16
    gone = metric("chunkserve_evicted_sessions_total", tenant="default") - evicted
    assert gone == 4 - len(left)


async def test_session_in_use_and_damaged_session_are_passed_over(store: Store, valkey_url: str):
    busy = await store_session(store, "s-busy", seed=1, updated_s=1000)
    damaged = await store_session(store, "s-damaged", seed=2, updated_s=1001)
    await store_session(store, "s-free", seed=3, updated_s=1002)
    (size,) = await sizes(store, "s-free")
    await store.acquire_lease("default", "s-busy", ttl_s=60)
    store.delete_segments([damaged.segments[0].segment_id])

    await policy(store, 3 * size - 1, 3 * size - 1).relieve()

    assert await read_session(store, "s-busy") == busy
    assert await read_session(store, "s-damaged") == damaged
    assert (await sizes(store, "s-free"))[0] < size


async def test_a_session_in_use_is_not_evicted(store: Store):
    await store_session(store, "s-busy")
    await store.acquire_lease("default", "s-busy", ttl_s=60)

    await policy(store, 1, 1).relieve()

    assert await exists(store, "s-busy")


async def test_nothing_is_dropped_before_sessions_in_use_had_a_second_chance(store: Store):
    await store_session(store, "s-busy", seed=1, updated_s=1000)
    free = await store_session(store, "s-free", seed=2, updated_s=1001)
    await store.acquire_lease("default", "s-busy", ttl_s=60)
    pressed = policy(store, 1, 1)

    await pressed.relieve()
    once = (await read_session(store, "s-free")).segments[0]
    await pressed.relieve()

    assert once.num_kept_tokens == free.segments[0].num_kept_tokens
    assert once.size_bytes < free.segments[0].size_bytes
    assert not await exists(store, "s-free")  # one byte is room for nobody
    assert await exists(store, "s-busy")


async def test_each_tenant_has_marks_of_its_own(store: Store):
    for tenant, count in (("large", 3), ("small", 1)):
        for number in range(count):
            await store_session(store, f"s-{number}", tenant=tenant, seed=number)
    (size,) = await sizes(store, "s-0", tenant="small")

    await policy(store, tenant=Marks(2 * size, 2 * size), tenants=("large", "small")).relieve()

    assert await sizes(store, "s-0", tenant="small") == [size]
    assert sum(await sizes(store, "s-0", "s-1", "s-2", tenant="large")) <= 2 * size


async def test_shared_segments_count_once(store: Store):
    for number in range(10):
        await store_session(store, f"s-{number}")
    (size,) = await sizes(store, "s-0")

    await policy(store, size, size // 2).relieve()

    assert await sizes(store, "s-0") == [size]


def test_stored_bytes_of_a_segment_go_with_the_last_session_that_names_it():
    stored = StoredBytes()

    totals = []
    for change, names in (
        (stored.add, {"a": 5, "b": 2}),
        (stored.add, {"a": 5}),
        (stored.remove, {"a": 5, "b": 2}),
        (stored.remove, {"a": 5}),
    ):
        change(names)
        totals.append(stored.total)

    assert totals == [7, 7, 5, 0]


async def test_who_finds_another_process_at_it_leaves_it_the_work(store: Store):
    before = await store_session(store, "s-1")
    other = await store.acquire_lease("", "pressure", ttl_s=60)

    assert not await policy(store, 1, 1).relieve()
    assert await read_session(store, "s-1") == before

    await store.release_lease("", "pressure", other)
    assert await policy(store, 1, 1).relieve()


class FlakyCompactor(Compactor):
    """Fails once, as if the store were away."""

    failed = False

    def __init__(self, store: Store) -> None:
        super().__init__(store, lease_ttl_s=30)
        self.has_worked = asyncio.Event()

    async def compact(self, *args: Any, **options: Any) -> Compacted:
        if not self.failed:
            self.failed = True
            raise UnavailableError("away")
        done = await super().compact(*args, **options)
        self.has_worked.set()
        return done


async def test_outage_of_the_store_is_survived(store: Store):
    await store_session(store, "s-1")
    (size,) = await sizes(store, "s-1")
    compactor = FlakyCompactor(store)
    relief = PressurePolicy(
        store,
        compactor,
        tenants=("default",),
        total=Marks(size - 1, size - 1),
        tenant=OFF,
        floor_ratio=0.05,
        lease_ttl_s=30,
    )

    running = asyncio.create_task(relief.run(interval_s=0.01))
    async with asyncio.timeout(60):
        await compactor.has_worked.wait()
    await end_task(running)

    assert compactor.failed
    assert await sizes(store, "s-1") != [size]


class VanishingStore:
    """Sessions expire in the moment in which they are reached for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_manifest(self, tenant: str, session_id: str) -> StoredManifest:
        if session_id == "s-listed":
            raise NotFoundError("gone")
        return await self._store.get_manifest(tenant, session_id)

    async def delete_manifest(self, tenant: str, session_id: str) -> None:
        await self._store.delete_manifest(tenant, session_id)
        raise NotFoundError("gone")


async def test_session_that_expires_meanwhile_is_no_error(store: Store):
    for number, name in enumerate(("s-listed", "s-evicted", "s-left")):
        await store_session(store, name, [(8, WHOLE)], seed=number, updated_s=1000 + number)
    evicted = metric("chunkserve_evicted_sessions_total", tenant="default")
    relief = policy(cast(Store, VanishingStore(store)), 1, 2500)

    assert await relief.relieve()

    assert not await exists(store, "s-evicted")
    assert await exists(store, "s-left")
    assert metric("chunkserve_evicted_sessions_total", tenant="default") == evicted


def test_policy_without_marks_is_off(store: Store):
    assert not policy(store).is_enabled
    assert policy(store, 1).is_enabled
    assert policy(store, tenant=Marks(1, 1)).is_enabled
