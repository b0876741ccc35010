"""Queries are caught on their way through a model, and nothing of the model changes."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, NUM_LAYERS, prompts, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from chunkkv import QueryProbe, make_observable, observable, run_prefill


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_observed_model_computes_what_it_did(family: str, attention: str):
    model = tiny_model(family, attention=attention)
    ids, mask = prompts(40, 23)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with observable(model):
            during = model(ids, attention_mask=mask).logits

    assert torch.equal(before, during)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_the_last_of_every_layer_however_the_prompt_was_cut(family: str):
    model = tiny_model(family)
    ids, _ = prompts(40)
    whole = run_prefill(model, ids, window_size=8).probe

    for piece in (1, 3, 8, 13, 39):
        probe = run_prefill(model, ids, window_size=8, prefill_chunk_tokens=piece).probe
        assert sorted(probe.queries) == list(range(NUM_LAYERS))
        for layer, queries in probe.queries.items():
            assert queries.shape == (1, 4, 8, 16)
            torch.testing.assert_close(queries, whole.queries[layer], atol=1e-4, rtol=1e-4)


def test_prompt_shorter_than_the_window_gives_all_its_queries():
    probe = run_prefill(tiny_model(), prompts(3)[0], window_size=8).probe

    assert probe.queries[0].shape == (1, 4, 3, 16)


def test_queries_of_a_long_prompt_are_not_kept_alive():
    probe = QueryProbe(4)
    queries = torch.randn(1, 2, 1000, 8)

    probe.observe(0, queries, None, None)

    assert probe.queries[0].untyped_storage().nbytes() == queries[:, :, -4:].numel() * 4
    assert probe.scaling[0] == 8**-0.5


def test_models_own_scaling_and_softcap_are_noted():
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=50.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()

    probe = run_prefill(model, prompts(20)[0], window_size=8).probe

    assert set(probe.scaling.values()) == {1 / 3}
    assert set(probe.softcap.values()) == {50.0}


def test_observing_twice_is_harmless():
    model = tiny_model()

    make_observable(model)
    name = model.config._attn_implementation
    make_observable(model)
    with observable(model):
        inside = model.config._attn_implementation

    assert name == inside == model.config._attn_implementation == "chunkkv_sdpa"


def test_attention_is_restored_after_an_error():
    model = tiny_model()

    with pytest.raises(ZeroDivisionError), observable(model):
        raise ZeroDivisionError

    assert model.config._attn_implementation == "sdpa"


def test_call_without_a_probe_is_not_observed():
    model = tiny_model()
    probe = QueryProbe(8)

    with observable(model), torch.no_grad():
        model(prompts(20)[0])

    assert probe.queries == {}
