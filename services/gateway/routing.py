"""Which worker serves a request: a view of the living workers, and the choice among them.

Two workers are drawn at random and the less loaded one is taken, so that several gateways with
views of different age do not all run to the same worker. Decode goes back to the worker that may
still hold the session's KV cache, if it is free.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, Literal, TypeVar

from chunkserve.v1 import inference_pb2, types_pb2
from services.runtime.errors import (
    InvalidRequestError,
    MismatchError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from services.store.base import Registry, WorkerInfo

Role = Literal["prefill", "decode", "compression"]

_Answer = TypeVar("_Answer")

_RETRY_AFTER_S: Final = 1.0
_NO_WORKER: Final = {
    "prefill": "NO_PREFILL_WORKER",
    "decode": "NO_DECODE_WORKER",
    "compression": "NO_COMPRESSION_WORKER",
}


class Router:
    """Chooses workers.

    Args:
        registry: Who lives.
        refresh_s: Age at which the view is read again. It is also read again when what is asked
            for is not in it.
        outage_grace_s: How long after an outage of the store workers that were known before it
            count as alive although they have not announced themselves again.
        default_model: The model of requests that name none. Empty: the only one that lives.
        num_calls: Calls that this gateway has running at an address; newer than a worker's own
            announcement.
        rng: Draws the two.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        refresh_s: float,
        outage_grace_s: float = 5.0,
        default_model: str = "",
        num_calls: Callable[[str], int] = lambda address: 0,
        rng: random.Random | None = None,
    ) -> None:
        self._registry = registry
        self._refresh_s = refresh_s
        self._outage_grace_s = outage_grace_s
        self._is_away = False
        self._grace_ends_at = float("-inf")
        self._default_model = default_model
        self._num_calls = num_calls
        self._rng = rng or random.Random()
        self._lock = asyncio.Lock()
        self._workers: Sequence[WorkerInfo] = ()
        self._failure: ServiceError | None = None
        self._read_at = float("-inf")

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return the living workers, as of ``refresh_s`` ago or as the store last said.

        Raises:
            UnavailableError: The store is away, and was from the beginning.
        """
        return await self._workers_since(time.monotonic() - self._refresh_s)

    async def resolve_model(self, model: str) -> str:
        """Return the model of a request, the default one if it names none.

        Raises:
            NotFoundError: No worker has it (``MODEL_NOT_FOUND``).
            InvalidRequestError: None is named, there is no default, and several live.
            UnavailableError: No worker of any model lives, or none of the default one.
        """
        wanted = model or self._default_model
        living = await self._living(lambda worker: worker.model == wanted)
        models = sorted({worker.model for worker in living if worker.role != "compression"})
        if wanted in models:
            return wanted
        if not models or (wanted and wanted == self._default_model):
            raise _no_worker("prefill", f" of {_named(wanted)}")
        if wanted:
            raise NotFoundError(
                f"no model {wanted!r} here; send one of: {', '.join(models)}",
                reason="MODEL_NOT_FOUND",
                field="model",
                resource=("model", wanted),
            )
        if len(models) > 1:
            raise InvalidRequestError(
                f"model is empty and this server has no default; send one of: {', '.join(models)}",
                field="model",
            )
        return models[0]

    async def pick_prefill(
        self, model: str, *, fingerprint: str = "", exclude: Collection[str] = ()
    ) -> WorkerInfo:
        """Return the prefill worker for a request.

        While a model's weights are being replaced, a new session begins on weights that decode
        workers have as well.

        Args:
            model: Its model.
            fingerprint: Of the session's stored KV; empty if there is none yet.
            exclude: Ids of workers that were tried already.

        Raises:
            UnavailableError: None lives (``NO_PREFILL_WORKER``).
            MismatchError: The model's workers all have other weights.
        """
        found = await self._candidates("prefill", model, fingerprint, exclude)
        decodable = {
            worker.fingerprint
            for worker in self._workers
            if worker.role == "decode" and worker.model == model
        }
        return self._less_loaded([w for w in found if w.fingerprint in decodable] or found)

    async def pick_decode(
        self,
        model: str,
        *,
        fingerprint: str = "",
        last_worker: str = "",
        avoid: str = "",
        exclude: Collection[str] = (),
    ) -> WorkerInfo:
        """Return the decode worker for a request.

        Args:
            model: Its model.
            fingerprint: Of the KV it is to continue.
            last_worker: Id of the worker that answered last in this session.
            avoid: Id of a worker that is taken only if there is no other.
            exclude: Ids of workers that were tried already.

        Raises:
            UnavailableError: None lives (``NO_DECODE_WORKER``).
            MismatchError: The model's workers all have other weights.
        """
        found = await self._candidates("decode", model, fingerprint, exclude)
        found = [worker for worker in found if worker.worker_id != avoid] or found
        for worker in found:
            if worker.worker_id == last_worker and self._load(worker) < 1:
                return worker
        return self._less_loaded(found)

    async def pick_compression(self, *, exclude: Collection[str] = ()) -> WorkerInfo:
        """Return the compression worker for a request; they have no model.

        Args:
            exclude: Ids of workers that were tried already.

        Raises:
            UnavailableError: None lives (``NO_COMPRESSION_WORKER``).
        """

        def fits(worker: WorkerInfo) -> bool:
            return worker.role == "compression" and worker.worker_id not in exclude

        found = [worker for worker in await self._living(fits) if fits(worker)]
        if not found:
            raise _no_worker("compression", "")
        return self._less_loaded(found)

    async def models(self) -> Sequence[inference_pb2.Model]:
        """Return the models that have prefill and decode workers, by name."""
        pairs: dict[tuple[str, str], list[WorkerInfo]] = {}
        for worker in await self.workers():
            pairs.setdefault((worker.model, worker.fingerprint), []).append(worker)
        models = [_describe(*pairs[pair]) for pair in sorted(pairs)]
        return [m for m in models if m.num_prefill_workers > 0 and m.num_decode_workers > 0]

    async def _candidates(
        self, role: Role, model: str, fingerprint: str, exclude: Collection[str]
    ) -> list[WorkerInfo]:
        def fits(worker: WorkerInfo) -> bool:
            has_role = worker.role == role and worker.model == model
            return has_role and fingerprint in ("", worker.fingerprint)

        living = await self._living(lambda w: fits(w) and w.worker_id not in exclude)
        found = [worker for worker in living if fits(worker) and worker.worker_id not in exclude]
        if found:
            return found
        prints = {worker.fingerprint for worker in living if worker.model == model}
        if fingerprint and prints and fingerprint not in prints:
            raise MismatchError(
                f"the session's KV cache was computed by other weights of {_named(model)} "
                f"({fingerprint[:12]}) than its workers have now; begin a new session",
                metadata={"session_fingerprint": fingerprint},
            )
        raise _no_worker(role, f" of {_named(model)}")

    async def _living(self, is_wanted: Callable[[WorkerInfo], bool]) -> Sequence[WorkerInfo]:
        """Return the living workers, read anew if none in the view is wanted."""
        asked_at = time.monotonic()
        living = await self.workers()
        if not any(map(is_wanted, living)):
            living = await self._workers_since(asked_at)
        return living

    async def _workers_since(self, oldest: float) -> Sequence[WorkerInfo]:
        """Return a view that was read at ``oldest`` or later.

        One reader reads for all who wait, and fails for all: behind a store that does not answer,
        they would otherwise time out one after another. Workers outlive an outage of the
        store: what was read before it stands.
        """
        async with self._lock:
            if self._read_at < oldest:
                read_at = time.monotonic()
                try:
                    read = await self._registry.workers()
                except ServiceError as error:
                    read_at = time.monotonic()
                    self._is_away = True
                    if not self._workers:
                        self._failure = error
                else:
                    self._workers, self._failure = self._with_those_before(read), None
                self._read_at = read_at
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            return self._workers

    def _with_those_before(self, read: Sequence[WorkerInfo]) -> Sequence[WorkerInfo]:
        """Return what was read, soon after an outage with those that were known before it."""
        now = time.monotonic()
        if self._is_away:
            self._is_away = False
            self._grace_ends_at = now + self._outage_grace_s
        if now >= self._grace_ends_at:
            return read
        known = {worker.worker_id: worker for worker in (*self._workers, *read)}
        return list(known.values())

    def _less_loaded(self, workers: Sequence[WorkerInfo]) -> WorkerInfo:
        drawn = self._rng.sample(workers, min(2, len(workers)))
        return min(drawn, key=self._load)

    def _load(self, worker: WorkerInfo) -> float:
        """Return the fraction of the worker's slots that are taken, 1 or more if all are."""
        num_active = max(worker.num_active, self._num_calls(worker.address))
        return num_active / max(worker.num_slots, 1)


