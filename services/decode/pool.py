"""The decode workers of a cluster, placed, watched and replaced by Ray Serve.

Ray is the control plane alone. Each replica runs a gRPC server of its own and announces it in the
registry; no token and no request passes through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from services.decode.config import DecodeSettings
from services.decode.worker import DecodeWorker, load
from services.runtime.errors import ServiceError
from services.runtime.tasks import end_task
from services.runtime.telemetry import configure_logging, get_logger
from services.store import Store, open_store
from services.store.base import WorkerInfo

_POLL_S: Final = 0.2

# Past its grace period a replica needs a moment to close its connections.
_EXIT_S: Final = 5.0

# Of 107 bytes that the path of a unix socket may have, Ray's own part takes about 80.
_MAX_RAY_FOLDER_BYTES: Final = 24

_log = get_logger()


class PoolError(Exception):
    """The workers did not start."""


class DecodeReplica:
    """A decode worker inside a Ray Serve replica.

    Args:
        settings: Of the pool.
        pool_id: Beginning of the worker's id.
    """

    # Ray Serve awaits it.
    async def __init__(self, settings: DecodeSettings, pool_id: str) -> None:  # type: ignore[misc]
        configure_logging(settings.log_level)
        self._settings = settings
        loaded = await asyncio.to_thread(load, settings)
        self._store = open_store(settings.redis_url)
        self._worker = DecodeWorker(
            loaded, self._store, settings, worker_id=f"{pool_id}-{uuid.uuid4().hex[:8]}"
        )
        await self._worker.start()

    def check_health(self) -> None:
        """Raise if the worker is broken; Ray Serve then replaces the replica."""
        self._worker.check_health()

    async def __del__(self) -> None:
        # Ray Serve awaits this when it stops a replica, and calls it "destructor".
        await self._worker.stop(self._settings.stop_grace_s)
        await self._store.close()


@contextlib.contextmanager
def ray_session(settings: DecodeSettings) -> Iterator[None]:
    """Be connected to Ray inside the block: to ``RAY_ADDRESS``, or to a local one that ends then.

    Call from the main thread: Ray installs signal handlers, and its processes end with the thread
    that started them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would give its workers the last turn on the CPU, and every token waits for one of them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        try:
            yield
        finally:
            ray.shutdown()
        return
    directory = tempfile.mkdtemp(prefix="cs-ray-", dir=os.environ.get("RAY_TMPDIR", _short_tmp()))
    try:
        ray.init(
            num_cpus=settings.ray_num_cpus or _needed_cpus(settings),
            include_dashboard=False,
            object_store_memory=settings.ray_object_store_bytes,
            _temp_dir=directory,
            **quiet,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _short_tmp() -> str:
    """Return a temporary folder into which Ray can put unix sockets, 70 characters deeper."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _MAX_RAY_FOLDER_BYTES else "/tmp"


async def run_pool(settings: DecodeSettings) -> None:
    """Start the workers, wait for SIGTERM or SIGINT, and end them. Inside a :func:`ray_session`.

    Raises:
        PoolError: They did not start.
        UnavailableError: The store is away.
    """
    stopping = _stop_event()
    store = open_store(settings.redis_url)
    try:
        await store.ping()
        await _serve(settings, store, stopping)
    finally:
        await store.close()


async def _serve(settings: DecodeSettings, store: Store, stopping: asyncio.Event) -> None:
    pool_id = f"decode-{uuid.uuid4().hex[:8]}"
    # Not to be left before its end: what is deployed later than deleted would stay.
    await asyncio.to_thread(_deploy, settings, pool_id)
    started = asyncio.create_task(
        wait_announced(
            store,
            pool_id,
            settings.decode_replicas,
            timeout_s=settings.ready_timeout_s,
            check=functools.partial(_check_deployment, pool_id),
        )
    )
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            workers = started.result()
            _log.info("decode.ready", pool_id=pool_id, workers=[w.address for w in workers])
            await stopped
    finally:
        _log.info("decode.stopping", pool_id=pool_id)
        await end_task(stopped)
        await end_task(started)
        with contextlib.suppress(TimeoutError):  # Serve waits 60 s; grace periods may be longer
            await asyncio.to_thread(serve.delete, pool_id)
        await _withdraw_all(store, pool_id)


async def wait_announced(
    store: Store,
    pool_id: str,
    num_workers: int,
    *,
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> Sequence[WorkerInfo]:
    """Wait until the registry has so many workers of a pool, and return them.

    Args:
        store: With the registry.
        pool_id: Beginning of the workers' ids.
        num_workers: How many.
        timeout_s: Seconds to wait.
        check: Blocks shortly, and raises if there is no use in waiting.

    Raises:
        PoolError: They did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while len(workers := await _workers(store, pool_id)) < num_workers:
        if time.monotonic() > deadline:
            raise PoolError(
                f"{len(workers)} of {num_workers} decode workers are announced after {timeout_s} s"
            )
        await asyncio.to_thread(check)
        await asyncio.sleep(_POLL_S)
    return workers


def _deploy(settings: DecodeSettings, pool_id: str) -> None:
    deployment = serve.deployment(
        DecodeReplica,
        name="DecodeReplica",
        num_replicas=settings.decode_replicas,
        ray_actor_options={
            "num_cpus": settings.replica_num_cpus,
            "num_gpus": settings.replica_num_gpus,
        },
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.stop_grace_s + _EXIT_S,
    )
    serve.start(proxy_location="Disabled")
    target = serve.RunTarget(deployment.bind(settings, pool_id), name=pool_id, route_prefix=None)
    # Not waited for: a thread that waits inside Serve could not be stopped, and would wait for
    # ever for a pool that is stopped while it starts.
    serve.run_many([target], wait_for_applications_running=False)


def _check_deployment(pool_id: str) -> None:
    application = serve.status().applications[pool_id]
    if application.status == ApplicationStatus.DEPLOY_FAILED:
        raise PoolError(f"Ray Serve could not start the decode workers: {application.message}")


async def _workers(store: Store, pool_id: str) -> Sequence[WorkerInfo]:
    return [w for w in await store.workers() if w.worker_id.startswith(pool_id)]


async def _withdraw_all(store: Store, pool_id: str) -> None:
    """Remove what workers left that had no time to withdraw."""
    with contextlib.suppress(ServiceError):
        for worker in await _workers(store, pool_id):
            await store.withdraw(worker)


def _stop_event() -> asyncio.Event:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


def _needed_cpus(settings: DecodeSettings) -> int:
    return max(1, math.ceil(settings.decode_replicas * settings.replica_num_cpus))
