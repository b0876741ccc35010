from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode.penalties import LogitBias, Penalties

VOCAB = 64
TOKEN_IDS = st.integers(0, VOCAB - 1)


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def penalized(
    logits: torch.Tensor,
    prompt: list[int],
    answer: list[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> torch.Tensor:
    """The slow, obvious way: token by token over all that was said."""
    scores = [float(logit) for logit in logits]
    for token_id in set(prompt) | set(answer):
        score = scores[token_id]
        scores[token_id] = score * repetition if score < 0 else score / repetition
    for token_id, count in Counter(answer).items():
        scores[token_id] -= frequency * count + presence
    return torch.tensor(scores)


@settings(max_examples=300, deadline=None)
@given(
    logits_seed=st.integers(0, 10_000),
    prompt=st.lists(TOKEN_IDS, max_size=40),
    answer=st.lists(TOKEN_IDS, max_size=60),
    first_call=st.integers(0, 60),
    repetition=st.one_of(st.just(1.0), st.floats(0.1, 10)),
    presence=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency=st.one_of(st.just(0.0), st.floats(-2, 2)),
)
def test_penalties_equal_the_obvious_ones_after_every_token(
    logits_seed, prompt, answer, first_call, repetition, presence, frequency
):
    options = {"repetition": repetition, "presence": presence, "frequency": frequency}
    penalties = Penalties(**options, prompt_token_ids=prompt)

    for length, next_token in enumerate([*answer, None]):
        if length >= first_call or length == len(answer):
            logits = random_logits(logits_seed + length)
            expected = penalized(logits, prompt, answer[:length], **options)
            torch.testing.assert_close(penalties(logits), expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(logits, random_logits(logits_seed + length))
        if next_token is not None:
            penalties.add(next_token)


def test_presence_and_frequency_do_not_see_the_prompt():
    penalties = Penalties(repetition=1.0, presence=1.0, frequency=1.0, prompt_token_ids=[1, 2])
    logits = torch.zeros(4)

    assert penalties(logits) is logits
    penalties.add(2)
    penalties.add(2)
    penalties.add(3)

    assert penalties(logits).tolist() == [0.0, 0.0, -3.0, -2.0]


def test_repetition_counts_a_token_once_and_comes_first():
    penalties = Penalties(repetition=2.0, frequency=1.0, prompt_token_ids=[0, 0, 1])
    for token_id in (1, 1, 2):
        penalties.add(token_id)

    assert penalties(torch.tensor([8.0, -8.0, 8.0, 8.0])).tolist() == [4.0, -18.0, 3.0, 8.0]


def test_prompt_tokens_without_a_logit_do_not_matter():
    penalties = Penalties(repetition=2.0, prompt_token_ids=[1, 4, 900])

    assert penalties(torch.tensor([1.0, 1.0])).tolist() == [1.0, 0.5]


def test_without_penalties_the_logits_are_not_touched():
    penalties = Penalties(prompt_token_ids=[1, 2])
    penalties.add(1)
    logits = torch.zeros(4)

    assert penalties(logits) is logits
    assert LogitBias({})(logits) is logits


def test_a_thousand_distinct_tokens_are_all_penalized():
    penalties = Penalties(presence=1.0)
    logits = torch.zeros(1500)

    for token_id in range(1000):
        penalties.add(token_id)
        assert float(penalties(logits).sum()) == -(token_id + 1)


def test_a_bias_is_added_and_may_forbid():
    bias = LogitBias({0: 1.5, 2: float("-inf")})
    whole = LogitBias({1: 2})

    for _ in range(2):
        assert bias(torch.tensor([1.0, 2.0, 3.0])).tolist() == [2.5, 2.0, float("-inf")]
        assert whole(torch.zeros(2)).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("value", [float("-inf"), -100.0])
def test_what_is_forbidden_stays_forbidden(value):
    penalties = Penalties(repetition=0.5, presence=-2.0, prompt_token_ids=[0])
    penalties.add(0)
    logits = torch.tensor([value, 0.0])

    assert int(penalties(logits).argmax()) == 1
