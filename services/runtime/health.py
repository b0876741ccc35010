"""``grpc.health.v1``, with watches that end when the server drains.

The package's own servicer keeps every ``Watch`` open for ever, so that one watching client would
hold up a graceful stop until its grace period is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.interceptors import ServicerContext

_Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped package
    """Tells whether this server serves: as a whole (``""``) and for each service, always alike.

    Args:
        service_names: Full names of the services on this server.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = frozenset(["", *service_names])
        self._is_serving = False
        self._is_draining = False
        self._changed = asyncio.Condition()

    async def set_serving(self, is_serving: bool) -> None:
        """Change the status; ignored once draining."""
        async with self._changed:
            self._is_serving = is_serving and not self._is_draining
            self._changed.notify_all()

    async def drain(self) -> None:
        """Change to NOT_SERVING for good; watches send it and end."""
        async with self._changed:
            self._is_serving = False
            self._is_draining = True
            self._changed.notify_all()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return _Status(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: ServicerContext) -> None:
        sent = None
        while not (self._is_draining and sent == self._status(request.service)):
            status = self._status(request.service)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            async with self._changed:
                while not self._is_draining and self._status(request.service) == sent:
                    await self._changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._names:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._is_serving else _Status.NOT_SERVING)
