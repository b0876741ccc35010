"""Settings of a prefill worker: what applies where nobody asks for anything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import chunkkv
from chunkserve.v1 import types_pb2
from services.compress.policy import from_wire, to_wire
from services.prefill.config import PrefillSettings
from services.runtime.config import load

VALUES: dict[str, Any] = {
    "keep_ratio": 0.5,
    "scorer": "recency",
    "unit": "sentence",
    "scope": "head",
    "spread": "adaptive",
    "chunk_size": 7,
    "window_size": 9,
    "sink_tokens": 2,
    "reuse_interval": 3,
    "vote_power": 2,
    "pool_size": 5,
    "head_floor": 0.25,
    "gating": 0.5,
    "merge_layers": True,
    "precision": "int8",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("CHUNKSERVE_MODEL", "tiny")
    return monkeypatch


def prompts(settings: PrefillSettings) -> chunkkv.CompressionPolicy:
    return from_wire(settings.compression)


def prefixes(settings: PrefillSettings) -> chunkkv.CompressionPolicy:
    return from_wire(settings.prefix_compression)


def test_prompts_are_compressed_fast_and_prefixes_for_questions_to_come(environment):
    settings = load(PrefillSettings)

    assert prompts(settings) == chunkkv.preset("fast")
    assert prefixes(settings) == chunkkv.preset("durable")
    shown = settings.default_compression
    assert (shown.preset, shown.prefix_preset) == ("fast", "durable")
    assert from_wire(shown).canonical() == chunkkv.preset("fast").canonical()
    prefix_scorer = types_pb2.CompressionPolicy(scorer=shown.prefix_scorer)
    assert from_wire(prefix_scorer).scorer == chunkkv.preset("durable").scorer


def test_every_field_of_a_policy_is_a_variable(environment):
    for name, value in VALUES.items():
        environment.setenv(f"CHUNKSERVE_{name.upper()}", str(value))

    settings = load(PrefillSettings)

    fields = {field.name for field in dataclasses.fields(chunkkv.CompressionPolicy)}
    assert VALUES.keys() == fields - {"max_kept_tokens"}
    assert prompts(settings) == chunkkv.CompressionPolicy(**VALUES)
    # A scorer says nothing about prefixes, everything else does.
    assert prefixes(settings) == chunkkv.CompressionPolicy(
        **{**VALUES, "scorer": chunkkv.preset("durable").scorer}
    )


def test_a_number_of_tokens_is_a_budget_too(environment):
    environment.setenv("CHUNKSERVE_MAX_KEPT_TOKENS", "99")

    settings = load(PrefillSettings)

    assert (prompts(settings).max_kept_tokens, prefixes(settings).max_kept_tokens) == (99, 99)


def test_presets_are_chosen_by_their_names_and_changed_by_variables(environment):
    environment.setenv("CHUNKSERVE_DEFAULT_PRESET", "snapkv")
    environment.setenv("CHUNKSERVE_PREFIX_PRESET", "kvzip")
    environment.setenv("CHUNKSERVE_PREFIX_SCORER", "key_norm")
    environment.setenv("CHUNKSERVE_SINK_TOKENS", "3")

    settings = load(PrefillSettings)

    assert prompts(settings) == chunkkv.preset("snapkv", sink_tokens=3)
    assert prefixes(settings) == chunkkv.preset("kvzip", sink_tokens=3, scorer="key_norm")


def test_a_file_is_the_default_policy_and_gives_prefixes_budget_and_precision(
    environment, tmp_path: Path
):
    tuned = chunkkv.CompressionPolicy(**VALUES)
    chunkkv.write_policy(tuned, tmp_path / "policy.json")
    environment.setenv("CHUNKSERVE_POLICY_FILE", str(tmp_path / "policy.json"))
    environment.setenv("CHUNKSERVE_CHUNK_SIZE", "8")

    settings = load(PrefillSettings)

    assert prompts(settings) == dataclasses.replace(tuned, chunk_size=8)
    assert prefixes(settings) == chunkkv.preset(
        "durable", keep_ratio=0.5, precision="int8", chunk_size=8
    )
    assert not settings.default_compression.HasField("preset")


def test_an_empty_name_of_a_file_is_none(environment):
    environment.setenv("CHUNKSERVE_POLICY_FILE", "")

    assert prompts(load(PrefillSettings)) == chunkkv.preset("fast")


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", json.dumps({"keep": 1}), json.dumps({"keep_ratio": 2.0})],
    ids=["missing", "no_json", "no_object", "unknown_field", "out_of_range"],
)
def test_a_malformed_file_ends_the_process_and_names_the_variable(
    environment, tmp_path: Path, text: str | None
):
    path = tmp_path / "policy.json"
    if text is not None:
        path.write_text(text)
    environment.setenv("CHUNKSERVE_POLICY_FILE", str(path))

    with pytest.raises(SystemExit, match=r"^CHUNKSERVE_POLICY_FILE=") as ended:
        load(PrefillSettings)

    assert f"policy file {path}" in str(ended.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEFAULT_PRESET", "slow"),
        ("PREFIX_PRESET", ""),
        ("PREFIX_SCORER", "luck"),
        ("KEEP_RATIO", "0"),
        ("MAX_KEPT_TOKENS", "0"),
        ("SCORER", "luck"),
        ("UNIT", "word"),
        ("SPREAD", "wide"),
        ("VOTE_POWER", "9"),
        ("POOL_SIZE", "0"),
        ("HEAD_FLOOR", "1.5"),
        ("GATING", "nan"),
        ("MERGE_LAYERS", "perhaps"),
    ],
)
def test_a_value_out_of_range_ends_the_process_and_names_the_variable(environment, name, value):
    environment.setenv(f"CHUNKSERVE_{name}", value)

    with pytest.raises(SystemExit, match=f"^CHUNKSERVE_{name}='{value}': "):
        load(PrefillSettings)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"POOL_SIZE": "4"}, "pool_size is 4; give an odd number"),
        ({"KEEP_RATIO": "0.5", "MAX_KEPT_TOKENS": "9"}, "CHUNKSERVE_KEEP_RATIO or CHUNKSERVE_MAX_"),
        ({"SPREAD": "adaptive", "SCOPE": "global"}, "spread is 'adaptive' and scope 'global'"),
    ],
)
def test_values_that_make_no_policy_end_the_process(environment, variables, says):
    for name, value in variables.items():
        environment.setenv(f"CHUNKSERVE_{name}", value)

    with pytest.raises(SystemExit, match=says):
        load(PrefillSettings)


def test_what_is_shown_is_what_applies():
    settings = PrefillSettings(model="tiny", **VALUES)

    assert from_wire(settings.default_compression) == prompts(settings)
    assert to_wire(prompts(settings)).keep_ratio == 0.5
