"""One turn: prefill worker, then decode worker, then the stream to the caller.

Knows no leases and no limits; those are its caller's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from chunkserve.v1 import decode_pb2, inference_pb2, manifest_pb2, prefill_pb2, types_pb2
from services.gateway.channels import WorkerChannels
from services.gateway.manifests import num_cached_tokens
from services.gateway.routing import Router
from services.runtime.errors import OverloadedError, ServiceError, UnavailableError
from services.runtime.interceptors import current_request_id
from services.runtime.status import WORKER_UNAVAILABLE
from services.runtime.telemetry import add_request_fields
from services.store.base import SegmentStore, WorkerInfo
from services.store.lease import finish

# Reason with which the store says that it takes no more.
_STORE_FULL: Final = "STORE_FULL"

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Turn:
    """A request that was let in.

    Attributes:
        request: What the caller sent; valid.
        send: Writes one event to the caller.
        remaining_s: Returns the seconds until the deadline.
        started_at: ``time.perf_counter()`` when the request came.
        avoid_worker: Id of a decode worker that is taken only if there is no other.
        request_digest: Tells the request from another one of the same id.
    """

    request: inference_pb2.GenerateRequest
    send: Callable[[inference_pb2.GenerateResponse], Awaitable[None]]
    remaining_s: Callable[[], float]
    started_at: float
    avoid_worker: str = ""
    request_digest: bytes = b""


class TurnRunner:
    """Runs turns on workers.

    A worker that cannot be reached, or is full, is replaced once: a prefill worker always, because
    it keeps no state; a decode worker as long as it has sent nothing.
    """

    def __init__(self, store: SegmentStore, router: Router, channels: WorkerChannels) -> None:
        self._store = store
        self._router = router
        self._channels = channels

    async def run(self, turn: Turn, manifest: manifest_pb2.Manifest) -> types_pb2.Finish:
        """Answer ``turn`` on top of ``manifest``: send its PromptInfo and tokens, return its end.

        With a session's manifest, the decode worker commits the turn. Without a session id,
        nothing is kept, however this ends.

        Returns:
            The end, which is the caller's to send once the session is free: a client that has
            seen it may send the next turn at once.

        Raises:
            ServiceError: What a worker raised, unchanged.
            UnavailableError: No worker lives, or one died during the answer.
            MismatchError: No worker has the weights that computed the session's KV cache.
        """
        await self._channels.prune({w.address for w in await self._router.workers()})
        # Without a decode worker, a long prefill would be in vain.
        await self._router.pick_decode(manifest.model, fingerprint=manifest.model_fingerprint)
        prefilled = await self._prefill(turn, manifest)
        try:
            return await self._decode(turn, prefilled)
        finally:
            if not manifest.session_id:
                await finish("one_off.delete", self._delete_segments(prefilled.manifest))

    async def count_tokens(
        self,
        request: inference_pb2.CountTokensRequest,
        model: str,
        remaining_s: Callable[[], float],
    ) -> int:
        """Return the number of tokens of an input, template included."""
        tokenize = prefill_pb2.TokenizeRequest()
        _copy_input(request, tokenize)
        answer = await self._ask_prefill_worker(
            model,
            "",
            lambda worker: self._channels.tokenize(worker, tokenize, timeout_s=remaining_s()),
        )
        return len(answer.token_ids)

    async def _prefill(
        self, turn: Turn, manifest: manifest_pb2.Manifest
    ) -> prefill_pb2.PrefillResponse:
        request = prefill_pb2.PrefillRequest(
            manifest=manifest, min_free_tokens=max(1, turn.request.sampling.min_tokens)
        )
        _copy_input(turn.request, request)
        if turn.request.HasField("compression"):
            request.compression.CopyFrom(turn.request.compression)
        return await self._ask_prefill_worker(
            manifest.model,
            manifest.model_fingerprint,
            lambda worker: self._channels.prefill(worker, request, timeout_s=turn.remaining_s()),
        )

    async def _ask_prefill_worker(
        self, model: str, fingerprint: str, ask: Callable[[WorkerInfo], Awaitable[_Answer]]
    ) -> _Answer:
        pick = partial(self._router.pick_prefill, model, fingerprint=fingerprint)
        worker = await pick()
        try:
            return await ask(worker)
        except ServiceError as error:
            if not _may_go_elsewhere(error):
                raise
            other = await _other_worker(pick(exclude=[worker.worker_id]), error)
        return await ask(other)

    async def _decode(self, turn: Turn, prefilled: prefill_pb2.PrefillResponse) -> types_pb2.Finish:
        pick = partial(
            self._router.pick_decode,
            prefilled.manifest.model,
            fingerprint=prefilled.manifest.model_fingerprint,
            last_worker=prefilled.manifest.last_decode_worker,
            avoid=turn.avoid_worker,
        )
        worker = await pick()
        relay = _Relay(turn, prefilled)
        try:
            return await self._decode_on(worker, relay)
        except ServiceError as error:
            if relay.has_begun or not _may_go_elsewhere(error):
                raise
            other = await _other_worker(pick(exclude=[worker.worker_id]), error)
        return await self._decode_on(other, relay)

    async def _decode_on(self, worker: WorkerInfo, relay: _Relay) -> types_pb2.Finish:
        request = decode_pb2.DecodeRequest(
            manifest=relay.prefilled.manifest,
            sampling=relay.turn.request.sampling,
            compression=relay.prefilled.compression,
            request_id=current_request_id(),
            request_digest=relay.turn.request_digest,
        )
        call = self._channels.decode(worker, request, timeout_s=relay.turn.remaining_s())
        async with aclosing(call) as events:
            async for event in events:
                await relay.forward(event)
        return relay.finish()

    async def _delete_segments(self, manifest: manifest_pb2.Manifest) -> None:
        segment_ids = [segment.segment_id for segment in manifest.segments]
        if segment_ids:
            await asyncio.to_thread(self._store.delete_segments, segment_ids)


class _Relay:
    """Turns a decode worker's events into the caller's."""

    def __init__(self, turn: Turn, prefilled: prefill_pb2.PrefillResponse) -> None:
        self.turn = turn
        self.prefilled = prefilled
        self._has_token = False
        self._finish: types_pb2.Finish | None = None
        self.has_begun = False

    async def forward(self, event: decode_pb2.DecodeResponse) -> None:
        """Send the event on; keep the last one."""
        self.has_begun = True
        match event.WhichOneof("event"):
            case "started":
                info = _prompt_info(self.prefilled, event.started)
                _log_prompt(info)
                await self.turn.send(inference_pb2.GenerateResponse(prompt_info=info))
            case "delta":
                if not self._has_token:
                    self._has_token = True
                    add_request_fields(first_token_ms=_ms_since(self.turn.started_at))
                await self.turn.send(inference_pb2.GenerateResponse(delta=event.delta))
            case "finish":
                self._finish = event.finish
                add_request_fields(num_generated_tokens=event.finish.num_generated_tokens)

    def finish(self) -> types_pb2.Finish:
        """Return the worker's last word; without one, the answer was cut off: not silently."""
        if self._finish is None:
            raise UnavailableError(
                "the decode worker ended before the answer was complete; try again",
                reason=WORKER_UNAVAILABLE,
            )
        return self._finish


