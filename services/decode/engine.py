"""Runs the model over all sequences of this worker, on one thread of its own.

Continuous batching: every step is one forward pass over whatever sequences there are, each of which
joins and leaves between two steps. Running streams get one token a step; sequences that have known
tokens to be seen (the end of a prompt, a short turn, a resumed answer) take them in pieces that
delay the streams by a bounded time. The event loop never computes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch

from services.decode.attention import Rows, forward
from services.decode.generation import Generation, Sink
from services.decode.pacing import Pace
from services.decode.sequence import DecodeSequence, DecodeTask
from services.decode.sequence_kv import SequenceKV
from services.decode.tail import MAX_NEW_TOKENS
from services.models.loader import LoadedModel
from services.runtime.errors import UnavailableError
from services.runtime.telemetry import get_logger

# Tokens that wait for a slow reader before his sequence pauses.
READER_CAPACITY: Final = 32

# So many tokens of a step are on their way while the next are chosen, which takes about as long as
# a message does. One message for a whole step would find everything behind it asleep.
_TOKENS_AT_ONCE: Final = 6

_log = get_logger()


class _Share(NamedTuple):
    """A sequence's part of a step.

    Attributes:
        generation: The sequence.
        num_tokens: Tokens that the model sees of it.
        is_stream: They are one, its latest; else known ones, of which more may follow.
    """

    generation: Generation
    num_tokens: int
    is_stream: bool


class Engine:
    """Generates for several requests at once.

    Args:
        loaded: The model, its tokenizer and its end-of-sequence tokens. The model attends to
            ``SequenceKV`` (``use_sequences``).
        prefill_chunk_tokens: Known tokens in one step at most, in ``[1, MAX_NEW_TOKENS]``.
        max_stall_ms: Milliseconds by which known tokens may lengthen a step of running streams.
        num_threads: Processor threads of a step; then all other threads of the process compute
            with one. ``None``: as torch is set.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        prefill_chunk_tokens: int = MAX_NEW_TOKENS,
        max_stall_ms: float = 50.0,
        num_threads: int | None = None,
    ) -> None:
        self._loaded = loaded
        self._num_threads = num_threads
        self._pace = Pace(max_stall_ms, prefill_chunk_tokens)
        self._generations: list[Generation] = []  # in order of arrival
        self._changed = threading.Condition()  # guards the list
        self._is_running = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = asyncio.Event()

    @property
    def num_running(self) -> int:
        """Sequences that the thread knows."""
        return len(self._generations)

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

    def submit(
        self,
        task: DecodeTask,
        kv: SequenceKV,
        *,
        on_released: Callable[[], None],
        sink: Sink | None = None,
    ) -> Generation:
        """Begin to generate.

        Args:
            task: What is to be generated.
            kv: Of the tokens before the task's; has room for all that the task can come to.
            on_released: Called on the event loop, once, when the thread uses ``kv`` no more.
            sink: Takes the tokens, on the engine's thread; else the generation is read.

        Raises:
            InvalidRequestError: The task's resumed tokens contradict its settings.
            UnavailableError: The engine has failed or was stopped.
        """
        generation = Generation(
            DecodeSequence(
                task,
                tokenizer=self._loaded.tokenizer,
                eos_token_ids=self._loaded.eos_token_ids,
            ),
            kv,
            capacity=READER_CAPACITY,
            notify=self._wake_up,
            on_released=on_released,
            sink=sink,
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
        if self._num_threads is not None:
            _take_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while shares := self._next_shares():
                    self._step(shares)
        except BaseException as error:
            # Nobody could join the thread to see it: this is where a fatal error is told.
            _log.error("engine.failed", exc_info=error)
            self._on_loop([self._failed.set])
        finally:
            self._release_all()

    def _next_shares(self) -> list[_Share]:
        """Wait until a sequence can go on, and return what the next step takes of each.

        Empty when it is time to stop.
        """
        with self._changed:
            while self._is_running:
                self._drop_cancelled()
                if shares := self._share([each for each in self._generations if each.has_room]):
                    return shares
                self._changed.wait()
        return []

    def _share(self, ready: Sequence[Generation]) -> list[_Share]:
        streams = [each for each in ready if each.sequence.num_pending == 1]
        catching_up = [each for each in ready if each.sequence.num_pending > 1]
        shares = [_Share(generation, 1, is_stream=True) for generation in streams]
        left = self._pace.known_tokens(num_streams=len(streams))
        for generation in catching_up:
            piece = min(generation.sequence.num_pending, generation.kv.max_new_tokens, left)
            if piece == 0:
                break
            shares.append(_Share(generation, piece, is_stream=False))
            left -= piece
        return shares

    def _step(self, shares: Sequence[_Share]) -> None:
        started = time.perf_counter()
        shares = self._with_room(shares)
        if not shares:
            return
        try:
            logits = self._forward(shares)
        except torch.AcceleratorError:
            raise  # the device is lost to this process, and with it every sequence
        except Exception as error:
            self._release([(share.generation, error) for share in shares])
            return
        chosen: list[Callable[[], None]] = []
        ended: list[tuple[Generation, Exception | None]] = []
        for share, row in zip(shares, logits, strict=True):
            generation = share.generation
            try:
                delta = generation.sequence.accept(row)
            except Exception as error:
                ended.append((generation, error))
                continue
            if delta is not None:
                chosen.append(generation.put(delta))
            if len(chosen) == _TOKENS_AT_ONCE:
                self._on_loop(chosen)
                chosen = []
            if generation.sequence.is_done:
                ended.append((generation, None))
        self._on_loop(chosen)
        self._release(ended)
        self._pace.observe(
            (time.perf_counter() - started) * 1000,
            num_streams=sum(share.is_stream for share in shares),
            num_known_tokens=sum(share.num_tokens for share in shares if not share.is_stream),
        )

    def _with_room(self, shares: Sequence[_Share]) -> list[_Share]:
        """Compress the KV of sequences that have come to their limit; those that fail leave."""
        ready: list[_Share] = []
        for share in shares:
            try:
                share.generation.kv.make_room(share.num_tokens)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                self._release([(share.generation, error)])
            else:
                ready.append(share)
        return ready

    def _forward(self, shares: Sequence[_Share]) -> torch.Tensor:
        """Return the logits behind each share's last token ``(len(shares), vocab_size)``."""
        token_ids: list[int] = []
        position_ids: list[int] = []
        last: list[int] = []
        for generation, num_tokens, _ in shares:
            token_ids += generation.sequence.next_input(num_tokens)
            first = generation.kv.num_tokens
            position_ids += range(first, first + num_tokens)
            last.append(len(token_ids) - 1)
        rows = Rows([(share.generation.kv, share.num_tokens) for share in shares])
        logits = forward(self._loaded.model, token_ids, position_ids, rows, last)
        for share in shares:
            share.generation.kv.advance(share.num_tokens)
        return logits

    def _drop_cancelled(self) -> None:
        """Let go of those that were cancelled."""
        ended = [each for each in self._generations if each.is_cancelled]
        self._release([(generation, None) for generation in ended])

    def _release(self, ended: Sequence[tuple[Generation, Exception | None]]) -> None:
        if not ended:
            return
        gone = {id(generation) for generation, _ in ended}
        with self._changed:
            self._generations = [each for each in self._generations if id(each) not in gone]
        self._on_loop([generation.released(error) for generation, error in ended])

    def _release_all(self) -> None:
        with self._changed:
            self._is_running = False
            left = list(self._generations)
        self._release([(generation, _not_running()) for generation in left])

    def _on_loop(self, calls: Sequence[Callable[[], None]]) -> None:
        """Run calls on the event loop, equal ones once; it is woken up once for all of them."""
        if calls:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_call_all, list(dict.fromkeys(calls)))


def _take_threads(num_threads: int) -> None:
    """Let this thread compute with ``num_threads``, and those that come with one.

    OpenMP keeps a team for every thread that computes with several. If all teams together have more
    threads than there are processors, none of them spins at its barriers, and a step takes 1.7
    times as long, although the other teams do nothing.
    """
    torch.set_num_threads(num_threads)
    torch.get_num_threads()  # else this thread would take the default when it first computes
    # That was also the default of threads to come: taken back on a thread that does not stay.
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _not_running() -> UnavailableError:
    return UnavailableError(
        "this worker has stopped generating; send the request to another",
        reason="WORKER_STOPPED",
    )
