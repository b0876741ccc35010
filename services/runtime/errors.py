"""What can go wrong in a service, and the gRPC status of each.

Servicers raise these; one interceptor turns them into statuses with ``google.rpc`` details. Knows
nothing of gRPC servers, stores or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import grpc

ERROR_DOMAIN: Final = "chunkserve"


class ServiceError(Exception):
    """An error that a caller may see.

    Args:
        message: What was wrong, what was seen, what to send instead. Reaches the caller.
        reason: ``ErrorInfo.reason``, UPPER_SNAKE_CASE; the class's own if not given.
        metadata: ``ErrorInfo.metadata``.
        field: Path of the request field at fault, for ``BadRequest`` (``sampling.max_tokens``).
        resource: ``(type, name)`` for ``ResourceInfo`` (``("session", "s-1")``).
        retry_after_s: For ``RetryInfo``, in seconds.
        quota_subject: For ``QuotaFailure``: whose quota is used up (``tenant:default``).
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        field: str | None = None,
        resource: tuple[str, str] | None = None,
        retry_after_s: float | None = None,
        quota_subject: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_reason = reason or self.reason
        self.metadata = dict(metadata or {})
        self.field = field
        self.resource = resource
        self.retry_after_s = retry_after_s
        self.quota_subject = quota_subject


class InvalidRequestError(ServiceError):
    """The request is malformed: fix it, then send it again."""

    reason = "INVALID_REQUEST"


class NotFoundError(ServiceError):
    """A session, model or segment does not exist, or has expired."""

    reason = "NOT_FOUND"


class AlreadyExistsError(ServiceError):
    """Something of this name exists."""

    reason = "ALREADY_EXISTS"


class ConflictError(ServiceError):
    """Another turn holds or has changed the session."""

    reason = "SESSION_BUSY"


class MismatchError(ServiceError):
    """Stored KV belongs to another model or format version."""

    reason = "MODEL_MISMATCH"


class CorruptError(ServiceError):
    """Stored KV is damaged. Never decoded, never retried."""

    reason = "SEGMENT_CORRUPT"


class OverloadedError(ServiceError):
    """A queue, the workers or the store are full: back off."""

    reason = "OVERLOADED"


class UnavailableError(ServiceError):
    """The store or a worker is away: retry."""

    reason = "UNAVAILABLE"


class DeadlineError(ServiceError):
    """The caller's deadline passed before the work was done."""

    reason = "DEADLINE_EXCEEDED"


STATUS_CODES: Final[dict[type[ServiceError], grpc.StatusCode]] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    ConflictError: grpc.StatusCode.ABORTED,
    MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    CorruptError: grpc.StatusCode.DATA_LOSS,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
