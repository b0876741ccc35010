from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.decode.logprobs import token_logprob

VOCAB = 30


@given(
    logits_seed=st.integers(0, 10_000),
    token_id=st.integers(0, VOCAB - 1),
    num_top=st.integers(0, 20),
)
def test_logprobs_are_those_of_log_softmax(logits_seed, token_id, num_top):
    logits = 5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(logits_seed))
    expected = logits.log_softmax(-1)

    logprob = token_logprob(logits, token_id, num_top)

    assert logprob.token_id == token_id
    assert logprob.logprob == float(expected[token_id])
    best = sorted(range(VOCAB), key=lambda i: -float(expected[i]))[:num_top]
    assert [top.token_id for top in logprob.top_logprobs] == best
    assert [top.logprob for top in logprob.top_logprobs] == expected[best].tolist()


def test_a_small_vocabulary_has_fewer_alternatives():
    logprob = token_logprob(torch.tensor([0.0, 1.0, 2.0]), 1, 20)

    assert [top.token_id for top in logprob.top_logprobs] == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprobs_are_computed_in_float32(dtype):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)

    logprob = token_logprob(logits, 4, 2)

    assert logprob == token_logprob(logits.float(), 4, 2)
