"""Workers that keep the wire contract without a model, and a cluster of them around a gateway.

The fake model's tokens are the UTF-8 bytes of the text, and its answers spell ``ANSWER``. Servers,
connections and the store are real.
"""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc.aio
import xxhash
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from chunkserve.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    manifest_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    types_pb2,
)
from services.decode.feeds import TokenFeeds
from services.gateway.app import Gateway
from services.gateway.config import GatewaySettings
from services.runtime.interceptors import ServicerContext, current_request_id
from services.runtime.server import GrpcServer, open_channel
from services.store.base import SegmentOwner, Store, TurnRecord, WorkerInfo

MODEL = "fake-model"
FINGERPRINT = "fake-fingerprint"
ANSWER = b"Paris."
KV_BYTES_PER_TOKEN = 100
WAIT_S = 30.0

DEFAULT_POLICY = types_pb2.CompressionPolicy(keep_ratio=0.5, scorer=types_pb2.SCORER_WINDOW)


class Gate:
    """Where a fake stands still if it is told to, until it is released or cancelled."""

    def __init__(self) -> None:
        self.is_closed = False
        self.reached = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.released = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        if not self.is_closed:
            return
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Makes one segment of half the size of every input of two tokens and more."""

    def __init__(self, store: Store, worker_id: str, fingerprint: str = FINGERPRINT) -> None:
        self._store = store
        self._worker_id = worker_id
        self._fingerprint = fingerprint
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.request_ids: list[str] = []
        self.remaining_s: list[float | None] = []
        self.gate = Gate()
        self.error: Exception | None = None
        self.prefill_error: Exception | None = None
        self.num_rebuilt_tokens = 0  # on the way, without being asked to
        self.rebuild_requests: list[prefill_pb2.RebuildRequest] = []

    async def Rebuild(
        self, request: prefill_pb2.RebuildRequest, context: ServicerContext
    ) -> prefill_pb2.RebuildResponse:
        self.rebuild_requests.append(request)
        self.error = None
        return prefill_pb2.RebuildResponse(
            manifest=request.manifest,
            num_rebuilt_tokens=num_cached(request.manifest),
            prefill_ms=7,
            worker_id=self._worker_id,
        )

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: ServicerContext
    ) -> prefill_pb2.PrefillResponse:
        self.requests.append(request)
        self.request_ids.append(current_request_id())
        self.remaining_s.append(context.time_remaining())
        await self.gate.pass_through()
        if self.error is not None or self.prefill_error is not None:
            raise self.error or self.prefill_error

        manifest = manifest_pb2.Manifest()
        manifest.CopyFrom(request.manifest)
        new_ids = input_ids(request)
        manifest.token_ids.extend(new_ids)
        manifest.model_fingerprint = self._fingerprint
        span = len(manifest.token_ids) - 1 - num_cached(manifest)
        if span > 0:
            await store_fake_segment(self._store, manifest, span)
        return prefill_pb2.PrefillResponse(
            manifest=manifest,
            num_new_tokens=len(new_ids),
            num_prefilled_tokens=max(span, 0),
            full_kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            tokenize_ms=1,
            prefill_ms=2,
            compression_ms=3,
            store_ms=4,
            worker_id=self._worker_id,
            num_rebuilt_tokens=self.num_rebuilt_tokens,
        )

    async def Tokenize(
        self, request: prefill_pb2.TokenizeRequest, context: ServicerContext
    ) -> prefill_pb2.TokenizeResponse:
        self.request_ids.append(current_request_id())
        await self.gate.pass_through()
        if self.error is not None:
            raise self.error
        return prefill_pb2.TokenizeResponse(token_ids=input_ids(request))


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Streams the answer byte by byte, then stores its segment and commits."""

    def __init__(self, store: Store, worker_id: str) -> None:
        self._store = store
        self._worker_id = worker_id
        self.requests: list[decode_pb2.DecodeRequest] = []
        self.request_ids: list[str] = []
        self.before_start = Gate()
        self.after_first_token = Gate()
        self.error: Exception | None = None
        self.errors: list[Exception] = []  # at the start, each once
        self.errors_at_end: list[Exception] = []  # instead of the commit, each once
        self.error_after_first_token: Exception | None = None
        self.stopped = asyncio.Event()
        self.error_after_commit: Exception | None = None
        self.ends_early = False
        self._feeds = TokenFeeds()

    async def FeedTokens(
        self, request: decode_pb2.FeedTokensRequest, context: ServicerContext
    ) -> AsyncIterator[decode_pb2.FeedTokensResponse]:
        with self._feeds.open(request.feed_id) as feed:
            async for message in feed.messages():
                yield message

    async def HoldTokens(
        self, request: decode_pb2.HoldTokensRequest, context: ServicerContext
    ) -> decode_pb2.HoldTokensResponse:
        raise NotImplementedError

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        received = decode_pb2.DecodeRequest()
        received.CopyFrom(request)  # the commit adds to the manifest
        self.requests.append(received)
        self.request_ids.append(current_request_id())
        await self.before_start.pass_through()
        if self.error is not None:
            raise self.error
        if self.errors:
            raise self.errors.pop()

        manifest = request.manifest
        feed = self._feeds.get(request.feed_id)
        yield decode_pb2.DecodeResponse(
            started=decode_pb2.DecodeStarted(
                worker_id=self._worker_id,
                fetched_bytes=sum(segment.size_bytes for segment in manifest.segments),
                fetch_ms=5,
                num_kept_tokens=sum(segment.num_kept_tokens for segment in manifest.segments),
            )
        )
        for i, byte in list(enumerate(ANSWER))[request.num_resumed_tokens :]:
            wake_up = feed.put(
                request.feed_key,
                types_pb2.TokenDelta(
                    text=chr(byte),
                    token_ids=[byte],
                    first_token_index=i,
                    logprobs=_fake_logprobs(byte, request.sampling),
                ),
            )
            wake_up()
            if i == request.num_resumed_tokens:
                await self.after_first_token.pass_through()
                if self.error_after_first_token is not None:
                    self.stopped.set()
                    raise self.error_after_first_token
        if self.ends_early:
            return
        if self.errors_at_end:
            raise self.errors_at_end.pop()
        manifest.token_ids.extend(ANSWER[request.num_resumed_tokens :])
        finish = types_pb2.Finish(
            reason=types_pb2.FINISH_REASON_EOS,
            num_generated_tokens=len(ANSWER),
            num_total_tokens=len(manifest.token_ids),
            session_version=manifest.version + 1 if manifest.session_id else 0,
        )
        if manifest.session_id:
            await self._commit(request, finish)
            if self.error_after_commit is not None:
                raise self.error_after_commit
        yield decode_pb2.DecodeResponse(finish=finish)

    async def _commit(self, request: decode_pb2.DecodeRequest, finish: types_pb2.Finish) -> None:
        manifest = request.manifest
        read_version = manifest.version
        result = manifest_pb2.TurnResult(
            request_digest=request.request_digest,
            num_prompt_tokens=len(manifest.token_ids) - len(ANSWER),
            answer=types_pb2.TokenDelta(text=ANSWER.decode(), token_ids=ANSWER),
            finish=finish,
        )
        await store_fake_segment(
            self._store, manifest, len(manifest.token_ids) - num_cached(manifest)
        )
        manifest.num_turns += 1
        manifest.last_decode_worker = self._worker_id
        manifest.version = read_version + 1
        await self._store.commit_manifest(
            manifest.tenant,
            manifest.session_id,
            manifest.SerializeToString(),
            expected_version=read_version,
            ttl_s=manifest.ttl.seconds,
            segment_ids=[segment.segment_id for segment in manifest.segments],
            result=TurnRecord(request.request_id, result.SerializeToString()),
        )


