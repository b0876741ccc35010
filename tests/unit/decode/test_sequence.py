from __future__ import annotations

import pytest
import torch
from tiny_model import EOS_TOKEN_ID, byte_tokenizer

from chunkserve.v1 import types_pb2
from services.decode.sampling import SamplingSettings
from services.decode.sequence import DecodeSequence, DecodeTask

TOKENIZER = byte_tokenizer()


def sequence_of(
    pending=(5,), *, max_tokens: int = 100, first_position: int = 0, **sampling
) -> DecodeSequence:
    task = DecodeTask(
        first_position=first_position,
        pending_token_ids=pending,
        sampling=SamplingSettings(**sampling),
        max_tokens=max_tokens,
        prompt_token_ids=pending,
    )
    return DecodeSequence(task, tokenizer=TOKENIZER, eos_token_ids=frozenset({EOS_TOKEN_ID}))


def logits_for(*token_ids: int) -> torch.Tensor:
    """Logits whose best tokens are these, in this order."""
    logits = torch.zeros(257)
    for rank, token_id in enumerate(token_ids):
        logits[token_id] = 10.0 - rank
    return logits


def feed(sequence: DecodeSequence, text: str) -> str:
    """Let the model "produce" a text, byte by byte; return what was released."""
    released = ""
    for token_id in TOKENIZER.encode(text):
        if sequence.is_finished:
            break
        sequence.next_input(512)
        released += sequence.accept(logits_for(token_id)).text
    return released


def test_pending_tokens_are_seen_in_pieces_before_anything_is_chosen():
    sequence = sequence_of(pending=(1, 2, 3, 4, 5))

    assert sequence.next_input(2) == [1, 2]
    assert sequence.accept(logits_for(9)) is None
    assert sequence.next_input(2) == [3, 4]
    assert sequence.accept(logits_for(9)) is None
    assert sequence.next_input(2) == [5]
    assert list(sequence.accept(logits_for(9)).token_ids) == [9]
    assert sequence.next_input(2) == [9]


def test_deltas_are_numbered_from_zero():
    sequence = sequence_of()

    indices = []
    for token_id in (7, 8, 9):
        sequence.next_input(512)
        indices.append(sequence.accept(logits_for(token_id)).first_token_index)

    assert indices == [0, 1, 2]
    assert sequence.token_ids == [7, 8, 9]


def test_the_end_of_sequence_token_ends_it_without_text():
    sequence = sequence_of()

    sequence.next_input(512)
    delta = sequence.accept(logits_for(EOS_TOKEN_ID))

    assert (delta.text, list(delta.token_ids)) == ("", [EOS_TOKEN_ID])
    assert sequence.finish_reason == types_pb2.FINISH_REASON_EOS


def test_ignore_eos_goes_on():
    sequence = sequence_of(ignore_eos=True)

    sequence.next_input(512)
    sequence.accept(logits_for(EOS_TOKEN_ID))

    assert not sequence.is_finished


def test_a_stop_token_ends_it():
    sequence = sequence_of(stop_token_ids=frozenset({77}), ignore_eos=True)

    sequence.next_input(512)
    sequence.accept(logits_for(77))

    assert sequence.finish_reason == types_pb2.FINISH_REASON_EOS


def test_before_min_tokens_no_ending_token_is_chosen():
    sequence = sequence_of(min_tokens=2, stop_token_ids=frozenset({77}))

    for _ in range(3):
        sequence.next_input(512)
        sequence.accept(logits_for(EOS_TOKEN_ID, 77, 30))

    assert sequence.token_ids == [30, 30, EOS_TOKEN_ID]
    assert sequence.finish_reason == types_pb2.FINISH_REASON_EOS


def test_max_tokens_ends_it_and_releases_what_was_held_back():
    sequence = sequence_of(max_tokens=4, stop=("STOP",))

    assert feed(sequence, "aSTxyz") == "aSTx"
    assert sequence.finish_reason == types_pb2.FINISH_REASON_LENGTH

    sequence = sequence_of(max_tokens=3, stop=("STOP",))

    assert feed(sequence, "aSTxyz") == "aST"


def test_a_stop_string_ends_it_and_its_tokens_stay():
    sequence = sequence_of(stop=("\n\n",))

    assert feed(sequence, "ab\n\ncd") == "ab"
    assert sequence.finish_reason == types_pb2.FINISH_REASON_STOP
    assert sequence.matched_stop == "\n\n"
    assert len(sequence.token_ids) == 4


def test_a_stop_string_wins_over_the_last_allowed_token():
    sequence = sequence_of(max_tokens=2, stop=("b",))

    assert feed(sequence, "ab") == "a"
    assert sequence.finish_reason == types_pb2.FINISH_REASON_STOP


def test_a_stop_string_that_the_end_completes_counts():
    # The replacement character is certain only at the end: its bytes could have gone on.
    sequence = sequence_of(max_tokens=1, stop=("\ufffd",))

    sequence.next_input(512)
    delta = sequence.accept(logits_for(TOKENIZER.encode("é")[0]))

    assert delta.text == ""
    assert sequence.finish_reason == types_pb2.FINISH_REASON_STOP


def test_the_draw_depends_on_the_position_in_the_conversation_alone():
    long, short = sequence_of((1, 2, 3), temperature=1.0), sequence_of((1, 2), temperature=1.0)
    cached = sequence_of((3,), first_position=2, temperature=1.0)
    flat = torch.zeros(257)
    for sequence in (long, short, cached):
        sequence.next_input(512)

    short.accept(flat)
    short.next_input(512)

    token_ids = [list(each.accept(flat).token_ids) for each in (long, short, cached)]
    assert token_ids[0] == token_ids[1] == token_ids[2]


def test_penalties_see_the_prompt_and_the_answer():
    sequence = sequence_of((5, 6), repetition_penalty=2.0, frequency_penalty=1.0)

    chosen = []
    for _ in range(5):
        sequence.next_input(512)
        chosen.extend(sequence.accept(logits_for(5, 7, 8)).token_ids)

    # 10, 9 and 8, halved (5's at once), and 1 less for each time: 5 to 3, 7 to 3.5, 8 to 3.
    assert chosen == [7, 8, 5, 5, 7]


def test_logprobs_come_with_each_token_and_are_the_models_own():
    sequence = sequence_of(logprobs=2, logit_bias={9: 100.0}, temperature=0.5)
    logits = logits_for(7, 8)
    sequence.next_input(512)

    delta = sequence.accept(logits)

    [logprob] = delta.logprobs
    assert list(delta.token_ids) == [9] == [logprob.token_id]
    assert logprob.logprob == pytest.approx(float(logits.log_softmax(-1)[9]))
    assert [top.token_id for top in logprob.top_logprobs] == [7, 8]


def test_without_logprobs_none_are_sent():
    sequence = sequence_of()
    sequence.next_input(512)

    assert not sequence.accept(logits_for(7)).logprobs


def test_a_model_without_numbers_is_an_error():
    sequence = sequence_of()
    sequence.next_input(512)

    with pytest.raises(ValueError, match="no token can be chosen"):
        sequence.accept(torch.full((257,), float("nan")))
