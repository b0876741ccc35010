"""Compression policies: from the wire to the library and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import chunkkv
from chunkserve.v1 import types_pb2
from services.compress.segments import library_errors

_SCORERS: Final[dict[int, str]] = {
    types_pb2.SCORER_WINDOW: "window",
    types_pb2.SCORER_RECONSTRUCTION: "reconstruction",
    types_pb2.SCORER_KEY_DIFF: "key_diff",
}
_UNITS: Final[dict[int, str]] = {types_pb2.UNIT_CHUNK: "chunk", types_pb2.UNIT_TOKEN: "token"}
_SCOPES: Final[dict[int, str]] = {
    types_pb2.SCOPE_HEAD: "head",
    types_pb2.SCOPE_LAYER: "layer",
    types_pb2.SCOPE_GROUP: "group",
    types_pb2.SCOPE_GLOBAL: "global",
}
PRECISIONS: Final[dict[types_pb2.Precision, chunkkv.Precision]] = {
    types_pb2.PRECISION_NATIVE: "native",
    types_pb2.PRECISION_FP8: "fp8",
    types_pb2.PRECISION_INT8: "int8",
    types_pb2.PRECISION_INT4: "int4",
}
_ENUMS: Final[dict[str, Mapping[Any, str]]] = {
    "scorer": _SCORERS,
    "unit": _UNITS,
    "scope": _SCOPES,
    "precision": PRECISIONS,
}
_INTEGERS: Final = ("chunk_size", "window_size", "sink_tokens", "reuse_interval")


def from_wire(
    message: types_pb2.CompressionPolicy, default: chunkkv.CompressionPolicy
) -> chunkkv.CompressionPolicy:
    """Return the policy that a message asks for; what it leaves unset is the default's.

    Raises:
        InvalidRequestError: A value is out of range.
    """
    values = {name: getattr(default, name) for name in (*_ENUMS, *_INTEGERS)}
    values |= {name: getattr(message, name) for name in _INTEGERS if message.HasField(name)}
    values |= {
        name: names.get(getattr(message, name), f"number {getattr(message, name)}")
        for name, names in _ENUMS.items()
        if getattr(message, name)
    }
    budget = message.WhichOneof("budget")
    with library_errors():
        if budget is None:
            return chunkkv.CompressionPolicy(
                keep_ratio=None if default.max_kept_tokens is not None else default.keep_ratio,
                max_kept_tokens=default.max_kept_tokens,
                **values,
            )
        return chunkkv.CompressionPolicy(**{budget: getattr(message, budget)}, **values)


def prefix_policy(
    policy: chunkkv.CompressionPolicy, *messages: types_pb2.CompressionPolicy, default: str
) -> chunkkv.CompressionPolicy:
    """Return the policy of a prefix that ends with a ``cache_breakpoint``.

    Args:
        policy: What applies to the prompt.
        messages: The first one that sets ``prefix_scorer`` names the prefix's scorer.
        default: Scorer if none does.

    Raises:
        InvalidRequestError: There is no such scorer.
    """
    named = next((m.prefix_scorer for m in messages if m.prefix_scorer), None)
    scorer = named or _number(_SCORERS, default)
    return from_wire(types_pb2.CompressionPolicy(scorer=scorer), policy)


def to_wire(
    policy: chunkkv.CompressionPolicy,
    *,
    max_kv_tokens: int | None = None,
    prefix_scorer: str | None = None,
) -> types_pb2.CompressionPolicy:
    """Return a message with every field of the policy set.

    Args:
        policy: What is kept of a prompt.
        max_kv_tokens: Bound of the KV while an answer is generated, if there is one.
        prefix_scorer: Scorer of prefixes, where it matters.
    """
    message = types_pb2.CompressionPolicy(max_kv_tokens=max_kv_tokens)
    for name in _INTEGERS:
        setattr(message, name, getattr(policy, name))
    for name, names in _ENUMS.items():
        setattr(message, name, _number(names, getattr(policy, name)))
    if prefix_scorer is not None:
        message.prefix_scorer = _number(_SCORERS, prefix_scorer)
    if policy.max_kept_tokens is not None:
        message.max_kept_tokens = policy.max_kept_tokens
    elif policy.keep_ratio is not None:
        message.keep_ratio = policy.keep_ratio
    return message


def _number(names: Mapping[Any, str], value: str) -> Any:
    return next(number for number, name in names.items() if name == value)
