"""PrefillService: tokenize, run, compress, store, answer with the session as it becomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc.aio

import chunkkv
from chunkserve.v1 import manifest_pb2, prefill_pb2, prefill_pb2_grpc, session_pb2
from services.compress import policy as policies
from services.compress.memory import ReceivePool
from services.compress.segments import (
    covered_tokens,
    encode_segment,
    fetched_segments,
    find_segment,
    library_errors,
    put_encoded,
    segment_id,
)
from services.models.chat import tokenize
from services.models.loader import LoadedModel
from services.prefill.config import PrefillSettings
from services.prefill.runner import PrefillRunner
from services.runtime.errors import InvalidRequestError, MismatchError
from services.runtime.telemetry import add_request_fields
from services.store.base import SegmentStore

T = TypeVar("T")


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Turns a prompt into the segment that a session lacks."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: PrefillRunner,
        store: SegmentStore,
        settings: PrefillSettings,
        *,
        worker_id: str,
    ) -> None:
        self._loaded = loaded
        self._runner = runner
        self._store = store
        self._settings = settings
        self._worker_id = worker_id
        self._receive_pool = ReceivePool()
        self._bytes_per_token = kv_bytes_per_token(loaded.model)

    async def Tokenize(
        self,
        request: prefill_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> prefill_pb2.TokenizeResponse:
        ids = await asyncio.to_thread(tokenize, self._loaded, request)
        return prefill_pb2.TokenizeResponse(token_ids=ids)

    async def Rebuild(
        self,
        request: prefill_pb2.RebuildRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> prefill_pb2.RebuildResponse:
        raise NotImplementedError

    async def Prefill(
        self,
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> prefill_pb2.PrefillResponse:
        manifest = request.manifest
        if manifest.model_fingerprint not in ("", self._loaded.fingerprint):
            raise MismatchError(
                f"session {manifest.session_id} was computed by model "
                f"{manifest.model_fingerprint}, this worker runs {self._loaded.fingerprint}; "
                "start a new session"
            )
        before = list(manifest.token_ids)
        new_ids, tokenize_ms = await _timed(lambda: tokenize(self._loaded, request, before=before))
        self._check_length(len(before), len(new_ids), request.min_free_tokens)
        policy = self._policy(request, len(new_ids))
        manifest.token_ids.extend(new_ids)
        manifest.model_fingerprint = self._loaded.fingerprint

        response = prefill_pb2.PrefillResponse(
            num_new_tokens=len(new_ids),
            full_kv_bytes_per_token=self._bytes_per_token,
            tokenize_ms=tokenize_ms,
            worker_id=self._worker_id,
            compression=policies.to_wire(policy, max_kv_tokens=_max_kv_tokens(request)),
        )
        # The last token is left to the decode worker, where all sampling happens.
        span = len(manifest.token_ids) - 1 - covered_tokens(manifest)
        if span >= self._settings.min_compress_tokens:
            segment = await self._segment(manifest, span, policy, response)
            segment.compression.CopyFrom(policies.to_wire(policy))
            manifest.segments.append(segment)
        response.manifest.CopyFrom(manifest)
        add_request_fields(
            num_new_tokens=response.num_new_tokens,
            num_prefilled_tokens=response.num_prefilled_tokens,
            prefill_ms=round(response.prefill_ms, 1),
            compression_ms=round(response.compression_ms, 1),
            store_ms=round(response.store_ms, 1),
        )
        return response

    async def _segment(
        self,
        manifest: manifest_pb2.Manifest,
        span: int,
        policy: chunkkv.CompressionPolicy,
        response: prefill_pb2.PrefillResponse,
    ) -> session_pb2.Segment:
        """Find or make the segment of the next ``span`` tokens; note its cost in ``response``."""
        ttl_s = manifest.ttl.ToTimedelta().total_seconds() or self._settings.ephemeral_ttl_s
        fingerprint = self._loaded.fingerprint
        if manifest.session_id:
            name = segment_id(
                manifest, num_tokens=span, policy=policy.canonical(), fingerprint=fingerprint
            )
            found = await asyncio.to_thread(find_segment, self._store, name, ttl_s=ttl_s)
            if found is not None:
                return found
        start = covered_tokens(manifest)
        past = await asyncio.to_thread(self._open, manifest)
        result = await self._runner.run(manifest.token_ids[start : start + span], past, policy)
        encoded, encode_ms = await _timed(lambda: encode_segment(result.kv, manifest))
        segment, store_ms = await _timed(lambda: put_encoded(self._store, encoded, ttl_s=ttl_s))
        response.num_prefilled_tokens = span
        response.prefill_ms = result.prefill_ms
        response.compression_ms = result.compression_ms + encode_ms
        response.store_ms = store_ms
        return segment

    def _open(self, manifest: manifest_pb2.Manifest) -> chunkkv.KVCache:
        """Fetch the session's KV cache. Blocks."""
        fetched = fetched_segments(
            self._store,
            list(manifest.segments),
            fingerprint=self._loaded.fingerprint,
            pool=self._receive_pool,
        )
        with fetched as prefix, library_errors():
            return chunkkv.KVCache.from_segments(
                self._loaded.model.config, prefix.kv, device=self._loaded.device
            )

    def _policy(
        self, request: prefill_pb2.PrefillRequest, num_new_tokens: int
    ) -> chunkkv.CompressionPolicy:
        if not request.HasField("compression"):
            return policies.from_wire(request.manifest.compression, self._settings.default_policy)
        asked = request.compression
        if asked.HasField("chunk_size") and asked.chunk_size > num_new_tokens:
            raise InvalidRequestError(
                f"compression.chunk_size is {asked.chunk_size}, but the prompt has "
                f"{num_new_tokens} tokens; send 1 to {num_new_tokens}",
                reason="CHUNK_LARGER_THAN_PROMPT",
                field="compression.chunk_size",
            )
        default = policies.from_wire(request.manifest.compression, self._settings.default_policy)
        return policies.from_wire(asked, default)

    def _check_length(self, num_before: int, num_new: int, min_free: int) -> None:
        most = self._loaded.max_model_len - max(min_free, 1)
        if num_before + num_new <= most:
            return
        behind = f" behind the session's {num_before}" if num_before else ""
        raise InvalidRequestError(
            f"prompt has {num_new} tokens{behind}; {self._loaded.name} takes "
            f"{self._loaded.max_model_len}, of which {max(min_free, 1)} are for the answer: "
            f"send at most {max(most - num_before, 0)}",
            reason="PROMPT_TOO_LONG",
            field="input",
        )


def _max_kv_tokens(request: prefill_pb2.PrefillRequest) -> int | None:
    for policy in (request.compression, request.manifest.compression):
        if policy.HasField("max_kv_tokens"):
            bound: int = policy.max_kv_tokens
            return bound
    return None


def kv_bytes_per_token(model: Any) -> int:
    """Return the bytes that one token takes in the full KV cache of all layers."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    return int(2 * heads * head_dim * model.dtype.itemsize)


async def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Run blocking ``work`` on a thread; return its result and milliseconds."""
    started = time.perf_counter()
    result = await asyncio.to_thread(work)
    return result, (time.perf_counter() - started) * 1000
