"""One channel to a gateway: how it is opened, what every call carries, what is tried again."""

from __future__ import annotations

import asyncio
import math
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypedDict, TypeVar

import grpc

from chunkserve.v1 import inference_pb2_grpc, session_pb2_grpc
from chunkserve_client.errors import (
    ChunkServeError,
    Overloaded,
    Unavailable,
    cancelled,
    from_rpc_error,
)

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S: Final = 600.0
DEFAULT_MAX_RETRIES: Final = 2
_FIRST_BACKOFF_S: Final = 0.2
_LOOPBACK: Final = ("localhost", "127.", "[::1]", "unix:")

_CHANNEL_OPTIONS: Final = (
    # A gateway whose machine vanished is noticed after 40 s instead of at the deadline.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC does not connect again before its own backoff (default: from 1 s to 2 min) is over, so
    # it must be shorter than that of our retries, or these would fail without having tried.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Two clients in a process do not share a connection, nor its backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
)

T = TypeVar("T")


class ClientOptions(TypedDict, total=False):
    """Options of a client.

    Attributes:
        timeout_s: Deadline of a call that names none, above 0. Default 600.
        max_retries: How often a call is tried again when the server is away or full, at least 0.
            Only calls that had no effect yet: reads, and ``generate`` before its first event.
            Default 2.
        tls: Encrypts with the system's root certificates.
        credentials: Encrypts with these; for a root certificate or a client key of one's own.
        token: Sent with every call as ``authorization: Bearer``. Readable on the way without TLS.
    """

    timeout_s: float
    max_retries: int
    tls: bool
    credentials: grpc.ChannelCredentials | None
    token: str | None


class Connection:
    """A channel, opened at the first call, and the rules that all calls share.

    Args:
        address: ``host:port`` of the gateway.
        options: See :class:`ClientOptions`.
        channel: Used instead of one of our own, and left open at the end.
    """

    def __init__(
        self, address: str, options: ClientOptions, channel: grpc.aio.Channel | None
    ) -> None:
        self.address = address
        self.timeout_s = checked_timeout(options.get("timeout_s", DEFAULT_TIMEOUT_S))
        self._max_retries = options.get("max_retries", DEFAULT_MAX_RETRIES)
        self._credentials = _credentials(options)
        self._token = options.get("token")
        self._channel = channel
        self._owns_channel = channel is None
        self._closed = False

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        """Stub of InferenceService."""
        return inference_pb2_grpc.InferenceServiceStub(self._open_channel())

    @property
    def sessions(self) -> session_pb2_grpc.SessionServiceAsyncStub:
        """Stub of SessionService."""
        return session_pb2_grpc.SessionServiceStub(self._open_channel())

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, T],
        request: Any,
        *,
        timeout_s: float | None = None,
        is_retried: bool,
    ) -> T:
        """Call a method that has one answer.

        Raises:
            ChunkServeError: The call failed.
        """
        request_id = new_request_id()

        async def start(remaining_s: float) -> T:
            return await method(request, timeout=remaining_s, metadata=self.metadata(request_id))

        return await self.attempt(
            start,
            timeout_s=self.timeout_s if timeout_s is None else checked_timeout(timeout_s),
            request_id=request_id,
            max_retries=self._max_retries if is_retried else 0,
        )

    async def attempt(
        self,
        start: Callable[[float], Awaitable[T]],
        *,
        timeout_s: float,
        request_id: str,
        max_retries: int | None = None,
    ) -> T:
        """Run ``start(remaining seconds)``, again while the server is away or full.

        Raises:
            ChunkServeError: The last attempt failed, or no time is left for another.
        """
        retries_left = self._max_retries if max_retries is None else max_retries
        backoff_s = _FIRST_BACKOFF_S
        deadline = _now() + timeout_s
        while True:
            try:
                return await start(max(deadline - _now(), 0.0))
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
                error = self.mapped(caught, timeout_s=timeout_s, request_id=request_id)
                delay_s = _retry_delay_s(error, backoff_s)
                if retries_left <= 0 or delay_s is None or _now() + delay_s >= deadline:
                    raise error from caught
            retries_left -= 1
            backoff_s *= 2
            await asyncio.sleep(delay_s)

    def mapped(
        self, caught: BaseException, *, timeout_s: float, request_id: str
    ) -> ChunkServeError:
        """Return the exception that the caller gets for what gRPC raised.

        Raises:
            CancelledError: It is the caller's own task that was cancelled.
        """
        if isinstance(caught, grpc.aio.AioRpcError):
            return from_rpc_error(
                caught, address=self.address, timeout_s=timeout_s, request_id=request_id
            )
        # gRPC raises CancelledError also where only the call ended, on either side.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise caught
        return cancelled(request_id)

    def metadata(self, request_id: str, avoid_worker: str = "") -> tuple[tuple[str, str], ...]:
        """Return what goes with every call."""
        metadata: tuple[tuple[str, str], ...] = ()
        if _is_header_value(request_id):  # if not, the server says what is wrong with it
            metadata = (("x-request-id", request_id),)
        if avoid_worker:
            metadata = (*metadata, ("x-chunkserve-avoid-worker", avoid_worker))
        if self._token is not None:
            metadata = (*metadata, ("authorization", f"Bearer {self._token}"))
        return metadata

    async def aclose(self) -> None:
        """End all calls and close the channel. Harmless if it is closed."""
        self._closed = True
        if self._channel is not None and self._owns_channel:
            await self._channel.close()

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._channel is None:
            # A proxy for the outer world does not know what listens on this machine.
            is_local = self.address.startswith(_LOOPBACK)
            options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if is_local else 1))
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.address, options)
            else:
                self._channel = grpc.aio.secure_channel(self.address, self._credentials, options)
        return self._channel


def new_request_id() -> str:
    """Return an id that nobody else has."""
    return uuid.uuid4().hex


def checked_timeout(timeout_s: float) -> float:
    """Return the timeout if it is one.

    Raises:
        ValueError: It is not above 0, or not finite.
    """
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s={timeout_s}: give seconds above 0")
    return timeout_s


def _credentials(options: ClientOptions) -> grpc.ChannelCredentials | None:
    token = options.get("token")
    if token is not None and not _is_header_value(token):
        raise ValueError("token: give printable ASCII without spaces at its ends")
    credentials = options.get("credentials")
    if credentials is None and options.get("tls", False):
        return grpc.ssl_channel_credentials()
    return credentials


def _retry_delay_s(error: ChunkServeError, backoff_s: float) -> float | None:
    """Return seconds to wait before another attempt, or ``None`` if it would not help."""
    if not isinstance(error, Unavailable | Overloaded):
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s
    return backoff_s * random.uniform(0.5, 1.0)  # spread, so that clients do not come as one


def _is_header_value(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and text == text.strip()


def _now() -> float:
    return asyncio.get_running_loop().time()
