"""Builds and runs the process: ``python -m services.compress``, configured by ``CHUNKSERVE_*``."""

from __future__ import annotations

import asyncio
import functools
import uuid

import torch

from chunkserve.v1 import compression_pb2, compression_pb2_grpc
from services.compress.compaction import Compactor
from services.compress.config import CompressionSettings
from services.compress.pressure import PressurePolicy
from services.compress.servicer import CompressionServicer
from services.runtime.address import own_address
from services.runtime.config import load
from services.runtime.metrics import served_metrics
from services.runtime.server import GrpcServer, serve_until_stopped
from services.runtime.tasks import end_task
from services.runtime.telemetry import configure_logging, get_logger
from services.store import open_store
from services.store.base import WorkerInfo
from services.store.heartbeat import keep_announced

_log = get_logger()


async def serve(settings: CompressionSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    store = open_store(settings.redis_url)
    compactor = Compactor(store, lease_ttl_s=settings.lease_ttl_s)
    servicer = CompressionServicer(
        compactor, max_concurrent_requests=settings.max_concurrent_requests
    )
    pressure = PressurePolicy(
        store,
        compactor,
        tenants=settings.tenants,
        total=settings.total_marks,
        tenant=settings.tenant_marks,
        floor_ratio=settings.pressure_floor_ratio,
        lease_ttl_s=settings.lease_ttl_s,
    )
    server = GrpcServer(
        settings.listen,
        [
            functools.partial(
                compression_pb2_grpc.add_CompressionServiceServicer_to_server, servicer
            )
        ],
        [compression_pb2.DESCRIPTOR.services_by_name["CompressionService"].full_name],
    )
    port = await server.start()
    worker_id = f"compression-{uuid.uuid4().hex[:8]}"
    host = settings.advertise_host or own_address()

    def describe() -> WorkerInfo:
        return WorkerInfo(
            worker_id=worker_id,
            role="compression",
            address=f"{host}:{port}",
            model="",
            fingerprint="",
            max_model_len=0,
            num_active=servicer.num_active,
            num_slots=servicer.num_slots,
        )

    tasks = [
        asyncio.create_task(
            keep_announced(
                store, describe, interval_s=settings.heartbeat_s, ttl_s=settings.heartbeat_ttl_s
            )
        )
    ]
    if pressure.is_enabled:
        tasks.append(asyncio.create_task(pressure.run(interval_s=settings.pressure_interval_s)))

    async def withdraw() -> None:
        for task in tasks:
            await end_task(task)

    _log.info("compression.ready", worker_id=worker_id, port=port)
    await serve_until_stopped(
        server, on_drain=withdraw, on_stop=store.close, grace_s=settings.stop_grace_s
    )


def main() -> None:
    """Run the compression worker."""
    settings = load(CompressionSettings)
    configure_logging(settings.log_level)
    # Small work: threads beside the decode workers' cost more than they bring.
    torch.set_num_threads(1)
    with served_metrics(settings.metrics_listen):
        asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
