"""Runs the model over new tokens, one prompt at a time, on a thread of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from prometheus_client import Counter

import chunkkv
from services.compress.segments import library_errors
from services.models.loader import LoadedModel
from services.runtime.errors import OverloadedError

_TOKENS = Counter("chunkserve_prefill_tokens", "Tokens that the model ran over.")


@dataclass(frozen=True, slots=True)
class RunResult:
    """A prompt that was run and compressed.

    Attributes:
        kv: What was kept of its new tokens.
        prefill_ms: Milliseconds of forward passes, with what a scorer does that watches them.
        compression_ms: Milliseconds to score, by a second pass if the scorer needs one, select and
            gather.
    """

    kv: chunkkv.CompressedKV
    prefill_ms: float
    compression_ms: float


class PrefillRunner:
    """The model, behind a bounded queue.

    Args:
        loaded: The model. Its attention is made observable for good.
        prefill_chunk_tokens: Tokens in one forward pass at most.
        queue_size: Prompts that wait at most, beside the one that runs.
    """

    def __init__(self, loaded: LoadedModel, *, prefill_chunk_tokens: int, queue_size: int) -> None:
        self._loaded = loaded
        self._chunk_tokens = prefill_chunk_tokens
        self._most = queue_size + 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._sentence_ends: torch.Tensor | None = None
        self.num_active = 0
        chunkkv.make_observable(loaded.model)

    @property
    def num_slots(self) -> int:
        """Prompts that run or wait at most."""
        return self._most

    async def run(
        self,
        token_ids: Sequence[int],
        past: chunkkv.KVCache,
        policy: chunkkv.CompressionPolicy | None,
    ) -> RunResult:
        """Run the model over ``token_ids`` behind ``past``, and keep what ``policy`` says.

        If the caller is cancelled, the run ends before its next forward pass.

        Args:
            token_ids: At least one.
            past: KV of the tokens before; it is extended.
            policy: What to keep; ``None``: everything, as decode workers store an answer.

        Raises:
            OverloadedError: Too many prompts wait.
            InvalidRequestError: The model's attention overflowed.
        """
        if self.num_active >= self._most:
            raise OverloadedError(
                f"{self.num_active} prompts are running or waiting, the most that this worker "
                "takes; send it again a little later",
                reason="PREFILL_QUEUE_FULL",
                retry_after_s=1.0,
            )
        stopped = threading.Event()
        self.num_active += 1
        job = asyncio.get_running_loop().run_in_executor(
            self._thread, self._run, token_ids, past, policy, stopped
        )
        # Counted until the thread is done with it, even if nobody waits for it any more.
        job.add_done_callback(self._finished)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            stopped.set()
            raise

    def close(self) -> None:
        """End the thread once it is idle."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _finished(self, job: asyncio.Future[RunResult]) -> None:
        self.num_active -= 1
        if not job.cancelled():
            # Whoever was cancelled does not fetch the exception; asyncio would complain.
            job.exception()

    def _run(
        self,
        token_ids: Sequence[int],
        past: chunkkv.KVCache,
        policy: chunkkv.CompressionPolicy | None,
        stopped: threading.Event,
    ) -> RunResult:
        def check() -> None:
            if stopped.is_set():
                raise _StoppedError

        model = self._loaded.model
        input_ids = torch.tensor([token_ids], device=self._loaded.device)
        started = time.perf_counter()
        check()
        with library_errors():
            prefilled = chunkkv.run_prefill(
                model,
                input_ids,
                window_size=1 if policy is None else policy.num_queries,
                scorers=() if policy is None else (policy.scorer,),
                past=past,
                prefill_chunk_tokens=self._chunk_tokens,
                fingerprint=self._loaded.fingerprint,
                before_chunk=check,
            )
            computed = time.perf_counter()
            if policy is not None:
                prefilled = chunkkv.repeat(
                    model, prefilled, input_ids, (policy.scorer,), before_chunk=check
                )
            if policy is not None and policy.unit == "sentence":
                ends = self._ends_of(input_ids)
                prefilled = dataclasses.replace(prefilled, sentence_ends=ends)
            kv = _kept(prefilled, policy).to("cpu")
        ended = time.perf_counter()
        _TOKENS.inc(len(token_ids))
        return RunResult(kv, (computed - started) * 1000, (ended - computed) * 1000)

    def _ends_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which of the tokens end a sentence, ``(batch, seq_len)`` bool."""
        if self._sentence_ends is None:  # a second for a large vocabulary, and few ask
            ends = chunkkv.sentence_ending_tokens(
                self._loaded.tokenizer,
                vocab_size=int(self._loaded.model.config.get_text_config().vocab_size),
            )
            self._sentence_ends = ends.to(self._loaded.device)
        return self._sentence_ends[input_ids]


def _kept(
    prefilled: chunkkv.Prefilled, policy: chunkkv.CompressionPolicy | None
) -> chunkkv.CompressedKV:
    if policy is None:
        return prefilled.cache.take_tail(prefilled.first_token, fingerprint=prefilled.fingerprint)
    return chunkkv.compress(prefilled, policy)[0]


class _StoppedError(Exception):
    """Nobody waits for this prompt any more."""
