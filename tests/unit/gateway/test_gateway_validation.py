"""Ranges of the public fields."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

import chunkkv
from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from services.gateway import validation
from services.runtime.errors import InvalidRequestError

Fields = list[tuple[str, Iterable[Any], Iterable[Any]]]

SAMPLING_FIELDS: Fields = [
    # field, values in range, values out of range
    ("max_tokens", [1, 2**31 - 1], [0, -3]),
    ("min_tokens", [0, 5], [-1]),
    ("temperature", [0, 0.7, 2], [-0.1, 2.1, math.nan, math.inf, -math.inf]),
    ("top_p", [0.01, 1], [0, -1, 1.1, math.nan, math.inf]),
    ("top_k", [1, 50], [0, -1]),
    ("min_p", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    ("seed", [0, -1, 2**63 - 1], []),
    ("ignore_eos", [True, False], []),
    ("repetition_penalty", [0.1, 1, 1.2, 10], [0, -1, 10.5, math.nan, math.inf]),
    ("presence_penalty", [-2, 0, 2], [-2.5, 2.5, math.nan]),
    ("frequency_penalty", [-2, 0, 2], [-2.5, 2.5, math.nan]),
    ("logprobs", [0, 20], [-1, 21]),
]
POLICY_FIELDS: Fields = [
    ("keep_ratio", [0.001, 0.1, 1], [0, -0.5, 1.5, math.nan, math.inf]),
    ("max_kept_tokens", [1, 10_000], [0, -1]),
    ("chunk_size", [1, 20], [0, -1]),
    ("window_size", [1, 32], [0, -1]),
    ("sink_tokens", [0, 4], [-1]),
    ("reuse_interval", [1, 4], [0, -1]),
    ("scorer", range(9), [9, 99, -1]),
    ("prefix_scorer", range(9), [9, -1]),
    ("precision", [0, 1, 2, 3, 4], [5, -1]),
    ("unit", [0, 1, 2, 3], [4, -1]),
    ("scope", [0, 1, 2, 3, 4], [5, -1]),
    ("spread", [0, 1, 2, 3], [4, -1]),
    ("max_kv_tokens", [1, 10_000], [0, -1]),
    ("vote_power", [1, 8], [0, 9, -1]),
    ("pool_size", [1, 7], [0, 2, -1]),
    ("head_floor", [0, 0.5, 1], [-0.5, 1.5, math.nan, math.inf]),
    ("gating", [0, 0.5, 1], [-0.5, 1.5, math.nan]),
    ("merge_layers", [False, True], []),
    ("preset", chunkkv.PRESETS, ["", "slow", "x" * 100]),
    ("prefix_preset", chunkkv.PRESETS, ["", "slow"]),
]


def flatten(fields: Fields, index: int) -> list[tuple[str, Any]]:
    return [(field[0], value) for field in fields for value in field[index]]


def generate(**fields: Any) -> inference_pb2.GenerateRequest:
    if not {"chat", "text", "token_ids"} & fields.keys():
        fields["text"] = "Hello"
    return inference_pb2.GenerateRequest(**fields)


def refused(request: inference_pb2.GenerateRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        validation.check_generate(request)
    assert caught.value.message.startswith(f"{caught.value.field} is ")
    return caught.value


@pytest.mark.parametrize(("field", "value"), flatten(SAMPLING_FIELDS, 1))
def test_sampling_in_range_is_accepted(field: str, value: Any) -> None:
    validation.check_generate(generate(sampling=types_pb2.SamplingParams(**{field: value})))


@pytest.mark.parametrize(("field", "value"), flatten(SAMPLING_FIELDS, 2))
def test_sampling_out_of_range_is_refused(field: str, value: Any) -> None:
    error = refused(generate(sampling=types_pb2.SamplingParams(**{field: value})))

    assert error.field == f"sampling.{field}"
    assert f"is {value:g}; send " in error.message


@pytest.mark.parametrize(("field", "value"), flatten(POLICY_FIELDS, 1))
def test_a_policy_in_range_is_accepted(field: str, value: Any) -> None:
    policy = types_pb2.CompressionPolicy(**{field: value})

    validation.check_generate(generate(compression=policy))
    validation.check_create_session(
        session_pb2.CreateSessionRequest(compression=policy), max_ttl_s=60
    )


@pytest.mark.parametrize(("field", "value"), flatten(POLICY_FIELDS, 2))
def test_a_policy_out_of_range_is_refused(field: str, value: Any) -> None:
    error = refused(generate(compression=types_pb2.CompressionPolicy(**{field: value})))

    assert error.field == f"compression.{field}"
    shown = f"{value:g}" if isinstance(value, int | float) else repr(value[:40])[:-1]
    assert error.message.startswith(f"compression.{field} is {shown}")
    assert "; send " in error.message


def test_every_field_of_a_policy_is_tried() -> None:
    tried = {field for field, _, _ in POLICY_FIELDS}

    assert tried == set(types_pb2.CompressionPolicy.DESCRIPTOR.fields_by_name)


def test_presets_are_the_librarys() -> None:
    assert tuple(chunkkv.PRESETS) == validation.PRESETS
    error = refused(generate(compression=types_pb2.CompressionPolicy(preset="slow")))
    assert error.message == (
        f"compression.preset is 'slow'; send one of {', '.join(chunkkv.PRESETS)}"
    )


@pytest.mark.parametrize("spread", [2, 3])
@pytest.mark.parametrize(
    ("scope", "is_valid"), [(0, True), (1, True), (2, True), (3, False), (4, False)]
)
def test_a_spread_needs_lists_of_layers_or_heads(spread: int, scope: int, is_valid: bool) -> None:
    request = generate(compression=types_pb2.CompressionPolicy(spread=spread, scope=scope))

    if is_valid:
        validation.check_generate(request)
    else:
        error = refused(request)
        assert error.field == "compression.spread"
        assert error.message.endswith("; send it with SCOPE_HEAD or SCOPE_LAYER")


@pytest.mark.parametrize(
    ("sampling", "path"),
    [
        ({"stop": ["x"] * 17}, "sampling.stop"),
        ({"stop": ["x", ""]}, "sampling.stop[1]"),
        ({"stop_token_ids": [3, -1]}, "sampling.stop_token_ids[1]"),
        ({"max_tokens": 3, "min_tokens": 4}, "sampling.min_tokens"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "sampling.logit_bias"),
        ({"logit_bias": {5: 1, -1: 1}}, "sampling.logit_bias[-1]"),
        ({"logit_bias": {5: 1, 6: 100.5}}, "sampling.logit_bias[6]"),
        ({"logit_bias": {5: math.nan}}, "sampling.logit_bias[5]"),
    ],
    ids=[
        "many_stops",
        "empty_stop",
        "stop_token",
        "min_over_max",
        "many_biases",
        "bias_token",
        "bias",
        "bias_nan",
    ],
)
def test_lists_and_pairs_of_sampling_are_checked(sampling: dict[str, Any], path: str) -> None:
    assert refused(generate(sampling=types_pb2.SamplingParams(**sampling))).field == path


def test_lists_that_are_full_and_equal_bounds_are_accepted() -> None:
    sampling = types_pb2.SamplingParams(
        stop=["x"] * 16,
        max_tokens=3,
        min_tokens=3,
        logit_bias={i: 100 - 200 * (i % 2) for i in range(1024)},
    )

    validation.check_generate(generate(sampling=sampling))


def messages(*pairs: tuple[str, str]) -> types_pb2.ChatInput:
    return types_pb2.ChatInput(
        messages=[types_pb2.ChatMessage(role=role, content=content) for role, content in pairs]
    )


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"text": ""}, "text"),
        ({"chat": messages()}, "chat.messages"),
        ({"chat": messages(("user", "a"), ("", "b"))}, "chat.messages[1].role"),
        ({"chat": messages(("user", ""))}, "chat.messages[0].content"),
        ({"token_ids": types_pb2.TokenIds()}, "token_ids.ids"),
        ({"token_ids": types_pb2.TokenIds(ids=[1, -2])}, "token_ids.ids[1]"),
    ],
    ids=["text", "no_messages", "no_role", "no_content", "no_ids", "negative_id"],
)
def test_an_empty_input_is_refused(fields: dict[str, Any], path: str) -> None:
    assert refused(generate(**fields)).field == path
    with pytest.raises(InvalidRequestError):
        validation.check_count_tokens(inference_pb2.CountTokensRequest(**fields))


def test_a_request_without_input_is_refused() -> None:
    assert refused(inference_pb2.GenerateRequest()).field == "input"


@pytest.mark.parametrize("session_id", ["a", "A.b_c-9", "x" * 64])
def test_a_session_id_of_the_pattern_is_accepted(session_id: str) -> None:
    validation.check_session_id(session_id)
    validation.check_generate(generate(session_id=session_id))


@pytest.mark.parametrize("session_id", ["x" * 65, "a b", "a/b", "ä", "a\n"])
def test_another_session_id_is_refused(session_id: str) -> None:
    error = refused(generate(session_id=session_id))

    assert error.field == "session_id"
    assert "\n" not in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("field", ["request_id", "model"])
@pytest.mark.parametrize("value", ["x" * 129, "tab\t", "ä"])
def test_names_that_are_not_printable_are_refused(field: str, value: str) -> None:
    assert refused(generate(**{field: value})).field == field


def test_an_empty_session_id_names_no_session() -> None:
    with pytest.raises(InvalidRequestError):
        validation.check_session_id("")


@pytest.mark.parametrize(
    ("ttl", "is_valid"),
    [
        (Duration(seconds=1), True),
        (Duration(seconds=60), True),
        (Duration(seconds=60, nanos=1), False),
        (Duration(nanos=999_999_999), False),
        (Duration(seconds=-5), False),
        (Duration(), False),
    ],
)
def test_a_ttl_is_between_a_second_and_the_cap(ttl: Duration, is_valid: bool) -> None:
    request = session_pb2.CreateSessionRequest(ttl=ttl)

    if is_valid:
        validation.check_create_session(request, max_ttl_s=60)
    else:
        with pytest.raises(InvalidRequestError, match="send 1 to 60 s") as caught:
            validation.check_create_session(request, max_ttl_s=60)
        assert caught.value.field == "ttl"


@pytest.mark.parametrize(("page_size", "is_valid"), [(0, True), (1000, True), (1001, False)])
def test_a_page_holds_up_to_a_thousand(page_size: int, is_valid: bool) -> None:
    request = session_pb2.ListSessionsRequest(page_size=page_size)

    if is_valid:
        validation.check_list_sessions(request)
    else:
        with pytest.raises(InvalidRequestError, match="page_size is 1001; send 1 to 1000"):
            validation.check_list_sessions(request)
