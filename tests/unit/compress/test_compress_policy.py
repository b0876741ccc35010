"""Compression policies, from the wire and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkkv import CompressionPolicy
from chunkserve.v1 import types_pb2
from services.compress.policy import from_wire, prefix_policy, to_wire
from services.runtime.errors import InvalidRequestError

DEFAULT = CompressionPolicy(
    keep_ratio=0.25, scope="head", chunk_size=7, window_size=9, sink_tokens=3, reuse_interval=5
)
INT32_MAX = 2**31 - 1


def message(**fields: Any) -> types_pb2.CompressionPolicy:
    return types_pb2.CompressionPolicy(**fields)


policies = st.builds(
    lambda budget, **choices: CompressionPolicy(**budget, **choices),
    budget=st.one_of(
        st.builds(lambda n: {"keep_ratio": n / 1000}, st.integers(1, 1000)),
        st.builds(lambda n: {"max_kept_tokens": n}, st.integers(1, INT32_MAX)),
    ),
    scorer=st.sampled_from(["window", "reconstruction", "key_diff"]),
    unit=st.sampled_from(["chunk", "token"]),
    scope=st.sampled_from(["head", "layer", "group", "global"]),
    precision=st.sampled_from(["native", "fp8", "int8", "int4"]),
    chunk_size=st.integers(1, INT32_MAX),
    window_size=st.integers(1, INT32_MAX),
    sink_tokens=st.integers(0, INT32_MAX),
    reuse_interval=st.integers(1, INT32_MAX),
)


@given(policy=policies)
def test_policy_comes_back_as_it_was(policy: CompressionPolicy):
    sent = types_pb2.CompressionPolicy.FromString(to_wire(policy).SerializeToString())

    found = from_wire(sent, DEFAULT)

    assert found.canonical() == policy.canonical()
    assert to_wire(found) == sent


def test_every_field_is_written():
    written = {field.name for field, _ in to_wire(DEFAULT, prefix_scorer="window").ListFields()}

    known = {field.name for field in types_pb2.CompressionPolicy.DESCRIPTOR.fields}
    assert written == known - {"max_kept_tokens", "max_kv_tokens"}
    assert to_wire(DEFAULT, max_kv_tokens=900).max_kv_tokens == 900


@pytest.mark.parametrize("default", [DEFAULT, CompressionPolicy(max_kept_tokens=99)])
def test_unset_fields_are_the_defaults(default: CompressionPolicy):
    assert from_wire(message(), default) == default


def test_set_fields_are_the_messages():
    found = from_wire(
        message(
            max_kept_tokens=50,
            scorer=types_pb2.SCORER_WINDOW,
            unit=types_pb2.UNIT_TOKEN,
            scope=types_pb2.SCOPE_GROUP,
            chunk_size=11,
            window_size=12,
            sink_tokens=0,
            reuse_interval=4,
        ),
        DEFAULT,
    )

    assert found == CompressionPolicy(
        max_kept_tokens=50,
        unit="token",
        scope="group",
        chunk_size=11,
        window_size=12,
        sink_tokens=0,
        reuse_interval=4,
    )


def test_one_budget_replaces_the_defaults_other():
    by_tokens = CompressionPolicy(max_kept_tokens=99)

    assert from_wire(message(keep_ratio=0.5), by_tokens).max_kept_tokens is None
    assert from_wire(message(max_kept_tokens=5), DEFAULT).keep_ratio is None


@pytest.mark.parametrize("percent", [10, 30, 80])
def test_ratio_of_the_wire_gives_the_exact_budget(percent: int):
    sent = types_pb2.CompressionPolicy.FromString(
        message(keep_ratio=percent / 100).SerializeToString()
    )

    assert from_wire(sent, DEFAULT).budget(1000) == percent * 10


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": -0.5}, "keep_ratio is -0.5"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"keep_ratio": math.nan}, "keep_ratio is nan"),
        ({"keep_ratio": math.inf}, "keep_ratio is inf"),
        ({"max_kept_tokens": 0}, "max_kept_tokens is 0"),
        ({"max_kept_tokens": -1}, "max_kept_tokens is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"window_size": 0}, "window_size is 0"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"reuse_interval": 0}, "reuse_interval is 0"),
        ({"scorer": 99}, "scorer is 'number 99'; give one of window, reconstruction, key_diff"),
        ({"unit": 99}, "unit is 'number 99'; give one of chunk, token"),
        ({"scope": 99}, "scope is 'number 99'; give one of head, layer, group, global"),
    ],
)
def test_value_out_of_range_is_the_callers_fault(fields: dict[str, Any], text: str):
    with pytest.raises(InvalidRequestError) as caught:
        from_wire(message(**fields), DEFAULT)

    assert text in caught.value.message


def test_a_prefix_has_the_first_scorer_that_is_named_and_else_the_same_policy():
    unset, window = message(), message(prefix_scorer=types_pb2.SCORER_WINDOW)

    assert prefix_policy(DEFAULT, unset, window, default="window") == DEFAULT
    assert prefix_policy(DEFAULT, unset, unset, default="window") == DEFAULT


def test_a_prefix_scorer_that_does_not_exist_is_the_callers_fault():
    asked = message(prefix_scorer=types_pb2.Scorer.ValueType(99))

    with pytest.raises(InvalidRequestError, match="scorer is 'number 99'; give one of window"):
        prefix_policy(DEFAULT, asked, default="window")
