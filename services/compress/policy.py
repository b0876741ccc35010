"""Compression policies: from the wire to the library and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import chunkkv
from chunkserve.v1 import types_pb2
from services.compress.segments import library_errors

PRECISIONS: Final[dict[types_pb2.Precision, chunkkv.Precision]] = {
    types_pb2.PRECISION_NATIVE: "native",
    types_pb2.PRECISION_FP8: "fp8",
    types_pb2.PRECISION_INT8: "int8",
    types_pb2.PRECISION_INT4: "int4",
}
_ENUMS: Final[dict[str, Mapping[Any, str]]] = {
    "scorer": {
        types_pb2.SCORER_WINDOW: "window",
        types_pb2.SCORER_RECONSTRUCTION: "reconstruction",
        types_pb2.SCORER_KEY_DIFF: "key_diff",
        types_pb2.SCORER_HEAVY_HITTER: "heavy_hitter",
        types_pb2.SCORER_RECENCY: "recency",
        types_pb2.SCORER_EXPECTED_ATTENTION: "expected_attention",
        types_pb2.SCORER_KEY_NORM: "key_norm",
        types_pb2.SCORER_RECALL: "recall",
    },
    "unit": {
        types_pb2.UNIT_CHUNK: "chunk",
        types_pb2.UNIT_TOKEN: "token",
        types_pb2.UNIT_SENTENCE: "sentence",
    },
    "scope": {
        types_pb2.SCOPE_HEAD: "head",
        types_pb2.SCOPE_LAYER: "layer",
        types_pb2.SCOPE_GROUP: "group",
        types_pb2.SCOPE_GLOBAL: "global",
    },
    "spread": {
        types_pb2.BUDGET_SPREAD_UNIFORM: "uniform",
        types_pb2.BUDGET_SPREAD_PYRAMID: "pyramid",
        types_pb2.BUDGET_SPREAD_ADAPTIVE: "adaptive",
    },
    "precision": PRECISIONS,
}
_BUDGETS: Final = ("keep_ratio", "max_kept_tokens")
_FIELDS: Final = tuple(field.name for field in dataclasses.fields(chunkkv.CompressionPolicy))
# What a preset replaces: how tokens are chosen, and not how many or how they are stored.
_METHOD: Final = tuple(name for name in _FIELDS if name not in (*_BUDGETS, "precision"))
_UNIFORM_SCOPES: Final = (types_pb2.SCOPE_GROUP, types_pb2.SCOPE_GLOBAL)


def overlaid(
    below: types_pb2.CompressionPolicy, above: types_pb2.CompressionPolicy
) -> types_pb2.CompressionPolicy:
    """Return a message of the fields that ``above`` sets, and of ``below``'s where it sets none.

    A preset takes the place of all that ``below`` says of how tokens are chosen.
    """
    merged = types_pb2.CompressionPolicy()
    merged.CopyFrom(below)
    if above.HasField("preset"):
        for name in _METHOD:
            merged.ClearField(name)
    merged.MergeFrom(_agreeing(above))
    return merged


def for_prefixes(message: types_pb2.CompressionPolicy) -> types_pb2.CompressionPolicy:
    """Return what a message asks for of prefixes that end with a ``cache_breakpoint``.

    All that it asks for of a prompt, but scorer and preset: prefixes have their own.
    """
    prefix = types_pb2.CompressionPolicy()
    prefix.CopyFrom(_agreeing(message))
    for name in ("scorer", "preset", "prefix_scorer", "prefix_preset"):
        prefix.ClearField(name)
    prefix.scorer = message.prefix_scorer
    if message.HasField("prefix_preset"):
        prefix.preset = message.prefix_preset
    return prefix


def from_wire(
    message: types_pb2.CompressionPolicy,
    default: chunkkv.CompressionPolicy | None = None,
    *,
    num_tokens: int | None = None,
) -> chunkkv.CompressionPolicy:
    """Return the policy that a message asks for.

    Args:
        message: Its preset, if it names one, with the fields that it sets.
        default: Values of what it leaves unset; the library's own if ``None``.
        num_tokens: Tokens of the text, if known, at least 1: some presets keep a share of them.

    Raises:
        InvalidRequestError: A value is out of range.
    """
    default = chunkkv.CompressionPolicy() if default is None else default
    asked = _asked(_agreeing(message))
    budget: dict[str, Any] = {name: asked.pop(name) for name in _BUDGETS if name in asked}
    if not budget:
        budget = {name: getattr(default, name) for name in _BUDGETS}
    with library_errors():
        if message.HasField("preset"):
            asked.setdefault("precision", default.precision)
            return chunkkv.preset(message.preset, num_tokens=num_tokens, **budget, **asked)
        for name in (*_METHOD, "precision"):
            asked.setdefault(name, getattr(default, name))
        return chunkkv.CompressionPolicy(**budget, **asked)


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
    message = message_of({name: getattr(policy, name) for name in _FIELDS})
    message.MergeFrom(types_pb2.CompressionPolicy(max_kv_tokens=max_kv_tokens))
    if prefix_scorer is not None:
        message.prefix_scorer = _number(_ENUMS["scorer"], prefix_scorer)
    return message


def of_answer(policy: chunkkv.CompressionPolicy, num_kept: int) -> chunkkv.CompressionPolicy:
    """Return the policy by which an answer whose KV is bounded keeps so many tokens.

    Answers are stored native, every layer by itself.
    """
    return dataclasses.replace(
        policy,
        keep_ratio=None,
        max_kept_tokens=num_kept,
        # The sink is the beginning of the conversation, not that of an answer.
        sink_tokens=0,
        # The tail has one length in all layers and heads, and nobody knows its sentences.
        spread="uniform",
        unit="token" if policy.unit == "token" else "chunk",
        # Latest tokens ask, whatever the scorer; what they pay is not averaged over neighbours.
        vote_power=policy.vote_power if policy.scorer == "window" else 1,
        pool_size=1,
        merge_layers=False,
        precision="native",
    )


def message_of(fields: Mapping[str, Any]) -> types_pb2.CompressionPolicy:
    """Return a message that sets some fields of the library's policy; ``None`` leaves one unset."""
    message = types_pb2.CompressionPolicy()
    for name, value in fields.items():
        if value is not None:
            setattr(message, name, _number(_ENUMS[name], value) if name in _ENUMS else value)
    return message


def _asked(message: types_pb2.CompressionPolicy) -> dict[str, Any]:
    """Return the fields of the library's policy that a message sets."""
    asked: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(message, name)
        if name in _ENUMS:
            if value:
                asked[name] = _ENUMS[name].get(value, f"number {value}")
        elif message.HasField(name):
            asked[name] = value
    return asked


def _agreeing(message: types_pb2.CompressionPolicy) -> types_pb2.CompressionPolicy:
    """Return a message whose scope gives up whatever spread it would inherit and cannot have."""
    if message.scope not in _UNIFORM_SCOPES or message.spread:
        return message
    agreeing = types_pb2.CompressionPolicy(spread=types_pb2.BUDGET_SPREAD_UNIFORM)
    agreeing.MergeFrom(message)
    return agreeing


def _number(names: Mapping[Any, str], value: str) -> Any:
    return next(number for number, name in names.items() if name == value)
