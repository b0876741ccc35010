"""Inputs to token ids, with the demo model's tokenizer and template."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from chunkserve.v1 import prefill_pb2, types_pb2
from services.models.chat import tokenize
from services.models.loader import LoadedModel, load_model
from services.runtime.errors import InvalidRequestError

pytestmark = pytest.mark.model

VOCAB_SIZE = 49152
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "The capital of France is Paris."}
FOLLOW_UP = {"role": "user", "content": "And of Spain?"}


@pytest.fixture(scope="module")
def loaded(model_path) -> LoadedModel:
    """The demo model's tokenizer; the weights are not needed."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB_SIZE))
    return LoadedModel(
        name="demo",
        model=SimpleNamespace(config=config),
        tokenizer=AutoTokenizer.from_pretrained(model_path),
        fingerprint="f",
        max_model_len=8192,
        eos_token_ids=frozenset({2}),
    )


def chat(*messages: dict[str, str]) -> prefill_pb2.TokenizeRequest:
    return prefill_pb2.TokenizeRequest(
        chat=types_pb2.ChatInput(messages=[types_pb2.ChatMessage(**m) for m in messages])
    )


def rendered(loaded: LoadedModel, *messages: dict[str, str]) -> list[int]:
    encoded = loaded.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
    return list(encoded["input_ids"])


def test_a_first_turn_is_the_template(loaded):
    assert tokenize(loaded, chat(QUESTION)) == rendered(loaded, QUESTION)


@pytest.mark.parametrize("ended_by_itself", [True, False])
def test_a_later_turn_continues_what_the_template_makes_of_the_whole(loaded, ended_by_itself):
    closing = [2] if ended_by_itself else []
    answer = loaded.tokenizer(ANSWER["content"], add_special_tokens=False)["input_ids"]
    before = [*rendered(loaded, QUESTION), *answer, *closing]

    new = tokenize(loaded, chat(FOLLOW_UP), before=before)

    assert before + new == rendered(loaded, QUESTION, ANSWER, FOLLOW_UP)


def test_text_and_token_ids_are_taken_as_they_are(loaded):
    text = prefill_pb2.TokenizeRequest(text="two words")
    ids = prefill_pb2.TokenizeRequest(token_ids=types_pb2.TokenIds(ids=[5, 0, VOCAB_SIZE - 1]))

    assert loaded.tokenizer.decode(tokenize(loaded, text)) == "two words"
    assert tokenize(loaded, ids) == [5, 0, VOCAB_SIZE - 1]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (prefill_pb2.TokenizeRequest(), "no input"),
        (prefill_pb2.TokenizeRequest(text=""), "prompt is empty"),
        (chat(), "ends with nothing"),
        (chat(QUESTION, ANSWER), "ends with assistant"),
        (
            prefill_pb2.TokenizeRequest(token_ids=types_pb2.TokenIds(ids=[1, VOCAB_SIZE])),
            r"ids\[1\] is 49152",
        ),
        (
            prefill_pb2.TokenizeRequest(token_ids=types_pb2.TokenIds(ids=[-1])),
            r"ids\[0\] is -1",
        ),
    ],
    ids=["nothing", "empty_text", "no_messages", "ends_with_answer", "large_id", "negative_id"],
)
def test_bad_input_says_what_to_send(loaded, request_, says):
    with pytest.raises(InvalidRequestError, match=says):
        tokenize(loaded, request_)


def with_template(loaded: LoadedModel, template: str | None) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(loaded.tokenizer.name_or_path)
    tokenizer.chat_template = template
    return dataclasses.replace(loaded, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("template", "before", "says"),
    [
        (None, [], "has no chat template; send text"),
        ("{{ raise_exception('roles must alternate') }}", [], "roles must alternate"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", [5], "leaves"),
    ],
    ids=["none", "refuses", "leaves_out_answers"],
)
def test_a_template_that_cannot_be_used_is_told(loaded, template, before, says):
    with pytest.raises(InvalidRequestError, match=says):
        tokenize(with_template(loaded, template), chat(QUESTION), before=before)


def test_a_turn_that_the_template_makes_nothing_of_is_empty(loaded):
    bare = with_template(loaded, "{% for m in messages %}{{ m.content }}{% endfor %}")
    nothing = {"role": "user", "content": ""}

    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        tokenize(bare, chat(nothing), before=[5, 2])


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot load the model .*nothing"):
        load_model(str(tmp_path / "nothing"))
