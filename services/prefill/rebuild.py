"""Heals a session: checks its segments, and computes again those that are missing or damaged."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from functools import partial

from prometheus_client import Counter

import chunkkv
from chunkserve.v1 import manifest_pb2, session_pb2
from services.compress import policy as policies
from services.compress.segments import covered_tokens, owner_of
from services.models.loader import LoadedModel
from services.prefill.config import PrefillSettings
from services.prefill.segments import MadeSegment, SegmentMaker, Span
from services.prefill.single_flight import SingleFlight
from services.runtime.errors import InvalidRequestError, MismatchError
from services.store.base import Store

_SEGMENTS = Counter("chunkserve_prefill_rebuilt_segments", "Lost segments computed again.")


@dataclass(frozen=True, slots=True)
class RebuiltSession:
    """A session whose segments are all in the store and intact.

    Attributes:
        segments: The manifest's entries, in order.
        num_rebuilt_tokens: Tokens of the spans that were computed again.
        prefill_ms: Milliseconds of forward passes.
    """

    segments: list[session_pb2.Segment]
    num_rebuilt_tokens: int
    prefill_ms: float


class Rebuilder:
    """Heals sessions of one model.

    Args:
        loaded: The model.
        maker: Computes and stores spans.
        store: Where segments are.
        settings: Of the worker.
    """

    def __init__(
        self, loaded: LoadedModel, maker: SegmentMaker, store: Store, settings: PrefillSettings
    ) -> None:
        self._loaded = loaded
        self._maker = maker
        self._store = store
        self._ttl_s = settings.ephemeral_ttl_s
        # Not those of prompts, which take a segment by its name and do not look at its parts.
        self._flights = SingleFlight[MadeSegment](store, lease_ttl_s=settings.segment_lease_s)

    async def rebuild(self, manifest: manifest_pb2.Manifest) -> RebuiltSession:
        """Return the session with every segment stored and intact.

        Each span is computed on top of those before it as they are stored, so the KV cache is the
        one that was lost: the same positions, and values up to rounding.

        Raises:
            InvalidRequestError: It is no session's manifest, or its entries contradict its tokens.
            MismatchError: This worker cannot compute what was lost.
            OverloadedError: Too many prompts wait, or the store is full.
            UnavailableError: The store is away.
        """
        self._check(manifest)
        ttl_s = manifest.ttl.ToTimedelta().total_seconds() or self._ttl_s
        segments: list[session_pb2.Segment] = []
        known: dict[str, chunkkv.CompressedKV] = {}
        num_tokens, prefill_ms = 0, 0.0
        for entry in manifest.segments:
            start = entry.first_token
            span = Span(
                name=entry.recompression.original_segment_id or entry.segment_id,
                token_ids=manifest.token_ids[start : start + entry.num_tokens],
                policy=_policy(entry),
                before=tuple(segments),
                ttl_s=ttl_s,
                owner=owner_of(manifest),
                known=known,
            )
            healed = await self._heal(entry, span)
            assert healed.kv is not None  # whatever is healed was read
            segments.append(healed.segment)
            known[healed.segment.segment_id] = healed.kv
            if healed.is_computed:
                num_tokens += entry.num_tokens
                prefill_ms += healed.prefill_ms
        return RebuiltSession(segments, num_tokens, prefill_ms)

    async def _heal(self, entry: session_pb2.Segment, span: Span) -> MadeSegment:
        """Return an intact segment: as it is, or as it was before it was compressed again."""
        kv = await asyncio.to_thread(self._maker.fetch_intact, entry)
        if kv is not None:
            return MadeSegment(entry, kv)
        if span.name != entry.segment_id:
            # Nobody makes this one again under its name: whoever finds it would find the damage.
            await asyncio.to_thread(self._store.discard_damaged, entry.segment_id)
        healed, is_first = await self._flights.run(
            span.name, find=partial(self._find, span), make=partial(self._make, entry, span)
        )
        if not is_first:
            await self._maker.find(span)  # for as long as this session lives, too
        segment = session_pb2.Segment(is_prefix=entry.is_prefix)
        segment.MergeFrom(healed.segment)
        if entry.HasField("compression"):
            segment.compression.CopyFrom(entry.compression)
        return dataclasses.replace(healed, segment=segment)

    async def _find(self, span: Span) -> MadeSegment | None:
        """Return a span's segment if it is stored and intact."""
        found = await self._maker.find(span)
        if found is None:
            return None
        kv = await asyncio.to_thread(self._maker.fetch_intact, found.segment)
        return None if kv is None else dataclasses.replace(found, kv=kv)

    async def _make(self, entry: session_pb2.Segment, span: Span) -> MadeSegment:
        # A copy with an intact header and damaged parts would stay where it is.
        await asyncio.to_thread(self._store.discard_damaged, span.name)
        result = await self._maker.compute(span)
        num_kept = _num_kept_tokens(entry)
        if result.kv.num_kept_tokens != num_kept:
            raise MismatchError(
                f"segment {span.name} kept {num_kept} tokens; computed again, it "
                f"keeps {result.kv.num_kept_tokens}: it was compressed in another way than its "
                "session says; start a new session"
            )
        made = await self._maker.store(span, result)
        _SEGMENTS.inc()
        # What is stored may be of less precision than what was computed, or another worker's copy.
        kv = await asyncio.to_thread(self._maker.fetch, made.segment)
        return dataclasses.replace(made, kv=kv)

    def _check(self, manifest: manifest_pb2.Manifest) -> None:
        if not manifest.session_id:
            raise InvalidRequestError(
                "a one-off request's segments are never computed again; send the request again",
                field="manifest.session_id",
            )
        if manifest.model_fingerprint != self._loaded.fingerprint:
            raise MismatchError(
                f"session {manifest.session_id} was computed by model "
                f"{manifest.model_fingerprint}, this worker runs {self._loaded.fingerprint}: its "
                "segments cannot be computed again here; start a new session"
            )
        num_covered = covered_tokens(manifest)
        if num_covered > self._loaded.max_model_len:
            raise MismatchError(
                f"session {manifest.session_id} has {num_covered} tokens in segments, this worker "
                f"takes {self._loaded.max_model_len}: they cannot be computed again here"
            )
        _check_spans(manifest)
        vocab_size = int(self._loaded.model.config.get_text_config().vocab_size)
        for token in manifest.token_ids[:num_covered]:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"manifest.token_ids has {token}; {self._loaded.name} has tokens 0 to "
                    f"{vocab_size - 1}",
                    field="manifest.token_ids",
                )


