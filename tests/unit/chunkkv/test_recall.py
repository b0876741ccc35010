"""``recall`` against a model that is run anew, piece by piece, with eager attention in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from models import FAMILIES, prompts, tiny_model
from transformers import GptOssConfig, GptOssForCausalLM

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache
from chunkkv.cache import KeptLayer
from chunkkv.scoring import layer_scores
from chunkkv.scoring import recall as recall_module

POLICY = CompressionPolicy(scorer="recall", keep_ratio=0.5, chunk_size=5, window_size=8)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recall_module, "REPEATED_TOKENS", 16)
    monkeypatch.setattr(recall_module, "LEAD_TOKENS", 3)
    monkeypatch.setattr(recall_module, "SINK_TOKENS", 2)
    monkeypatch.setattr(recall_module, "SAMPLED_TOKENS", 5)


def slow_recall(family: str, ids: torch.Tensor, before: int = 0) -> dict[int, torch.Tensor]:
    """Return the scores of one text ``(tokens,)``, of which the first ``before`` are a prefix.

    Every piece is repeated behind the whole text, with a mask that hides what is not sampled of the
    rest and weighs what is, and the model itself reports its attention.
    """
    model = tiny_model(family, attention="eager", dtype=torch.float64)
    layers = KVCache(model.config).layers
    full = [index for index, layer in enumerate(layers) if isinstance(layer, KeptLayer)]
    text = len(ids) - before
    scores = {index: torch.zeros(2, text, dtype=torch.float64) for index in full}
    for start in range(0, text, recall_module.REPEATED_TOKENS):
        first = max(start - recall_module.LEAD_TOKENS, 0)
        stop = min(start + recall_module.REPEATED_TOKENS, text)
        voted = sorted({*range(min(recall_module.SINK_TOKENS, first)), *range(first, stop)})
        others = [p for p in range(text) if p not in voted]
        num_sampled = min(recall_module.SAMPLED_TOKENS, len(others))
        parts = [(i + Fraction(1, 2)) / num_sampled for i in range(num_sampled)]
        weights = dict.fromkeys(voted, 1.0)
        weights |= {others[int(len(others) * part)]: len(others) / num_sampled for part in parts}
        repeated = ids[before + first : before + stop]
        shifted = {before + p: weight for p, weight in weights.items()}
        attention = _attention(model, ids, repeated, shifted)
        worth = [_information(ids[before:].tolist(), p + 1) for p in range(first, stop)]
        for index in full:
            votes = attention[index].view(2, 2, len(repeated), -1).square()
            votes *= torch.tensor(worth)[:, None]  # KV heads, group, queries, keys
            for p in voted:
                scores[index][:, p] += votes[..., before + p].sum(dim=2).mean(dim=1)
    for index in full:
        scores[index] /= scores[index].sum(dim=1, keepdim=True) ** (1 / 3)
    return scores


def _information(text: list[int], position: int) -> float:
    if position == len(text):
        return 0.0
    return math.log(1 + len(text) / text.count(text[position]))


def _attention(
    model: Any, ids: torch.Tensor, repeated: torch.Tensor, weights: dict[int, float]
) -> dict[int, torch.Tensor]:
    total = len(ids) + len(repeated)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    window = getattr(model.config, "sliding_window", None)
    order = torch.arange(total)
    near = causal if window is None else causal & (order[:, None] - order < window)
    excerpt = causal.clone()
    excerpt[len(ids) :, : len(ids)] = False
    excerpt[len(ids) :, list(weights)] = True
    weighted = _additive(excerpt)
    for position, weight in weights.items():
        weighted[len(ids) :, position] = math.log(weight)
    masks = {
        "full_attention": weighted,
        "sliding_attention": _additive(near),
    }
    only_kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(model.config, "layer_types", None) or [only_kind] * 4
    taken: dict[int, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.base_model.layers):

        def with_mask(module: Any, args: Any, kwargs: Any, kind: str = kinds[index]) -> Any:
            return args, {**kwargs, "attention_mask": masks[kind][None, None]}

        def take(module: Any, args: Any, output: Any, index: int = index) -> None:
            taken[index] = output[1][0, :, len(ids) :]

        hooks += [
            layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True),
            layer.self_attn.register_forward_hook(take),
        ]
    with torch.no_grad():
        model.base_model(torch.cat([ids, repeated])[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return taken


def _additive(visible: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=torch.float64)
    return mask.masked_fill(~visible, torch.finfo(torch.float64).min)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("family", FAMILIES)
def test_recall_equals_the_models_own_attention(family: str):
    ids, mask = prompts(45, 23)
    model = tiny_model(family)
    prefilled = chunkkv.run_prefill(model, ids, window_size=8, attention_mask=mask)

    repeated = chunkkv.recollect(model, prefilled, ids)

    for row, length in enumerate((45, 23)):
        expected = slow_recall(family, ids[row, -length:])
        assert repeated.observed["recall"].keys() == expected.keys()
        for layer, scores in expected.items():
            found = layer_scores(repeated, POLICY, layer)[row]
            assert (found[:, :-length] == 0).all(), "padding"
            torch.testing.assert_close(found[:, -length:].double(), scores, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_not_seen_and_not_scored(family: str):
    ids, _ = prompts(50)
    model = tiny_model(family)
    past = chunkkv.run_prefill(model, ids[:, :20], window_size=8).cache
    prefilled = chunkkv.run_prefill(model, ids[:, 20:], window_size=8, past=past)

    repeated = chunkkv.recollect(model, prefilled, ids[:, 20:])

    for layer, scores in slow_recall(family, ids[0], before=20).items():
        found = repeated.observed["recall"][layer][0].double()
        torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("short_pieces")
def test_the_cache_stays_as_it_is():
    ids, _ = prompts(40)
    model = tiny_model()
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefilled.cache.layers]

    chunkkv.recollect(model, prefilled, ids)

    assert prefilled.cache.get_seq_length() == 40
    for layer, (keys, values) in zip(prefilled.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_other_tokens_than_those_that_were_run_are_refused():
    ids, _ = prompts(40)
    prefilled = chunkkv.run_prefill(tiny_model(), ids, window_size=8)

    with pytest.raises(InvalidInputError, match=r"\(1, 39\); \(1, 40\) were run"):
        chunkkv.recollect(tiny_model(), prefilled, ids[:, 1:])


def test_a_model_with_learned_sinks_is_refused():
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)

    with pytest.raises(InvalidInputError, match="learned attention sinks, which recall does not"):
        chunkkv.recollect(model, prefilled, ids)


@pytest.mark.usefixtures("short_pieces")
def test_many_tokens_weigh_more_together_than_float16_holds():
    model = tiny_model("qwen3", dtype=torch.float16)
    for layer in model.base_model.layers:  # large values, of which attention makes what it did
        layer.self_attn.v_proj.weight.data *= 2000
        layer.self_attn.o_proj.weight.data /= 2000
    ids, _ = prompts(1000)
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)
    stands_for = (1000 - 16 - 3 - 2) / 5  # a piece, what leads into it, and the first ones aside
    largest = max(float(layer.values.abs().max()) for layer in prefilled.cache.layers)
    assert largest * stands_for > torch.finfo(torch.float16).max

    repeated = chunkkv.recollect(model, prefilled, ids)

    assert all(scores.isfinite().all() for scores in repeated.observed["recall"].values())


@pytest.mark.parametrize("text", [[5], [5, 9, 5], [7] * 40], ids=["one", "three", "all equal"])
def test_texts_that_tell_little_are_scored(text: list[int]):
    kept = chunkkv.prefill(tiny_model(), torch.tensor([text]), POLICY)[0]

    assert kept.shape.num_tokens == len(text)


def test_scores_of_a_text_that_was_not_repeated_are_refused():
    prefilled = chunkkv.run_prefill(tiny_model(), prompts(40)[0], window_size=8)

    with pytest.raises(InvalidInputError, match=r"no scores of recall; .*then repeat"):
        chunkkv.compress(prefilled, POLICY)


def test_a_repetition_can_be_ended_between_two_pieces(short_pieces: None):
    ids, _ = prompts(40)
    model = tiny_model()
    prefilled = chunkkv.run_prefill(model, ids, window_size=8)
    calls = iter([None, None])

    def ended() -> None:
        if next(calls, StopIteration) is StopIteration:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        chunkkv.recollect(model, prefilled, ids, before_chunk=ended)
