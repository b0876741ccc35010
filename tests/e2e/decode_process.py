"""A decode worker as a process without Ray, which can be held at a moment and then killed there.

The worker is the real one: model, engine, gRPC server, heartbeat. Processes are forked from one
that has imported everything, so that a new worker is there at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from services.decode.config import DecodeSettings
from services.decode.sequence import DecodeSequence
from services.decode.worker import DecodeWorker, load
from services.runtime.telemetry import configure_logging
from services.store import Store, open_store

START_TIMEOUT_S: Final = 60.0
HELD_TIMEOUT_S: Final = 60.0

# Places behind the last token: before the turn's commit, and behind it.
BEFORE_COMMIT: Final = 1_000_000
AFTER_COMMIT: Final = 1_000_001

_PR_SET_PDEATHSIG: Final = 1

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["services.decode.worker", __name__])


class DecodeProcess:
    """A running worker.

    Args:
        worker_id: Unique among all workers that ever lived.
        log: Where its output goes.
        settings: Of the worker (:class:`DecodeSettings`).
    """

    def __init__(self, worker_id: str, log: Path, **settings: Any) -> None:
        self.worker_id = worker_id
        self._is_ready = False
        self._commands, commands = _context.Pipe()
        self._held, held = _context.Pipe(duplex=False)
        self._process = _context.Process(
            target=_run,
            args=(worker_id, log, settings, commands, held),
            name=worker_id,
            daemon=True,
        )
        self._process.start()
        for pipe in (commands, held):
            pipe.close()

    async def ready(self) -> None:
        """Wait until it serves."""
        if not self._is_ready:
            await self._answered("ready")
            self._is_ready = True

    async def hold_at(self, place: int, *, seed: int) -> None:
        """Hold all of it at a place of an answer.

        Args:
            place: So many tokens are chosen, not one more; or :data:`BEFORE_COMMIT` or
                :data:`AFTER_COMMIT` of any session's turn.
            seed: Of the answer.
        """
        await self._tell((place, seed))
        while self._held.poll():
            self._held.recv()  # of the place before

    async def go_on(self) -> None:
        """Hold it nowhere any more."""
        await self._tell(None)

    async def held(self) -> None:
        """Wait until it has come to the place."""
        assert await asyncio.to_thread(self._held.poll, HELD_TIMEOUT_S), "it was never held"
        self._held.recv()

    def kill(self) -> None:
        """Kill it with SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.join()
        self._commands.close()
        self._held.close()

    async def _tell(self, hold: tuple[int, int] | None) -> None:
        self._commands.send(hold)
        await self._answered("told")

    async def _answered(self, word: str) -> None:
        assert await asyncio.to_thread(self._commands.poll, START_TIMEOUT_S), f"never {word}"
        assert self._commands.recv() == word


# In the worker's process.


def _run(
    worker_id: str, log: Path, settings: dict[str, Any], commands: Connection, held: Connection
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    # Progress bars have locks, which otherwise have names that nobody removes after a kill.
    multiprocessing.set_start_method("fork", force=True)
    asyncio.run(_serve(worker_id, DecodeSettings(**settings), commands, _Hold(held)))


async def _serve(
    worker_id: str, settings: DecodeSettings, commands: Connection, hold: _Hold
) -> None:
    configure_logging(settings.log_level)
    store = open_store(settings.redis_url)
    hold.watch_commits(store)
    hold.watch_tokens()
    worker = DecodeWorker(load(settings), store, settings, worker_id=worker_id)
    await worker.start()

    def obey() -> None:
        hold.set(commands.recv())
        commands.send("told")

    asyncio.get_running_loop().add_reader(commands.fileno(), obey)
    commands.send("ready")
    await asyncio.Event().wait()


class _Hold:
    """Stops the worker where it was told to, and says so."""

    def __init__(self, held: Connection) -> None:
        self._held = held
        self._where: tuple[int, int] | None = None
        self._go_on = threading.Event()

    def set(self, where: tuple[int, int] | None) -> None:
        self._where = where
        self._go_on.set()
        self._go_on = threading.Event()

    def watch_tokens(self) -> None:
        accept = DecodeSequence.accept

        def held(sequence: DecodeSequence, logits: torch.Tensor) -> Any:
            here = (len(sequence.token_ids), sequence._sampling.seed)
            go_on = self._go_on
            if here == self._where and not sequence._pending:
                self._held.send("held")
                go_on.wait()
            return accept(sequence, logits)

        DecodeSequence.accept = held  # type: ignore[method-assign]

    def watch_commits(self, store: Store) -> None:
        commit = store.commit_manifest

        async def held(*arguments: Any, **options: Any) -> None:
            await self._at(BEFORE_COMMIT)
            await commit(*arguments, **options)
            await self._at(AFTER_COMMIT)

        store.commit_manifest = held  # type: ignore[method-assign]

    async def _at(self, place: int) -> None:
        go_on = self._go_on
        if self._where is not None and place == self._where[0]:
            self._held.send("held")
            await asyncio.to_thread(go_on.wait)
