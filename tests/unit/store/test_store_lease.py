"""The turn lease and cleaning up, over a store that is told when to fail."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from services.runtime.errors import ConflictError, NotFoundError, UnavailableError
from services.store.base import SessionStore
from services.store.lease import completed, counted_turn, finish, turn_lease

WAIT_S = 10.0


class LeaseStore:
    """The lease methods of a store, with answers that are set beforehand."""

    def __init__(self, *renewals: bool | Exception) -> None:
        self.renewals = list(renewals)
        self.all_renewed = asyncio.Event()
        self.is_held = False
        self.is_released = asyncio.Event()
        self.release_error: Exception | None = None
        self.refusals: list[Exception] = []
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def acquire_lease(self, tenant: str, session_id: str, *, ttl_s: float) -> str:
        self.is_asked.set()
        await self.may_answer.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        self.is_held = True
        return "token"

    async def renew_lease(self, tenant: str, session_id: str, token: str, *, ttl_s: float) -> bool:
        if not self.renewals:
            self.all_renewed.set()
            return True
        answer = self.renewals.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def release_lease(self, tenant: str, session_id: str, token: str) -> None:
        if self.release_error is not None:
            raise self.release_error
        self.is_held = False
        self.is_released.set()


def lease(store: LeaseStore, ttl_s: float = 0.03, **options: bool):  # type: ignore[no-untyped-def]
    return turn_lease(as_store(store), "default", "s-1", ttl_s=ttl_s, **options)


def as_store(store: LeaseStore) -> SessionStore:
    return store  # type: ignore[return-value]  # only what a lease needs


async def test_a_lost_lease_cancels_the_turn() -> None:
    store = LeaseStore(True, False)

    with pytest.raises(ConflictError) as caught:
        async with lease(store):
            await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)

    assert caught.value.error_reason == "LEASE_LOST"
    assert not store.is_held


async def test_a_store_that_hiccups_does_not_end_the_turn() -> None:
    store = LeaseStore(UnavailableError("away"), True)

    async with lease(store, ttl_s=3):
        await asyncio.wait_for(store.all_renewed.wait(), WAIT_S)

    assert not store.is_held


async def test_a_store_that_stays_away_ends_the_turn() -> None:
    store = LeaseStore(*[UnavailableError("away")] * 100)

    with pytest.raises(UnavailableError, match="away"):
        async with lease(store):
            await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)


async def test_a_lease_that_ran_out_while_the_store_was_away_is_lost_to_the_outage() -> None:
    store = LeaseStore(UnavailableError("away"), False)

    with pytest.raises(UnavailableError, match="away"):
        async with lease(store, ttl_s=0.3):
            await asyncio.wait_for(asyncio.Event().wait(), WAIT_S)


async def test_an_error_of_the_turn_comes_out_as_it_is_and_frees_the_lease() -> None:
    store = LeaseStore()

    with pytest.raises(NotFoundError, match="gone"):
        async with lease(store):
            raise NotFoundError("gone")

    assert not store.is_held


class LosingStore(LeaseStore):
    """A store in whose first renewal a cancellation is lost, because the answer has just come."""

    def __init__(self) -> None:
        super().__init__()
        self.is_renewing = asyncio.Event()
        self.num_lost = 0

    async def renew_lease(self, tenant: str, session_id: str, token: str, *, ttl_s: float) -> bool:
        self.is_renewing.set()
        if not self.num_lost:
            # What ``asyncio.wait_for`` of Python 3.11 does, by which redis-py sends a command.
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            self.num_lost += 1
        return True


@pytest.mark.parametrize("error", [None, NotFoundError("gone")], ids=["well", "early"])
async def test_a_turn_ends_although_the_cancellation_of_its_renewal_is_lost(
    error: NotFoundError | None,
) -> None:
    store = LosingStore()

    async def turn() -> None:
        async with lease(store):
            await store.is_renewing.wait()
            if error is not None:
                raise error

    ended, _ = await asyncio.wait([task := asyncio.create_task(turn())], timeout=WAIT_S)

    assert ended, "the turn still waits for its renewal"
    assert task.exception() is error
    assert store.num_lost == 1
    assert not store.is_held


async def test_a_lease_that_cannot_be_released_does_not_fail_the_turn() -> None:
    store = LeaseStore()
    store.release_error = UnavailableError("away")

    async with lease(store):
        pass

    assert store.is_held


async def test_a_lease_is_released_once_the_store_is_back() -> None:
    store = LeaseStore()
    async with lease(store, ttl_s=60):
        store.release_error = UnavailableError("away")
    assert store.is_held

    store.release_error = None
    await asyncio.wait_for(store.is_released.wait(), WAIT_S)

    assert not store.is_held


class TurnStore:
    """The counted turns of a store."""

    def __init__(self, *renewals: Exception | None, has_room: bool = True) -> None:
        self.renewals = list(renewals)
        self.all_renewed = asyncio.Event()
        self.has_room = has_room
        self.ended: list[str] = []

    async def begin_turn(self, tenant: str, *, limit: int, ttl_s: float) -> str | None:
        return "token" if self.has_room else None

    async def renew_turn(self, tenant: str, token: str, *, ttl_s: float) -> None:
        if not self.renewals:
            self.all_renewed.set()
            return
        if (error := self.renewals.pop(0)) is not None:
            raise error

    async def end_turn(self, tenant: str, token: str) -> None:
        self.ended.append(token)


async def test_a_turn_is_counted_until_it_ends_although_the_store_goes_away() -> None:
    store = TurnStore(None, *[UnavailableError("away")] * 5)

    counted = counted_turn(store, "default", limit=1, ttl_s=0.003)  # type: ignore[arg-type]
    async with counted as has_room:
        await asyncio.wait_for(store.all_renewed.wait(), WAIT_S)

    assert has_room
    assert store.ended == ["token"]


async def test_a_turn_without_room_is_not_counted() -> None:
    store = TurnStore(has_room=False)

    async with counted_turn(store, "default", limit=1, ttl_s=1) as has_room:  # type: ignore[arg-type]
        assert not has_room

    assert store.ended == []


async def test_who_waits_gets_the_lease_when_it_is_free() -> None:
    store = LeaseStore()
    store.refusals = [ConflictError("busy")] * 3

    async with lease(store, waits=True):
        assert store.is_held

    assert store.refusals == []


async def test_who_does_not_wait_is_refused_at_once() -> None:
    store = LeaseStore()
    store.refusals = [ConflictError("busy")]

    with pytest.raises(ConflictError, match="busy"):
        async with lease(store):
            pass


async def test_a_store_that_is_away_is_not_waited_for() -> None:
    store = LeaseStore()
    store.refusals = [ConflictError("busy"), UnavailableError("away")]

    with pytest.raises(UnavailableError, match="away"):
        async with lease(store, waits=True):
            pass


@pytest.mark.parametrize("refusals", [[], [ConflictError("busy")]], ids=["free", "busy"])
async def test_who_is_cancelled_while_the_lease_is_taken_leaves_none(
    refusals: list[Exception],
) -> None:
    store = LeaseStore()
    store.refusals = refusals
    store.may_answer.clear()

    async def turn() -> None:
        async with lease(store):
            raise AssertionError("was cancelled before")

    task = asyncio.create_task(turn())
    await store.is_asked.wait()
    task.cancel()
    await asyncio.sleep(0)  # lets the cancellation in
    store.may_answer.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert not store.is_held


@pytest.mark.parametrize("fails", [False, True])
async def test_work_that_must_be_complete_ends_before_a_cancellation(fails: bool) -> None:
    has_started, may_end, has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        has_started.set()
        await may_end.wait()
        has_ended.set()
        if fails:
            raise NotFoundError("gone")

    task = asyncio.create_task(completed(work()))
    await has_started.wait()
    task.cancel()
    await asyncio.sleep(0)  # lets the cancellation in
    may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert has_ended.is_set()


async def test_work_that_is_not_cancelled_has_its_own_outcome() -> None:
    async def work(error: Exception | None) -> int:
        if error is not None:
            raise error
        return 7

    assert await completed(work(None)) == 7
    with pytest.raises(NotFoundError, match="gone"):
        await completed(work(NotFoundError("gone")))


async def test_a_cleanup_runs_to_its_end_also_when_cancelled_twice() -> None:
    has_started, may_end, has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def cleanup() -> None:
        has_started.set()
        await may_end.wait()
        has_ended.set()

    task = asyncio.create_task(finish("cleanup", cleanup()))
    await has_started.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)  # lets the cancellation in
    may_end.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert has_ended.is_set()
