"""``InferenceService``: checks a request, opens its session, and lets a turn run.

``Generate`` writes to its context instead of yielding: deadline, lease and worker calls are scopes
that cancel this task, and such a scope must not span a ``yield``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from chunkserve.v1 import inference_pb2, inference_pb2_grpc, manifest_pb2, types_pb2
from services.gateway import validation
from services.gateway.admission import Admission
from services.gateway.config import GatewaySettings
from services.gateway.manifests import new_manifest, read_manifest
from services.gateway.quotas import Quotas
from services.gateway.replay import replay, request_digest, stored_result
from services.gateway.routing import Router
from services.gateway.turn import Turn, TurnRunner
from services.runtime.errors import DeadlineError, MismatchError
from services.runtime.interceptors import ServicerContext, bind_request_id
from services.runtime.telemetry import add_request_fields
from services.store.base import Store
from services.store.lease import turn_lease

# Metadata of Generate: id of a decode worker that is taken only if there is no other. For tests
# and demonstrations that a session moves between workers.
AVOID_WORKER_KEY: Final = "x-chunkserve-avoid-worker"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generates text, counts tokens, lists models."""

    def __init__(
        self,
        settings: GatewaySettings,
        store: Store,
        router: Router,
        turns: TurnRunner,
        admission: Admission,
        quotas: Quotas,
    ) -> None:
        self._settings = settings
        self._store = store
        self._router = router
        self._turns = turns
        self._admission = admission
        self._quotas = quotas

    async def Generate(  # type: ignore[override]  # writes, see the module's text
        self, request: inference_pb2.GenerateRequest, context: ServicerContext
    ) -> None:
        started_at = time.perf_counter()
        validation.check_generate(request)
        if request.request_id:
            bind_request_id(request.request_id)
        add_request_fields(session_id=request.session_id)

        with self._admission.admit():
            async with self._time_limit(context) as remaining_s, self._quotas.turn():
                turn = Turn(
                    request=request,
                    send=context.write,
                    remaining_s=remaining_s,
                    started_at=started_at,
                    avoid_worker=_avoided_worker(context),
                    request_digest=request_digest(request),
                )
                if request.session_id:
                    finish = await self._continue_session(turn)
                else:
                    finish = await self._answer_once(turn)
                await context.write(inference_pb2.GenerateResponse(finish=finish))

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: ServicerContext
    ) -> inference_pb2.CountTokensResponse:
        validation.check_count_tokens(request)
        with self._admission.admit():
            async with self._time_limit(context) as remaining_s:
                model = await self._router.resolve_model(request.model)
                num_tokens = await self._turns.count_tokens(request, model, remaining_s)
        return inference_pb2.CountTokensResponse(num_tokens=num_tokens, model=model)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=await self._router.models())

    async def _continue_session(self, turn: Turn) -> types_pb2.Finish:
        tenant, session_id = self._settings.tenant, turn.request.session_id
        # The lease comes first: what is read under it is what this turn will replace.
        async with turn_lease(
            self._store,
            tenant,
            session_id,
            ttl_s=self._settings.lease_ttl_s,
            waits=turn.request.wait_if_busy,
        ):
            # Before the result is looked for: a worker whose gateway died may commit this very turn
            # now. Between the two, its result is found; behind both, our commit is a conflict.
            manifest, _ = await read_manifest(self._store, tenant, session_id)
            if turn.request.request_id:
                result = await stored_result(self._store, tenant, turn.request)
                if result is not None:
                    return await replay(turn, result)
            await self._quotas.check_stored_bytes()
            _check_model(turn.request.model, manifest)
            return await self._turns.run(turn, manifest)

    async def _answer_once(self, turn: Turn) -> types_pb2.Finish:
        manifest = new_manifest(
            tenant=self._settings.tenant,
            session_id="",
            model=await self._router.resolve_model(turn.request.model),
            ttl_s=self._settings.ephemeral_ttl_s,
        )
        return await self._turns.run(turn, manifest)

    @asynccontextmanager
    async def _time_limit(self, context: ServicerContext) -> AsyncIterator[Callable[[], float]]:
        """End the block at the caller's deadline, or the server's for callers without one.

        Yields a function that returns the seconds left, for the calls to workers.
        """
        timeout_s = context.time_remaining()
        if timeout_s is None:
            timeout_s = self._settings.default_deadline_s
        ends_at = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(ends_at):
                yield lambda: max(ends_at - asyncio.get_running_loop().time(), 0.0)
        except TimeoutError:
            raise DeadlineError(
                f"the answer was not complete after {timeout_s:.3g} s; send a later deadline"
            ) from None


def _check_model(asked: str, manifest: manifest_pb2.Manifest) -> None:
    if asked and asked != manifest.model:
        raise MismatchError(
            f"session {manifest.session_id} belongs to model {manifest.model!r}, not {asked!r}; "
            "leave model empty or begin a new session",
            field="model",
            resource=("session", manifest.session_id),
        )


def _avoided_worker(context: ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == AVOID_WORKER_KEY and isinstance(value, str):
            return value
    return ""