async def ask_one_after_another(
    pick: Callable[..., Awaitable[WorkerInfo]],
    ask: Callable[[WorkerInfo], Awaitable[_Answer]],
    *,
    may_go_elsewhere: Callable[[ServiceError], bool],
) -> _Answer:
    """Return the answer of the first worker that gives one, each tried once.

    Args:
        pick: Chooses a worker, not one of ``exclude``.
        ask: Asks it.
        may_go_elsewhere: Whether another worker may do better after this error. If there is no
            other, the error stands.
    """
    tried: list[str] = []
    worker = await pick()
    while True:
        try:
            return await ask(worker)
        except ServiceError as error:
            if not may_go_elsewhere(error):
                raise
            tried.append(worker.worker_id)
            try:
                worker = await pick(exclude=tried)
            except UnavailableError:
                raise error from None


def _describe(*workers: WorkerInfo) -> inference_pb2.Model:
    """Return what callers see of the workers of one model."""
    policy = next((worker.default_policy for worker in workers if worker.default_policy), b"")
    return inference_pb2.Model(
        name=workers[0].model,
        max_model_len=min(worker.max_model_len for worker in workers),
        fingerprint=workers[0].fingerprint,
        num_prefill_workers=sum(worker.role == "prefill" for worker in workers),
        num_decode_workers=sum(worker.role == "decode" for worker in workers),
        default_compression=types_pb2.CompressionPolicy.FromString(policy),
    )


def _no_worker(role: Role, of_what: str) -> UnavailableError:
    return UnavailableError(
        f"no {role} worker{of_what} is alive; retry",
        reason=_NO_WORKER[role],
        retry_after_s=_RETRY_AFTER_S,
    )


def _named(model: str) -> str:
    return f"model {model!r}" if model else "any model"
