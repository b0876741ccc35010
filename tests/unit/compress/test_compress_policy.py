"""Compression policies on the wire."""

from __future__ import annotations

import pytest

import chunkkv
from chunkserve.v1 import types_pb2
from services.compress.policy import from_wire, to_wire
from services.runtime.errors import InvalidRequestError

DEFAULT = chunkkv.CompressionPolicy(keep_ratio=0.3, scope="layer", chunk_size=20)


@pytest.mark.parametrize(
    "policy",
    [
        DEFAULT,
        chunkkv.CompressionPolicy(max_kept_tokens=7, unit="token", scope="head"),
        chunkkv.CompressionPolicy(keep_ratio=1.0, scope="group", reuse_interval=4, sink_tokens=0),
        chunkkv.CompressionPolicy(keep_ratio=0.1, scope="global", window_size=32),
    ],
)
def test_a_policy_survives_the_wire(policy):
    arrived = from_wire(to_wire(policy), DEFAULT)

    assert arrived.canonical() == policy.canonical()


def test_what_a_message_leaves_unset_is_the_default():
    message = types_pb2.CompressionPolicy(scope=types_pb2.SCOPE_HEAD, sink_tokens=0)

    policy = from_wire(message, chunkkv.CompressionPolicy(max_kept_tokens=9, chunk_size=5))

    assert (policy.scope, policy.sink_tokens) == ("head", 0)
    assert (policy.max_kept_tokens, policy.keep_ratio, policy.chunk_size) == (9, None, 5)


def test_a_budget_of_the_message_replaces_the_other_kind_of_the_default():
    policy = from_wire(types_pb2.CompressionPolicy(max_kept_tokens=9), DEFAULT)

    assert (policy.max_kept_tokens, policy.keep_ratio) == (9, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_ratio", 0.0),
        ("keep_ratio", 1.5),
        ("keep_ratio", float("nan")),
        ("max_kept_tokens", 0),
        ("chunk_size", 0),
        ("window_size", -1),
        ("sink_tokens", -1),
        ("reuse_interval", 0),
        ("scope", 99),
        ("unit", 99),
        ("scorer", 99),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    message = types_pb2.CompressionPolicy(**{field: value})

    with pytest.raises(InvalidRequestError, match=field):
        from_wire(message, DEFAULT)
