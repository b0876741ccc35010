"""The choice of workers, over a registry that is a list."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from services.gateway.routing import Router
from services.runtime.errors import MismatchError, NotFoundError, UnavailableError
from services.store.base import WorkerInfo
from tests.fakes import FINGERPRINT, MODEL, worker_info


class ListRegistry:
    """A registry that counts how often it is read."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self.living = list(workers)
        self.num_reads = 0
        self.error: Exception | None = None
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def workers(self) -> Sequence[WorkerInfo]:
        self.num_reads += 1
        self.is_asked.set()
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return tuple(self.living)

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        self.living.append(worker)

    async def withdraw(self, worker: WorkerInfo) -> None:
        self.living.remove(worker)


def prefill(worker_id: str, **fields: Any) -> WorkerInfo:
    return worker_info(role="prefill", worker_id=worker_id, **fields)


def decode(worker_id: str, **fields: Any) -> WorkerInfo:
    return worker_info(role="decode", worker_id=worker_id, **fields)


def make_router(*workers: WorkerInfo, refresh_s: float = 60, **options: Any) -> Router:
    registry = ListRegistry(*workers)
    return Router(registry, refresh_s=refresh_s, rng=random.Random(0), **options)


async def test_the_less_loaded_of_two_is_taken() -> None:
    router = make_router(prefill("busy", num_active=3), prefill("idle", num_active=1))

    picked = {(await router.pick_prefill(MODEL)).worker_id for _ in range(10)}

    assert picked == {"idle"}


async def test_load_is_relative_to_slots() -> None:
    router = make_router(
        decode("small", num_active=1, num_slots=2), decode("large", num_active=3, num_slots=8)
    )

    assert (await router.pick_decode(MODEL)).worker_id == "large"


async def test_calls_of_this_gateway_count_before_they_are_announced() -> None:
    calls = {"127.0.0.1:1": 2}
    router = make_router(
        decode("one", address="127.0.0.1:1"),
        decode("two", address="127.0.0.1:2"),
        num_calls=lambda address: calls.get(address, 0),
    )

    assert (await router.pick_decode(MODEL)).worker_id == "two"


async def test_of_many_workers_not_always_the_same_is_taken() -> None:
    router = make_router(*(decode(f"d-{i}") for i in range(5)))

    picked = {(await router.pick_decode(MODEL)).worker_id for _ in range(50)}

    assert len(picked) == 5


async def test_a_session_goes_back_to_its_worker_while_it_has_a_free_slot() -> None:
    last = decode("last", num_active=3, num_slots=4)
    router = make_router(last, decode("idle"))

    assert await router.pick_decode(MODEL, last_worker="last") == last


async def test_a_session_leaves_a_worker_that_is_full() -> None:
    router = make_router(decode("last", num_active=4, num_slots=4), decode("idle"))

    assert (await router.pick_decode(MODEL, last_worker="last")).worker_id == "idle"


async def test_a_session_leaves_a_worker_that_is_gone() -> None:
    router = make_router(decode("idle"))

    assert (await router.pick_decode(MODEL, last_worker="gone")).worker_id == "idle"


async def test_an_avoided_worker_is_taken_only_if_it_is_the_only_one() -> None:
    both = make_router(decode("a"), decode("b", num_active=4))
    alone = make_router(decode("a"))

    assert (await both.pick_decode(MODEL, last_worker="a", avoid="a")).worker_id == "b"
    assert (await alone.pick_decode(MODEL, avoid="a")).worker_id == "a"


async def test_a_new_session_begins_on_weights_that_can_be_decoded() -> None:
    router = make_router(
        prefill("old", fingerprint="old", num_active=3),
        prefill("new", fingerprint="new"),
        decode("d", fingerprint="old"),
    )

    picked = {(await router.pick_prefill(MODEL)).worker_id for _ in range(10)}

    assert picked == {"old"}


async def test_a_session_stays_on_its_weights() -> None:
    router = make_router(decode("old", fingerprint="old", num_active=3), decode("new"))

    picked = await router.pick_decode(MODEL, fingerprint="old")

    assert picked.worker_id == "old"


async def test_weights_that_nobody_has_any_more_are_a_mismatch() -> None:
    router = make_router(prefill("p"), decode("d"))

    with pytest.raises(MismatchError, match="begin a new session"):
        await router.pick_prefill(MODEL, fingerprint="gone")


async def test_weights_that_only_the_other_kind_of_worker_has_are_unavailable() -> None:
    router = make_router(prefill("p", fingerprint="old"), decode("d", fingerprint="new"))

    with pytest.raises(UnavailableError) as caught:
        await router.pick_decode(MODEL, fingerprint="old")

    assert caught.value.error_reason == "NO_DECODE_WORKER"


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_no_worker_of_a_kind_is_unavailable(role: str) -> None:
    router = make_router(worker_info(role="decode" if role == "prefill" else "prefill"))
    pick = router.pick_prefill if role == "prefill" else router.pick_decode

    with pytest.raises(UnavailableError, match=f"no {role} worker of model") as caught:
        await pick(MODEL)

    assert caught.value.error_reason == f"NO_{role.upper()}_WORKER"
    assert caught.value.retry_after_s == 1


