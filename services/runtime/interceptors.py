"""What happens around every call of our own methods: request id, one log line, errors.

Only methods under ``/chunkserve.`` are wrapped. The health service must not be: its ``Check``
aborts by itself, and its ``Watch`` is a coroutine that writes, not a generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from services.runtime.errors import InvalidRequestError, ServiceError
from services.runtime.status import internal_error, status_code, to_status
from services.runtime.telemetry import add_request_fields, get_logger, open_request_fields

REQUEST_ID_KEY: Final = "x-request-id"

ServicerContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# What a handler is to an interceptor: a coroutine function. It takes the request, or an iterator
# over a stream of them; it returns the response, or has written all responses to the context and
# returns None.
_Behavior: TypeAlias = "Callable[[Any, ServicerContext], Awaitable[Any]]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_READ_REST_S: Final = 10.0
_OUR_METHODS: Final = "/chunkserve."
_REQUEST_ID: Final = re.compile(r"[\x20-\x7e]{1,128}")

_log = get_logger()


def current_request_id() -> str:
    """Return the id of the request that is being served; empty outside of one."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def bind_request_id(request_id: str) -> None:
    """Give the request that is being served another id, the one that its message names."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def request_id_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries the request id to the next service."""
    request_id = current_request_id()
    return ((REQUEST_ID_KEY, request_id),) if request_id else ()


class _Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own methods."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OUR_METHODS):
            return handler
        return self.wrap(handler, handler_call_details)

    def wrap(self, handler: _Handler, details: grpc.HandlerCallDetails) -> _Handler:
        raise NotImplementedError


class RequestIdInterceptor(_Interceptor):
    """Binds ``x-request-id``, or a fresh id, to all log events of the request."""

    def wrap(self, handler: _Handler, details: grpc.HandlerCallDetails) -> _Handler:
        request_id = _sent_request_id(details) or uuid.uuid4().hex

        def bind(behavior: _Behavior) -> _Behavior:
            async def bound(request: Any, context: ServicerContext) -> Any:
                with structlog.contextvars.bound_contextvars(request_id=request_id):
                    return await behavior(request, context)

            return bound

        return _replace_behavior(handler, bind)


class LogInterceptor(_Interceptor):
    """Logs one line when a request ends: ``generate.done method=... code=... duration_ms=...``.

    Servicers add to it with :func:`~services.runtime.telemetry.add_request_fields`.
    """

    def wrap(self, handler: _Handler, details: grpc.HandlerCallDetails) -> _Handler:
        method = details.method
        event = f"{_snake_case(method.rpartition('/')[2])}.done"

        def log(behavior: _Behavior) -> _Behavior:
            async def logged(request: Any, context: ServicerContext) -> Any:
                start = time.perf_counter()
                fields = open_request_fields()
                fields["code"] = "OK"
                try:
                    return await behavior(request, context)
                except asyncio.CancelledError:
                    fields["code"] = _cancel_code(context).name
                    raise
                finally:
                    duration_ms = round(1e3 * (time.perf_counter() - start), 3)
                    _log.info(event, method=method, duration_ms=duration_ms, **fields)

            return logged

        return _replace_behavior(handler, log)


class ErrorInterceptor(_Interceptor):
    """Turns what a handler raises into the status that the caller sees.

    A ``ServiceError`` gets the code of the table and its details. A message that cannot be parsed
    is INVALID_ARGUMENT. Everything else is INTERNAL with a fixed text, and its traceback is
    logged, unless the caller's deadline is over: then the failure is most likely its consequence,
    and nobody waits for the answer. Cancellation passes.
    """

    def wrap(self, handler: _Handler, details: grpc.HandlerCallDetails) -> _Handler:
        def guard(behavior: _Behavior) -> _Behavior:
            async def guarded(request: Any, context: ServicerContext) -> Any:
                try:
                    if handler.request_streaming:
                        return await behavior(_parsed(request, details.method), context)
                    if isinstance(request, _Unparsable):
                        raise _unparsable_error(details.method, request)
                    return await behavior(request, context)
                except ServiceError as error:
                    if handler.request_streaming:
                        await _read_rest(request)
                    await _abort(context, error)
                except grpc.aio.AbortError:
                    raise  # the status is on its way already
                except grpc.aio.InternalError as error:
                    # A write to a caller who has left, before this task hears of it.
                    raise asyncio.CancelledError from error
                except Exception:
                    await _abort_unexpected(context, details.method)

            return guarded

        return _replace_behavior(_catch_unparsable(handler), guard)


