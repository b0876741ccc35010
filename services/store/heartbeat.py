"""Keeps a worker's entry in the registry alive for as long as the worker is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from services.runtime.errors import ServiceError
from services.runtime.telemetry import get_logger
from services.store.base import Registry, WorkerInfo


async def keep_announced(
    registry: Registry,
    describe: Callable[[], WorkerInfo],
    *,
    interval_s: float,
    ttl_s: float,
) -> None:
    """Announce a worker again and again; withdraw it when cancelled.

    Outages of the store are survived: logged once, and tried again after every interval.

    Args:
        registry: Where to announce.
        describe: What to announce, asked before every heartbeat.
        interval_s: Seconds between heartbeats.
        ttl_s: Seconds that an entry lives without a heartbeat, more than ``interval_s``.
    """
    if not 0 < interval_s < ttl_s:
        raise ValueError(f"heartbeat of {interval_s} s must be in (0, {ttl_s}), its ttl")
    log = get_logger()
    is_store_away = False
    worker = describe()
    try:
        while True:
            try:
                await registry.announce(worker, ttl_s=ttl_s)
            except ServiceError as error:
                if not is_store_away:
                    log.warning(
                        "heartbeat.failing", worker_id=worker.worker_id, error=error.message
                    )
                is_store_away = True
            else:
                if is_store_away:
                    log.info("heartbeat.recovered", worker_id=worker.worker_id)
                is_store_away = False
            await asyncio.sleep(interval_s)
            worker = describe()
    finally:
        # If the store is away, the entry dies by itself.
        with contextlib.suppress(ServiceError, TimeoutError):
            async with asyncio.timeout(ttl_s):
                await registry.withdraw(worker)
