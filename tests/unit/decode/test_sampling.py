from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import load_tiny
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chunkserve.v1 import types_pb2
from services.decode.philox import random_words, uniforms
from services.decode.sampling import Sampler, SamplingSettings, candidates, sample
from services.runtime.errors import InvalidRequestError

VOCAB = 64


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def choose(logits: torch.Tensor, chosen: SamplingSettings, *, position: int, forbidden=()) -> int:
    """The first token of an answer."""
    return Sampler(chosen, ending_token_ids=forbidden).choose(logits, position=position)


def warp(logits: torch.Tensor, chosen: SamplingSettings) -> torch.Tensor:
    """The candidates as transformers has them: in their places, ``-inf`` where a token fell out."""
    token_ids, kept = candidates(logits, chosen)
    warped = torch.full_like(logits, float("-inf"))
    warped[torch.from_numpy(token_ids)] = torch.from_numpy(kept)
    return warped


def obvious_draw(warped: torch.Tensor, seed: int, position: int) -> int:
    """Noise for every token, and the first of the best."""
    uniform = torch.from_numpy(uniforms(random_words(len(warped), seed=seed, position=position)))
    return int((warped - (-uniform.log()).log()).numpy().argmax())


def transformers_processors(
    chosen: SamplingSettings, num_prompt_tokens: int, ending_token_ids: list[int]
) -> LogitsProcessorList:
    """What `generate` builds from the same settings, before the warpers."""
    processors = LogitsProcessorList()
    if chosen.logit_bias:
        bias = {(token_id,): float(value) for token_id, value in chosen.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if chosen.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    if chosen.min_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                num_prompt_tokens, chosen.min_tokens, ending_token_ids
            )
        )
    return processors


def transformers_warp(logits: torch.Tensor, chosen: SamplingSettings) -> torch.Tensor:
    """What `generate` builds from the same settings, of the warpers."""
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

    # Which of two equal tokens at the edge of a nucleus stays is up to torch.sort there.
    assert torch.equal(ours.sort().values, theirs.sort().values)
    if not ties:
        assert torch.equal(ours, theirs)


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


@settings(max_examples=300, deadline=None)
@given(
    logits_seed=st.integers(0, 10_000),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=10),
    min_tokens=st.integers(0, 8),
    temperature=st.floats(0.1, 2.0),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_the_chain_equals_that_of_transformers(
    logits_seed,
    prompt,
    answer,
    repetition_penalty,
    logit_bias,
    min_tokens,
    temperature,
    top_k,
    top_p,
    min_p,
):
    logits, endings = random_logits(logits_seed), [3, 5]
    chosen = SamplingSettings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        min_tokens=min_tokens,
        repetition_penalty=repetition_penalty,
        logit_bias=logit_bias,
    )
    sampler = Sampler(chosen, prompt_token_ids=prompt, ending_token_ids=endings)
    for i, token_id in enumerate(answer):
        if i == len(answer) // 2:
            sampler.process(logits)  # a step in between must not matter
        sampler.add(token_id)

    ours = sampler.process(logits)

    processors = transformers_processors(chosen, len(prompt), endings)
    theirs = processors(torch.tensor([prompt + answer]), logits[None].clone())[0]
    assert torch.equal(ours, theirs)
    assert torch.equal(logits, random_logits(logits_seed))
    assert torch.equal(warp(ours, chosen), transformers_warp(theirs, chosen))


def test_every_step_of_generate_is_processed_alike():
    """Order included, as `generate` itself applies it: the processors above are ours to list."""
    loaded, prompt = load_tiny(), list(range(10, 30))
    chosen = SamplingSettings(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        min_tokens=6,
        repetition_penalty=1.3,
        logit_bias={7: 4.0, 20: -3.0, 0: 50.0},
    )
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = loaded.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=6,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.3,
            sequence_bias={(7,): 4.0, (20,): -3.0, (0,): 50.0},
            eos_token_id=0,
            pad_token_id=0,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
    sampler = Sampler(chosen, prompt_token_ids=prompt, ending_token_ids=[0])
    answer = output.sequences[0, len(prompt) :].tolist()

    # The bias makes the end certain as soon as it is allowed.
    assert len(answer) == 7
    for raw, processed, token_id in zip(output.logits, output.scores, answer, strict=True):
        assert torch.equal(warp(sampler.process(raw[0]), chosen), processed[0])
        sampler.add(token_id)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_the_smallest_nucleus_is_the_likeliest_token(scale):
    for logits_seed in range(20):
        logits = scale * random_logits(logits_seed)
        warped = warp(logits, SamplingSettings(temperature=1.0, top_p=1e-9))
        assert warped.isfinite().nonzero().flatten().tolist() == [int(logits.argmax())]


def test_of_equal_tokens_at_the_edge_of_a_nucleus_the_first_stay():
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])

    for percent in range(1, 100):
        warped = warp(logits, SamplingSettings(temperature=1.0, top_p=percent / 100))
        kept = warped.isfinite().nonzero().flatten().tolist()
        assert kept == sorted([1, 3, 0, 2, 4][: len(kept)])


def test_the_temperature_of_almost_nothing_is_greedy():
    logits = 1e4 * random_logits(1)

    for temperature in (1e-45, 1e-6):
        chosen = SamplingSettings(temperature=temperature)
        assert choose(logits, chosen, position=3) == int(logits.argmax())


def test_greedy_skips_forbidden_tokens():
    logits = torch.tensor([1.0, 5.0, 4.0, 3.0])

    assert choose(logits, SamplingSettings(min_tokens=1), position=0, forbidden=[1, 2]) == 3
    assert logits.tolist() == [1.0, 5.0, 4.0, 3.0]


