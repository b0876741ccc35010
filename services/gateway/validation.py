"""Are the fields of a public request within their ranges?

One function per request message; each raises ``InvalidRequestError`` with the path of the first
field at fault, the value seen, and what to send. Knows the ranges of the ``.proto`` comments, and
not what only a worker can know: vocabulary, context length, a prompt's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from services.runtime.errors import InvalidRequestError

MAX_PAGE_SIZE: Final = 1000
MAX_STOPS: Final = 16
MAX_LOGIT_BIASES: Final = 1024

# Names of ``chunkkv.PRESETS``, which this process cannot import.
PRESETS: Final = (
    "fast",
    "durable",
    "chunkkv",
    "chunkkv_reuse",
    "snapkv",
    "pyramidkv",
    "h2o",
    "streamingllm",
    "kvzip",
    "expected_attention",
    "keydiff",
    "minicache",
)

_UNIFORM: Final = types_pb2.BUDGET_SPREAD_UNIFORM
_SCOPES_WITH_SPREADS: Final = (
    types_pb2.SCOPE_UNSPECIFIED,  # inherited: whoever knows from whom, judges
    types_pb2.SCOPE_HEAD,
    types_pb2.SCOPE_LAYER,
)

# What can be asked of a session that is stored already.
_COMPRESS_AGAIN: Final = {"keep_ratio", "max_kept_tokens", "precision"}

_SESSION_ID: Final = re.compile(r"[a-zA-Z0-9._-]{1,64}")
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]{0,128}")
_MAX_SHOWN: Final = 40


def check_generate(request: inference_pb2.GenerateRequest) -> None:
    """Raise unless every field is in range and there is an input."""
    if request.session_id:
        _check_session_id(request.session_id)
    _check_printable(request.request_id, "request_id")
    _check_printable(request.model, "model")
    _check_input(request)
    _check_sampling(request.sampling)
    _check_compression(request.compression)


def check_count_tokens(request: inference_pb2.CountTokensRequest) -> None:
    """Raise unless the model's name is printable and there is an input."""
    _check_printable(request.model, "model")
    _check_input(request)


def check_create_session(request: session_pb2.CreateSessionRequest, *, max_ttl_s: float) -> None:
    """Raise unless every field is in range; ``session_id`` may be empty."""
    if request.session_id:
        _check_session_id(request.session_id)
    _check_printable(request.model, "model")
    _check_compression(request.compression)
    if request.HasField("ttl"):
        _check_ttl(request.ttl, max_ttl_s)


def check_fork_session(request: session_pb2.ForkSessionRequest, *, max_ttl_s: float) -> None:
    """Raise unless every field is in range; ``new_session_id`` may be empty."""
    _check_session_id(request.session_id)
    if request.new_session_id:
        _check_session_id(request.new_session_id, "new_session_id")
    if request.HasField("ttl"):
        _check_ttl(request.ttl, max_ttl_s)


def check_session_id(session_id: str) -> None:
    """Raise unless it is a session id; an empty one is none."""
    _check_session_id(session_id)


def check_compress_session(request: session_pb2.CompressSessionRequest) -> None:
    """Raise unless it names a session, a budget or a precision in range, and nothing else."""
    _check_session_id(request.session_id)
    _check_compression(request.compression)
    named = {field.name for field, _ in request.compression.ListFields()}
    _require(
        bool(named & _COMPRESS_AGAIN),
        "compression",
        "without a budget and a precision",
        f"at least one of {', '.join(sorted(_COMPRESS_AGAIN))}",
    )
    for name in sorted(named - _COMPRESS_AGAIN):
        _require(
            False,
            f"compression.{name}",
            "set",
            "it to Generate: what is stored was scored already",
        )


def check_list_sessions(request: session_pb2.ListSessionsRequest) -> None:
    """Raise unless the page size is in range; the token is the store's to judge."""
    _require(
        0 <= request.page_size <= MAX_PAGE_SIZE,
        "page_size",
        request.page_size,
        f"1 to {MAX_PAGE_SIZE}, or 0 for the default",
    )


def seconds(duration: Duration) -> float:
    """Return a duration in seconds, however oddly it is split."""
    return duration.seconds + duration.nanos / 1e9


def _check_ttl(ttl: Duration, max_ttl_s: float) -> None:
    ttl_s = seconds(ttl)
    _require(1 <= ttl_s <= max_ttl_s, "ttl", f"{ttl_s:g} s", f"1 to {max_ttl_s:g} s")


def _check_session_id(session_id: str, field: str = "session_id") -> None:
    _require(
        _SESSION_ID.fullmatch(session_id) is not None,
        field,
        _shown(session_id),
        "1 to 64 characters of a-z A-Z 0-9 . _ -",
    )


def _check_printable(text: str, field: str) -> None:
    _require(
        _PRINTABLE.fullmatch(text) is not None,
        field,
        _shown(text),
        "at most 128 printable ASCII characters",
    )


def _check_input(
    request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest,
) -> None:
    match request.WhichOneof("input"):
        case "chat":
            _check_messages(request.chat.messages)
        case "text":
            _require(request.text != "", "text", "empty", "at least one character")
        case "token_ids":
            ids = request.token_ids.ids
            _require(len(ids) > 0, "token_ids.ids", "empty", "at least one token id")
            _check_token_ids(ids, "token_ids.ids")
        case _:
            _require(False, "input", "not set", "one of chat, text and token_ids")


def _check_messages(messages: Sequence[types_pb2.ChatMessage]) -> None:
    _require(len(messages) > 0, "chat.messages", "empty", "at least one message")
    for i, message in enumerate(messages):
        path = f"chat.messages[{i}]"
        roles = "system, user or assistant"
        _require(message.role != "", f"{path}.role", "empty", roles)
        _require(message.content != "", f"{path}.content", "empty", "at least one character")


