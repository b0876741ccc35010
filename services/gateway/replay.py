"""A request that is sent again gets the stored result of its turn instead of another turn.

Knows what makes two requests the same, and how a result becomes a stream again. The result was
stored by the decode worker, with the commit of the turn.
"""

from __future__ import annotations

import hashlib

from chunkserve.v1 import inference_pb2, manifest_pb2, types_pb2
from services.gateway.turn import Turn
from services.runtime.errors import AlreadyExistsError
from services.runtime.telemetry import add_request_fields
from services.store.base import SessionStore


def request_digest(request: inference_pb2.GenerateRequest) -> bytes:
    """Return the SHA-256 of what is asked: of all fields but the id, and whether to wait."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    asked.ClearField("wait_if_busy")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()


async def stored_result(
    store: SessionStore, tenant: str, request: inference_pb2.GenerateRequest
) -> manifest_pb2.TurnResult | None:
    """Return the result of the turn that this request began earlier; ``None`` if none ended.

    Raises:
        AlreadyExistsError: Its id named another request (reason ``REQUEST_ID_REUSED``).
    """
    body = await store.get_turn_result(tenant, request.session_id, request.request_id)
    if body is None:
        return None
    result = manifest_pb2.TurnResult.FromString(body)
    if result.request_digest != request_digest(request):
        raise AlreadyExistsError(
            f"request_id {request.request_id!r} named another request of session "
            f"{request.session_id}; send each request with an id of its own",
            reason="REQUEST_ID_REUSED",
            field="request_id",
            resource=("session", request.session_id),
        )
    return result


async def replay(turn: Turn, result: manifest_pb2.TurnResult) -> types_pb2.Finish:
    """Send the caller what the turn answered; return its end."""
    info = inference_pb2.PromptInfo(
        request_id=turn.request.request_id,
        num_prompt_tokens=result.num_prompt_tokens,
        num_reused_tokens=result.num_prompt_tokens,
        replayed=True,
    )
    add_request_fields(replayed=True, num_generated_tokens=result.finish.num_generated_tokens)
    await turn.send(inference_pb2.GenerateResponse(prompt_info=info))
    await turn.send(inference_pb2.GenerateResponse(delta=result.answer))
    return result.finish
