"""What goes wrong at the server, in the words of ``services.runtime.errors``."""

from __future__ import annotations

from typing import Final

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from services.runtime.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)

RETRY_AFTER_S: Final = 1.0
MAX_TTL_S: Final = 10 * 365 * 86_400

_CREDENTIALS: Final = "check the user, its password and its permissions in the store URL"
_WAIT: Final = "it is starting up or changing roles; retry"


def service_error(error: Exception, where: str) -> ServiceError:
    """Return the service error that says what ``error`` means and what to do."""
    if isinstance(error, OutOfMemoryError):
        return OverloadedError(
            f"the store at {where} is full; retry later, let sessions expire, or raise its"
            " maxmemory",
            reason="STORE_FULL",
            retry_after_s=RETRY_AFTER_S,
        )
    return UnavailableError(
        f"the store at {where} {_what_happened(error)}",
        reason="STORE_UNAVAILABLE",
        retry_after_s=RETRY_AFTER_S,
    )


def ttl_ms(ttl_s: float) -> int:
    """Return a TTL in the server's unit.

    Raises:
        InvalidRequestError: It is not positive (the server would delete the key), or too long.
    """
    if not 0 < ttl_s <= MAX_TTL_S:
        raise InvalidRequestError(
            f"ttl is {ttl_s} s; it must be greater than 0 and at most {MAX_TTL_S}", field="ttl"
        )
    return max(1, round(ttl_s * 1000))


def segment_not_found(segment_id: str) -> NotFoundError:
    """Return the error for a segment, or a part of one, that is not there."""
    return NotFoundError(
        f"segment {segment_id} is not in the store, or has expired",
        reason="SEGMENT_NOT_FOUND",
        resource=("segment", segment_id),
    )


def _what_happened(error: Exception) -> str:
    match error:
        case MovedError() | AskError():
            # A cluster's client follows these; what is left is a wrong URL, or slots on the move.
            return (
                f"does not hold this key's slot ({error}); if it is a Redis Cluster, its URL must"
                " begin with redis+cluster:// or rediss+cluster://, and if its slots are being"
                " moved, retry"
            )
        case AuthenticationError() | NoPermissionError():
            return f"refused us ({error}); {_CREDENTIALS}"
        case BusyLoadingError() | ReadOnlyError() | ClusterDownError() | TryAgainError():
            return f"cannot serve now ({error}); {_WAIT}"
        case ResponseError() if str(error).startswith(("NOAUTH", "WRONGPASS")):
            return f"refused us ({error}); {_CREDENTIALS}"
        case ResponseError() if not isinstance(error, ClusterError):
            return f"refused a command ({error}); it must be Redis 7 or Valkey 7.2, or later"
        case _:
            return f"is away ({error}); check that it runs and that the store URL is right, retry"
