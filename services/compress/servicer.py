"""CompressionService: a stored session in, a smaller one out."""

from __future__ import annotations

from collections.abc import Iterable

from chunkserve.v1 import compression_pb2, compression_pb2_grpc, session_pb2, types_pb2
from services.compress.compaction import Compactor, Target
from services.compress.policy import PRECISIONS
from services.runtime.errors import InvalidRequestError, OverloadedError
from services.runtime.interceptors import ServicerContext
from services.runtime.telemetry import add_request_fields


class CompressionServicer(compression_pb2_grpc.CompressionServiceServicer):
    """Compacts sessions on demand.

    Args:
        compactor: Does it.
        max_concurrent_requests: Calls at once; one more is refused.
    """

    def __init__(self, compactor: Compactor, *, max_concurrent_requests: int) -> None:
        self._compactor = compactor
        self.num_slots = max_concurrent_requests
        self.num_active = 0

    async def Compress(
        self, request: compression_pb2.CompressRequest, context: ServicerContext
    ) -> compression_pb2.CompressResponse:
        target = target_of(request.compression)
        add_request_fields(session_id=request.session_id)
        if self.num_active >= self.num_slots:
            raise OverloadedError(
                f"{self.num_active} sessions are being compressed; try again later",
                retry_after_s=1.0,
            )
        self.num_active += 1
        try:
            done = await self._compactor.compact(request.tenant, request.session_id, target)
        finally:
            self.num_active -= 1
        add_request_fields(
            original_bytes=_size_bytes(done.before), size_bytes=_size_bytes(done.after)
        )
        return compression_pb2.CompressResponse(
            session_version=done.version,
            original_bytes=_size_bytes(done.before),
            original_kept_tokens=sum(segment.num_kept_tokens for segment in done.before),
        )


def target_of(policy: types_pb2.CompressionPolicy) -> Target:
    """Return what a request asks for.

    Raises:
        InvalidRequestError: Neither a budget nor a precision, or one out of range.
    """
    budget = policy.WhichOneof("budget")
    if budget is None and not policy.precision:
        raise InvalidRequestError(
            "compression names neither a budget nor a precision; send at least one",
            field="compression",
        )
    if policy.precision and policy.precision not in PRECISIONS:
        raise InvalidRequestError(
            f"compression.precision is {policy.precision}, which this worker does not know",
            field="compression.precision",
        )
    return Target(
        keep_ratio=policy.keep_ratio if budget == "keep_ratio" else None,
        max_kept_tokens=policy.max_kept_tokens if budget == "max_kept_tokens" else None,
        precision=PRECISIONS.get(policy.precision),
    )


def _size_bytes(segments: Iterable[session_pb2.Segment]) -> int:
    return sum(segment.size_bytes for segment in segments)
