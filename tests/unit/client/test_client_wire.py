"""Public types to messages and back."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from chunkkv.policy import Precision, Scope, Scorer, Spread, Unit
from chunkserve.v1 import inference_pb2, session_pb2, types_pb2
from chunkserve_client import (
    Compression,
    CompressionResult,
    Finish,
    GenerateOptions,
    InvalidRequest,
    Message,
    Model,
    PromptInfo,
    Recompression,
    Segment,
    SessionInfo,
    TokenCount,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
    _wire,
)


@pytest.mark.parametrize(
    ("kind", "message", "renamed"),
    [
        (PromptInfo, inference_pb2.PromptInfo, {}),
        (TokenDelta, types_pb2.TokenDelta, {}),
        (TokenLogprob, types_pb2.TokenLogprob, {}),
        (TopLogprob, types_pb2.TopLogprob, {}),
        (Finish, types_pb2.Finish, {}),
        (Segment, session_pb2.Segment, {}),
        (Recompression, session_pb2.Recompression, {}),
        (CompressionResult, session_pb2.CompressSessionResponse, {"session": "info"}),
        (SessionInfo, session_pb2.Session, {"ttl": "ttl_s"}),
        (Compression, types_pb2.CompressionPolicy, {}),
        (Model, inference_pb2.Model, {}),
        (TokenCount, inference_pb2.CountTokensResponse, {}),
        (Message, types_pb2.ChatMessage, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_public_type_has_every_field_of_its_message(kind, message, renamed):
    wire = [renamed.get(name, name) for name in message.DESCRIPTOR.fields_by_name]

    assert sorted(field.name for field in fields(kind)) == sorted(wire)


def test_every_sampling_parameter_is_an_option():
    assert set(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name) <= set(
        GenerateOptions.__annotations__
    )


def build(prompt=None, **options):
    return _wire.generate_request(prompt, "s-1", "r-1", options)


def test_prompt_is_a_message_of_the_user():
    request = build("hi", max_tokens=3, seed=0, stop="END", model="tiny")

    assert request == inference_pb2.GenerateRequest(
        session_id="s-1",
        request_id="r-1",
        model="tiny",
        chat=types_pb2.ChatInput(messages=[types_pb2.ChatMessage(role="user", content="hi")]),
        sampling=types_pb2.SamplingParams(max_tokens=3, seed=0, stop=["END"]),
    )


def test_penalties_bias_and_logprobs_are_sent():
    options = {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.0,
        "frequency_penalty": -0.5,
        "logit_bias": {7: -100, 8: 2.5},
        "logprobs": 0,
    }

    request = build("hi", **options)

    assert request.sampling == types_pb2.SamplingParams(**options)
    assert request.sampling.HasField("presence_penalty")
    assert request.sampling.HasField("logprobs")


def test_logprobs_of_a_delta_are_read():
    top = types_pb2.TopLogprob(token_id=9, logprob=-0.25)
    logprob = types_pb2.TokenLogprob(token_id=5, logprob=-1.5, top_logprobs=[top])
    delta = types_pb2.TokenDelta(text="a", token_ids=[5], logprobs=[logprob])

    event = _wire.event_from_wire(inference_pb2.GenerateResponse(delta=delta))

    assert event == TokenDelta("a", (5,), 0, (TokenLogprob(5, -1.5, (TopLogprob(9, -0.25),)),))


def test_messages_may_be_mappings():
    request = build(messages=[Message("system", "be brief"), {"role": "user", "content": "hi"}])

    assert [(m.role, m.content) for m in request.chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"messages": []}, "chat"),
        ({"text": ""}, "text"),
        ({"token_ids": []}, "token_ids"),
    ],
    ids=["messages", "text", "token_ids"],
)
def test_empty_input_is_sent_for_the_server_to_refuse(options, kind):
    assert build(**options).WhichOneof("input") == kind


def test_what_is_not_given_is_not_sent():
    request = build("hi")

    assert not request.HasField("compression")
    assert request.sampling == types_pb2.SamplingParams()


@pytest.mark.parametrize("inputs", [{}, {"text": "a", "token_ids": [1]}], ids=["none", "two"])
def test_anything_but_one_input_is_a_type_error(inputs):
    with pytest.raises(TypeError, match="exactly one of prompt, messages, text"):
        build(**inputs)


def test_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected option 'max_token'"):
        build("hi", max_token=3)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "lone \ud800 surrogate"},
        {"prompt": "hi", "max_tokens": 1 << 40},
        {"prompt": "hi", "seed": 1 << 70},
        {"token_ids": [-(1 << 33)]},
        {"prompt": "hi", "logit_bias": {1 << 40: 1.0}},
        {"messages": [{"role": "user", "text": "typo"}]},
        {"prompt": "hi", "compression": Compression(unit="word")},
        {"prompt": "hi", "compression": Compression(keep_ratio=0.1, max_kept_tokens=5)},
    ],
    ids=["surrogate", "int32", "int64", "token", "bias", "message", "unit", "budgets"],
)
def test_value_that_no_message_can_carry_is_an_invalid_request(options):
    with pytest.raises(InvalidRequest) as caught:
        build(**options)

    assert caught.value.reason == "INVALID_REQUEST"


def test_unknown_choice_names_the_known_ones():
    with pytest.raises(InvalidRequest, match="unit 'word' is not one of chunk, token, sentence"):
        _wire.compression_to_wire(Compression(unit="word"))
    with pytest.raises(InvalidRequest, match="spread 'wide' is not one of uniform, pyramid, ad"):
        _wire.compression_to_wire(Compression(spread="wide"))


def test_every_choice_of_the_library_has_a_name_on_the_wire():
    names = {
        "scorer": Scorer,
        "prefix_scorer": Scorer,
        "unit": Unit,
        "scope": Scope,
        "spread": Spread,
        "precision": Precision,
    }

    for field, choices in names.items():
        for choice in get_args(choices):
            sent = _wire.compression_to_wire(Compression(**{field: choice}))
            assert getattr(_wire.compression_from_wire(sent), field) == choice


@pytest.mark.parametrize(
    "compression",
    [
        Compression(),
        Compression(keep_ratio=0.1, scorer="window", unit="chunk", scope="group"),
        Compression(max_kept_tokens=512, unit="token", scope="global", sink_tokens=0),
        Compression(chunk_size=10, window_size=16, reuse_interval=2),
        Compression(scorer="expected_attention", unit="sentence", spread="adaptive"),
        Compression(vote_power=2, pool_size=7, head_floor=0.1, gating=0.0, merge_layers=False),
        Compression(preset="snapkv", prefix_preset="durable", prefix_scorer="key_norm"),
    ],
    ids=["unset", "ratio", "tokens", "sizes", "spread", "knobs", "presets"],
)
def test_compression_survives_the_wire(compression):
    sent = _wire.compression_to_wire(compression).SerializeToString()

    assert _wire.compression_from_wire(types_pb2.CompressionPolicy.FromString(sent)) == compression


def test_out_of_range_policy_is_sent_for_the_server_to_refuse():
    policy = _wire.compression_to_wire(Compression(keep_ratio=0.0))

    assert policy.WhichOneof("budget") == "keep_ratio"


def test_choices_of_a_newer_server_read_as_unset():
    policy = types_pb2.CompressionPolicy()
    policy.scope = 99
    finish = types_pb2.Finish()
    finish.reason = 99

    assert _wire.compression_from_wire(policy).scope is None
    event = _wire.event_from_wire(inference_pb2.GenerateResponse(finish=finish))
    assert isinstance(event, Finish)
    assert event.reason == "unspecified"


def test_event_of_a_newer_server_is_no_event():
    assert _wire.event_from_wire(inference_pb2.GenerateResponse()) is None


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "huge"])
def test_lifetime_that_is_no_duration_is_an_invalid_request(ttl_s):
    with pytest.raises(InvalidRequest):
        _wire.create_session_request("s-1", None, None, ttl_s)


def test_a_segments_history_is_read():
    wire = session_pb2.Session(
        segments=[
            session_pb2.Segment(
                segment_id="a",
                kv_bytes=7,
                is_prefix=True,
                compression=types_pb2.CompressionPolicy(
                    precision=types_pb2.PRECISION_FP8, prefix_scorer=types_pb2.SCORER_KEY_DIFF
                ),
                recompression=session_pb2.Recompression(
                    precision=types_pb2.PRECISION_INT4, original_bytes=9, by_pressure=True
                ),
            ),
            session_pb2.Segment(segment_id="b"),
        ]
    )

    changed, whole = _wire.session_from_wire(wire).segments

    assert changed.compression == Compression(precision="fp8", prefix_scorer="key_diff")
    assert changed.recompression is not None
    assert (changed.recompression.precision, changed.recompression.original_bytes) == ("int4", 9)
    assert (changed.kv_bytes, changed.is_prefix) == (7, True)
    assert (whole.compression, whole.recompression) == (None, None)


def test_a_cache_breakpoint_is_sent():
    messages = [Message("system", "rules", cache_breakpoint=True), Message("user", "hi")]

    request = build(
        messages=[*messages, {"role": "user", "content": "x", "cache_breakpoint": True}]
    )

    assert [m.cache_breakpoint for m in request.chat.messages] == [True, False, True]
