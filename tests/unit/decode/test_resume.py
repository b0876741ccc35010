"""An answer that goes on elsewhere, from every token on, is the answer that was not interrupted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_model import EOS_TOKEN_ID, byte_tokenizer

from chunkserve.v1 import types_pb2
from services.decode.sampling import SamplingSettings
from services.decode.sequence import DecodeSequence, DecodeTask
from services.runtime.errors import InvalidRequestError

TOKENIZER = byte_tokenizer()
PROMPT = [70, 71, 72, 73]
NUM_CACHED = 2


@dataclass
class Run:
    """What a sequence sent, token by token, and how it ended."""

    deltas: list[types_pb2.TokenDelta]
    sequence: DecodeSequence

    @property
    def texts(self) -> list[str]:
        return [delta.text for delta in self.deltas]

    @property
    def end(self) -> tuple[int, str]:
        return self.sequence.finish_reason, self.sequence.matched_stop


def scripted_logits(text: str, index: int) -> torch.Tensor:
    """Logits of a model that mostly says ``text``: other tokens, and its end, have a chance."""
    script = [*TOKENIZER.encode(text), EOS_TOKEN_ID]
    logits = torch.randn(257, generator=torch.Generator().manual_seed(index))
    logits[script[min(index, len(script) - 1)]] += 6
    return logits


def run(text: str, sampling: SamplingSettings, *, resumed=(), max_tokens: int = 200) -> Run:
    """Generate to the end; the last prompt tokens and what is resumed are pending."""
    conversation = [*PROMPT, *resumed]
    task = DecodeTask(
        first_position=NUM_CACHED,
        pending_token_ids=conversation[NUM_CACHED:],
        sampling=sampling,
        max_tokens=max_tokens,
        num_resumed_tokens=len(resumed),
        prompt_token_ids=conversation,
    )
    sequence = DecodeSequence(task, tokenizer=TOKENIZER, eos_token_ids=frozenset({EOS_TOKEN_ID}))
    seen, deltas = NUM_CACHED, []
    while not sequence.is_finished:
        seen += len(sequence.next_input(3))
        delta = sequence.accept(scripted_logits(text, seen - len(PROMPT)))
        if delta is not None:
            deltas.append(delta)
    return Run(deltas, sequence)


def check_every_split(text: str, sampling: SamplingSettings, max_tokens: int) -> None:
    whole = run(text, sampling, max_tokens=max_tokens)
    answer = whole.sequence.token_ids
    for num_resumed in range(len(answer) + 1):
        rest = run(text, sampling, resumed=answer[:num_resumed], max_tokens=max_tokens)

        assert rest.sequence.token_ids == answer
        assert rest.sequence.new_token_ids == answer[num_resumed:]
        assert rest.deltas == whole.deltas[num_resumed:]
        assert rest.end == whole.end


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab é中文字👍🏽👩‍👧\u0301\n"), max_size=12),
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logprobs=st.sampled_from([None, 3]),
    min_tokens=st.integers(0, 10),
    max_tokens=st.integers(1, 30),
    stop=st.lists(
        st.sampled_from(["ab", "中文", "👍🏽", "b é", "\n\n", "\ufffd\ufffd"]), max_size=3
    ),
)
@example(
    text="ab 中文👍🏽 and é" * 2,
    seed=5,
    temperature=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logprobs=None,
    min_tokens=0,
    max_tokens=100,
    stop=["👍🏽 and é!", "\n\n"],
)
def test_a_resumed_answer_equals_the_uninterrupted_one(text, stop, max_tokens, **sampling):
    check_every_split(text, SamplingSettings(stop=tuple(stop), **sampling), max_tokens)


@pytest.mark.parametrize(
    ("sampling", "max_tokens", "reason"),
    [
        (SamplingSettings(), 50, types_pb2.FINISH_REASON_EOS),
        (SamplingSettings(), 3, types_pb2.FINISH_REASON_LENGTH),
        (SamplingSettings(stop=("d",)), 50, types_pb2.FINISH_REASON_STOP),
    ],
    ids=["eos", "length", "stop"],
)
def test_an_answer_whose_end_got_lost_has_ended_before_the_first_step(sampling, max_tokens, reason):
    whole = run("abcdef", sampling, max_tokens=max_tokens)
    assert whole.sequence.finish_reason == reason

    resumed = run(
        "abcdef", sampling, resumed=whole.sequence.token_ids, max_tokens=max_tokens
    ).sequence

    assert resumed.finish_reason == reason
    assert resumed.token_ids == whole.sequence.token_ids
    assert resumed.new_token_ids == []
    assert resumed.next_input(512)
    assert resumed.accept(torch.zeros(257)) is None
    assert resumed.last_token_at == resumed.first_token_at > 0


@pytest.mark.parametrize(
    ("sampling", "max_tokens"),
    [(SamplingSettings(), 50), (SamplingSettings(), 2), (SamplingSettings(stop=("b",)), 50)],
    ids=["eos", "length", "stop"],
)
def test_tokens_behind_the_end_of_an_answer_are_refused(sampling, max_tokens):
    token_ids = [*TOKENIZER.encode("ab"), EOS_TOKEN_ID, *TOKENIZER.encode("cd")]

    with pytest.raises(InvalidRequestError, match=r"answer ended with token [23]") as caught:
        run("abcd", sampling, resumed=token_ids, max_tokens=max_tokens)

    assert caught.value.field == "num_resumed_tokens"
