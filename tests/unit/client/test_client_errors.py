"""Statuses to exceptions."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

import chunkserve_client
from chunkserve_client import ChunkServeError, FieldViolation, errors
from services.runtime.errors import STATUS_CODES

Code = grpc.StatusCode

EXPECTED = {
    Code.CANCELLED: errors.Cancelled,
    Code.UNKNOWN: errors.InternalError,
    Code.INVALID_ARGUMENT: errors.InvalidRequest,
    Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    Code.NOT_FOUND: errors.NotFound,
    Code.ALREADY_EXISTS: errors.AlreadyExists,
    Code.PERMISSION_DENIED: errors.PermissionDenied,
    Code.RESOURCE_EXHAUSTED: errors.Overloaded,
    Code.FAILED_PRECONDITION: errors.Mismatch,
    Code.ABORTED: errors.SessionBusy,
    Code.OUT_OF_RANGE: errors.InvalidRequest,
    Code.UNIMPLEMENTED: errors.InternalError,
    Code.INTERNAL: errors.InternalError,
    Code.UNAVAILABLE: errors.Unavailable,
    Code.DATA_LOSS: errors.DataLoss,
    Code.UNAUTHENTICATED: errors.Unauthenticated,
}


def rpc_error(code: Code, text: str, *details: object) -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        status.details.add().Pack(detail)
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, text)


def mapped(error: grpc.aio.AioRpcError) -> ChunkServeError:
    return errors.from_rpc_error(error, address="gate:1", timeout_s=2.5, request_id="r-1")


def info(reason: str = "WHY", **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="chunkserve", metadata=metadata)


def test_every_status_has_an_exception():
    assert set(EXPECTED) == set(Code) - {Code.OK}


@pytest.mark.parametrize(("code", "kind"), EXPECTED.items(), ids=[c.name for c in EXPECTED])
def test_status_becomes_its_exception(code: Code, kind: type[ChunkServeError]):
    error = mapped(rpc_error(code, "no", info("WHY", model="tiny")))

    assert type(error) is kind
    assert (error.code, error.reason, error.message, str(error)) == (code, "WHY", "no", "no")
    assert error.metadata == {"model": "tiny"}
    assert error.request_id == "r-1"


@pytest.mark.parametrize("code", EXPECTED, ids=[c.name for c in EXPECTED])
def test_status_without_details_still_becomes_its_exception(code: Code):
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "wire text")

    error = mapped(bare)

    assert type(error) is EXPECTED[code]
    assert error.reason == ""
    assert error.message


@pytest.mark.parametrize("code", STATUS_CODES.values(), ids=lambda code: code.name)
def test_no_error_of_the_services_becomes_an_internal_error(code: Code):
    assert EXPECTED[code] is not errors.InternalError


def test_every_exception_is_public():
    kinds = {
        k for k in vars(errors).values() if isinstance(k, type) and k.__module__ == errors.__name__
    }
    public = {k for k in kinds if not k.__name__.startswith("_")}

    assert {k.__name__ for k in public} <= set(chunkserve_client.__all__)


def test_unknown_session_is_a_not_found_of_its_own():
    error = mapped(rpc_error(Code.NOT_FOUND, "gone", info("SESSION_NOT_FOUND")))

    assert type(error) is errors.SessionNotFound
    assert isinstance(error, errors.NotFound)


def test_retry_delay_and_field_violations_are_read():
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.max_tokens", description="is -1; send at least 1")

    error = mapped(rpc_error(Code.RESOURCE_EXHAUSTED, "full", info(), retry, bad))

    assert error.retry_after_s == 1.5
    assert error.field_violations == (
        FieldViolation("sampling.max_tokens", "is -1; send at least 1"),
    )


def test_request_id_of_the_server_wins():
    error = mapped(rpc_error(Code.INTERNAL, "internal error", info(request_id="r-server")))

    assert error.request_id == "r-server"


def test_details_of_another_domain_are_not_ours():
    foreign = error_details_pb2.ErrorInfo(reason="RATE_LIMIT", domain="proxy.example")

    error = mapped(rpc_error(Code.UNAVAILABLE, "slow down", foreign))

    assert error.reason == ""
    assert "no answer from gate:1: slow down" in error.message


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff\xff",
        status_pb2.Status(
            details=[{"type_url": "type.googleapis.com/google.rpc.ErrorInfo", "value": b"\xff"}]
        ).SerializeToString(),
        status_pb2.Status(
            details=[
                {
                    "type_url": "type.googleapis.com/google.rpc.RetryInfo",
                    "value": error_details_pb2.RetryInfo(
                        retry_delay=Duration(seconds=1 << 60)
                    ).SerializeToString(),
                }
            ]
        ).SerializeToString(),
    ],
    ids=["no_status", "damaged_detail", "absurd_delay"],
)
def test_damaged_details_count_as_absent(details: bytes):
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", details))
    damaged = grpc.aio.AioRpcError(Code.DATA_LOSS, grpc.aio.Metadata(), trailing, "damaged")

    error = mapped(damaged)

    assert type(error) is errors.DataLoss
    assert error.message == "damaged"
    assert error.retry_after_s is None


@pytest.mark.parametrize(
    ("code", "text", "message"),
    [
        (Code.UNAVAILABLE, "refused", "no answer from gate:1: refused"),
        (
            Code.DEADLINE_EXCEEDED,
            "Deadline Exceeded",
            "no complete answer from gate:1 within timeout_s=2.5",
        ),
        (Code.UNIMPLEMENTED, "Method not found!", "is it a ChunkServe gateway?"),
    ],
    ids=["unavailable", "deadline", "unimplemented"],
)
def test_message_of_the_connection_says_what_it_means(code: Code, text: str, message: str):
    bare = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), text)

    assert message in mapped(bare).message


def test_message_that_is_too_large_is_not_an_overload():
    text = "SERVER: Received message larger than max (9 vs. 4)"
    bare = grpc.aio.AioRpcError(
        Code.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), text
    )

    error = mapped(bare)

    assert type(error) is errors.InvalidRequest
    assert "too large" in error.message
