"""Between the public types and the wire's messages. Knows no channel and no call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, timedelta
from typing import Any, Final

from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from chunkserve_client._types import (
    Compression,
    CompressionResult,
    Event,
    Finish,
    GenerateOptions,
    Message,
    Model,
    PromptInfo,
    Recompression,
    Segment,
    SessionInfo,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
)
from chunkserve_client.errors import invalid_request

_SAMPLING = tuple(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
# By field of ``Compression``: its enum, and how its values' names begin.
_CHOICES: Final[dict[str, tuple[Any, str]]] = {
    "scorer": (types_pb2.Scorer, "SCORER"),
    "unit": (types_pb2.Unit, "UNIT"),
    "scope": (types_pb2.Scope, "SCOPE"),
    "spread": (types_pb2.BudgetSpread, "BUDGET_SPREAD"),
    "precision": (types_pb2.Precision, "PRECISION"),
    "prefix_scorer": (types_pb2.Scorer, "SCORER"),
}

Input = inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest


@contextmanager
def refusing() -> Iterator[None]:
    """Turn values that no wire message can carry (lone surrogates, 2**40) into one error.

    Raises:
        InvalidRequest: The block raised a ``ValueError`` or an ``OverflowError``.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise invalid_request(f"the request cannot be sent: {error}") from error


def generate_request(
    prompt: str | None, session_id: str, request_id: str, options: GenerateOptions
) -> inference_pb2.GenerateRequest:
    """Build the request of one answer.

    Raises:
        InvalidRequest: A value does not fit into its field.
        TypeError: Not exactly one input is given, or an option does not exist.
    """
    _check_names(options)
    with refusing():
        request = inference_pb2.GenerateRequest(
            session_id=session_id,
            sampling=_sampling(options),
            request_id=request_id,
            model=options.get("model") or "",
            wait_if_busy=options.get("wait_if_busy") or False,
        )
        compression = options.get("compression")
        if compression is not None:
            request.compression.CopyFrom(compression_to_wire(compression))
        set_input(
            request,
            prompt,
            options.get("messages"),
            options.get("text"),
            options.get("token_ids"),
        )
    return request


def set_input(
    request: Input,
    prompt: str | None,
    messages: Sequence[Message | Mapping[str, Any]] | None,
    text: str | None,
    token_ids: Sequence[int] | None,
) -> None:
    """Write the one input that is given into ``request``.

    Raises:
        TypeError: None, or more than one, is given.
    """
    if sum(given is not None for given in (prompt, messages, text, token_ids)) != 1:
        raise TypeError("give exactly one of prompt, messages, text and token_ids")
    if text is not None:
        request.text = text
    elif token_ids is not None:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(token_ids)
    else:
        request.chat.SetInParent()
        for message in messages if messages is not None else [Message("user", prompt or "")]:
            request.chat.messages.append(_message(message))


def event_from_wire(response: inference_pb2.GenerateResponse) -> Event | None:
    """Return the event, or ``None`` for a kind that a later version of the server added."""
    kind = response.WhichOneof("event")
    if kind == "delta":
        delta = response.delta
        logprobs = tuple(map(_token_logprob, delta.logprobs))
        return TokenDelta(delta.text, tuple(delta.token_ids), delta.first_token_index, logprobs)
    if kind == "prompt_info":
        return PromptInfo(**_same_names(PromptInfo, response.prompt_info))
    if kind == "finish":
        reason = _choice(types_pb2.FinishReason, "FINISH_REASON", response.finish.reason)
        values = _same_names(Finish, response.finish)
        return Finish(**{**values, "reason": reason or "unspecified"})
    return None


def compression_to_wire(compression: Compression) -> types_pb2.CompressionPolicy:
    """Return the policy as a message.

    Raises:
        InvalidRequest: Two budgets, an unknown choice, or a value that does not fit.
    """
    if compression.keep_ratio is not None and compression.max_kept_tokens is not None:
        raise invalid_request("give keep_ratio or max_kept_tokens, not both")
    with refusing():
        message = types_pb2.CompressionPolicy()
        for field in fields(Compression):
            value = getattr(compression, field.name)
            if value is not None:
                is_choice = field.name in _CHOICES
                setattr(message, field.name, _number(field.name, value) if is_choice else value)
        return message


