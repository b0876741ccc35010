"""Presets are policies with names of their own, and policies survive being files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import FAMILIES, prompts, tiny_model

import chunkkv
from chunkkv import PRESETS, CompressionPolicy, InvalidPolicyError, preset


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("keep_ratio", [0.05, 0.5, 1.0])
def test_presets_are_valid_at_every_ratio(name: str, keep_ratio: float) -> None:
    policy = preset(name, keep_ratio=keep_ratio, num_tokens=1000)

    assert policy.budget(1000) == 1000 * keep_ratio


def test_no_two_presets_choose_the_same() -> None:
    names = {preset(name, keep_ratio=0.1).canonical() for name in PRESETS}

    assert len(names) == len(PRESETS)


def test_every_preset_says_what_it_does_and_where_it_is_from() -> None:
    assert all(each.summary and each.source for each in PRESETS.values())


def test_h2o_keeps_half_of_its_budget_recent() -> None:
    assert preset("h2o", keep_ratio=0.1, num_tokens=1000).window_size == 50
    assert preset("h2o", max_kept_tokens=80).window_size == 40
    assert preset("h2o", keep_ratio=0.1).window_size == 32


def test_minicache_keeps_all_tokens_in_lists_of_their_own_or_shares_one() -> None:
    assert preset("minicache", keep_ratio=1.0).scope == "layer"
    assert preset("minicache", keep_ratio=0.5).scope == "global"


def test_changes_replace_what_a_preset_says() -> None:
    policy = preset("chunkkv", keep_ratio=0.2, precision="int4", chunk_size=7)

    assert (policy.precision, policy.chunk_size, policy.window_size) == ("int4", 7, 16)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scope", ["head", "layer", "group", "global"])
def test_a_scope_is_a_change_that_every_preset_takes(name: str, scope: str) -> None:
    policy = preset(name, keep_ratio=0.5, scope=scope)

    spread = PRESETS[name].choices.get("spread", "uniform")
    assert policy.scope == scope
    assert policy.spread == (spread if scope in ("head", "layer") else "uniform")


def test_a_scope_and_a_spread_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidPolicyError, match="spread is 'adaptive' and scope 'global'"):
        preset("fast", scope="global", spread="adaptive")


def test_a_field_that_no_policy_has_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidPolicyError, match=r"no field chunksize; fields are chunk_size, "):
        preset("fast", chunksize=7)


def test_unknown_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidPolicyError, match=r"no preset 'nope'.*snapkv"):
        preset("nope")


@pytest.mark.parametrize("name", PRESETS)
def test_policy_survives_being_a_file(name: str, tmp_path: Path) -> None:
    policy = preset(name, max_kept_tokens=100, precision="int8")
    chunkkv.write_policy(policy, tmp_path / "policy.json")

    assert chunkkv.policy_from_file(tmp_path / "policy.json") == policy


def test_fields_that_a_policy_file_lacks_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text('{"keep_ratio": 0.2}')

    assert chunkkv.policy_from_file(tmp_path / "policy.json") == CompressionPolicy(keep_ratio=0.2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "policy.json"),
        ("[1]", "object of fields"),
        (json.dumps({"keep_rato": 0.1}), "no field keep_rato"),
        (json.dumps({"keep_ratio": 2.0}), "keep_ratio is 2.0"),
        (json.dumps({"chunk_size": "ten"}), "chunk_size"),
        (json.dumps({"keep_ratio": "half"}), "keep_ratio"),
        (json.dumps({"gating": "half"}), "policy.json"),
    ],
)
def test_damaged_policy_file_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(text)

    with pytest.raises(InvalidPolicyError, match=problem):
        chunkkv.policy_from_file(tmp_path / "policy.json")


def test_missing_policy_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidPolicyError, match=r"nothing\.json"):
        chunkkv.policy_from_file(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_keeps_its_exact_budget_of_every_row_and_can_be_gone_on_from(
    family: str, name: str
) -> None:
    model = tiny_model(family)
    lengths = (60, 41)
    ids, mask = prompts(*lengths)
    policy = preset(name, keep_ratio=0.4)

    kept = chunkkv.prefill(model, ids[:, :-1], policy, attention_mask=mask[:, :-1])

    for row, length in zip(kept, lengths, strict=True):
        heads = [n for layer in row.layers if not layer.is_sliding for n in layer.lengths]
        assert sum(heads) == policy.budget(length - 1) * len(heads)
    token_ids = [ids[row, -length:] for row, length in enumerate(lengths)]
    for row, tokens in enumerate(token_ids):
        inputs = chunkkv.generation_inputs(model, [[kept[row]]], [tokens])
        alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert alone.shape == (1, lengths[row] + 3)
