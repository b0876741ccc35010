"""One decode worker: model, engine, gRPC server and heartbeat. Knows no Ray."""

from __future__ import annotations

import asyncio
import functools
import os

import torch

from chunkserve.v1 import decode_pb2, decode_pb2_grpc
from services.decode.attention import kv_geometry, use_sequences
from services.decode.config import DecodeSettings
from services.decode.engine import Engine
from services.decode.feeds import TokenFeeds
from services.decode.fetch import KVFetcher
from services.decode.memory import KVPool
from services.decode.placement import KVMemory
from services.decode.servicer import DecodeServicer
from services.models.loader import LoadedModel, load_model
from services.runtime.address import own_address
from services.runtime.errors import UnavailableError
from services.runtime.server import GrpcServer
from services.runtime.tasks import end_task
from services.runtime.telemetry import get_logger
from services.store.base import Store, WorkerInfo
from services.store.heartbeat import keep_announced

_log = get_logger()


class DecodeWorker:
    """Serves ``DecodeService`` and tells the registry so, from :meth:`start` to :meth:`stop`.

    Args:
        loaded: The model.
        store: Where sessions and the registry are. Stays the caller's.
        settings: Of the pool.
        worker_id: Unique among all workers that ever lived.
    """

    def __init__(
        self, loaded: LoadedModel, store: Store, settings: DecodeSettings, *, worker_id: str
    ) -> None:
        self.worker_id = worker_id
        use_sequences(loaded.model)
        geometry = kv_geometry(loaded.model)
        self.memory = KVMemory(
            KVPool(settings.kv_bytes, device=loaded.device),
            geometry,
            num_slots=settings.num_slots,
            queue_size=settings.queue_size,
        )
        self.engine = Engine(
            loaded,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            max_stall_ms=settings.max_stall_ms,
            # Ray sets OMP_NUM_THREADS to a replica's share of CPUs: torch's default is of no use.
            num_threads=settings.torch_threads or len(os.sched_getaffinity(0)),
        )
        self._feeds = TokenFeeds()
        self._loaded = loaded
        self._store = store
        self._settings = settings
        servicer = DecodeServicer(
            loaded,
            self.engine,
            store,
            self.memory,
            KVFetcher(store, self.memory, geometry, fingerprint=loaded.fingerprint),
            feeds=self._feeds,
            worker_id=worker_id,
            max_output_tokens=settings.max_output_tokens,
        )
        self._server = GrpcServer(
            f"{settings.decode_host}:{settings.decode_port}",
            [functools.partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer)],
            [decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name],
        )
        self._host = settings.advertise_host or own_address()
        self._port = 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """``host:port`` that the gateway reaches it by."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Serve, and announce it."""
        self.engine.start()
        self._port = await self._server.start()
        heartbeat = asyncio.create_task(
            keep_announced(
                self._store,
                self._describe,
                interval_s=self._settings.heartbeat_s,
                ttl_s=self._settings.heartbeat_ttl_s,
            )
        )
        self._tasks = [heartbeat, asyncio.create_task(self._retire_on_failure(heartbeat))]
        _log.info(
            "decode.worker_ready",
            worker_id=self.worker_id,
            address=self.address,
            model=self._loaded.name,
        )

    async def stop(self, grace_s: float) -> None:
        """Withdraw from the registry, finish or cancel what runs, and end the engine.

        Args:
            grace_s: Seconds after which running requests are cancelled.
        """
        for task in self._tasks:
            await end_task(task)
        self._feeds.drain()
        await self._server.stop(grace_s)
        await self.engine.stop()
        _log.info("decode.worker_stopped", worker_id=self.worker_id)

    def check_health(self) -> None:
        """Raise ``UnavailableError`` unless the engine runs and the heartbeat beats."""
        if not self.engine.is_running:
            raise UnavailableError(f"the engine of {self.worker_id} does not run")
        if any(task.done() for task in self._tasks):
            raise UnavailableError(f"the heartbeat of {self.worker_id} has ended")

    async def _retire_on_failure(self, heartbeat: asyncio.Task[None]) -> None:
        await self.engine.wait_failed()
        await self._server.set_serving(False)
        await end_task(heartbeat)

    def _describe(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            role="decode",
            address=self.address,
            model=self._loaded.name,
            fingerprint=self._loaded.fingerprint,
            max_model_len=self._loaded.max_model_len,
            num_active=self.memory.num_active,
            num_slots=self.memory.num_slots,
        )


def load(settings: DecodeSettings) -> LoadedModel:
    """Load the model that the settings name. Takes seconds to minutes: call it from a thread."""
    torch.set_num_threads(1)  # the engine's thread alone computes with more
    return load_model(
        settings.model,
        name=settings.model_name,
        device=settings.device,
        dtype=settings.dtype,
        weights_dtype=settings.weights_dtype,
    )