def _prompt_info(
    prefilled: prefill_pb2.PrefillResponse, started: decode_pb2.DecodeStarted
) -> inference_pb2.PromptInfo:
    manifest = prefilled.manifest
    num_prompt_tokens = len(manifest.token_ids)
    num_cached = num_cached_tokens(manifest)
    num_reused = max(num_cached - prefilled.num_prefilled_tokens, 0)
    return inference_pb2.PromptInfo(
        request_id=current_request_id(),
        num_prompt_tokens=num_prompt_tokens,
        num_reused_tokens=num_reused,
        # By the prefill worker, and the pending tokens by the decode worker.
        num_prefilled_tokens=num_prompt_tokens - num_reused,
        num_kept_tokens=started.num_kept_tokens + num_prompt_tokens - num_cached,
        full_kv_bytes=prefilled.full_kv_bytes_per_token * num_prompt_tokens,
        stored_bytes=sum(segment.size_bytes for segment in manifest.segments),
        fetched_bytes=started.fetched_bytes,
        tokenize_ms=prefilled.tokenize_ms,
        prefill_ms=prefilled.prefill_ms,
        compression_ms=prefilled.compression_ms,
        store_ms=prefilled.store_ms,
        fetch_ms=started.fetch_ms,
        prefill_worker=prefilled.worker_id,
        decode_worker=started.worker_id,
    )


def _log_prompt(info: inference_pb2.PromptInfo) -> None:
    add_request_fields(
        num_prompt_tokens=info.num_prompt_tokens,
        num_reused_tokens=info.num_reused_tokens,
        num_kept_tokens=info.num_kept_tokens,
        prefill_worker=info.prefill_worker,
        decode_worker=info.decode_worker,
    )


def _may_go_elsewhere(error: ServiceError) -> bool:
    """Whether another worker may do better: this one is unreachable or full. The store is one."""
    is_full = isinstance(error, OverloadedError) and error.error_reason != _STORE_FULL
    return is_full or error.error_reason == WORKER_UNAVAILABLE


async def _other_worker(pick: Awaitable[WorkerInfo], error: ServiceError) -> WorkerInfo:
    """Return another worker after ``error``; without one, the error stands."""
    try:
        return await pick
    except UnavailableError:
        raise error from None


def _copy_input(
    source: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest,
    target: prefill_pb2.PrefillRequest | prefill_pb2.TokenizeRequest,
) -> None:
    match source.WhichOneof("input"):
        case "chat":
            target.chat.CopyFrom(source.chat)
        case "text":
            target.text = source.text
        case "token_ids":
            target.token_ids.CopyFrom(source.token_ids)


def _ms_since(start: float) -> float:
    return round(1e3 * (time.perf_counter() - start), 3)
