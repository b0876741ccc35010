"""Builds the gateway from its settings, and runs it."""

from __future__ import annotations

from functools import partial
from typing import Final

from chunkserve.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from services.gateway.admission import Admission
from services.gateway.channels import WorkerChannels
from services.gateway.config import GatewaySettings
from services.gateway.quotas import Quotas
from services.gateway.routing import Router
from services.gateway.servicer import InferenceServicer
from services.gateway.sessions import SessionServicer
from services.gateway.turn import TurnRunner
from services.runtime.server import GrpcServer, serve_until_stopped
from services.runtime.telemetry import get_logger
from services.store import open_store
from services.store.base import Store

SERVICE_NAMES: Final = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)

_log = get_logger()


class Gateway:
    """A gateway: its server, and what the server's handlers use.

    Args:
        settings: Its settings.
        store: Where sessions and workers are found; the caller closes it.
    """

    def __init__(self, settings: GatewaySettings, store: Store) -> None:
        self._admission = Admission(settings.max_concurrent_requests)
        self._channels = WorkerChannels()
        router = Router(
            store,
            refresh_s=settings.worker_refresh_s,
            outage_grace_s=settings.heartbeat_ttl_s,
            default_model=settings.default_model,
            num_calls=self._channels.num_calls,
        )
        turns = TurnRunner(store, router, self._channels, failover_wait_s=settings.failover_wait_s)
        quotas = Quotas(settings, store)
        inference = InferenceServicer(settings, store, router, turns, self._admission, quotas)
        sessions = SessionServicer(settings, store, router, self._channels, quotas)
        self.server = GrpcServer(
            settings.listen,
            [
                partial(inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference),
                partial(session_pb2_grpc.add_SessionServiceServicer_to_server, sessions),
            ],
            SERVICE_NAMES,
        )

    async def start(self) -> int:
        """Listen; return the port."""
        return await self.server.start()

    async def stop(self, grace_s: float) -> None:
        """Let running requests end, then close the connections to workers."""
        await self.server.stop(grace_s)
        await self.close()

    async def close(self) -> None:
        """After the server has stopped: wait for the cleaning up of cancelled requests, close."""
        await self.wait_idle()
        await self._channels.close()

    async def wait_idle(self) -> None:
        """Wait until no Generate or CountTokens call runs, cleaning up included."""
        await self._admission.wait_idle()


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT.

    The gateway starts and reports SERVING also while the store or the workers are away: calls
    then say so.

    Raises:
        SystemExit: The store's URL is malformed, or the address to listen on is taken.
    """
    try:
        store = open_store(settings.redis_url)
    except ValueError as error:
        raise SystemExit(f"CHUNKSERVE_REDIS_URL: {error}") from None
    gateway = Gateway(settings, store)

    async def close() -> None:
        try:
            await gateway.close()
        finally:
            await store.close()

    try:
        port = await gateway.start()
    except BaseException:
        await close()
        raise
    _log.info("gateway.started", listen=settings.listen, port=port)
    await serve_until_stopped(gateway.server, on_stop=close, grace_s=settings.stop_grace_s)