INTERCEPTORS: Final = (RequestIdInterceptor, LogInterceptor, ErrorInterceptor)


class _Unparsable:
    """Stands for a request message whose bytes could not be parsed."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _replace_behavior(handler: _Handler, wrap: Callable[[_Behavior], _Behavior]) -> _Handler:
    behavior = _behavior(handler)
    if handler.response_streaming:
        behavior = _as_writer(behavior)
    return _remade(handler, wrap(behavior), handler.request_deserializer)


def _behavior(handler: _Handler) -> Any:
    if handler.request_streaming and handler.response_streaming:
        raise NotImplementedError("methods that stream both ways are not served")
    return handler.unary_unary or handler.unary_stream or handler.stream_unary


def _remade(handler: _Handler, behavior: Any, parse: Any) -> _Handler:
    """Return a handler of the same kind that does, and parses, something else."""
    make: Any = grpc.unary_unary_rpc_method_handler
    if handler.response_streaming:
        make = grpc.unary_stream_rpc_method_handler
    elif handler.request_streaming:
        make = grpc.stream_unary_rpc_method_handler
    remade: _Handler = make(
        behavior, request_deserializer=parse, response_serializer=handler.response_serializer
    )
    return remade


def _as_writer(behavior: Any) -> _Behavior:
    """Return a streaming handler as a coroutine function that writes to the context.

    A generator handler is closed by this coroutine. Left to gRPC, a call that is cancelled while
    it writes leaves the generator to the garbage collector, and its ``finally`` runs some time
    later in another task.
    """
    if not inspect.isasyncgenfunction(behavior):
        writer: _Behavior = behavior
        return writer

    async def write_all(request: Any, context: ServicerContext) -> None:
        async with contextlib.aclosing(behavior(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write_all


def _catch_unparsable(handler: _Handler) -> _Handler:
    parse = handler.request_deserializer
    if parse is None:
        return handler

    def parse_or_mark(data: bytes) -> Any:
        # Raised from here, gRPC would answer UNKNOWN with the exception's text.
        try:
            return parse(data)
        except (DecodeError, ValueError) as error:
            return _Unparsable(error)

    return _remade(handler, _behavior(handler), parse_or_mark)


async def _parsed(requests: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
    """Yield a stream's messages.

    Raises:
        InvalidRequestError: One of them could not be parsed.
    """
    async for request in requests:
        if isinstance(request, _Unparsable):
            raise _unparsable_error(method, request)
        yield request


async def _read_rest(requests: AsyncIterator[Any]) -> None:
    """Read what a refused caller still sends, for a while: Python's gRPC forgets the status if it
    comes during a write."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_READ_REST_S):
            async for _ in requests:
                pass


def _unparsable_error(method: str, request: _Unparsable) -> InvalidRequestError:
    return InvalidRequestError(
        f"the bytes sent to {method} are not its request message: {request.error}; "
        "encode it with the published .proto files, all strings in UTF-8",
        reason="MALFORMED_MESSAGE",
    )


async def _abort(context: ServicerContext, error: ServiceError) -> NoReturn:
    add_request_fields(code=status_code(error).name, reason=error.error_reason, error=error.message)
    await context.abort_with_status(to_status(error))
    raise AssertionError("abort_with_status always raises")


async def _abort_unexpected(context: ServicerContext, method: str) -> NoReturn:
    if _is_past_deadline(context):
        add_request_fields(code=grpc.StatusCode.DEADLINE_EXCEEDED.name)
    else:
        _log.exception("request.failed", method=method)
        add_request_fields(code=grpc.StatusCode.INTERNAL.name)
    await context.abort_with_status(to_status(internal_error(current_request_id())))
    raise AssertionError("abort_with_status always raises")


def _cancel_code(context: ServicerContext) -> grpc.StatusCode:
    if _is_past_deadline(context):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _is_past_deadline(context: ServicerContext) -> bool:
    remaining = context.time_remaining()
    return remaining is not None and remaining <= 0


def _sent_request_id(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