def _fake_logprobs(
    token_id: int, sampling: types_pb2.SamplingParams
) -> list[types_pb2.TokenLogprob]:
    if not sampling.HasField("logprobs"):
        return []
    return [types_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)]


class FakeCluster:
    """A gateway, and workers that announce themselves to its store.

    Use it as an async context manager; what was started in it is stopped at its end.
    """

    def __init__(self, store: Store, **settings: Any) -> None:
        self.store = store
        values = {
            "listen": "127.0.0.1:0",
            "worker_refresh_s": 0.02,
            "failover_wait_s": 0.0,
            **settings,
        }
        self.gateway = Gateway(GatewaySettings(**values), store)
        self.servers: list[GrpcServer] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.port = await self.gateway.start()
        self._stack.push_async_callback(self.gateway.stop, 0)
        self.channel = await self._stack.enter_async_context(open_channel(f"127.0.0.1:{self.port}"))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def add_prefill(self, **fields: Any) -> FakePrefill:
        """Start and announce a prefill worker; ``fields`` are those of ``WorkerInfo``."""
        worker_id = fields.setdefault("worker_id", f"prefill-{uuid.uuid4().hex[:8]}")
        fake = FakePrefill(self.store, worker_id, fields.get("fingerprint", FINGERPRINT))
        add = partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, fake)
        await self._start(add, "prefill", fields)
        return fake

    async def add_decode(self, **fields: Any) -> FakeDecode:
        """Start and announce a decode worker; ``fields`` are those of ``WorkerInfo``."""
        worker_id = fields.setdefault("worker_id", f"decode-{uuid.uuid4().hex[:8]}")
        fake = FakeDecode(self.store, worker_id)
        add = partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, fake)
        await self._start(add, "decode", fields)
        return fake

    async def announce(self, role: str, address: str, **fields: Any) -> WorkerInfo:
        """Announce a worker without starting one."""
        info = worker_info(role=role, address=address, **fields)
        await self.store.announce(info, ttl_s=300)
        return info

    async def create_session(self, **fields: Any) -> session_pb2.Session:
        response = await self.sessions.CreateSession(session_pb2.CreateSessionRequest(**fields))
        return response.session

    async def generate(self, text: str = "Hello", **fields: Any) -> list[Any]:
        """Return all events of a Generate call; ``fields`` are those of its request."""
        call = self.inference.Generate(generate_request(text, **fields), timeout=WAIT_S)
        return [event async for event in call]

    async def _start(
        self, add: Callable[[grpc.aio.Server], None], role: str, fields: dict[str, Any]
    ) -> None:
        server = GrpcServer("127.0.0.1:0", [add], [])
        port = await server.start()
        self.servers.append(server)
        self._stack.push_async_callback(server.stop, 0)
        await self.announce(role, f"127.0.0.1:{port}", **fields)


