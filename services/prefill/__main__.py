"""Builds and runs the process: ``python -m services.prefill``, configured by ``CHUNKSERVE_*``."""

from __future__ import annotations

import asyncio
import functools
import uuid

import torch

from chunkserve.v1 import prefill_pb2, prefill_pb2_grpc
from services.models.loader import LoadedModel, load_model
from services.prefill.config import PrefillSettings
from services.prefill.runner import PrefillRunner
from services.prefill.servicer import PrefillServicer
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


async def serve(settings: PrefillSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    loaded = await asyncio.to_thread(_load, settings)
    store = open_store(settings.redis_url)
    runner = PrefillRunner(
        loaded,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        queue_size=settings.queue_size,
    )
    worker_id = f"prefill-{uuid.uuid4().hex[:8]}"
    servicer = PrefillServicer(loaded, runner, store, settings, worker_id=worker_id)
    server = GrpcServer(
        settings.listen,
        [functools.partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer)],
        [prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name],
    )
    port = await server.start()
    host = settings.advertise_host or own_address()

    def describe() -> WorkerInfo:
        return WorkerInfo(
            worker_id=worker_id,
            role="prefill",
            address=f"{host}:{port}",
            model=loaded.name,
            fingerprint=loaded.fingerprint,
            max_model_len=loaded.max_model_len,
            num_active=runner.num_active,
            num_slots=runner.num_slots,
            default_policy=settings.default_compression.SerializeToString(),
        )

    heartbeat = asyncio.create_task(
        keep_announced(
            store, describe, interval_s=settings.heartbeat_s, ttl_s=settings.heartbeat_ttl_s
        )
    )

    async def withdraw() -> None:
        await end_task(heartbeat)

    async def close() -> None:
        runner.close()
        await store.close()

    _log.info("prefill.ready", worker_id=worker_id, port=port, model=loaded.name)
    await serve_until_stopped(
        server, on_drain=withdraw, on_stop=close, grace_s=settings.stop_grace_s
    )


def _load(settings: PrefillSettings) -> LoadedModel:
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    return load_model(
        settings.model,
        name=settings.model_name,
        device=settings.device,
        dtype=settings.dtype,
        weights_dtype=settings.weights_dtype,
    )


def main() -> None:
    """Run the prefill worker."""
    settings = load(PrefillSettings)
    configure_logging(settings.log_level)
    with served_metrics(settings.metrics_listen):
        asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
