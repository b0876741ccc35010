"""Service errors to statuses and back."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from services.runtime.errors import (
    STATUS_CODES,
    DeadlineError,
    NotFoundError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)
from services.runtime.status import (
    WORKER_UNAVAILABLE,
    from_rpc_error,
    internal_error,
    status_code,
    to_status,
)


def rpc_error(status: grpc.Status) -> grpc.aio.AioRpcError:
    """Return the error that a caller of a service sees that ended with ``status``."""
    trailing = grpc.aio.Metadata(*(status.trailing_metadata or ()))
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailing, status.details)


def plain_error(code: grpc.StatusCode, *trailing: tuple[str, bytes]) -> grpc.aio.AioRpcError:
    """Return an error that gRPC itself made."""
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, "127.0.0.1:1 refused")


def test_every_service_error_has_a_status_code() -> None:
    assert set(STATUS_CODES) == set(ServiceError.__subclasses__())


def test_no_two_service_errors_share_a_status_code() -> None:
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)


@pytest.mark.parametrize("error_class", [*STATUS_CODES, ServiceError])
def test_an_error_survives_the_wire(error_class: type[ServiceError]) -> None:
    error = error_class(
        "what was wrong",
        reason="SOME_REASON",
        metadata={"key": "value"},
        field="sampling.max_tokens",
        resource=("session", "s-1"),
        retry_after_s=1.25,
        quota_subject="tenant:default",
    )

    back = from_rpc_error(rpc_error(to_status(error)))

    assert type(back) is error_class
    assert vars(back) == vars(error)
    assert str(back) == str(error)


def test_an_error_without_details_survives_the_wire() -> None:
    error = NotFoundError("gone")

    back = from_rpc_error(rpc_error(to_status(error)))

    assert vars(back) == vars(error)


def test_a_subclass_has_the_code_of_its_parent() -> None:
    class SpecialNotFoundError(NotFoundError):
        pass

    code = status_code(SpecialNotFoundError("gone"))

    # The class must not stay among the subclasses that another test counts.
    assert code is grpc.StatusCode.NOT_FOUND
    assert SpecialNotFoundError not in ServiceError.__subclasses__()


def test_a_long_message_fits_into_the_headers() -> None:
    status = to_status(NotFoundError("ä" * 100_000, field="f", resource=("a", "b")))

    assert len(status.details) == 500
    assert status.details.endswith("…")
    [(_, packed)] = status.trailing_metadata
    assert len(packed) < 4096


@pytest.mark.parametrize(
    ("code", "error_class", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, WORKER_UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, UnavailableError, WORKER_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError, "OVERLOADED"),
        (grpc.StatusCode.UNIMPLEMENTED, ServiceError, "INTERNAL"),
    ],
)
def test_an_error_of_grpc_itself_gets_words_of_ours(
    code: grpc.StatusCode, error_class: type[ServiceError], reason: str
) -> None:
    error = from_rpc_error(plain_error(code))

    assert type(error) is error_class
    assert error.error_reason == reason
    assert "127.0.0.1" not in error.message


def test_details_that_are_no_status_are_ignored() -> None:
    error = from_rpc_error(
        plain_error(grpc.StatusCode.UNAVAILABLE, ("grpc-status-details-bin", b"\xff\xff"))
    )

    assert error.error_reason == WORKER_UNAVAILABLE


def test_details_of_another_domain_are_ignored() -> None:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="theirs")
    detail = error_details_pb2.ErrorInfo(reason="THEIRS", domain="example.com")
    status.details.add().Pack(detail)

    error = from_rpc_error(rpc_error(rpc_status.to_status(status)))

    assert error.error_reason == WORKER_UNAVAILABLE


def test_an_internal_error_names_the_request_alone() -> None:
    status = to_status(internal_error("r-1"))

    assert status.code is grpc.StatusCode.INTERNAL
    assert "'r-1'" in status.details
    assert from_rpc_error(rpc_error(status)).metadata == {"request_id": "r-1"}
