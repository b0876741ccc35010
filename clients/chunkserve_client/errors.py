"""What a call can end in: the server's statuses, mapped back to exceptions.

ChunkServeError
├── InvalidRequest        INVALID_ARGUMENT, OUT_OF_RANGE: fix the request
├── NotFound              NOT_FOUND: no such session or model
│   └── SessionNotFound   ... the session does not exist or has expired
├── AlreadyExists         ALREADY_EXISTS: something of this name exists
├── SessionBusy           ABORTED: another turn of the session is running
├── Mismatch              FAILED_PRECONDITION: the session belongs to another model
├── DataLoss              DATA_LOSS: the session's stored KV is damaged; never retry
├── Overloaded            RESOURCE_EXHAUSTED: back off, then retry
├── Unavailable           UNAVAILABLE: the gateway, a worker or the store is away; retry
├── DeadlineExceeded      DEADLINE_EXCEEDED: the call's ``timeout_s`` passed
├── Cancelled             CANCELLED: the call was closed before it ended
├── Unauthenticated       UNAUTHENTICATED: the token is missing or wrong
├── PermissionDenied      PERMISSION_DENIED: the token does not allow this
└── InternalError         anything else: a fault of the server, report it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

_DOMAIN: Final = "chunkserve"
_DETAILS_KEY: Final = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A request field at fault.

    Attributes:
        field: Its path in the wire message, for example ``sampling.max_tokens``.
        description: What was wrong with it.
    """

    field: str
    description: str


class ChunkServeError(Exception):
    """A call failed. ``str(error)`` is the message.

    Attributes:
        code: gRPC status code.
        reason: ``ErrorInfo.reason`` in UPPER_SNAKE_CASE; empty if the server gave none, which
            means that the error comes from the connection and not from ChunkServe.
        message: What was wrong, for people.
        metadata: ``ErrorInfo.metadata``.
        retry_after_s: Seconds to wait before a retry, if the server named them.
        field_violations: The request's fields at fault.
        request_id: Names the request in the server's logs.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field_violations: Sequence[FieldViolation] = (),
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field_violations = tuple(field_violations)
        self.request_id = request_id


class InvalidRequest(ChunkServeError):
    """The request is malformed: fix it, then send it again."""


class NotFound(ChunkServeError):
    """What the request names does not exist."""


class SessionNotFound(NotFound):
    """The session does not exist, or has expired."""


class AlreadyExists(ChunkServeError):
    """Something of this name exists."""


class SessionBusy(ChunkServeError):
    """Another turn of the session is running: wait for it."""


class Mismatch(ChunkServeError):
    """The session belongs to another model."""


class DataLoss(ChunkServeError):
    """The session's stored KV is damaged. Retrying does not help."""


class Overloaded(ChunkServeError):
    """All workers, or the store, are full: back off."""


class Unavailable(ChunkServeError):
    """The gateway, a worker or the store is away: retry."""


class DeadlineExceeded(ChunkServeError):
    """The call's ``timeout_s`` passed before it ended."""


class Cancelled(ChunkServeError):
    """The call was closed before it ended, by this client or by the server."""


class Unauthenticated(ChunkServeError):
    """The token is missing or wrong."""


class PermissionDenied(ChunkServeError):
    """The token does not allow this."""


class InternalError(ChunkServeError):
    """A fault of the server, or an answer that this client does not understand."""


_BY_CODE: Final[Mapping[grpc.StatusCode, type[ChunkServeError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: SessionBusy,
    grpc.StatusCode.FAILED_PRECONDITION: Mismatch,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}

_BY_REASON: Final[Mapping[str, type[ChunkServeError]]] = {"SESSION_NOT_FOUND": SessionNotFound}


def from_rpc_error(
    error: grpc.aio.AioRpcError, *, address: str, timeout_s: float, request_id: str
) -> ChunkServeError:
    """Map a failed call to an exception.

    Args:
        error: What gRPC raised.
        address: Whom the call went to, for messages about the connection.
        timeout_s: Deadline that the call had.
        request_id: Id that the call was sent with.
    """
    code = error.code()
    text = error.details() or ""
    details = _details(error)
    info = details.info
    if info is None:
        return _from_connection(code, text, address, timeout_s, request_id)
    kind = _BY_REASON.get(info.reason) or _BY_CODE.get(code, InternalError)
    return kind(
        text or info.reason,
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after_s=details.retry_after_s,
        field_violations=details.field_violations,
        request_id=info.metadata.get("request_id") or request_id,
    )


def invalid_request(message: str) -> InvalidRequest:
    """Return the error of a request that cannot even be sent."""
    return InvalidRequest(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_REQUEST")


def cancelled(request_id: str) -> Cancelled:
    """Return the error of a call that was closed while somebody waited for it."""
    return Cancelled(
        "the call was closed before it ended",
        code=grpc.StatusCode.CANCELLED,
        request_id=request_id,
    )


def _from_connection(
    code: grpc.StatusCode, text: str, address: str, timeout_s: float, request_id: str
) -> ChunkServeError:
    """Map a status that gRPC made itself, between this client and the server."""
    kind = _BY_CODE.get(code, InternalError)
    if code is grpc.StatusCode.UNAVAILABLE:
        text = f"no answer from {address}: {text}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        text = f"no complete answer from {address} within timeout_s={timeout_s:g}"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        text = f"{address} does not offer this method; is it a ChunkServe gateway? ({text})"
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        # Not a full server: a message that no retry makes smaller.
        kind, text = InvalidRequest, f"the request is too large to send: {text}"
    return kind(text or code.name, code=code, request_id=request_id)


@dataclass(slots=True)
class _Details:
    info: error_details_pb2.ErrorInfo | None = None
    retry_after_s: float | None = None
    field_violations: tuple[FieldViolation, ...] = ()


def _details(error: grpc.aio.AioRpcError) -> _Details:
    """Read the ``google.rpc`` details of an error; damaged or foreign ones count as absent."""
    found = _Details()
    try:
        for detail in _status(error).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                found.info = info if info.domain == _DOMAIN else found.info
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo.FromString(detail.value)
                found.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                request = error_details_pb2.BadRequest.FromString(detail.value)
                found.field_violations = tuple(
                    FieldViolation(v.field, v.description) for v in request.field_violations
                )
    except (DecodeError, ValueError, OverflowError):  # the latter two: an absurd delay
        return _Details()
    return found


def _status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()
