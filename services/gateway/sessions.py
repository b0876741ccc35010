"""``SessionService``: sessions are manifests in the store, and this shows them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Final

from chunkserve.v1 import compression_pb2, session_pb2, session_pb2_grpc
from services.gateway import validation
from services.gateway.channels import WorkerChannels
from services.gateway.config import GatewaySettings
from services.gateway.manifests import (
    new_manifest,
    new_session_id,
    read_manifest,
    session_of,
)
from services.gateway.quotas import Quotas
from services.gateway.routing import Router, ask_one_after_another
from services.gateway.transfer import export_session, import_session
from services.runtime.errors import NotFoundError
from services.runtime.interceptors import ServicerContext
from services.runtime.status import WORKER_UNAVAILABLE
from services.runtime.telemetry import add_request_fields
from services.store.base import Store, StoredManifest
from services.store.lease import completed, turn_lease

_DEFAULT_PAGE_SIZE: Final = 50
_READS_AT_ONCE: Final = 16
_FORK_TRIES: Final = 3


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Creates, shows, lists, forks, moves and deletes sessions of the gateway's tenant."""

    def __init__(
        self,
        settings: GatewaySettings,
        store: Store,
        router: Router,
        channels: WorkerChannels,
        quotas: Quotas,
    ) -> None:
        self._settings = settings
        self._tenant = settings.tenant
        self._store = store
        self._router = router
        self._channels = channels
        self._quotas = quotas

    async def CreateSession(
        self, request: session_pb2.CreateSessionRequest, context: ServicerContext
    ) -> session_pb2.CreateSessionResponse:
        validation.check_create_session(request, max_ttl_s=self._settings.max_session_ttl_s)
        ttl_s = self._settings.session_ttl_s
        if request.HasField("ttl"):
            ttl_s = validation.seconds(request.ttl)
        await self._quotas.check_new_session()
        manifest = new_manifest(
            tenant=self._tenant,
            session_id=request.session_id or new_session_id(),
            model=await self._router.resolve_model(request.model),
            ttl_s=ttl_s,
        )
        if request.HasField("compression"):
            manifest.compression.CopyFrom(request.compression)
        add_request_fields(session_id=manifest.session_id)

        body = manifest.SerializeToString()
        await self._store.create_manifest(self._tenant, manifest.session_id, body, ttl_s=ttl_s)

        stored = StoredManifest(body=body, version=1, expires_in_s=ttl_s)
        return session_pb2.CreateSessionResponse(session=session_of(manifest, stored))

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, context: ServicerContext
    ) -> session_pb2.GetSessionResponse:
        validation.check_session_id(request.session_id)
        add_request_fields(session_id=request.session_id)

        manifest, stored = await read_manifest(self._store, self._tenant, request.session_id)

        return session_pb2.GetSessionResponse(session=session_of(manifest, stored))

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: ServicerContext
    ) -> session_pb2.ListSessionsResponse:
        validation.check_list_sessions(request)
        page = await self._store.list_sessions(
            self._tenant,
            page_size=request.page_size or _DEFAULT_PAGE_SIZE,
            page_token=request.page_token,
        )

        reads_at_once = asyncio.Semaphore(_READS_AT_ONCE)
        found = await asyncio.gather(
            *(self._session_if_there(session_id, reads_at_once) for session_id in page.session_ids)
        )

        return session_pb2.ListSessionsResponse(
            sessions=[session for session in found if session is not None],
            next_page_token=page.next_page_token,
        )

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, context: ServicerContext
    ) -> session_pb2.DeleteSessionResponse:
        validation.check_session_id(request.session_id)
        add_request_fields(session_id=request.session_id)

        lease_ttl_s = self._settings.lease_ttl_s
        async with turn_lease(self._store, self._tenant, request.session_id, ttl_s=lease_ttl_s):
            await completed(self._store.delete_manifest(self._tenant, request.session_id))

        return session_pb2.DeleteSessionResponse()

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, context: ServicerContext
    ) -> session_pb2.ForkSessionResponse:
        validation.check_fork_session(request, max_ttl_s=self._settings.max_session_ttl_s)
        add_request_fields(session_id=request.session_id)

        await self._quotas.check_new_session()
        for _ in range(_FORK_TRIES - 1):
            # A segment of the version that was read may have been dropped by a newer one.
            with suppress(NotFoundError):
                return await self._fork(request)
        return await self._fork(request)

    async def CompressSession(
        self, request: session_pb2.CompressSessionRequest, context: ServicerContext
    ) -> session_pb2.CompressSessionResponse:
        validation.check_compress_session(request)
        add_request_fields(session_id=request.session_id)
        remaining_s = context.time_remaining()

        done = await self._compress(
            compression_pb2.CompressRequest(
                tenant=self._tenant,
                session_id=request.session_id,
                compression=request.compression,
            ),
            timeout_s=self._settings.default_deadline_s if remaining_s is None else remaining_s,
        )
        manifest, stored = await read_manifest(self._store, self._tenant, request.session_id)

        return session_pb2.CompressSessionResponse(
            session=session_of(manifest, stored),
            original_bytes=done.original_bytes,
            original_kept_tokens=done.original_kept_tokens,
        )

    async def _compress(
        self, request: compression_pb2.CompressRequest, *, timeout_s: float
    ) -> compression_pb2.CompressResponse:
        """Ask one compression worker after another, until one can be reached."""
        return await ask_one_after_another(
            self._router.pick_compression,
            lambda worker: self._channels.compress(worker, request, timeout_s=timeout_s),
            may_go_elsewhere=lambda error: error.error_reason == WORKER_UNAVAILABLE,
        )

    async def ExportSession(
        self, request: session_pb2.ExportSessionRequest, context: ServicerContext
    ) -> AsyncIterator[session_pb2.ExportSessionResponse]:
        validation.check_session_id(request.session_id)
        add_request_fields(session_id=request.session_id)

        exported = export_session(self._store, self._tenant, request.session_id)
        async with aclosing(exported) as pieces:
            async for piece in pieces:
                yield session_pb2.ExportSessionResponse(piece=piece)

    async def ImportSession(
        self, request: AsyncIterator[session_pb2.ImportSessionRequest], context: ServicerContext
    ) -> session_pb2.ImportSessionResponse:
        await self._quotas.check_new_session()
        manifest, stored = await import_session(
            self._store, self._tenant, request, max_ttl_s=self._settings.max_session_ttl_s
        )
        add_request_fields(session_id=manifest.session_id)
        return session_pb2.ImportSessionResponse(session=session_of(manifest, stored))

    async def _fork(
        self, request: session_pb2.ForkSessionRequest
    ) -> session_pb2.ForkSessionResponse:
        """Copy the manifest. Its segments are shared, so this costs the same for every length."""
        manifest, _ = await read_manifest(self._store, self._tenant, request.session_id)
        manifest.session_id = request.new_session_id or new_session_id()
        manifest.version = 1
        manifest.create_time.GetCurrentTime()
        if request.HasField("ttl"):
            manifest.ttl.CopyFrom(request.ttl)
        ttl_s = validation.seconds(manifest.ttl)

        body = manifest.SerializeToString()
        await completed(
            self._store.create_manifest(
                self._tenant,
                manifest.session_id,
                body,
                ttl_s=ttl_s,
                segment_ids=[segment.segment_id for segment in manifest.segments],
            )
        )

        stored = StoredManifest(body=body, version=1, expires_in_s=ttl_s)
        return session_pb2.ForkSessionResponse(session=session_of(manifest, stored))

    async def _session_if_there(
        self, session_id: str, reads_at_once: asyncio.Semaphore
    ) -> session_pb2.Session | None:
        """Return a listed session without its segments; ``None`` if it has expired since."""
        async with reads_at_once:
            try:
                manifest, stored = await read_manifest(self._store, self._tenant, session_id)
            except NotFoundError:
                return None
        return session_of(manifest, stored, with_segments=False)
