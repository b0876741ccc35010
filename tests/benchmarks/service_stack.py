"""The whole service in real processes, for benchmarks, and a client that looks at the clock.

Store, prefill worker and gateway as they are deployed; the decode worker is a
:class:`~tests.benchmarks.probed_worker.ProbedWorker`, so that more can be told of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from chunkserve_client import ChunkServeError, Client, Finish, PromptInfo, Session, TokenDelta
from services.local.processes import Child, start_child, stop_children
from services.store.embedded import EmbeddedOptions, EmbeddedValkey
from tests.benchmarks.probed_worker import ProbedWorker

START_TIMEOUT_S: Final = 120.0
STOP_GRACE_S: Final = 10.0

# The gateway's list of workers is at most half as old.
_LIST_AGE_S: Final = 1.0

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
        self._children: list[Child] = []
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as scope:
            logs = Path(scope.enter_context(tempfile.TemporaryDirectory(prefix="cs-bench-")))
            scope.enter_context(self._store)
            scope.callback(lambda: stop_children(self._children, grace_s=STOP_GRACE_S))
            self._start("prefill", logs, "127.0.0.1:0")
            self._start("gateway", logs, f"127.0.0.1:{self._port}")
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
        """Have a decode worker inside the block, the only one.

        Args:
            settings: Of the worker.
        """
        settings = {"queue_size": _QUEUE_SIZE, "log_level": "warning"} | settings
        with ProbedWorker(
            model=self.model, dtype="float32", redis_url=self._store.url, **settings
        ) as worker:
            time.sleep(_LIST_AGE_S)  # until the gateway has forgotten the one before
            asyncio.run(self._warm_up())
            worker.token_times()
            worker.admissions()
            yield worker

    def client(self) -> Client:
        """Return a client of the gateway."""
        return Client(f"127.0.0.1:{self._port}", max_retries=0)

    async def _warm_up(self) -> None:
        """Answer a request, as soon as all that it needs is there."""
        deadline = time.monotonic() + START_TIMEOUT_S
        async with self.client() as client:
            while True:
                try:
                    await client.generate("Hello", max_tokens=8).result()
                except ChunkServeError:
                    self._check(deadline)
                    await asyncio.sleep(0.2)
                else:
                    return

    def _check(self, deadline: float) -> None:
        for child in self._children:
            if not child.is_running:
                raise RuntimeError(f"{child.name} has ended:\n{child.last_words()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer after {START_TIMEOUT_S} s")

    def _start(self, name: str, logs: Path, listen: str) -> None:
        env = {
            **os.environ,
            "CHUNKSERVE_REDIS_URL": self._store.url,
            "CHUNKSERVE_MODEL": self.model,
            "CHUNKSERVE_DTYPE": "float32",
            "CHUNKSERVE_LISTEN": listen,
            "CHUNKSERVE_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", f"services.{name}"]
        self._children.append(start_child(name, command, env=env, log=logs / f"{name}.log"))


@dataclass(slots=True)
class Heard:
    """An answer as it arrived.

    Attributes:
        token_ids: Its tokens.
        arrived_ns: ``time.monotonic_ns()`` of each.
        prompt_info: Its first event.
        finish: Its last event; ``None`` if it was left early.
    """

    token_ids: list[int] = field(default_factory=list)
    arrived_ns: list[int] = field(default_factory=list)
    prompt_info: PromptInfo | None = None
    finish: Finish | None = None


async def listen(
    asker: Client | Session, token_ids: Sequence[int], heard: Heard | None = None, **options: Any
) -> Heard:
    """Ask, and note when each token arrives.

    Args:
        asker: The client, or a session.
        token_ids: What is asked.
        heard: Where to note it, for those who want to look while it arrives.
        options: Of ``generate``.
    """
    heard = heard or Heard()
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