def _check_token_ids(ids: Sequence[int], path: str) -> None:
    for i, token_id in enumerate(ids):
        _require(token_id >= 0, f"{path}[{i}]", token_id, "0 or more")


def _check_sampling(sampling: types_pb2.SamplingParams) -> None:
    def check(field: str, is_valid: Callable[[float], bool], send: str) -> None:
        if sampling.HasField(field):
            value = getattr(sampling, field)
            _require(is_valid(value), f"sampling.{field}", f"{value:g}", send)

    # NaN fails every comparison, so it is refused as well.
    check("max_tokens", lambda value: value >= 1, "1 or more")
    check("min_tokens", lambda value: value >= 0, "0 or more")
    check("temperature", lambda value: 0 <= value <= 2, "0 (greedy) to 2")
    check("top_p", lambda value: 0 < value <= 1, "a number above 0, at most 1")
    check("top_k", lambda value: value >= 1, "1 or more")
    check("min_p", lambda value: 0 <= value <= 1, "0 to 1")
    check("repetition_penalty", lambda value: 0.1 <= value <= 10, "0.1 to 10")
    check("presence_penalty", lambda value: -2 <= value <= 2, "-2 to 2")
    check("frequency_penalty", lambda value: -2 <= value <= 2, "-2 to 2")
    check("logprobs", lambda value: 0 <= value <= 20, "0 to 20")
    if sampling.HasField("max_tokens"):
        at_most = f"at most sampling.max_tokens, {sampling.max_tokens}"
        is_valid = sampling.min_tokens <= sampling.max_tokens
        _require(is_valid, "sampling.min_tokens", sampling.min_tokens, at_most)

    num_stops = len(sampling.stop)
    _require(
        num_stops <= MAX_STOPS, "sampling.stop", f"{num_stops} strings", f"at most {MAX_STOPS}"
    )
    for i, stop in enumerate(sampling.stop):
        _require(stop != "", f"sampling.stop[{i}]", "empty", "at least one character")
    _check_token_ids(sampling.stop_token_ids, "sampling.stop_token_ids")
    _check_logit_bias(sampling.logit_bias)


def _check_logit_bias(logit_bias: Mapping[int, float]) -> None:
    path, num_entries = "sampling.logit_bias", len(logit_bias)
    is_valid = num_entries <= MAX_LOGIT_BIASES
    _require(is_valid, path, f"{num_entries} entries", f"at most {MAX_LOGIT_BIASES}")
    for token_id, bias in sorted(logit_bias.items()):
        key = f"{path}[{token_id}]"
        _require(token_id >= 0, key, "for a negative token id", "ids of 0 or more")
        _require(-100 <= bias <= 100, key, f"{bias:g}", "-100 to 100")


def _check_compression(policy: types_pb2.CompressionPolicy) -> None:
    def check(field: str, is_valid: Callable[[float], bool], send: str) -> None:
        if policy.HasField(field):
            value = getattr(policy, field)
            _require(is_valid(value), f"compression.{field}", f"{value:g}", send)

    check("keep_ratio", lambda value: 0 < value <= 1, "a number above 0, at most 1 (keep all)")
    check("max_kept_tokens", lambda value: value >= 1, "1 or more")
    check("chunk_size", lambda value: value >= 1, "1 or more")
    check("window_size", lambda value: value >= 1, "1 or more")
    check("sink_tokens", lambda value: value >= 0, "0 or more")
    check("reuse_interval", lambda value: value >= 1, "1 or more")
    check("max_kv_tokens", lambda value: value >= 1, "1 or more")
    check("vote_power", lambda value: 1 <= value <= 8, "1 to 8")
    check("pool_size", lambda value: value >= 1 and value % 2 == 1, "an odd number of at least 1")
    check("head_floor", lambda value: 0 <= value <= 1, "a number from 0 to 1")
    check("gating", lambda value: 0 <= value <= 1, "a number from 0 to 1")
    _check_enum(policy.scorer, types_pb2.Scorer, "compression.scorer")
    _check_enum(policy.prefix_scorer, types_pb2.Scorer, "compression.prefix_scorer")
    _check_enum(policy.unit, types_pb2.Unit, "compression.unit")
    _check_enum(policy.scope, types_pb2.Scope, "compression.scope")
    _check_enum(policy.spread, types_pb2.BudgetSpread, "compression.spread")
    _check_enum(policy.precision, types_pb2.Precision, "compression.precision")
    _check_spread(policy)
    for field in ("preset", "prefix_preset"):
        if policy.HasField(field):
            name = getattr(policy, field)
            _require(name in PRESETS, f"compression.{field}", _shown(name), _one_of(PRESETS))


def _check_spread(policy: types_pb2.CompressionPolicy) -> None:
    if policy.spread in (_UNIFORM, types_pb2.BUDGET_SPREAD_UNSPECIFIED):
        return
    _require(
        policy.scope in _SCOPES_WITH_SPREADS,
        "compression.spread",
        f"{types_pb2.BudgetSpread.Name(policy.spread)} and scope "
        f"{types_pb2.Scope.Name(policy.scope)}",
        "it with SCOPE_HEAD or SCOPE_LAYER",
    )


def _check_enum(value: int, enum: EnumTypeWrapper, path: str) -> None:
    _require(value in enum.values(), path, value, _one_of(enum.keys()))


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"


def _require(is_valid: bool, path: str, seen: object, send: str) -> None:
    if not is_valid:
        raise InvalidRequestError(f"{path} is {seen}; send {send}", field=path)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")
