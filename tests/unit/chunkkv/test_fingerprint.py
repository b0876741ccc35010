"""Fingerprints: another model has another one, the same model has the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from chunkkv import make_observable, model_fingerprint


def test_fingerprint_is_32_hexadecimal_characters():
    fingerprint = model_fingerprint(tiny_model())

    assert len(fingerprint) == 32
    assert set(fingerprint) <= set("0123456789abcdef")


@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_model_is_the_same(family: str, tmp_path: Path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "other")

    reloaded = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "other")]

    assert {model_fingerprint(m) for m in (model, *reloaded)} == {model_fingerprint(model)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_how_attention_is_computed_changes_nothing(attention: str):
    model = tiny_model(attention=attention)
    make_observable(model)
    model.config.use_cache = False

    assert model_fingerprint(model) == model_fingerprint(tiny_model())


def test_families_differ():
    assert len({model_fingerprint(tiny_model(family)) for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"max_position_embeddings": 1024},
    ],
    ids=str,
)
def test_other_weights_config_or_dtype_make_another_model(other: dict[str, Any]):
    assert model_fingerprint(tiny_model(**other)) != model_fingerprint(tiny_model())


def test_fine_tuned_weights_make_another_model():
    model = tiny_model()
    before = model_fingerprint(model)

    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)

    assert model_fingerprint(model) != before


def test_two_tensors_that_changed_places_make_another_model():
    model = tiny_model()
    before = model_fingerprint(model)

    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    model.model.layers[0].self_attn, model.model.layers[1].self_attn = second, first

    assert model_fingerprint(model) != before
