"""One turn: prefill worker, then decode worker, then the stream to the caller.

Knows no leases and no limits; those are its caller's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from chunkserve.v1 import decode_pb2, inference_pb2, manifest_pb2, prefill_pb2, types_pb2
from services.gateway.channels import WorkerChannels
from services.gateway.feeds import Event
from services.gateway.manifests import num_cached_tokens
from services.gateway.routing import Router, ask_one_after_another
from services.runtime.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.runtime.interceptors import current_request_id
from services.runtime.status import WORKER_UNAVAILABLE
from services.runtime.telemetry import add_request_fields, get_logger
from services.store.base import Store, WorkerInfo
from services.store.lease import finish

# Reasons with which a worker, or what is left of it, says that it cannot go on.
_WORKER_GONE: Final = frozenset({WORKER_UNAVAILABLE, "WORKER_STOPPED", "FEED_CLOSED"})

# Reason with which the store says that it takes no more.
_STORE_FULL: Final = "STORE_FULL"
_STORE_AWAY: Final = "STORE_UNAVAILABLE"

_LOST_KV: Final = frozenset({"SEGMENT_NOT_FOUND", "SEGMENT_CORRUPT"})

_FAILOVER_POLL_S: Final = 0.25

_log = get_logger()

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
    """Runs turns on workers, and goes on where they fail.

    A worker that cannot be reached, is full or dies is replaced: a prefill worker because it keeps
    no state, a decode worker because the tokens that it sent are all the state there is. Stored KV
    that is missing or damaged is computed again once. Without the store, one-off requests are
    answered from the uncompressed prompt.

    Args:
        store: Where segments and turns' results are.
        router: Chooses workers.
        channels: Calls them.
        failover_wait_s: How long an answer that has begun waits for a worker to go on with.
    """

    def __init__(
        self,
        store: Store,
        router: Router,
        channels: WorkerChannels,
        *,
        failover_wait_s: float = 20.0,
    ) -> None:
        self._store = store
        self._router = router
        self._channels = channels
        self._failover_wait_s = failover_wait_s

    async def run(self, turn: Turn, manifest: manifest_pb2.Manifest) -> types_pb2.Finish:
        """Answer ``turn`` on top of ``manifest``: send its PromptInfo and tokens, return its end.

        With a session's manifest, the decode worker commits the turn. Without a session id,
        nothing is kept, however this ends.

        Returns:
            The end, which is the caller's to send once the session is free: a client that has
            seen it may send the next turn at once.

        Raises:
            ServiceError: What a worker raised, unchanged.
            UnavailableError: No worker lives, or none was left to go on with the answer.
            MismatchError: No worker has the weights that computed the session's KV cache.
        """
        await self._channels.prune({w.address for w in await self._router.workers()})
        # Without a decode worker, a long prefill would be in vain.
        await self._router.pick_decode(manifest.model, fingerprint=manifest.model_fingerprint)
        if not manifest.session_id:
            return await self._run_once(turn, manifest)
        try:
            return await self._decode(_Relay(turn, await self._prompt(turn, manifest)))
        except BaseException:
            # Also what a worker stored whose answer did not come.
            release = self._store.release_reserved(manifest.tenant, manifest.session_id)
            await finish("turn.release", release)
            raise

    async def _run_once(self, turn: Turn, manifest: manifest_pb2.Manifest) -> types_pb2.Finish:
        prompt = await self._prompt(turn, manifest)
        try:
            return await self._decode(_Relay(turn, prompt))
        finally:
            await finish("one_off.delete", self._delete_segments(prompt.manifest))

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

    async def _prompt(self, turn: Turn, manifest: manifest_pb2.Manifest) -> _Prompt:
        """Return the prompt with its KV stored, as far as a store is there to hold it."""
        is_one_off = not manifest.session_id
        try:
            return await self._healed(turn, _Prompt(manifest), partial(self._prefill, turn))
        except UnavailableError as error:
            if not is_one_off or error.error_reason != _STORE_AWAY:
                raise
        _log.warning("one_off.without_store")
        return await self._tokenized(turn, manifest)

    async def _healed(
        self, turn: Turn, prompt: _Prompt, use: Callable[[_Prompt], Awaitable[_Answer]]
    ) -> _Answer:
        """Return what ``use`` makes of the prompt; if its KV cannot be used, compute it again."""
        try:
            return await use(prompt)
        except (NotFoundError, CorruptError) as error:
            is_lost = error.error_reason in _LOST_KV
            if not is_lost or prompt.rebuilt is not None or not prompt.manifest.session_id:
                raise
            _log.warning("session.rebuild", reason=error.error_reason, error=error.message)
        await self._rebuild(turn, prompt)
        return await use(prompt)

    async def _rebuild(self, turn: Turn, prompt: _Prompt) -> None:
        manifest = prompt.manifest
        request = prefill_pb2.RebuildRequest(manifest=manifest)
        rebuilt = await self._ask_prefill_worker(
            manifest.model,
            manifest.model_fingerprint,
            lambda worker: self._channels.rebuild(worker, request, timeout_s=turn.remaining_s()),
        )
        prompt.manifest = rebuilt.manifest
        prompt.rebuilt = rebuilt

    async def _prefill(self, turn: Turn, prompt: _Prompt) -> _Prompt:
        manifest = prompt.manifest
        request = prefill_pb2.PrefillRequest(
            manifest=manifest, min_free_tokens=max(1, turn.request.sampling.min_tokens)
        )
        _copy_input(turn.request, request)
        if turn.request.HasField("compression"):
            request.compression.CopyFrom(turn.request.compression)
        prefilled = await self._ask_prefill_worker(
            manifest.model,
            manifest.model_fingerprint,
            lambda worker: self._channels.prefill(worker, request, timeout_s=turn.remaining_s()),
        )
        return _Prompt(prefilled.manifest, prefilled, prompt.rebuilt)

    async def _tokenized(self, turn: Turn, manifest: manifest_pb2.Manifest) -> _Prompt:
        """Return a one-off prompt whose KV is all left to the decode worker."""
        tokenize = prefill_pb2.TokenizeRequest()
        _copy_input(turn.request, tokenize)
        tokenized = await self._ask_prefill_worker(
            manifest.model,
            "",
            lambda worker: self._channels.tokenize(worker, tokenize, timeout_s=turn.remaining_s()),
        )
        prompt = manifest_pb2.Manifest()
        prompt.CopyFrom(manifest)
        prompt.token_ids.extend(tokenized.token_ids)
        return _Prompt(prompt, prefill_pb2.PrefillResponse(num_new_tokens=len(prompt.token_ids)))

    async def _ask_prefill_worker(
        self, model: str, fingerprint: str, ask: Callable[[WorkerInfo], Awaitable[_Answer]]
    ) -> _Answer:
        pick = partial(self._router.pick_prefill, model, fingerprint=fingerprint)
        return await ask_one_after_another(pick, ask, may_go_elsewhere=_may_go_elsewhere)

    async def _decode(self, relay: _Relay) -> types_pb2.Finish:
        gone: set[str] = set()
        full: set[str] = set()
        worker = await self._pick_decode(relay)
        while True:
            try:
                decode = partial(self._decode_on, worker, relay)
                return await self._healed(relay.turn, relay.prompt, decode)
            except ConflictError as error:
                return await self._committed_before(relay, error)
            except ServiceError as error:
                if not _may_go_elsewhere(error):
                    raise
                (full if isinstance(error, OverloadedError) else gone).add(worker.worker_id)
                worker = await self._next_decode(relay, gone, full, error)

    async def _committed_before(self, relay: _Relay, error: ConflictError) -> types_pb2.Finish:
        """Send the rest of an answer that a worker committed before it died; return its end.

        Called where the commit of another worker, which went on with the answer, is refused.

        Raises:
            ConflictError: It was not this turn that was committed.
        """
        manifest = relay.prompt.manifest
        body = await self._store.get_turn_result(
            manifest.tenant, manifest.session_id, current_request_id()
        )
        result = manifest_pb2.TurnResult.FromString(body or b"")
        if not body or result.request_digest != relay.turn.request_digest:
            raise error
        await relay.send_rest(result.answer)
        return result.finish

    async def _pick_decode(self, relay: _Relay, exclude: Collection[str] = ()) -> WorkerInfo:
        manifest = relay.prompt.manifest
        return await self._router.pick_decode(
            manifest.model,
            fingerprint=manifest.model_fingerprint,
            last_worker=manifest.last_decode_worker,
            avoid=relay.turn.avoid_worker,
            exclude=exclude,
        )

    async def _next_decode(
        self, relay: _Relay, gone: set[str], full: set[str], error: ServiceError
    ) -> WorkerInfo:
        """Return a worker to go on with after ``error``; an answer that has begun waits for one.

        Args:
            relay: What was sent so far.
            gone: Ids of workers that are not asked again.
            full: Ids of workers that are not asked again before the others.
            error: Stands if there is no other worker.
        """
        wait_s = self._failover_wait_s if relay.has_begun else 0.0
        give_up_at = time.monotonic() + min(wait_s, relay.turn.remaining_s())
        while True:
            try:
                worker = await self._pick_decode(relay, gone | full)
            except UnavailableError:
                if time.monotonic() >= give_up_at:
                    raise error from None
                full.clear()
                await asyncio.sleep(_FAILOVER_POLL_S)
            else:
                _log.warning(
                    "decode.failover",
                    reason=error.error_reason,
                    worker_id=worker.worker_id,
                    num_sent_tokens=len(relay.token_ids),
                )
                return worker

    async def _decode_on(
        self, worker: WorkerInfo, relay: _Relay, prompt: _Prompt
    ) -> types_pb2.Finish:
        request = decode_pb2.DecodeRequest(
            manifest=prompt.manifest,
            sampling=relay.sampling,
            num_resumed_tokens=len(relay.token_ids),
            compression=prompt.prefilled.compression,
            request_id=current_request_id(),
            request_digest=relay.turn.request_digest,
        )
        request.manifest.token_ids.extend(relay.token_ids)
        call = self._channels.decode(worker, request, timeout_s=relay.turn.remaining_s())
        async with call as events:
            # In a task of its own, which each event wakes without all that is around it.
            await asyncio.create_task(relay.forward(events))
        return relay.finish()

    async def _delete_segments(self, manifest: manifest_pb2.Manifest) -> None:
        segment_ids = [segment.segment_id for segment in manifest.segments]
        if segment_ids:
            await asyncio.to_thread(self._store.delete_segments, segment_ids)


@dataclass(slots=True)
class _Prompt:
    """A prompt on the way to its answer.

    Attributes:
        manifest: The session with what is known of this turn.
        prefilled: What the prefill worker said.
        rebuilt: What was computed again on the way, if anything.
    """

    manifest: manifest_pb2.Manifest
    prefilled: prefill_pb2.PrefillResponse = field(default_factory=prefill_pb2.PrefillResponse)
    rebuilt: prefill_pb2.RebuildResponse | None = None


class _Relay:
    """Turns decode workers' events into the caller's, and knows what was sent already.

    Attributes:
        token_ids: Of the answer, as sent so far: what another worker needs to go on.
        sampling: The caller's, its seed drawn if it named none: all workers must use the same.
    """

    def __init__(self, turn: Turn, prompt: _Prompt) -> None:
        self.turn = turn
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.sampling = types_pb2.SamplingParams()
        self.sampling.CopyFrom(turn.request.sampling)
        if not self.sampling.HasField("seed"):
            self.sampling.seed = secrets.randbits(63)
        self.has_begun = False
        self._num_chars = 0
        self._finish: types_pb2.Finish | None = None

    async def forward(self, events: AsyncIterator[Event]) -> None:
        """Send events on until they end, but for those that a worker before sent; keep the last."""
        async for event in events:
            await self._forward(event)

    async def _forward(self, event: Event) -> None:
        match event:
            case decode_pb2.DecodeStarted():
                if not self.has_begun:
                    self.has_begun = True
                    info = _prompt_info(self.prompt, event)
                    _log_prompt(info)
                    await self.turn.send(inference_pb2.GenerateResponse(prompt_info=info))
            case types_pb2.TokenDelta():
                if not self.token_ids:
                    add_request_fields(first_token_ms=_ms_since(self.turn.started_at))
                # Known to be sent before it is: gRPC sends it even if this is cancelled here.
                self.token_ids.extend(event.token_ids)
                self._num_chars += len(event.text)
                await self.turn.send(inference_pb2.GenerateResponse(delta=event))
            case types_pb2.Finish():
                self._finish = event
                add_request_fields(num_generated_tokens=event.num_generated_tokens)

    async def send_rest(self, answer: types_pb2.TokenDelta) -> None:
        """Send what is left of a whole answer."""
        num_sent = len(self.token_ids)
        if num_sent == len(answer.token_ids) and self._num_chars == len(answer.text):
            return
        # Of tokens that came from another worker, a result has no log-probabilities.
        num_missing = len(answer.token_ids) - len(answer.logprobs)
        rest = types_pb2.TokenDelta(
            text=answer.text[self._num_chars :],
            token_ids=answer.token_ids[num_sent:],
            first_token_index=num_sent,
            logprobs=answer.logprobs[max(num_sent - num_missing, 0) :],
        )
        await self.turn.send(inference_pb2.GenerateResponse(delta=rest))

    def finish(self) -> types_pb2.Finish:
        """Return the worker's last word; without one, the answer was cut off: not silently."""
        if self._finish is None:
            raise UnavailableError(
                "the decode worker ended before the answer was complete; try again",
                reason=WORKER_UNAVAILABLE,
            )
        return self._finish


def _prompt_info(prompt: _Prompt, started: decode_pb2.DecodeStarted) -> inference_pb2.PromptInfo:
    manifest, prefilled = prompt.manifest, prompt.prefilled
    num_prompt_tokens = len(manifest.token_ids)
    num_cached = num_cached_tokens(manifest)
    num_rebuilt = prompt.rebuilt.num_rebuilt_tokens if prompt.rebuilt else 0
    num_computed = prefilled.num_prefilled_tokens + num_rebuilt
    num_rebuilt += prefilled.num_rebuilt_tokens  # which are among the prefilled ones
    num_reused = max(num_cached - num_computed, 0)
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
        prefill_ms=prefilled.prefill_ms + (prompt.rebuilt.prefill_ms if prompt.rebuilt else 0),
        compression_ms=prefilled.compression_ms,
        store_ms=prefilled.store_ms,
        fetch_ms=started.fetch_ms,
        prefill_worker=prefilled.worker_id,
        decode_worker=started.worker_id,
        rebuilt=num_rebuilt > 0,
        num_rebuilt_tokens=num_rebuilt,
        num_shared_tokens=prefilled.num_shared_tokens,
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
    return is_full or error.error_reason in _WORKER_GONE


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