def generate_request(text: str = "Hello", **fields: Any) -> inference_pb2.GenerateRequest:
    """Return a request of raw text, unless ``fields`` bring another input."""
    if not {"chat", "token_ids"} & fields.keys():
        fields["text"] = text
    return inference_pb2.GenerateRequest(**fields)


async def read_rest(call: Any) -> list[Any]:
    """Return the events of a call that has been read from already."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


def worker_info(**fields: Any) -> WorkerInfo:
    """Return a worker; what ``fields`` leave out is made up."""
    defaults = {
        "worker_id": f"worker-{uuid.uuid4().hex[:8]}",
        "role": "decode",
        "address": "127.0.0.1:1",
        "model": MODEL,
        "fingerprint": FINGERPRINT,
        "max_model_len": 8192,
        "num_active": 0,
        "num_slots": 4,
        "default_policy": DEFAULT_POLICY.SerializeToString(),
    }
    return WorkerInfo(**{**defaults, **fields})


def input_ids(request: prefill_pb2.PrefillRequest | prefill_pb2.TokenizeRequest) -> list[int]:
    match request.WhichOneof("input"):
        case "chat":
            return list("".join(message.content for message in request.chat.messages).encode())
        case "text":
            return list(request.text.encode())
        case _:
            return list(request.token_ids.ids)


def num_cached(manifest: manifest_pb2.Manifest) -> int:
    last = manifest.segments[-1] if manifest.segments else session_pb2.Segment()
    return last.first_token + last.num_tokens


async def store_fake_segment(store: Store, manifest: manifest_pb2.Manifest, span: int) -> None:
    """Store a segment of the next ``span`` tokens, and name it in ``manifest``."""
    segment = session_pb2.Segment(
        segment_id=uuid.uuid4().hex,
        first_token=num_cached(manifest),
        num_tokens=span,
        num_kept_tokens=(span + 1) // 2,
        size_bytes=10 * span,
    )
    ttl_s = manifest.ttl.seconds
    owner = SegmentOwner(manifest.tenant, manifest.session_id) if manifest.session_id else None
    parts = [b"keys", b"values"]
    header = fake_header(segment, manifest.model_fingerprint, parts)
    await asyncio.to_thread(
        store.put_segment, segment.segment_id, header, parts, ttl_s=ttl_s, owner=owner
    )
    manifest.segments.append(segment)


def fake_header(
    segment: session_pb2.Segment, fingerprint: str, parts: Sequence[bytes], **fields: Any
) -> bytes:
    """Return a header as far as the gateway reads it; ``fields`` replace what it says."""
    body = {
        "identity": segment.segment_id,
        "part_sizes": [len(part) for part in parts],
        "part_checksums": [f"{xxhash.xxh3_64_intdigest(part):016x}" for part in parts],
        "shape": {
            "fingerprint": fingerprint,
            "first_token": segment.first_token,
            "num_tokens": segment.num_tokens,
        },
        **fields,
    }
    return sealed_header(json.dumps(body).encode())


def sealed_header(body: bytes) -> bytes:
    """Return a header of any body, its checksum right."""
    checksum = xxhash.xxh3_64_intdigest(body)
    return struct.pack("<4sHIQ", b"CKV\x01", 1, len(body), checksum) + body


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Return the ErrorInfo of a status; fails if there is none, or two."""
    [info] = details(error, error_details_pb2.ErrorInfo)
    return info


def details(error: grpc.aio.AioRpcError, kind: type[Any]) -> list[Any]:
    """Return the details of one kind, after checking what holds for every status of ours."""
    text = error.details() or ""
    assert "Traceback" not in text
    assert 'File "' not in text
    status = rpc_status.from_call(_PlainCall(error))
    found = []
    for packed in status.details if status is not None else ():
        detail = kind()
        if packed.Unpack(detail):
            found.append(detail)
    return found


class _PlainCall:
    """An AioRpcError as ``rpc_status`` reads calls."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        return self._error.code()

    def details(self) -> str | None:
        return self._error.details()

    def trailing_metadata(self) -> Any:
        return tuple(self._error.trailing_metadata())
