from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chunkserve.v1 import types_pb2
from services.decode.sampling import SamplingSettings, sample, warp
from services.runtime.errors import InvalidRequestError

VOCAB = 64


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def transformers_warp(logits: torch.Tensor, chosen: SamplingSettings) -> torch.Tensor:
    """What `generate` builds from the same settings."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(chosen.temperature)])
    if chosen.top_k:
        warpers.append(TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        warpers.append(TopPLogitsWarper(chosen.top_p))
    if chosen.min_p > 0:
        warpers.append(MinPLogitsWarper(chosen.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]


@settings(max_examples=300, deadline=None)
@given(
    logits_seed=st.integers(0, 10_000),
    ties=st.booleans(),
    temperature=st.floats(0.01, 2.0),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_equal_those_of_transformers(logits_seed, ties, temperature, top_k, top_p, min_p):
    logits = random_logits(logits_seed)
    if ties:
        logits = logits.round()
    chosen = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    ours, theirs = warp(logits, chosen), transformers_warp(logits, chosen)

    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize(
    "chosen",
    [
        SamplingSettings(temperature=1.0, top_k=3),
        SamplingSettings(temperature=0.7, top_p=0.6),
        SamplingSettings(temperature=1.3, min_p=0.2),
        SamplingSettings(temperature=0.5, top_k=20, top_p=0.9, min_p=0.01),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_each_filter_equals_that_of_transformers_on_a_large_vocabulary(chosen):
    logits = random_logits(0, vocab=49_152)

    assert torch.equal(warp(logits, chosen), transformers_warp(logits, chosen))


def test_greedy_takes_the_best_token_and_ignores_filters_and_seed():
    logits = random_logits(1)

    for seed in range(5):
        chosen = SamplingSettings(top_k=1, top_p=0.1, seed=seed)
        assert sample(logits, chosen, position=seed) == int(logits.argmax())


def test_greedy_skips_forbidden_tokens():
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])

    assert sample(logits, SamplingSettings(), position=0, forbidden_token_ids=[1, 2]) == 3
    assert logits.tolist() == [1.0, 5.0, 4.0, 3.0]


def test_forbidden_tokens_are_masked_before_the_filters_as_transformers_does():
    logits, eos = random_logits(2), [int(random_logits(2).argmax())]
    masked = MinNewTokensLengthLogitsProcessor(1, 4, eos)(torch.zeros(1, 2), logits[None])[0]
    chosen = SamplingSettings(temperature=1.0, top_k=2)

    allowed = set(warp(masked, chosen).isfinite().nonzero().flatten().tolist())
    drawn = {sample(logits, chosen, position=p, forbidden_token_ids=eos) for p in range(200)}

    assert drawn == allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_sampled_in_float32(dtype):
    logits = random_logits(3).to(dtype)
    chosen = SamplingSettings(temperature=0.8, seed=5)

    assert sample(logits, chosen, position=9) == sample(logits.float(), chosen, position=9)


# 99.995 % quantile of chi-square by degrees of freedom: honest draws fail once in 20,000.
CHI_SQUARE_LIMITS = {9: 34.8, 15: 44.6, 63: 116.1}


@pytest.mark.parametrize(
    ("chosen", "vocab"),
    [
        (SamplingSettings(temperature=1.0, seed=11), 10),
        (SamplingSettings(temperature=2.0, seed=12), 64),
        (SamplingSettings(temperature=1.0, top_k=16, seed=13), 64),
    ],
    ids=["plain", "hot", "top_k"],
)
def test_draws_follow_the_probabilities(chosen, vocab):
    logits = torch.linspace(0, 3, vocab)
    probabilities = warp(logits, chosen).softmax(-1).double()
    num_draws = 20_000

    draws = [sample(logits, chosen, position=p) for p in range(num_draws)]

    counts = torch.bincount(torch.tensor(draws), minlength=vocab).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * num_draws
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < CHI_SQUARE_LIMITS[int(possible.sum()) - 1]


def test_draws_of_one_position_over_seeds_follow_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()

    draws = [
        sample(logits, SamplingSettings(temperature=1.0, seed=s), position=100)
        for s in range(10_000)
    ]

    counts = torch.bincount(torch.tensor(draws), minlength=3)
    expected = torch.tensor([7000.0, 2000.0, 1000.0])
    assert float(((counts - expected) ** 2 / expected).sum()) < 19.8  # 2 degrees of freedom


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.zeros(1000)
    chosen = SamplingSettings(temperature=1.0, seed=42)

    torch.manual_seed(0)
    first = [sample(logits, chosen, position=p) for p in range(20)]
    torch.manual_seed(1)
    again = [sample(logits, chosen, position=p) for p in reversed(range(20))][::-1]

    assert first == again
    assert len(set(first)) > 15
    assert first != [
        sample(logits, SamplingSettings(temperature=1.0, seed=43), position=p) for p in range(20)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_number_are_an_error(temperature):
    chosen = SamplingSettings(temperature=temperature)

    with pytest.raises(ValueError, match="no token can be chosen"):
        sample(torch.tensor([1.0, float("nan")]), chosen, position=0)
    with pytest.raises(ValueError, match="no token can be chosen"):
        sample(torch.tensor([1.0, 2.0]), chosen, position=0, forbidden_token_ids=[0, 1])


def test_unset_fields_are_greedy_without_limits():
    chosen = SamplingSettings.from_proto(types_pb2.SamplingParams(), seed=77)

    assert chosen == SamplingSettings(seed=77)


def test_set_fields_are_taken():
    params = types_pb2.SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        seed=-9,
        stop=["a", "bc"],
        stop_token_ids=[4, 4],
        ignore_eos=True,
    )

    chosen = SamplingSettings.from_proto(params, seed=77)

    assert chosen == SamplingSettings(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        seed=-9,
        max_tokens=5,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=frozenset({4}),
        stop=("a", "bc"),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("top_k", -1),
        ("min_p", -0.5),
        ("min_p", float("nan")),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("stop", [""]),
        ("stop", ["x"] * 17),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    params = types_pb2.SamplingParams(**{field: value})

    with pytest.raises(InvalidRequestError) as caught:
        SamplingSettings.from_proto(params, seed=0)

    assert caught.value.field == f"sampling.{field}"


def test_ignore_eos_leaves_only_the_stop_tokens_as_ends():
    eos = frozenset({2})

    assert SamplingSettings(stop_token_ids=frozenset({5})).ending_token_ids(eos) == {2, 5}
    assert SamplingSettings(stop_token_ids=frozenset({5}), ignore_eos=True).ending_token_ids(
        eos
    ) == {5}
