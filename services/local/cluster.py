"""Starts and stops the processes of a cluster on this machine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.local.processes import Child, adopt_orphans, start_child, stop_children
from services.store import open_store
from services.store.embedded import EmbeddedOptions, EmbeddedValkey

_POLL_S: Final = 0.1
_STOP_GRACE_S: Final = 25.0

Say = Callable[[str], None]


class ClusterError(RuntimeError):
    """The cluster could not be started, or has died."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What to start.

    Attributes:
        directory: Folder for logs and sockets.
        model: Local folder in the Hugging Face layout, or a hub id.
        port: Of the gateway on 127.0.0.1; 0 for a free one.
        num_decode_workers: Decode replicas on Ray.
        redis_url: Store to use; empty starts an embedded one.
        store_bytes: Memory of the embedded store.
        start_timeout_s: Seconds until all of it must answer.
        env: More environment variables for the services (``CHUNKSERVE_*``).
    """

    directory: Path
    model: str
    port: int = 50051
    num_decode_workers: int = 1
    redis_url: str = ""
    store_bytes: int = 4 << 30
    start_timeout_s: float = 180.0
    env: dict[str, str] = field(default_factory=dict)


class LocalCluster:
    """Store, workers and gateway on this machine. A context manager.

    Start it from the main thread. Whatever ends the block, nothing is left running.
    """

    def __init__(self, options: ClusterOptions, *, say: Say = lambda text: None) -> None:
        self._options = options
        self.say = say
        self._store: EmbeddedValkey | None = None
        self._children: list[Child] = []
        self.redis_url = options.redis_url
        self.port = options.port

    def __enter__(self) -> LocalCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """``host:port`` of the gateway."""
        return f"127.0.0.1:{self.port}"

    @property
    def children(self) -> tuple[Child, ...]:
        """The services that were started."""
        return tuple(self._children)

    def start(self) -> None:
        """Start everything and wait until the gateway can answer.

        Raises:
            ClusterError: The port is taken, a service died (its last log lines are in the
                message), or the time is over.
        """
        adopt_orphans()
        options = self._options
        options.directory.mkdir(parents=True, exist_ok=True)
        self.port = _claim_port(options.port)
        if not options.redis_url:
            self.say("starting the store")
            self._store = EmbeddedValkey(
                EmbeddedOptions(directory=options.directory, maxmemory_bytes=options.store_bytes)
            )
            self._store.start()
            self.redis_url = self._store.url
        self.say("starting prefill, decode (Ray), compression and gateway")
        self._start("prefill", CHUNKSERVE_LISTEN="127.0.0.1:0")
        self._start("decode", CHUNKSERVE_DECODE_REPLICAS=str(options.num_decode_workers))
        self._start("compress", CHUNKSERVE_LISTEN="127.0.0.1:0")
        self._start("gateway", CHUNKSERVE_LISTEN=self.address)
        asyncio.run(self._wait_until_ready())

    def check(self) -> None:
        """Raise ClusterError if a service has died."""
        for child in self._children:
            if not child.is_running:
                raise ClusterError(
                    f"{child.name} ended with code {child.process.returncode}; the end of "
                    f"{child.log}:\n{child.last_words()}"
                )

    def stop(self) -> None:
        """Stop everything that was started."""
        stop_children(self._children, grace_s=_STOP_GRACE_S)
        self._children.clear()
        if self._store is not None:
            self._store.stop()
            self._store = None

    def _start(self, name: str, **settings: str) -> None:
        env = {
            **os.environ,
            "CHUNKSERVE_REDIS_URL": self.redis_url,
            "CHUNKSERVE_MODEL": self._options.model,
            **self._options.env,
            **settings,
        }
        command = [sys.executable, "-m", f"services.{name}"]
        log = self._options.directory / f"{name}.log"
        self._children.append(start_child(name, command, env=env, log=log))

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._options.start_timeout_s
        store = open_store(self.redis_url)
        wanted = {"prefill": 1, "decode": self._options.num_decode_workers, "compression": 1}
        seen: dict[str, int] = {}
        try:
            while True:
                self.check()
                workers = await store.workers()
                counts = {role: sum(w.role == role for w in workers) for role in wanted}
                if counts != seen:
                    seen = counts
                    self.say(", ".join(f"{n} of {wanted[r]} {r}" for r, n in counts.items()))
                if all(counts[role] >= n for role, n in wanted.items()) and await self._serves():
                    return
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"not ready after {self._options.start_timeout_s:.0f} s: {counts} of "
                        f"{wanted} workers; logs in {self._options.directory}"
                    )
                await asyncio.sleep(_POLL_S)
        finally:
            await store.close()

    async def _serves(self) -> bool:
        async with grpc.aio.insecure_channel(self.address) as channel:
            with suppress(grpc.aio.AioRpcError):
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=1.0
                )
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False


def _claim_port(port: int) -> int:
    """Return a port that is free now.

    Raises:
        ClusterError: ``port`` is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"port {port} is taken ({error.strerror}); choose another one, 0 for any"
            ) from error
        return int(probe.getsockname()[1])
