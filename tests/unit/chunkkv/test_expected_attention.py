"""Expected attention against explicit loops over queries, positions and keys, in float64.

The reference takes queries before position encoding from the model's projections, and rotates by
matrices that it builds from the configuration.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from models import FAMILIES, FULL_ATTENTION_FAMILIES, prompts, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import chunkkv
from chunkkv import CompressionPolicy, InvalidInputError, KVCache, Prefilled
from chunkkv.scoring import layer_scores
from chunkkv.scoring.expected_attention import (
    EPSILON,
    FUTURE_POSITIONS,
    SINK_TOKENS,
    QueryStatistics,
    expected_attention_scores,
)
from chunkkv.scoring.rotary import Rotary

POLICY = CompressionPolicy(scorer="expected_attention", keep_ratio=0.5, window_size=8)
LENGTHS = (60, 37)


class PlainQueries:
    """The queries of each layer as they leave the projection (and its norm), before RoPE."""

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._taken: dict[int, list[torch.Tensor]] = {}
        for index, layer in enumerate(model.base_model.layers):
            attention = layer.self_attn
            for name in ("q_norm", "q_proj", "qkv_proj"):
                if hasattr(attention, name):
                    getattr(attention, name).register_forward_hook(self._hook(index, name))
                    break

    def of(self, layer: int) -> torch.Tensor:
        """Return ``(batch, num_heads, seq_len, head_dim)`` float64."""
        return torch.cat(self._taken[layer], dim=2).double()

    def _hook(self, layer: int, name: str) -> Any:
        def take(module: Any, arguments: Any, output: torch.Tensor) -> None:
            num_heads = self._config.num_attention_heads
            if name == "qkv_proj":
                output = output[..., : self._config.hidden_size]
            if name != "q_norm":
                output = output.unflatten(-1, (num_heads, -1)).transpose(1, 2)
            if output.shape[1] != num_heads:  # normalised before the transposition
                output = output.transpose(1, 2)
            self._taken.setdefault(layer, []).append(output)

        return take


@cache
def mean_rotation(theta: float, head_dim: int, end: int) -> torch.Tensor:
    """Return the mean of the rotation matrices of the positions that follow the text."""
    mean = [[0.0] * head_dim for _ in range(head_dim)]
    half = head_dim // 2
    for position in range(end, end + FUTURE_POSITIONS):
        for i in range(half):
            angle = position * theta ** (-2 * i / head_dim)
            mean[i][i] += math.cos(angle) / FUTURE_POSITIONS
            mean[i + half][i + half] += math.cos(angle) / FUTURE_POSITIONS
            mean[i][i + half] -= math.sin(angle) / FUTURE_POSITIONS
            mean[i + half][i] += math.sin(angle) / FUTURE_POSITIONS
    return torch.tensor(mean, dtype=torch.float64)


def slow_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: torch.Tensor,
    *,
    scaling: float,
    num_span: int,
    skipped: int,
) -> torch.Tensor:
    """Return the scores of one row ``(num_kv_heads, num_span)``, one key at a time.

    Args:
        queries: ``(num_heads, num_span, head_dim)`` before RoPE.
        keys: ``(num_kv_heads, kept, head_dim)``, those of a prefix included.
        values: Like ``keys``.
        rotation: ``(head_dim, head_dim)``.
        scaling: Factor on the dot products.
        num_span: The last so many keys are the span's.
        skipped: Queries that do not count.
    """
    num_kv_heads, num_keys, _ = keys.shape
    group = queries.shape[0] // num_kv_heads
    scores = torch.zeros(num_kv_heads, num_keys, dtype=torch.float64)
    for head, seen in enumerate(queries):
        voting = [rotation @ query for query in seen[skipped:]]
        mean = sum(voting) / len(voting)
        covariance = sum(torch.outer(q - mean, q - mean) for q in voting) / len(voting)
        logits = [
            float(mean @ key * scaling + key @ covariance @ key * scaling**2 / 2)
            for key in keys[head // group, SINK_TOKENS:]
        ]
        largest = max(logits)
        total = sum(math.exp(logit - largest) for logit in logits)
        for p, logit in enumerate(logits, start=SINK_TOKENS):
            scores[head // group, p] += math.exp(logit - largest) / total / group
    scores[:, SINK_TOKENS:] += EPSILON
    for head in range(num_kv_heads):
        scores[head] *= torch.tensor([math.hypot(*value) for value in values[head].tolist()])
        scores[head, :SINK_TOKENS] = scores[head, SINK_TOKENS:].max()
    return scores[:, -num_span:]


def check(
    model: Any,
    plain: PlainQueries,
    prefilled: Prefilled,
    *,
    row: int,
    length: int,
    prefix: int = 0,
) -> None:
    """Compare one row of every full-attention layer with the reference."""
    config = model.config
    for index, layer in enumerate(prefilled.cache.layers):
        if layer.is_sliding:
            continue
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        kept = length + layer.keys.shape[2] - prefilled.longest
        expected = slow_scores(
            plain.of(index)[row, :, -length:],
            layer.keys[row, :, -kept:].double(),
            layer.values[row, :, -kept:].double(),
            mean_rotation(rope["rope_theta"], layer.keys.shape[-1], prefix + length),
            scaling=model.base_model.layers[index].self_attn.scaling,
            num_span=length,
            skipped=max(SINK_TOKENS - prefix, 0),
        )
        found = layer_scores(prefilled, POLICY, index)
        assert found.shape == (len(prefilled.num_tokens), 2, prefilled.longest)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[row, :, -length:].double(), expected, atol=1e-4, rtol=1e-3)
        assert (found[row, :, :-length] == 0).all(), "padding"


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_scores_equal_the_slow_reference(family: str, piece: int | None):
    ids, mask = prompts(*LENGTHS)
    model = tiny_model(family, initializer_range=0.1)
    plain = PlainQueries(model)

    prefilled = chunkkv.run_prefill(
        model,
        ids,
        window_size=8,
        scorers=["expected_attention"],
        attention_mask=mask,
        prefill_chunk_tokens=piece,
    )

    for row, length in enumerate(LENGTHS):
        check(model, plain, prefilled, row=row, length=length)


@pytest.mark.parametrize("piece", [None, 9], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("family", [*FULL_ATTENTION_FAMILIES, "gemma3"])
def test_compressed_prefix_is_seen_and_not_scored(family: str, piece: int | None):
    ids, _ = prompts(100)
    model = tiny_model(family, initializer_range=0.1)
    [first] = chunkkv.prefill(model, ids[:, :40], POLICY)
    past = KVCache.from_segments(model.config, [first])
    plain = PlainQueries(model)

    prefilled = chunkkv.run_prefill(
        model,
        ids[:, 40:],
        window_size=8,
        scorers=["expected_attention"],
        past=past,
        prefill_chunk_tokens=piece,
    )

    check(model, plain, prefilled, row=0, length=60, prefix=40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, SINK_TOKENS, SINK_TOKENS + 1])
def test_text_of_hardly_more_than_a_sink_has_scores(family: str, length: int):
    ids, mask = prompts(20, length)
    policy = CompressionPolicy(scorer="expected_attention", max_kept_tokens=length, window_size=1)

    spans = chunkkv.prefill(tiny_model(family), ids, policy, attention_mask=mask)

    for layer in spans[1].layers:
        assert layer.scores is not None
        assert layer.scores.isfinite().all()


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "yarn, which scales": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "a part of each head": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
}


class Unrotated:
    """A probe that turns every query back at once."""

    def __init__(self, model: Any) -> None:
        self.rotary = Rotary.of(model)
        self.queries: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, queries: torch.Tensor, *rest: Any, **named: Any) -> None:
        positions = torch.arange(queries.shape[2])[None].expand(queries.shape[0], -1)
        self.queries[layer] = self.rotary.undone(queries, layer, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROPES)
def test_rotation_is_undone(name: str, dtype: torch.dtype):
    family, config = ROPES[name]
    model = tiny_model(family, dtype=dtype, **config)
    plain, probe = PlainQueries(model), Unrotated(model)

    with chunkkv.observable(model), torch.no_grad():
        model(prompts(50)[0], chunkkv_probe=probe)

    for layer, queries in probe.queries.items():
        expected = plain.of(layer)
        scale = float(expected.abs().max())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * scale
        torch.testing.assert_close(queries.double(), expected, atol=tolerance, rtol=0)


def test_far_positions_leave_the_models_own_rotation_alone():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=128)
    embedding = model.base_model.rotary_emb
    before = embedding.inv_freq.clone()

    chunkkv.prefill(model, prompts(60)[0], POLICY)

    assert torch.equal(embedding.inv_freq, before)
    assert embedding.max_seq_len_cached == 128


def test_statistics_of_pieces_are_those_of_the_whole_even_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 50, 4, generator=generator) + 1000
    voting = torch.arange(50) >= torch.tensor([[0], [13]])
    queries[1, :, :13] = math.nan

    pieces = [
        QueryStatistics.of(queries[:, :, i : i + 7], voting[:, i : i + 7]) for i in range(0, 50, 7)
    ]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merged(piece)

    for row, start in enumerate((0, 13)):
        for head in range(3):
            seen = queries[row, head, start:].double()
            torch.testing.assert_close(
                merged.mean[row, head].double(), seen.mean(dim=0), atol=1e-3, rtol=0
            )
            torch.testing.assert_close(
                merged.covariance[row, head].double(), seen.T.cov(correction=0), atol=1e-3, rtol=0
            )


def test_softcap_bounds_the_expected_logits():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 2, 4, generator=generator)
    keys, values = torch.randn(2, 1, 1, 9, 4, generator=generator)
    covariance = torch.eye(4).expand(1, 2, 4, 4)

    found = expected_attention_scores(mean, covariance, keys, values, scaling=0.5, softcap=0.7)

    logits = torch.stack(
        [(m @ keys[0, 0].T) * 0.5 + keys[0, 0].square().sum(dim=-1) * 0.125 for m in mean[0]]
    )[:, SINK_TOKENS:]
    attention = (0.7 * torch.tanh(logits / 0.7)).softmax(dim=-1).mean(dim=0)
    expected = (attention + EPSILON) * values[0, 0, SINK_TOKENS:].norm(dim=-1)
    torch.testing.assert_close(found[0, 0, SINK_TOKENS:], expected, atol=1e-6, rtol=0)


def test_prefill_that_was_not_watched_is_refused():
    prefilled = chunkkv.run_prefill(
        tiny_model(), prompts(30)[0], window_size=8, scorers=["heavy_hitter"]
    )

    with pytest.raises(InvalidInputError, match=r"call run_prefill with scorers=\['expected_"):
        chunkkv.compress(prefilled, POLICY)


def test_model_without_rotation_is_refused():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()

    with pytest.raises(InvalidInputError, match="GPT2Model does not rotate the queries"):
        chunkkv.prefill(model, prompts(20)[0], POLICY)
