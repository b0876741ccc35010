"""The whole service as processes that can be killed one by one, with a tiny model.

A Valkey that loses nothing, prefill workers and a gateway as they are deployed, and decode workers
without Ray (:class:`~tests.e2e.decode_process.DecodeProcess`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from types import TracebackType
from typing import Final, Self, TypeVar

import redis
from prometheus_client.parser import text_string_to_metric_families

from chunkserve_client import Client, Unavailable
from services.local.processes import Child, start_child
from services.store.embedded import EmbeddedOptions, EmbeddedValkey
from tests.e2e.decode_process import DecodeProcess

WAIT_S: Final = 90.0
# Heartbeats that come late, because other processes have the processor, are no deaths: neither in
# a quiet moment, nor behind an outage of the store, which a worker may notice the end of a second
# later than the gateway does.
HEARTBEAT_TTL_S: Final = 3.0

_HEARTBEAT_S: Final = 0.2
_NUM_LAST_LINES: Final = 50
_STOP_S: Final = 10.0
_POLL_S: Final = 0.02

T = TypeVar("T")


class PrefillProcess:
    """A prefill worker."""

    def __init__(self, child: Child, metrics_address: str) -> None:
        self._child = child
        self._metrics_url = f"http://{metrics_address}/metrics"

    async def worker_id(self) -> str:
        """Wait until it serves; return its id."""
        event: dict[str, str] = await eventually(
            lambda: _logged(self._child, "prefill.ready"), state=self._child.last_words
        )
        return event["worker_id"]

    async def metric(self, name: str, **labels: str) -> float:
        """Return a counter's value; 0 if there is none yet."""

        def read() -> float:
            with urllib.request.urlopen(self._metrics_url, timeout=WAIT_S) as response:
                families = text_string_to_metric_families(response.read().decode())
            samples = (sample for family in families for sample in family.samples)
            return sum(s.value for s in samples if s.name == name and labels == s.labels)

        return await asyncio.to_thread(read)

    def kill(self) -> None:
        """Kill it with SIGKILL, and wait until it is gone."""
        self._child.process.kill()
        self._child.process.wait()

    def stop(self) -> None:
        """End it, at the end of all tests."""
        _stop(self._child)


