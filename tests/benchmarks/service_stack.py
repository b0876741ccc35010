"""The whole service in real processes, for benchmarks, and a client that looks at the clock.

Store, prefill worker, compression worker and gateway as they are deployed; decode workers are
:class:`~tests.benchmarks.probed_worker.ProbedWorker`, so that more can be told of them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.error import URLError

from prometheus_client.parser import text_string_to_metric_families

from chunkserve_client import ChunkServeError, Client, Finish, PromptInfo, Session, TokenDelta
from services.local.processes import Child, start_child, stop_children
from services.store.embedded import EmbeddedOptions, EmbeddedValkey
from tests.benchmarks.probed_worker import ProbedWorker

START_TIMEOUT_S: Final = 120.0
STOP_GRACE_S: Final = 10.0

# Of every decode worker, unless it is told otherwise.
_QUEUE_SIZE: Final = 256


class ServiceStack:
    """Store, prefill worker and gateway on this machine. A context manager, for the main thread.

    Args:
        model: Folder of the model.
        store_bytes: Memory of the store.
    """

    def __init__(self, model: str, *, store_bytes: int = 2 << 30) -> None:
        self.model = model
        self._store = EmbeddedValkey(EmbeddedOptions(maxmemory_bytes=store_bytes))
        self._port = _free_port()
        self._logs = Path()
        self._children: list[Child] = []
        self._workers: list[ProbedWorker] = []
        self._metrics_ports: dict[str, int] = {}
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as scope:
            self._logs = Path(scope.enter_context(tempfile.TemporaryDirectory(prefix="cs-bench-")))
            scope.enter_context(self._store)
            scope.callback(lambda: stop_children(self._children, grace_s=STOP_GRACE_S))
            self.start("prefill")
            self.start("gateway", listen=f"127.0.0.1:{self._port}")
            self._scope = scope.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scope.close()

    @contextmanager
    def worker(self, **settings: Any) -> Iterator[ProbedWorker]:
        """Have a decode worker inside the block, beside those of blocks around it.

        Args:
            settings: Of the worker.
        """
        settings = {"queue_size": _QUEUE_SIZE, "log_level": "warning"} | settings
        with ProbedWorker(
            model=self.model, dtype="float32", redis_url=self._store.url, **settings
        ) as worker:
            asyncio.run(self._warm_up(worker))
            worker.token_times()
            worker.admissions()
            self._workers.append(worker)
            try:
                yield worker
            finally:
                self._workers.remove(worker)

    def start(self, name: str, **settings: object) -> None:
        """Start a process that lives as long as the stack.

        Args:
            name: ``compress``, for one; ``prefill`` and ``gateway`` are there.
            settings: Of the process, by their names.
        """
        self._metrics_ports[name] = _free_port()
        settings = {
            "redis_url": self._store.url,
            "model": self.model,
            "dtype": "float32",
            "listen": "127.0.0.1:0",
            "log_level": "warning",
            "metrics_listen": f"127.0.0.1:{self._metrics_ports[name]}",
        } | settings
        own = {f"CHUNKSERVE_{key.upper()}": str(value) for key, value in settings.items()}
        command = [sys.executable, "-m", f"services.{name}"]
        log = self._logs / f"{name}.log"
        self._children.append(start_child(name, command, env={**os.environ, **own}, log=log))

    @property
    def store_url(self) -> str:
        """Where the store is."""
        return self._store.url

    def client(self) -> Client:
        """Return a client of the gateway."""
        return Client(f"127.0.0.1:{self._port}", max_retries=0)

    def metric(self, process: str, name: str, **labels: str) -> float:
        """Return a metric of a process, as soon as it tells any.

        Args:
            process: Name of a process that was started.
            name: Of the sample, ``_total`` included.
            labels: Only samples with these count.

        Returns:
            The sum of the samples that match; 0 if there are none.
        """
        url = f"http://127.0.0.1:{self._metrics_ports[process]}/metrics"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(url) as answer:
                    families = list(text_string_to_metric_families(answer.read().decode()))
                break
            except URLError:
                self._check(deadline)
                time.sleep(0.2)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def _warm_up(self, worker: ProbedWorker) -> None:
        """Let a worker answer a request, as soon as all that it needs is there."""
        deadline = time.monotonic() + START_TIMEOUT_S
        other = self._workers[-1].worker_id if self._workers else ""
        async with self.client() as client:
            while True:
                try:
                    answer = client.generate("Hello", max_tokens=8, avoid_worker=other)
                    result = await answer.result()
                except ChunkServeError:
                    pass  # some process is not ready yet
                else:
                    if result.prompt_info.decode_worker == worker.worker_id:
                        return
                self._check(deadline)
                await asyncio.sleep(0.2)

    def _check(self, deadline: float) -> None:
        for child in self._children:
            if not child.is_running:
                raise RuntimeError(f"{child.name} has ended:\n{child.last_words()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer after {START_TIMEOUT_S} s")


@dataclass(slots=True)
class Heard:
    """An answer as it arrived.

    Attributes:
        asked_ns: ``time.monotonic_ns()`` when it was asked for.
        token_ids: Its tokens.
        arrived_ns: ``time.monotonic_ns()`` of each.
        prompt_info: Its first event.
        finish: Its last event; ``None`` if it was left early.
    """

    asked_ns: int = 0
    token_ids: list[int] = field(default_factory=list)
    arrived_ns: list[int] = field(default_factory=list)
    prompt_info: PromptInfo | None = None
    finish: Finish | None = None

    @property
    def first_token_ms(self) -> float:
        """Milliseconds from the question to the first token."""
        return (self.arrived_ns[0] - self.asked_ns) / 1e6


async def listen(
    asker: Client | Session,
    token_ids: Sequence[int] | None = None,
    heard: Heard | None = None,
    **options: Any,
) -> Heard:
    """Ask, and note when each token arrives.

    Args:
        asker: The client, or a session.
        token_ids: What is asked; ``None``: ``options`` say it.
        heard: Where to note it, for those who want to look while it arrives.
        options: Of ``generate``.
    """
    heard = heard or Heard()
    heard.asked_ns = time.monotonic_ns()
    async with asker.generate(token_ids=token_ids, **options) as answer:
        async for event in answer.events():
            now = time.monotonic_ns()
            if isinstance(event, TokenDelta):
                heard.token_ids.extend(event.token_ids)
                heard.arrived_ns.extend([now] * len(event.token_ids))
            elif isinstance(event, PromptInfo):
                heard.prompt_info = event
            else:
                heard.finish = event
    return heard


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
