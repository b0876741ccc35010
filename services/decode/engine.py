"""Runs the model over all sequences of this worker, on one thread of its own.

The event loop asks for a slot, starts a sequence in it and reads its tokens; it never computes.
The thread takes the sequences in turn, one forward pass each, so that a long answer does not make
others wait. What callers see (:meth:`Engine.slot`, :meth:`Slot.start`, the returned generation)
says nothing of how steps are made: an engine that steps all sequences in one pass keeps it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import torch

from services.decode.generation import Generation
from services.decode.sequence import DecodeSequence, DecodeTask
from services.decode.slots import Slots
from services.models.loader import LoadedModel
from services.runtime.errors import UnavailableError
from services.runtime.telemetry import get_logger

# Tokens that wait for a slow reader before his sequence pauses.
READER_CAPACITY: Final = 32

_log = get_logger()


class Engine:
    """Generates for several requests at once.

    Args:
        loaded: The model, its tokenizer and its end-of-sequence tokens.
        num_slots: Sequences that are worked on at once.
        queue_size: Requests that may wait for a slot.
        prefill_chunk_tokens: Known tokens that one forward pass takes at most, so that a long
            turn does not make the other sequences wait.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_slots: int = 8,
        queue_size: int = 32,
        prefill_chunk_tokens: int = 512,
    ) -> None:
        self._loaded = loaded
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._slots = Slots(num_slots, queue_size)
        self._generations: deque[Generation] = deque()
        self._changed = threading.Condition()  # guards the two around it
        self._is_running = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = asyncio.Event()

    @property
    def num_slots(self) -> int:
        """Sequences that are worked on at once."""
        return self._slots.num_slots

    @property
    def num_active(self) -> int:
        """Requests that hold a slot or wait for one."""
        return self._slots.num_active

    @property
    def is_running(self) -> bool:
        """Whether the thread works: started, not stopped and not failed."""
        return self._is_running and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; tokens go to the event loop that this is called on."""
        self._loop = asyncio.get_running_loop()
        self._is_running = True
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step; running sequences fail. Idempotent."""
        with self._changed:
            self._is_running = False
            self._changed.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    async def wait_failed(self) -> None:
        """Wait until the thread has failed."""
        await self._failed.wait()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot]:
        """Hold a slot inside the block. Leaving it cancels what was started in the slot.

        Raises:
            OverloadedError: All slots are held and the queue is full.
        """
        await self._slots.acquire()
        slot = Slot(self)
        try:
            yield slot
        finally:
            # Without waiting, so that no second cancellation can come in between.
            if slot.generation is None:
                self._slots.release()
            else:
                slot.generation.cancel(self._slots.release)

    def submit(self, task: DecodeTask) -> Generation:
        """Begin to generate. Called by :meth:`Slot.start`.

        Raises:
            UnavailableError: The engine has failed or was stopped.
        """
        assert self._loop is not None
        generation = Generation(
            DecodeSequence(
                task,
                tokenizer=self._loaded.tokenizer,
                eos_token_ids=self._loaded.eos_token_ids,
            ),
            capacity=READER_CAPACITY,
            loop=self._loop,
            notify=self._wake_up,
        )
        with self._changed:
            if not self._is_running:
                raise _not_running()
            self._generations.append(generation)
            self._changed.notify()
        return generation

    def _wake_up(self) -> None:
        with self._changed:
            self._changed.notify()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while (generation := self._next()) is not None:
                    self._step(generation)
        except BaseException as error:
            # Nobody could join the thread to see it: this is where a fatal error is told.
            _log.error("engine.failed", exc_info=error)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._failed.set)
        finally:
            self._release_all()

    def _next(self) -> Generation | None:
        """Wait for a sequence that can go on, in turn; ``None`` when it is time to stop."""
        with self._changed:
            while self._is_running:
                self._drop_cancelled()
                for _ in range(len(self._generations)):
                    generation = self._generations.popleft()
                    self._generations.append(generation)
                    if generation.has_room:
                        return generation
                self._changed.wait()
        return None

    def _step(self, generation: Generation) -> None:
        try:
            delta = generation.sequence.accept(self._forward(generation.sequence))
        except torch.AcceleratorError:
            raise  # the device is lost to this process, and with it every sequence
        except Exception as error:
            self._release(generation, error)
            return
        if delta is not None:
            generation.put(delta)
        if generation.sequence.is_finished:
            self._release(generation, None)

    def _forward(self, sequence: DecodeSequence) -> torch.Tensor:
        tokens = sequence.next_input(self._prefill_chunk_tokens)
        output = self._loaded.model(
            input_ids=torch.tensor([tokens], device=self._loaded.device),
            past_key_values=sequence.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _drop_cancelled(self) -> None:
        for generation in [each for each in self._generations if each.is_cancelled]:
            self._generations.remove(generation)
            generation.release(None)

    def _release(self, generation: Generation, error: BaseException | None) -> None:
        with self._changed:
            self._generations.remove(generation)
        generation.release(error)

    def _release_all(self) -> None:
        with self._changed:
            self._is_running = False
            generations = list(self._generations)
            self._generations.clear()
        for generation in generations:
            generation.release(_not_running())


class Slot:
    """A place in the engine for one sequence.

    Attributes:
        generation: What was started in it, if anything was.
    """

    def __init__(self, engine: Engine) -> None:
        self.generation: Generation | None = None
        self._engine = engine

    def start(self, task: DecodeTask) -> Generation:
        """Begin to generate; once.

        Raises:
            UnavailableError: The engine has failed or was stopped.
        """
        self.generation = self._engine.submit(task)
        return self.generation


def _not_running() -> UnavailableError:
    return UnavailableError(
        "this worker has stopped generating; send the request to another",
        reason="WORKER_STOPPED",
    )