async def test_compression_workers_have_no_model() -> None:
    idle = worker_info(role="compression", model="", worker_id="c-1", num_active=0)
    busy = worker_info(role="compression", model="", worker_id="c-2", num_active=9)
    router = make_router(idle, busy, decode("d"))

    assert (await router.pick_compression()).worker_id == "c-1"
    assert await router.resolve_model("") == MODEL


async def test_no_compression_worker_is_unavailable() -> None:
    router = make_router(prefill("p"), decode("d"))

    with pytest.raises(UnavailableError, match="no compression worker is alive") as caught:
        await router.pick_compression()

    assert caught.value.error_reason == "NO_COMPRESSION_WORKER"


async def test_the_only_worker_was_tried_already() -> None:
    router = make_router(prefill("p"))

    with pytest.raises(UnavailableError, match="no prefill worker"):
        await router.pick_prefill(MODEL, exclude=["p"])


async def test_a_view_is_read_once_within_its_age() -> None:
    registry = ListRegistry(decode("d"))
    router = Router(registry, refresh_s=60)

    for _ in range(3):
        await router.pick_decode(MODEL)

    assert registry.num_reads == 1


async def test_a_view_that_lacks_what_is_asked_is_read_again() -> None:
    registry = ListRegistry(decode("d"))
    router = Router(registry, refresh_s=60)
    await router.workers()

    registry.living.append(prefill("p"))

    assert (await router.pick_prefill(MODEL)).worker_id == "p"
    assert (await router.pick_prefill(MODEL)).worker_id == "p"
    assert registry.num_reads == 2


async def test_a_view_whose_workers_were_all_tried_is_read_again() -> None:
    registry = ListRegistry(decode("a"))
    router = Router(registry, refresh_s=60)
    await router.workers()

    registry.living.append(decode("b"))

    assert (await router.pick_decode(MODEL, exclude=["a"])).worker_id == "b"


async def test_the_last_view_stands_while_the_store_is_away() -> None:
    registry = ListRegistry(decode("d"))
    router = Router(registry, refresh_s=0)
    await router.workers()

    registry.error = UnavailableError("away", reason="STORE_UNAVAILABLE")

    assert (await router.pick_decode(MODEL)).worker_id == "d"
    with pytest.raises(UnavailableError) as caught:
        await router.pick_prefill(MODEL)
    assert caught.value.error_reason == "NO_PREFILL_WORKER"


@pytest.mark.parametrize(("grace_s", "ids"), [(60.0, {"d", "e"}), (0.0, {"e"})])
async def test_those_before_an_outage_have_time_to_announce_themselves(
    grace_s: float, ids: set[str]
) -> None:
    registry = ListRegistry(decode("d"))
    router = Router(registry, refresh_s=0, outage_grace_s=grace_s)
    await router.workers()
    registry.error = UnavailableError("away", reason="STORE_UNAVAILABLE")
    await router.workers()

    registry.error = None
    registry.living = [decode("e")]

    assert {worker.worker_id for worker in await router.workers()} == ids


async def test_one_failed_reading_answers_all_who_wait_for_it() -> None:
    registry = ListRegistry(decode("d"))
    registry.may_answer.clear()
    registry.error = UnavailableError("away")
    router = Router(registry, refresh_s=0.001)
    waiting = [asyncio.create_task(router.pick_decode(MODEL)) for _ in range(5)]
    await asyncio.wait_for(registry.is_asked.wait(), 10)

    registry.may_answer.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)

    assert {str(answer) for answer in answers} == {"away"}
    assert registry.num_reads == 1


async def test_a_store_that_is_back_is_asked_again() -> None:
    registry = ListRegistry(decode("d"))
    registry.error = UnavailableError("away")
    router = Router(registry, refresh_s=0)
    with pytest.raises(UnavailableError):
        await router.workers()

    registry.error = None

    assert (await router.pick_decode(MODEL)).worker_id == "d"


async def test_the_model_of_a_request_is_its_own_or_the_default_or_the_only_one() -> None:
    router = make_router(prefill("p"), default_model="")
    with_default = make_router(prefill("p"), prefill("q", model="other"), default_model="other")

    assert await router.resolve_model("") == MODEL
    assert await router.resolve_model(MODEL) == MODEL
    assert await with_default.resolve_model("") == "other"


async def test_a_default_model_without_workers_is_unavailable() -> None:
    router = make_router(prefill("p"), default_model="other")

    with pytest.raises(UnavailableError, match="no prefill worker of model 'other' is alive"):
        await router.resolve_model("")


async def test_a_model_that_nobody_has_is_not_found() -> None:
    router = make_router(prefill("p"), default_model=MODEL)

    with pytest.raises(NotFoundError, match=f"no model 'other' here; send one of: {MODEL}"):
        await router.resolve_model("other")


async def test_models_of_other_weights_are_listed_apart() -> None:
    router = make_router(
        prefill("p-1", fingerprint="old"),
        decode("d-1", fingerprint="old", default_policy=b""),
        prefill("p-2"),
        decode("d-2"),
        prefill("p-3", fingerprint="unfinished"),
    )

    models = await router.models()

    assert [model.fingerprint for model in models] == [FINGERPRINT, "old"]