class ProcessStack:
    """A store, a gateway and workers, two of each kind. A context manager, for the main thread.

    Args:
        directory: Empty; for the store's data, its socket, and logs.
        model: Folder of the model.
        prefill: More settings of the prefill workers, without the prefix ``CHUNKSERVE_``.
        gateway: More settings of the gateway, likewise.
    """

    def __init__(
        self, directory: Path, model: Path, *, prefill: dict[str, str], gateway: dict[str, str]
    ) -> None:
        self.store = EmbeddedValkey(
            EmbeddedOptions(
                directory=directory, extra={"appendonly": "yes", "appendfsync": "always"}
            )
        )
        self.prefill: list[PrefillProcess] = []
        self.decode: dict[str, DecodeProcess] = {}
        self._prefill_settings = prefill
        self._gateway_settings = gateway
        self._directory = directory
        self._model = model
        self._address = _free_address()
        self._gateway: Child | None = None
        self._num_started = 0
        self._store_ended_at = 0.0  # time.monotonic()
        self._read_up_to: dict[Path, int] = {}

    def __enter__(self) -> Self:
        try:
            self.store.start()
            for _ in range(2):
                self.add_prefill()
                self.add_decode()
            self.start_gateway()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def client(self) -> Client:
        """Return a client of the gateway, which hides no error."""
        return Client(self._address, max_retries=0, timeout_s=WAIT_S)

    def add_prefill(self) -> None:
        """Start a prefill worker."""
        metrics_address = _free_address()
        child = self._start(
            "prefill",
            LISTEN="127.0.0.1:0",
            METRICS_LISTEN=metrics_address,
            **self._prefill_settings,
        )
        self.prefill.append(PrefillProcess(child, metrics_address))

    def add_decode(self) -> None:
        """Start a decode worker."""
        self._num_started += 1
        worker_id = f"decode-{self._num_started}"
        self.decode[worker_id] = DecodeProcess(
            worker_id,
            self._directory / f"{worker_id}.log",
            model=str(self._model),
            dtype="float32",
            torch_threads=1,
            kv_bytes=256 << 20,
            redis_url=self.store.url,
            heartbeat_s=_HEARTBEAT_S,
            heartbeat_ttl_s=HEARTBEAT_TTL_S,
        )

    def start_gateway(self) -> None:
        """Start the gateway, always at the same address."""
        self._gateway = self._start("gateway", LISTEN=self._address, **self._gateway_settings)

    def kill_gateway(self) -> None:
        """Kill the gateway with SIGKILL, and wait until it is gone."""
        assert self._gateway is not None
        self._gateway.process.kill()
        self._gateway.process.wait()

    def kill_decode(self, worker_id: str) -> None:
        """Kill a decode worker with SIGKILL, and wait until it is gone."""
        self.decode.pop(worker_id).kill()

    async def kill_prefill(self, worker_id: str) -> None:
        """Kill a prefill worker with SIGKILL, and wait until it is gone."""
        for worker in self.prefill:
            if await worker.worker_id() == worker_id:
                worker.kill()
                self.prefill.remove(worker)
                return
        raise AssertionError(f"no prefill worker {worker_id}")

    def shut_down_store(self) -> None:
        """Let the store save and end, as an operator does."""
        with redis.Redis.from_url(self.store.url) as admin:
            admin.shutdown()
        self.store.stop()
        self._store_ended_at = time.monotonic()

    def kill_store(self) -> None:
        """Kill the store with SIGKILL."""
        os.kill(self.store.pid, signal.SIGKILL)
        self.store.stop()
        self._store_ended_at = time.monotonic()

    async def heartbeats_expired(self) -> None:
        """Wait until all that workers announced before the store ended has expired.

        Time alone does that, on the server's clock, whether it runs or not.
        """
        over_s = time.monotonic() - self._store_ended_at
        await asyncio.sleep(max(HEARTBEAT_TTL_S - over_s, 0.0))

    async def ready(self) -> None:
        """Wait until all workers serve, and the gateway knows them."""
        for decode in self.decode.values():
            await decode.ready()
        for prefill in self.prefill:
            await prefill.worker_id()
        expected = (len(self.prefill), len(self.decode))
        async with self.client() as client:

            async def is_known() -> bool:
                with suppress(Unavailable):
                    for model in await client.list_models():
                        return (model.num_prefill_workers, model.num_decode_workers) == expected
                return False

            await eventually_async(
                is_known, state=lambda: f"{expected} workers; {self.new_log_lines()}"
            )

    def new_log_lines(self) -> str:
        """Return what the processes have logged since the last call, the last lines of each."""
        found = []
        for log in sorted(self._directory.glob("*.log")):
            text = log.read_text(errors="replace")
            lines = text[self._read_up_to.get(log, 0) :].splitlines()[-_NUM_LAST_LINES:]
            self._read_up_to[log] = len(text)
            found += [f"{log.stem}: {line}" for line in lines]
        return "\n".join(found)

    def _start(self, service: str, **settings: str) -> Child:
        self._num_started += 1
        settings = {
            "REDIS_URL": self.store.url,
            "MODEL": str(self._model),
            "DTYPE": "float32",
            "HEARTBEAT_S": str(_HEARTBEAT_S),
            "HEARTBEAT_TTL_S": str(HEARTBEAT_TTL_S),
            **settings,
        }
        return start_child(
            service,
            [sys.executable, "-m", f"services.{service}"],
            env=os.environ
            | {"OMP_NUM_THREADS": "1"}
            | {f"CHUNKSERVE_{name}": value for name, value in settings.items()},
            log=self._directory / f"{service}-{self._num_started}.log",
        )

    def _stop(self) -> None:
        for decode in self.decode.values():
            decode.kill()
        for prefill in self.prefill:
            prefill.stop()
        if self._gateway is not None:
            _stop(self._gateway)
        self.store.stop()


async def eventually(look: Callable[[], T | None], *, state: Callable[[], object]) -> T:
    """Return what there is to see, as soon as it is there; see :func:`eventually_async`."""

    async def look_async() -> T | None:
        return look()

    return await eventually_async(look_async, state=state)


async def eventually_async(
    look: Callable[[], Awaitable[T | None]], *, state: Callable[[], object]
) -> T:
    """Return what there is to see, as soon as it is there.

    Args:
        look: Returns it; something false as long as it is not there.
        state: Returns what there is instead, for the error if it never comes.
    """
    deadline = time.monotonic() + WAIT_S
    while not (seen := await look()):
        assert time.monotonic() < deadline, f"not seen within {WAIT_S} s, but: {state()}"
        await asyncio.sleep(_POLL_S)
    return seen


def _logged(child: Child, event: str) -> dict[str, str] | None:
    assert child.is_running, child.last_words()
    for line in child.log.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            logged: dict[str, str] = json.loads(line)
            if logged["event"] == event:
                return logged
    return None


def _stop(child: Child) -> None:
    child.process.terminate()
    try:
        child.process.wait(_STOP_S)
    except TimeoutExpired:
        child.process.kill()
        child.process.wait()


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