def _check_spans(manifest: manifest_pb2.Manifest) -> None:
    end = 0
    for index, entry in enumerate(manifest.segments):
        if entry.first_token != end or entry.num_tokens < 1:
            raise InvalidRequestError(
                f"segments[{index}] has {entry.num_tokens} tokens from {entry.first_token}; the "
                f"one before ends at {end}",
                field=f"manifest.segments[{index}]",
            )
        end += entry.num_tokens
    if end > len(manifest.token_ids):
        raise InvalidRequestError(
            f"the segments have {end} tokens, the session {len(manifest.token_ids)}",
            field="manifest.token_ids",
        )


def _num_kept_tokens(entry: session_pb2.Segment) -> int:
    """Return what a span kept before its segment was compressed again, if it was."""
    if entry.HasField("recompression"):
        return int(entry.recompression.original_kept_tokens)
    return int(entry.num_kept_tokens)


def _policy(entry: session_pb2.Segment) -> chunkkv.CompressionPolicy | None:
    """Return what a span was compressed by; ``None``: it was stored whole."""
    if not entry.HasField("compression"):
        return None
    policy = policies.from_wire(entry.compression)
    if not entry.compression.HasField("max_kv_tokens"):
        return policy
    # An answer whose KV was bounded while it grew. Which tokens went at which step is not known
    # any more; as many are kept, all chosen at the end.
    kept = _num_kept_tokens(entry)
    if kept in (0, entry.num_tokens):  # 0: a model that only has sliding windows
        return None
    return policies.of_answer(policy, kept)
