"""A gRPC server of ours: interceptors, health, reflection, and a clean end.

Knows no service: what it serves is handed in.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.health import HealthServicer
from services.runtime.interceptors import INTERCEPTORS
from services.runtime.telemetry import get_logger

MAX_MESSAGE_BYTES: Final = 64 << 20

# A peer whose machine vanished is noticed after 30 s instead of never.
_KEEPALIVE_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_MESSAGE_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_CHANNEL_OPTIONS: Final = (
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    # A connection attempt to an address that does not answer fails after 2 s (default: 20 s), and
    # a worker that comes back on its old address is tried again soon (default: up to 2 min).
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A new channel to an address starts afresh instead of in its predecessor's backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # Calls between our services do not go through a proxy meant for the outside.
    ("grpc.enable_http_proxy", 0),
)
_SERVER_OPTIONS: Final = (
    *_MESSAGE_OPTIONS,
    *_KEEPALIVE_OPTIONS,
    # Admits our own channels' keepalive pings, which come faster than the default allows.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Without this, a second server on the same port starts and gets half of the calls.
    ("grpc.so_reuseport", 0),
)

_log = get_logger()


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a channel to another of our services at ``host:port``."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


class GrpcServer:
    """Serves on one address.

    Args:
        address: ``host:port``; port 0 lets the system choose.
        add: Each adds one servicer to the server (``functools.partial`` of the generated
            ``add_...Servicer_to_server``).
        service_names: Full names of these services, for health and reflection.
    """

    def __init__(
        self,
        address: str,
        add: Sequence[Callable[[grpc.aio.Server], None]],
        service_names: Sequence[str],
    ) -> None:
        self._address = address
        self._add = add
        self._service_names = service_names
        self._health = HealthServicer(service_names)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen, report SERVING, and return the port.

        Raises:
            SystemExit: The address is taken or malformed.
        """
        server = grpc.aio.server(
            interceptors=[interceptor() for interceptor in INTERCEPTORS], options=_SERVER_OPTIONS
        )
        for add_servicer in self._add:
            add_servicer(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise SystemExit(f"cannot listen on {self._address}: {error}") from None
        await server.start()
        self._server = server
        await self._health.set_serving(True)
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Report SERVING or NOT_SERVING to health checks; calls are served either way."""
        await self._health.set_serving(is_serving)

    async def drain(self) -> None:
        """Report NOT_SERVING for good; calls are still served."""
        await self._health.drain()

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, and end when the running ones have.

        Args:
            grace_s: Seconds after which running calls are cancelled.
        """
        await self._health.drain()
        if self._server is not None:
            await self._server.stop(grace_s)


async def serve_until_stopped(
    server: GrpcServer,
    *,
    on_stop: Callable[[], Awaitable[None]],
    on_drain: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = 10.0,
) -> None:
    """Wait for SIGTERM or SIGINT, then end cleanly; a second signal ends the process at once.

    Args:
        server: Started.
        on_stop: Runs last, when no call runs any more: closes the store.
        on_drain: Runs once health says NOT_SERVING, before new calls are refused: withdraws a
            worker from the registry.
        grace_s: Seconds that running calls get.
    """
    received = await _first_signal()
    _log.info("server.draining", signal=received.name, grace_s=grace_s)
    try:
        await server.drain()
        if on_drain is not None:
            await on_drain()
    finally:
        try:
            await server.stop(grace_s)
        finally:
            await on_stop()
    _log.info("server.stopped")


async def _first_signal() -> signal.Signals:
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        received.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await received
