"""PrefillService: tokenize, run, compress, store, answer with the session as it becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc.aio
from prometheus_client import Counter

import chunkkv
from chunkserve.v1 import manifest_pb2, prefill_pb2, prefill_pb2_grpc, types_pb2
from services.compress import policy as policies
from services.compress.segments import covered_tokens, owner_of, segment_id
from services.models.chat import prefix_ends, tokenize
from services.models.loader import LoadedModel
from services.prefill.config import PrefillSettings
from services.prefill.plan import PlannedSpan, plan_spans
from services.prefill.rebuild import Rebuilder
from services.prefill.runner import PrefillRunner
from services.prefill.segments import MadeSegment, SegmentMaker, Span, timed
from services.prefill.single_flight import SingleFlight
from services.runtime.errors import CorruptError, InvalidRequestError, MismatchError, NotFoundError
from services.runtime.telemetry import add_request_fields
from services.store.base import Store

_SEGMENTS = Counter(
    "chunkserve_prefill_segments",
    "Segments of prompts.",
    ["source"],  # computed, or found: in the store, or computed for another request
)
_SHARED_TOKENS = Counter(
    "chunkserve_prefill_shared_tokens",
    "New prompt tokens whose KV was in the store, or computed for another request.",
)


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Turns a prompt into the segments that a session lacks, and heals those that it has."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: PrefillRunner,
        store: Store,
        settings: PrefillSettings,
        *,
        worker_id: str,
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._worker_id = worker_id
        self._maker = SegmentMaker(loaded, runner, store)
        self._rebuilder = Rebuilder(loaded, self._maker, store, settings)
        self._flights = SingleFlight[MadeSegment](store, lease_ttl_s=settings.segment_lease_s)
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
        rebuilt = await self._rebuilder.rebuild(request.manifest)
        response = prefill_pb2.RebuildResponse(
            manifest=request.manifest,
            num_rebuilt_tokens=rebuilt.num_rebuilt_tokens,
            prefill_ms=rebuilt.prefill_ms,
            worker_id=self._worker_id,
        )
        del response.manifest.segments[:]
        response.manifest.segments.extend(rebuilt.segments)
        add_request_fields(
            num_rebuilt_tokens=response.num_rebuilt_tokens,
            prefill_ms=round(response.prefill_ms, 1),
        )
        return response

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
        (new_ids, ends), tokenize_ms = await timed(lambda: self._tokenize(request, before))
        self._check_length(len(before), len(new_ids), request.min_free_tokens)
        _check_chunk_size(request, len(new_ids))
        asked = policies.overlaid(manifest.compression, request.compression)
        prompt = policies.overlaid(self._settings.compression, asked)
        prefix = self._settings.prefix_compression
        for message in (manifest.compression, request.compression):
            prefix = policies.overlaid(prefix, policies.for_prefixes(message))
        # Here, so that nothing is in the store yet when a value is refused.
        policy, prefix_policy = _recorded(prompt), _recorded(prefix)
        manifest.token_ids.extend(new_ids)
        manifest.model_fingerprint = self._loaded.fingerprint

        response = prefill_pb2.PrefillResponse(
            num_new_tokens=len(new_ids),
            full_kv_bytes_per_token=self._bytes_per_token,
            tokenize_ms=tokenize_ms,
            worker_id=self._worker_id,
            compression=policies.to_wire(
                policy,
                max_kv_tokens=asked.max_kv_tokens if asked.HasField("max_kv_tokens") else None,
                prefix_scorer=prefix_policy.scorer,
            ),
        )
        spans = plan_spans(
            covered_tokens(manifest),
            # The last token is left to the decode worker, where all sampling happens.
            len(manifest.token_ids) - 1,
            # Nobody else can find a one-off request's segments.
            [len(before) + end for end in ends] if manifest.session_id else [],
            policy=partial(_recorded, prompt),
            prefix_policy=partial(_recorded, prefix),
            min_tokens=self._settings.min_compress_tokens,
        )
        await self._add_segments(manifest, spans, response, num_before=len(before))
        response.manifest.CopyFrom(manifest)
        add_request_fields(
            num_new_tokens=response.num_new_tokens,
            num_prefilled_tokens=response.num_prefilled_tokens,
            num_shared_tokens=response.num_shared_tokens,
            prefill_ms=round(response.prefill_ms, 1),
            compression_ms=round(response.compression_ms, 1),
            store_ms=round(response.store_ms, 1),
        )
        return response

    async def _add_segments(
        self,
        manifest: manifest_pb2.Manifest,
        spans: Sequence[PlannedSpan],
        response: prefill_pb2.PrefillResponse,
        *,
        num_before: int,
    ) -> None:
        """Add a segment for each span to the manifest; note in ``response`` what they cost."""
        num_stored = len(manifest.segments)
        for span in spans:
            try:
                made, is_shared = await self._segment(manifest, span)
            except (NotFoundError, CorruptError):
                if len(manifest.segments) == num_stored:
                    raise  # the session itself is damaged; whoever has it rebuilt, says so
                # A prefix that was found by its name: no session that is stored need name it.
                rebuilt = await self._rebuilder.rebuild(manifest)
                del manifest.segments[:]
                manifest.segments.extend(rebuilt.segments)
                response.num_prefilled_tokens += rebuilt.num_rebuilt_tokens
                response.num_rebuilt_tokens += rebuilt.num_rebuilt_tokens
                response.num_shared_tokens -= rebuilt.num_rebuilt_tokens
                response.prefill_ms += rebuilt.prefill_ms
                made, is_shared = await self._segment(manifest, span)
            if is_shared:
                response.num_shared_tokens += span.end - max(span.start, num_before)
            else:
                response.num_prefilled_tokens += span.num_tokens
                response.prefill_ms += made.prefill_ms
                response.compression_ms += made.compression_ms
                response.store_ms += made.store_ms
            _SEGMENTS.labels("found" if is_shared else "computed").inc()
            segment = manifest.segments.add()
            segment.CopyFrom(made.segment)
            segment.compression.CopyFrom(policies.to_wire(span.policy))
            segment.is_prefix = span.is_prefix
        response.num_shared_tokens = max(response.num_shared_tokens, 0)
        _SHARED_TOKENS.inc(response.num_shared_tokens)

    def _tokenize(
        self, request: prefill_pb2.PrefillRequest, before: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return the new tokens, and how many of them each marked prefix has."""
        ids = tokenize(self._loaded, request, before=before)
        return ids, prefix_ends(self._loaded, request, ids, before=before)

    async def _segment(
        self, manifest: manifest_pb2.Manifest, planned: PlannedSpan
    ) -> tuple[MadeSegment, bool]:
        """Find or make the segment of the next span; return whether it was there already."""
        span = Span(
            name=segment_id(
                manifest,
                num_tokens=planned.num_tokens,
                policy=planned.policy.canonical(),
                fingerprint=self._loaded.fingerprint,
            ),
            token_ids=manifest.token_ids[planned.start : planned.end],
            policy=planned.policy,
            before=tuple(manifest.segments),
            ttl_s=manifest.ttl.ToTimedelta().total_seconds() or self._settings.ephemeral_ttl_s,
            owner=owner_of(manifest),
        )
        if not manifest.session_id:
            return await self._maker.make(span), False
        find = partial(self._maker.find, span)
        if (found := await find()) is not None:
            return found, True
        made, is_first = await self._flights.run(
            span.name, find=find, make=partial(self._maker.make, span)
        )
        if not is_first:
            await find()  # for as long as this session lives, too
        return made, not (made.is_computed and is_first)

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


def _check_chunk_size(request: prefill_pb2.PrefillRequest, num_new_tokens: int) -> None:
    asked = request.compression
    if asked.HasField("chunk_size") and asked.chunk_size > num_new_tokens:
        raise InvalidRequestError(
            f"compression.chunk_size is {asked.chunk_size}, but the prompt has "
            f"{num_new_tokens} tokens; send 1 to {num_new_tokens}",
            reason="CHUNK_LARGER_THAN_PROMPT",
            field="compression.chunk_size",
        )


def _recorded(
    message: types_pb2.CompressionPolicy, num_tokens: int | None = None
) -> chunkkv.CompressionPolicy:
    """Return the policy of a span, as a manifest's entry gives it back.

    The wire has 32-bit fractions: a span that is rebuilt must be compressed as it was.
    """
    return policies.from_wire(policies.to_wire(policies.from_wire(message, num_tokens=num_tokens)))


def kv_bytes_per_token(model: Any) -> int:
    """Return the bytes that one token takes in the full KV cache of all layers."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    return int(2 * heads * head_dim * model.dtype.itemsize)
