"""DecodeService: a manifest in, tokens out, the turn committed at the end."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import grpc.aio
import torch

import chunkkv
from chunkserve.v1 import decode_pb2, decode_pb2_grpc, manifest_pb2, session_pb2, types_pb2
from services.compress import policy as policies
from services.compress.segments import covered_tokens, store_segment
from services.decode.engine import Engine
from services.decode.feeds import TokenFeeds
from services.decode.fetch import KVFetcher, OpenedKV
from services.decode.generation import Generation, Sink
from services.decode.limit import KVLimit
from services.decode.placement import KVMemory, Placement
from services.decode.sampling import SamplingSettings
from services.decode.sequence import DecodeSequence, DecodeTask
from services.decode.sequence_kv import SequenceKV
from services.models.loader import LoadedModel
from services.runtime.errors import InvalidRequestError, MismatchError
from services.runtime.telemetry import add_request_fields
from services.store.base import Store, TurnRecord
from services.store.lease import completed


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Continues conversations.

    Args:
        loaded: The model.
        engine: Runs it; started.
        store: Where segments and manifests are.
        memory: Where KV goes.
        fetcher: Brings it there.
        feeds: Where tokens go whose caller has opened one.
        worker_id: This worker's name.
        max_output_tokens: Most tokens of an answer where the request names no number.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Engine,
        store: Store,
        memory: KVMemory,
        fetcher: KVFetcher,
        *,
        feeds: TokenFeeds,
        worker_id: str,
        max_output_tokens: int,
    ) -> None:
        self._feeds = feeds
        self._loaded = loaded
        self._engine = engine
        self._store = store
        self._memory = memory
        self._fetcher = fetcher
        self._worker_id = worker_id
        self._max_output_tokens = max_output_tokens

    async def Decode(
        self,
        request: decode_pb2.DecodeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        started_at = time.perf_counter()
        manifest = request.manifest
        sampling = SamplingSettings.from_proto(request.sampling, seed=secrets.randbits(63))
        num_resumed = request.num_resumed_tokens
        self._check(manifest, sampling, num_resumed)
        feed = self._feeds.get(request.feed_id) if request.feed_id else None
        max_tokens = self._max_tokens(manifest, sampling, num_resumed)
        num_pending = len(manifest.token_ids) - covered_tokens(manifest)

        async with self._memory.placed(
            manifest.segments,
            new_tokens=num_pending + max_tokens - num_resumed,
            limit=_limit(request),
        ) as placement:
            opened = await self._fetcher.open(manifest, placement)
            yield decode_pb2.DecodeResponse(started=self._describe(opened))

            generation = self._start(
                DecodeTask(
                    first_position=opened.kv.num_tokens,
                    pending_token_ids=manifest.token_ids[opened.kv.num_tokens :],
                    sampling=sampling,
                    max_tokens=max_tokens,
                    num_resumed_tokens=num_resumed,
                    prompt_token_ids=manifest.token_ids,
                ),
                opened.kv,
                placement,
                sink=functools.partial(feed.put, request.feed_key) if feed else None,
            )
            try:
                with feed.carrying(request.feed_key, generation) if feed else nullcontext():
                    async for delta in generation:
                        yield decode_pb2.DecodeResponse(delta=delta)
            finally:
                generation.cancel()

            commit_started_at = time.perf_counter()
            finish = _finish(manifest, generation.sequence, sampling, started_at)
            # Once the answer is complete, whoever leaves does not leave half of it behind.
            await completed(self._commit(request, generation, placement, finish))
            finish.commit_ms = _milliseconds(commit_started_at, time.perf_counter())

        add_request_fields(
            session_id=manifest.session_id,
            num_generated_tokens=finish.num_generated_tokens,
            fetched_bytes=opened.fetched_bytes,
            first_token_ms=round(finish.first_token_ms, 3),
            decode_ms=round(finish.decode_ms, 3),
        )
        yield decode_pb2.DecodeResponse(finish=finish)

    async def FeedTokens(
        self,
        request: decode_pb2.FeedTokensRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[decode_pb2.FeedTokensResponse]:
        if not request.feed_id:
            raise InvalidRequestError("feed_id is empty; send one of your own", field="feed_id")
        with self._feeds.open(request.feed_id) as feed:
            async for message in feed.messages():
                yield message

    async def HoldTokens(
        self,
        request: decode_pb2.HoldTokensRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> decode_pb2.HoldTokensResponse:
        self._feeds.get(request.feed_id).hold(request.feed_key, request.is_held)
        return decode_pb2.HoldTokensResponse()

    def _start(
        self,
        task: DecodeTask,
        kv: SequenceKV,
        placement: Placement,
        sink: Sink | None,
    ) -> Generation:
        generation = self._engine.submit(task, kv, on_released=placement.give_back, sink=sink)
        placement.lend()
        return generation

    def _check(
        self, manifest: manifest_pb2.Manifest, sampling: SamplingSettings, num_resumed: int
    ) -> None:
        fingerprint = self._loaded.fingerprint
        if manifest.model_fingerprint not in ("", fingerprint):
            raise MismatchError(
                f"the session belongs to model {manifest.model!r} with fingerprint "
                f"{manifest.model_fingerprint}; this worker runs {fingerprint}"
            )
        num_tokens, num_covered = len(manifest.token_ids), covered_tokens(manifest)
        if num_covered >= num_tokens:
            raise InvalidRequestError(
                f"{num_covered} of {num_tokens} tokens are in segments; leave at least one pending",
                field="manifest.token_ids",
            )
        if not 0 <= num_resumed < num_tokens - num_covered:
            raise InvalidRequestError(
                f"num_resumed_tokens is {num_resumed} and {num_tokens - num_covered} tokens are "
                "pending; send 0 or more, and at least one pending token before them",
                field="num_resumed_tokens",
            )
        if num_tokens - num_resumed >= self._loaded.max_model_len:
            raise InvalidRequestError(
                f"the conversation has {num_tokens - num_resumed} tokens and the model's context "
                f"{self._loaded.max_model_len}; there is no room for an answer",
                reason="CONTEXT_FULL",
                field="manifest.token_ids",
            )
        max_tokens = self._max_tokens(manifest, sampling, num_resumed)
        if num_resumed > max_tokens:
            raise InvalidRequestError(
                f"num_resumed_tokens is {num_resumed} and the answer has at most {max_tokens} "
                "tokens; send no more",
                field="num_resumed_tokens",
            )
        self._check_token_ids(manifest.token_ids[num_covered:], "manifest.token_ids")
        self._check_token_ids(sorted(sampling.stop_token_ids), "sampling.stop_token_ids")
        self._check_token_ids(sorted(sampling.logit_bias), "sampling.logit_bias")

    def _check_token_ids(self, token_ids: Any, field: str) -> None:
        vocab_size = self._loaded.model.config.get_text_config().vocab_size
        for token_id in token_ids:
            # An unchecked id would index outside of the embedding, which on a GPU kills the device.
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{field} has {token_id}; send 0 to {vocab_size - 1}", field=field
                )

    def _max_tokens(
        self, manifest: manifest_pb2.Manifest, sampling: SamplingSettings, num_resumed: int
    ) -> int:
        room = self._loaded.max_model_len - (len(manifest.token_ids) - num_resumed)
        return min(sampling.max_tokens or self._max_output_tokens, room)

    def _describe(self, opened: OpenedKV) -> decode_pb2.DecodeStarted:
        return decode_pb2.DecodeStarted(
            worker_id=self._worker_id,
            fetched_bytes=opened.fetched_bytes,
            fetch_ms=opened.fetch_ms,
            num_kept_tokens=opened.kv.num_kept_tokens,
        )

    async def _commit(
        self,
        request: decode_pb2.DecodeRequest,
        generation: Generation,
        placement: Placement,
        finish: types_pb2.Finish,
    ) -> None:
        """Add the answer to the manifest, store its KV, and commit; keep the KV in memory.

        What the turn answered is stored with it. Nothing is kept of a one-off request.

        Raises:
            ConflictError: Another turn was committed meanwhile.
            NotFoundError: The session, or one of its segments, is gone.
            UnavailableError, OverloadedError: The store is away, or full.
        """
        manifest = request.manifest
        if not manifest.session_id:
            return
        result = _result(request, generation.sequence, finish)
        manifest.token_ids.extend(generation.sequence.new_token_ids)
        ttl_s = manifest.ttl.ToTimedelta().total_seconds()
        sealed = await placement.in_thread(self._seal, generation.kv, manifest, ttl_s)
        if sealed is not None:
            span, segment = sealed
            if request.compression.HasField("max_kv_tokens"):
                segment.compression.CopyFrom(request.compression)
            manifest.segments.append(segment)
        expected_version = manifest.version
        manifest.version += 1
        manifest.model_fingerprint = self._loaded.fingerprint
        manifest.num_turns += 1
        manifest.last_decode_worker = self._worker_id
        manifest.update_time.GetCurrentTime()
        await self._store.commit_manifest(
            manifest.tenant,
            manifest.session_id,
            manifest.SerializeToString(),
            expected_version=expected_version,
            ttl_s=ttl_s,
            segment_ids=[segment.segment_id for segment in manifest.segments],
            result=result,
        )
        if sealed is not None:
            self._memory.publish(placement, segment, placement.tail, span)

    def _seal(
        self, kv: SequenceKV, manifest: manifest_pb2.Manifest, ttl_s: float
    ) -> tuple[chunkkv.CompressedKV, session_pb2.Segment] | None:
        """Store what the turn added, if it added anything. Blocks."""
        with torch.inference_mode():
            span = kv.seal(fingerprint=self._loaded.fingerprint)
        if span is None:
            return None
        return span, store_segment(self._store, span, manifest, ttl_s=ttl_s)


def _limit(request: decode_pb2.DecodeRequest) -> KVLimit | None:
    asked = request.compression
    if not asked.HasField("max_kv_tokens"):
        return None
    limit = KVLimit(asked.max_kv_tokens, policies.from_wire(asked))
    try:
        limit.check(sum(segment.num_kept_tokens for segment in request.manifest.segments))
    except chunkkv.InvalidInputError as error:
        raise InvalidRequestError(str(error), field="compression.max_kv_tokens") from error
    return limit


def _finish(
    manifest: manifest_pb2.Manifest,
    sequence: DecodeSequence,
    sampling: SamplingSettings,
    started_at: float,
) -> types_pb2.Finish:
    """Return the end of the answer; ``manifest`` is yet without it."""
    return types_pb2.Finish(
        reason=sequence.finish_reason,
        matched_stop=sequence.matched_stop,
        num_generated_tokens=len(sequence.token_ids),
        num_total_tokens=len(manifest.token_ids) + len(sequence.new_token_ids),
        seed=sampling.seed,
        session_version=manifest.version + 1 if manifest.session_id else 0,
        first_token_ms=_milliseconds(started_at, sequence.first_token_at),
        decode_ms=_milliseconds(sequence.first_token_at, sequence.last_token_at),
    )


def _result(
    request: decode_pb2.DecodeRequest, sequence: DecodeSequence, finish: types_pb2.Finish
) -> TurnRecord | None:
    """Return what is stored of the turn; ``request.manifest`` is yet without the answer."""
    if not request.request_id:
        return None
    result = manifest_pb2.TurnResult(
        request_digest=request.request_digest,
        num_prompt_tokens=len(request.manifest.token_ids) - request.num_resumed_tokens,
        answer=sequence.answer,
        finish=finish,
    )
    return TurnRecord(request.request_id, result.SerializeToString())


def _milliseconds(start_s: float, end_s: float) -> float:
    return 1000 * (end_s - start_s)
