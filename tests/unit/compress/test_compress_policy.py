"""Compression policies, from the wire and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkkv import PRESETS, CompressionPolicy, preset
from chunkkv.policy import Precision, Scope, Scorer, Spread, Unit
from chunkserve.v1 import types_pb2
from services.compress.policy import (
    for_prefixes,
    from_wire,
    message_of,
    of_answer,
    overlaid,
    to_wire,
)
from services.runtime.errors import InvalidRequestError

DEFAULT = CompressionPolicy(
    keep_ratio=0.25, scope="head", chunk_size=7, window_size=9, sink_tokens=3, reuse_interval=5
)
INT32_MAX = 2**31 - 1


def message(**fields: Any) -> types_pb2.CompressionPolicy:
    return types_pb2.CompressionPolicy(**fields)


fractions = st.integers(0, 1000).map(lambda n: n / 1000)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "scorer": st.sampled_from(get_args(Scorer)),
    "unit": st.sampled_from(get_args(Unit)),
    "scope": st.sampled_from(get_args(Scope)),
    "spread": st.sampled_from(get_args(Spread)),
    "precision": st.sampled_from(get_args(Precision)),
    "chunk_size": st.integers(1, INT32_MAX),
    "window_size": st.integers(1, INT32_MAX),
    "sink_tokens": st.integers(0, INT32_MAX),
    "reuse_interval": st.integers(1, INT32_MAX),
    "vote_power": st.integers(1, 8),
    "pool_size": st.integers(0, INT32_MAX // 2 - 1).map(lambda n: 2 * n + 1),
    "head_floor": fractions,
    "gating": fractions,
    "merge_layers": st.booleans(),
}
budgets = st.one_of(
    st.builds(lambda n: {"keep_ratio": n / 1000}, st.integers(1, 1000)),
    st.builds(lambda n: {"max_kept_tokens": n}, st.integers(1, INT32_MAX)),
)


@st.composite
def any_policy(draw: st.DrawFn) -> CompressionPolicy:
    chosen = draw(st.fixed_dictionaries(CHOICES))
    assume(chosen["spread"] == "uniform" or chosen["scope"] in ("head", "layer"))
    return CompressionPolicy(**draw(budgets), **chosen)


def test_every_field_of_the_library_is_drawn():
    drawn = {"keep_ratio", "max_kept_tokens", *CHOICES}

    assert drawn == {field.name for field in dataclasses.fields(CompressionPolicy)}


def as_sent(policy: types_pb2.CompressionPolicy) -> types_pb2.CompressionPolicy:
    return types_pb2.CompressionPolicy.FromString(policy.SerializeToString())


@given(policy=any_policy())
def test_policy_comes_back_as_it_was(policy: CompressionPolicy):
    sent = as_sent(to_wire(policy))

    found = from_wire(sent, DEFAULT)

    assert found.canonical() == policy.canonical()
    assert to_wire(found) == sent
    # What a manifest's entry gives back chooses the same in every bit.
    assert from_wire(as_sent(to_wire(found))) == found


def test_every_field_is_written():
    written = {field.name for field, _ in to_wire(DEFAULT, prefix_scorer="window").ListFields()}

    known = {field.name for field in types_pb2.CompressionPolicy.DESCRIPTOR.fields}
    # Presets are gone into the fields.
    assert written == known - {"max_kept_tokens", "max_kv_tokens", "preset", "prefix_preset"}
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
            pool_size=5,
            gating=0.5,
            merge_layers=True,
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
        pool_size=5,
        gating=0.5,
        merge_layers=True,
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
        ({"scorer": 99}, "scorer is 'number 99'; give one of window, reconstruction, recall"),
        ({"unit": 99}, "unit is 'number 99'; give one of chunk, token"),
        ({"vote_power": 0}, "vote_power is 0"),
        ({"vote_power": 9}, "vote_power is 9; give 1 to 8"),
        ({"pool_size": 0}, "pool_size is 0"),
        ({"pool_size": 4}, "pool_size is 4; give an odd number"),
        ({"head_floor": -0.5}, "head_floor is -0.5; give a number from 0 to 1"),
        ({"head_floor": math.nan}, "head_floor is nan"),
        ({"gating": 1.5}, "gating is 1.5; give a number from 0 to 1"),
        ({"spread": 99}, "spread is 'number 99'; give one of uniform, pyramid, adaptive"),
        ({"preset": "slow"}, "no preset 'slow'; give one of fast, durable, "),
        ({"preset": ""}, "no preset ''"),
        (
            {"spread": types_pb2.BUDGET_SPREAD_ADAPTIVE, "scope": types_pb2.SCOPE_GLOBAL},
            "spread is 'adaptive' and scope 'global'",
        ),
        ({"scope": 99}, "scope is 'number 99'; give one of head, layer, group, global"),
    ],
)
def test_value_out_of_range_is_the_callers_fault(fields: dict[str, Any], text: str):
    with pytest.raises(InvalidRequestError) as caught:
        from_wire(message(**fields), DEFAULT)

    assert text in caught.value.message


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.5}, {"keep_ratio": 1.0}])
def test_a_preset_is_the_librarys_with_the_budget_and_the_precision_of_the_default(name, budget):
    default = CompressionPolicy(**budget, scope="head", chunk_size=7, precision="int8")

    found = from_wire(message(preset=name), default, num_tokens=100)

    expected = preset(name, num_tokens=100, precision="int8", **budget)
    assert found == expected


def test_a_preset_is_changed_by_the_fields_beside_it():
    found = from_wire(message(preset="durable", chunk_size=9, keep_ratio=0.125), DEFAULT)

    assert found == preset("durable", keep_ratio=0.125, chunk_size=9)


def test_a_shared_scope_gives_up_a_spread_that_it_inherits():
    adaptive = CompressionPolicy(scope="head", spread="adaptive")

    assert from_wire(message(scope=types_pb2.SCOPE_GLOBAL), adaptive).spread == "uniform"
    assert from_wire(message(scope=types_pb2.SCOPE_LAYER), adaptive).spread == "adaptive"
    durable = overlaid(message(preset="durable"), message(scope=types_pb2.SCOPE_GROUP))
    assert from_wire(durable).spread == "uniform"


def test_of_two_messages_the_upper_ones_fields_apply():
    below = message(keep_ratio=0.5, chunk_size=3, scorer=types_pb2.SCORER_RECENCY, pool_size=5)
    above = message(max_kept_tokens=9, chunk_size=4, max_kv_tokens=50)

    assert overlaid(below, above) == message(
        max_kept_tokens=9,
        chunk_size=4,
        scorer=types_pb2.SCORER_RECENCY,
        pool_size=5,
        max_kv_tokens=50,
    )
    assert below == message(
        keep_ratio=0.5, chunk_size=3, scorer=types_pb2.SCORER_RECENCY, pool_size=5
    )


def test_a_preset_of_the_upper_message_replaces_the_method_below_and_nothing_else():
    below = message(
        preset="kvzip",
        keep_ratio=0.5,
        chunk_size=3,
        precision=types_pb2.PRECISION_INT8,
        prefix_scorer=types_pb2.SCORER_WINDOW,
        max_kv_tokens=50,
    )

    merged = overlaid(below, message(preset="snapkv", pool_size=7))

    assert merged == message(
        preset="snapkv",
        keep_ratio=0.5,
        pool_size=7,
        precision=types_pb2.PRECISION_INT8,
        prefix_scorer=types_pb2.SCORER_WINDOW,
        max_kv_tokens=50,
    )


def test_a_prefix_has_a_scorer_and_a_preset_of_its_own_and_else_the_same_fields():
    asked = message(
        keep_ratio=0.5,
        scorer=types_pb2.SCORER_WINDOW,
        preset="snapkv",
        chunk_size=4,
        prefix_scorer=types_pb2.SCORER_KEY_DIFF,
        prefix_preset="durable",
    )

    assert for_prefixes(asked) == message(
        keep_ratio=0.5, preset="durable", scorer=types_pb2.SCORER_KEY_DIFF, chunk_size=4
    )
    assert for_prefixes(message(scorer=types_pb2.SCORER_WINDOW)) == message()


def test_fields_that_are_none_are_not_set():
    assert message_of({"keep_ratio": None, "unit": "sentence", "gating": 0.5}) == message(
        unit=types_pb2.UNIT_SENTENCE, gating=0.5
    )


@pytest.mark.parametrize("name", PRESETS)
def test_an_answer_is_kept_by_equal_lists_of_its_own_and_stored_as_it_is(name: str) -> None:
    whole = preset(name, keep_ratio=0.5, precision="int4", unit="sentence", merge_layers=True)

    policy = of_answer(whole, 7)

    assert policy.budget(1000) == 7
    assert (policy.unit, policy.spread, policy.sink_tokens) == ("chunk", "uniform", 0)
    assert (policy.precision, policy.merge_layers) == ("native", False)
    assert (policy.scorer, policy.scope) == (whole.scorer, whole.scope)