def compression_from_wire(policy: types_pb2.CompressionPolicy) -> Compression:
    """Return what the message sets; unset fields are ``None``."""
    values: dict[str, Any] = {}
    for field in fields(Compression):
        value = getattr(policy, field.name)
        if field.name in _CHOICES:
            values[field.name] = _choice(*_CHOICES[field.name], value)
        elif policy.HasField(field.name):
            # The wire's float has 7 digits: 0.1 shall come back as 0.1, not 0.10000000149.
            values[field.name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return Compression(**values)


def create_session_request(
    session_id: str | None,
    model: str | None,
    compression: Compression | None,
    ttl_s: float | None,
) -> session_pb2.CreateSessionRequest:
    """Build the request of a new session.

    Raises:
        InvalidRequest: A value does not fit into its field.
    """
    with refusing():
        request = session_pb2.CreateSessionRequest(session_id=session_id or "", model=model or "")
        if compression is not None:
            request.compression.CopyFrom(compression_to_wire(compression))
        if ttl_s is not None:
            request.ttl.FromTimedelta(timedelta(seconds=ttl_s))
    return request


def fork_session_request(
    session_id: str, new_session_id: str | None, ttl_s: float | None
) -> session_pb2.ForkSessionRequest:
    """Build the request of a fork.

    Raises:
        InvalidRequest: A value does not fit into its field.
    """
    with refusing():
        request = session_pb2.ForkSessionRequest(
            session_id=session_id, new_session_id=new_session_id or ""
        )
        if ttl_s is not None:
            request.ttl.FromTimedelta(timedelta(seconds=ttl_s))
    return request


def compress_session_request(
    session_id: str, compression: Compression
) -> session_pb2.CompressSessionRequest:
    """Build the request to compress a session further.

    Raises:
        InvalidRequest: A value does not fit into its field.
    """
    with refusing():
        return session_pb2.CompressSessionRequest(
            session_id=session_id, compression=compression_to_wire(compression)
        )


def compression_result_from_wire(
    response: session_pb2.CompressSessionResponse,
) -> CompressionResult:
    """Return the outcome as data."""
    return CompressionResult(
        session_from_wire(response.session),
        response.original_bytes,
        response.original_kept_tokens,
    )


def session_from_wire(session: session_pb2.Session) -> SessionInfo:
    """Return the session as data."""
    compression = None
    if session.HasField("compression"):
        compression = compression_from_wire(session.compression)
    return SessionInfo(
        session_id=session.session_id,
        model=session.model,
        version=session.version,
        num_turns=session.num_turns,
        num_tokens=session.num_tokens,
        num_kept_tokens=session.num_kept_tokens,
        stored_bytes=session.stored_bytes,
        compression=compression,
        create_time=session.create_time.ToDatetime(tzinfo=UTC),
        update_time=session.update_time.ToDatetime(tzinfo=UTC),
        expire_time=session.expire_time.ToDatetime(tzinfo=UTC),
        ttl_s=session.ttl.ToTimedelta().total_seconds(),
        segments=tuple(_segment(segment) for segment in session.segments),
    )


def model_from_wire(model: inference_pb2.Model) -> Model:
    """Return the model as data."""
    compression = None
    if model.HasField("default_compression"):
        compression = compression_from_wire(model.default_compression)
    return Model(**{**_same_names(Model, model), "default_compression": compression})


def _check_names(options: GenerateOptions) -> None:
    # Python does not check ``**options`` against its TypedDict: a typo would pass in silence.
    unknown = sorted(options.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"generate() got an unexpected option {unknown[0]!r}")


def _sampling(options: Mapping[str, Any]) -> types_pb2.SamplingParams:
    values = {name: options.get(name) for name in _SAMPLING}
    if isinstance(values["stop"], str):
        values["stop"] = [values["stop"]]
    return types_pb2.SamplingParams(**values)


def _segment(segment: session_pb2.Segment) -> Segment:
    values = _same_names(Segment, segment)
    values["compression"] = values["recompression"] = None
    if segment.HasField("compression"):
        values["compression"] = compression_from_wire(segment.compression)
    if segment.HasField("recompression"):
        done = segment.recompression
        values["recompression"] = Recompression(
            **{
                **_same_names(Recompression, done),
                "precision": _choice(types_pb2.Precision, "PRECISION", done.precision),
                "time": done.time.ToDatetime(tzinfo=UTC),
            }
        )
    return Segment(**values)


def _token_logprob(logprob: types_pb2.TokenLogprob) -> TokenLogprob:
    top = tuple(TopLogprob(each.token_id, each.logprob) for each in logprob.top_logprobs)
    return TokenLogprob(logprob.token_id, logprob.logprob, top)


def _message(message: Message | Mapping[str, Any]) -> types_pb2.ChatMessage:
    if isinstance(message, Message):
        return types_pb2.ChatMessage(
            role=message.role,
            content=message.content,
            cache_breakpoint=message.cache_breakpoint,
        )
    return types_pb2.ChatMessage(**message)


def _same_names(kind: type, message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in fields(kind)}


def _number(field: str, choice: str) -> Any:
    """Return the enum value that ``choice`` names in a field of ``Compression``."""
    enum, prefix = _CHOICES[field]
    name = f"{prefix}_{choice.upper()}"
    if name not in set(enum.keys()) or enum.Value(name) == 0:
        names = ", ".join(n.removeprefix(f"{prefix}_").lower() for n in enum.keys()[1:])
        raise ValueError(f"{field} {choice!r} is not one of {names}")
    return enum.Value(name)


def _choice(enum: Any, prefix: str, number: int) -> str | None:
    """Return the name of an enum value as options give it; ``None`` for unset or unknown."""
    if number == 0 or number not in enum.values():
        return None
    name: str = enum.Name(number)
    return name.removeprefix(f"{prefix}_").lower()