def test_forbidden_tokens_are_masked_before_the_filters_as_transformers_does():
    logits, eos = random_logits(2), [int(random_logits(2).argmax())]
    masked = MinNewTokensLengthLogitsProcessor(1, 4, eos)(torch.zeros(1, 2), logits[None])[0]
    chosen = SamplingSettings(temperature=1.0, top_k=2, min_tokens=4)

    allowed = set(warp(masked, chosen).isfinite().nonzero().flatten().tolist())
    drawn = {choose(logits, chosen, position=p, forbidden=eos) for p in range(200)}

    assert drawn == allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_sampled_in_float32(dtype):
    logits = random_logits(3).to(dtype)
    chosen = SamplingSettings(temperature=0.8, seed=5, repetition_penalty=1.1)

    assert choose(logits, chosen, position=9) == choose(logits.float(), chosen, position=9)


@pytest.mark.parametrize("vocab", [VOCAB, 49_152])
@pytest.mark.parametrize("top_k", [1, 2, 40, 15_000])
def test_filters_do_not_move_the_noise_of_the_tokens_that_stay(vocab, top_k):
    logits = random_logits(4, vocab)
    chosen = SamplingSettings(temperature=1.5, top_k=min(top_k, vocab), seed=3)
    warped = warp(logits, chosen)

    for position in range(20):
        drawn = sample(logits, chosen, position=position)
        assert drawn == obvious_draw(warped, seed=3, position=position)


@settings(max_examples=1500, deadline=None)
@given(
    logits_seed=st.integers(0, 2**32),
    vocab=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 3.0, 10.0, 1e3, 1e8, 1e30]),
    shift=st.sampled_from([0.0, 0.0, -50.0, 1e6]),
    form=st.sampled_from(["float32", "bfloat16", "whole numbers"]),
    share_forbidden=st.sampled_from([0.0, 0.1, 0.9]),
    temperature=st.floats(1e-5, 2.0),
    top_k=st.sampled_from([0, 0, 1, 50, 2000]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.0, 1e-6, 0.05]),
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
)
def test_tokens_left_out_of_the_draw_could_not_have_won(
    logits_seed,
    vocab,
    scale,
    shift,
    form,
    share_forbidden,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
):
    logits = scale * random_logits(logits_seed, vocab) + shift
    if form == "bfloat16":
        logits = logits.bfloat16().float()
    elif form == "whole numbers":
        logits = logits.round()
    logits[: int(share_forbidden * vocab)] = float("-inf")
    chosen = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )

    drawn = sample(logits, chosen, position=position)

    assert drawn == obvious_draw(warp(logits, chosen), seed, position)


# Drawn by the first implementation, in tensor operations: a seed keeps its answers.
DRAWN_BEFORE = [
    ({"temperature": 1.0}, [7121, 5579, 2231, 2605, 4592, 3448, 4744, 2016]),
    ({"temperature": 0.2}, [4338, 9663, 843, 2605, 4592, 144, 8841, 8786]),
    ({"temperature": 2.0, "top_k": 50}, [4338, 9752, 843, 843, 8587, 144, 7045, 6812]),
    ({"temperature": 1.0, "top_p": 0.9}, [7121, 5579, 6600, 2605, 4592, 3448, 4744, 2016]),
    ({"temperature": 1.5, "min_p": 0.1}, [7121, 5579, 2231, 2605, 4592, 3448, 4744, 2016]),
    (
        {"temperature": 0.8, "top_k": 500, "top_p": 0.95, "min_p": 0.02},
        [7121, 5579, 6600, 2605, 4592, 3448, 8841, 8786],
    ),
]


@pytest.mark.parametrize(("filters", "token_ids"), DRAWN_BEFORE)
def test_a_seed_draws_the_tokens_that_it_always_drew(filters, token_ids):
    logits = torch.arange(10_007) * 40_503 % 2**16 / 2**12  # 0 to 16, without a pattern
    chosen = SamplingSettings(seed=-(2**40) - 5, **filters)

    assert [sample(logits, chosen, position=p) for p in range(100, 108)] == token_ids


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
    num_draws = 5_000

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
        for s in range(4_000)
    ]

    counts = torch.bincount(torch.tensor(draws), minlength=3)
    expected = torch.tensor([2800.0, 800.0, 400.0])
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
        sample(torch.full((2,), float("-inf")), chosen, position=0)


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
        repetition_penalty=1.25,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias={3: -100, 9: 0.5},
        logprobs=0,
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
        repetition_penalty=1.25,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias={3: -100.0, 9: 0.5},
        logprobs=0,
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
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("inf")),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    params = types_pb2.SamplingParams(**{field: value})

    with pytest.raises(InvalidRequestError) as caught:
        SamplingSettings.from_proto(params, seed=0)

    assert caught.value.field == f"sampling.{field}"
    assert "; send " in caught.value.message


@pytest.mark.parametrize("bias", [-100.5, 101.0, float("nan"), float("inf")])
def test_a_bias_out_of_range_is_named_with_its_token(bias):
    params = types_pb2.SamplingParams(logit_bias={4: 1.0, 7: bias})

    with pytest.raises(InvalidRequestError, match=r"logit_bias\[7\] is .*; send -100 to 100"):
        SamplingSettings.from_proto(params, seed=0)


def test_ignore_eos_leaves_only_the_stop_tokens_as_ends():
    eos = frozenset({2})

    assert SamplingSettings(stop_token_ids=frozenset({5})).ending_token_ids(eos) == {2, 5}
    assert SamplingSettings(stop_token_ids=frozenset({5}), ignore_eos=True).ending_token_ids(
        eos
    ) == {5}
