"""Service errors to gRPC statuses with ``google.rpc`` details, and back.

The two directions are inverse, so that a gateway can pass a worker's error on unchanged. Statuses
that carry no ``ErrorInfo`` come from gRPC itself (a dead address, a closed connection): their
technical text is replaced, because it names addresses and says nothing to the caller.
"""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from services.runtime.errors import (
    ERROR_DOMAIN,
    STATUS_CODES,
    DeadlineError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)

# Reason of errors that gRPC found, not the worker: its address is dead or the connection broke.
WORKER_UNAVAILABLE: Final = "WORKER_UNAVAILABLE"

# A status travels in HTTP/2 headers, 8 KiB by default, and its message up to four times in them.
_MAX_MESSAGE_CHARS: Final = 500

_ERRORS: Final = {code: error for error, code in STATUS_CODES.items()}
_DETAILS_KEY: Final = "grpc-status-details-bin"


def status_code(error: ServiceError) -> grpc.StatusCode:
    """Return the gRPC code of ``error``; INTERNAL if its class is not in the table."""
    for error_class in type(error).__mro__:
        if error_class in STATUS_CODES:
            return STATUS_CODES[error_class]
    return grpc.StatusCode.INTERNAL


def to_status(error: ServiceError) -> grpc.Status:
    """Return the status of ``error``: ``ErrorInfo``, and the other details that it has."""
    code, _ = status_code(error).value
    message = _shortened(error.message)
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code, message=message, details=_pack_details(error, message))
    )
    return status


def internal_error(request_id: str) -> ServiceError:
    """Return what the caller sees of an error whose text is for the log only."""
    return ServiceError(
        f"internal error; the server's log has the details under request id {request_id!r}",
        metadata={"request_id": request_id},
    )


def from_rpc_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """Return the service error that a call to another of our services ended with."""
    rich = _rich_status(error)
    info = error_details_pb2.ErrorInfo()
    if rich is None or not _unpack(rich, info) or info.domain != ERROR_DOMAIN:
        return _from_plain_code(error.code())

    violations = error_details_pb2.BadRequest()
    resource = error_details_pb2.ResourceInfo()
    retry = error_details_pb2.RetryInfo()
    has_field = _unpack(rich, violations) and len(violations.field_violations) > 0
    has_resource = _unpack(rich, resource)
    has_retry = _unpack(rich, retry)
    quota = error_details_pb2.QuotaFailure()
    has_quota = _unpack(rich, quota) and len(quota.violations) > 0
    return _ERRORS.get(error.code(), ServiceError)(
        rich.message,
        reason=info.reason,
        metadata=info.metadata,
        field=violations.field_violations[0].field if has_field else None,
        resource=(resource.resource_type, resource.resource_name) if has_resource else None,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None,
        quota_subject=quota.violations[0].subject if has_quota else None,
    )


def _pack_details(error: ServiceError, message: str) -> list[Any]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.error_reason, domain=ERROR_DOMAIN, metadata=error.metadata
        )
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.resource is not None:
        resource_type, resource_name = error.resource
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=resource_type,
                resource_name=resource_name,
                description=message,
            )
        )
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.quota_subject is not None:
        exceeded = error_details_pb2.QuotaFailure.Violation(
            subject=error.quota_subject, description=message
        )
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    return [_packed(detail) for detail in details]


def _shortened(message: str) -> str:
    if len(message) <= _MAX_MESSAGE_CHARS:
        return message
    return f"{message[: _MAX_MESSAGE_CHARS - 1]}…"


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpack(status: status_pb2.Status, detail: Message) -> bool:
    """Fill ``detail`` from the first of its kind in ``status``; ``False`` if there is none."""
    return any(packed.Unpack(detail) for packed in status.details)


def _from_plain_code(code: grpc.StatusCode) -> ServiceError:
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            # A worker that is stopped past its grace period cancels what still runs.
            return UnavailableError(
                "a worker went away; try again", reason=WORKER_UNAVAILABLE, retry_after_s=1.0
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineError("the deadline passed before the answer was complete")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError("a message or a worker's queue is over its limit")
        case _:
            return ServiceError("internal error in a worker; its log has the details")
