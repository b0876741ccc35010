"""A prefill worker over a real gRPC server, with a tiny model, for tests."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from tiny_model import load_tiny

from chunkserve.v1 import manifest_pb2, prefill_pb2, prefill_pb2_grpc, types_pb2
from services.models.loader import LoadedModel
from services.prefill.config import PrefillSettings
from services.prefill.runner import PrefillRunner
from services.prefill.servicer import PrefillServicer
from services.runtime.server import GrpcServer, open_channel
from services.store import Store

POLICY = types_pb2.CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4)


@asynccontextmanager
async def serving(
    store: Store,
    runner: PrefillRunner | None = None,
    *,
    loaded: LoadedModel | None = None,
    **settings: object,
) -> AsyncIterator[prefill_pb2_grpc.PrefillServiceStub]:
    """Serve while the block runs; a runner that is given must run the same model."""
    loaded = loaded or load_tiny()
    options = PrefillSettings(
        model="tiny", **{"min_compress_tokens": 16, "prefill_chunk_tokens": 8, **settings}
    )
    runner = runner or PrefillRunner(loaded, prefill_chunk_tokens=8, queue_size=2)
    servicer = PrefillServicer(loaded, runner, store, options, worker_id="prefill-1")
    add = functools.partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer)
    server = GrpcServer("127.0.0.1:0", [add], ["chunkserve.v1.PrefillService"])
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield prefill_pb2_grpc.PrefillServiceStub(channel)
    finally:
        await server.stop(0)
        runner.close()


def session(**fields: object) -> manifest_pb2.Manifest:
    """Return the manifest of a session before its first turn."""
    named = {"tenant": "t", "session_id": "s", "version": 1, **fields}
    made = manifest_pb2.Manifest(**named)
    made.compression.CopyFrom(POLICY)
    made.ttl.FromSeconds(60)
    return made


def request(
    manifest: manifest_pb2.Manifest, ids: list[int], **fields: object
) -> prefill_pb2.PrefillRequest:
    """Return a turn of token ids."""
    return prefill_pb2.PrefillRequest(
        manifest=manifest, token_ids=types_pb2.TokenIds(ids=ids), **fields
    )


async def refused(call: object) -> grpc.aio.AioRpcError:
    """Return the error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
