"""Inputs to token ids, with the demo model's tokenizer and template."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from chunkserve.v1 import prefill_pb2, types_pb2
from services.models.chat import prefix_ends, tokenize
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


SYSTEM = {"role": "system", "content": "You know this book: Call me Ishmael."}
JOINED = {"role": "user", "content": "\n\n\nWhat is the capital of France?"}


def marked(message: dict[str, str]) -> dict[str, object]:
    return {**message, "cache_breakpoint": True}


def ends(
    loaded: LoadedModel, *messages: dict[str, object], before: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Return the tokens of messages, and where their prefixes end."""
    request = chat(*messages)
    ids = tokenize(loaded, request, before=before or [])
    return ids, prefix_ends(loaded, request, ids, before=before or [])


def test_a_prefix_ends_behind_its_message(loaded):
    ids, [first, second] = ends(loaded, marked(SYSTEM), QUESTION, ANSWER, marked(FOLLOW_UP))

    text = loaded.tokenizer.decode
    assert text(ids[:first]) == f"<|im_start|>system\n{SYSTEM['content']}<|im_end|>\n"
    assert text(ids[first:second]).endswith(f"{FOLLOW_UP['content']}<|im_end|>\n")
    assert text(ids[second:]) == "<|im_start|>assistant\n"


def test_a_prefix_is_the_same_whatever_follows(loaded):
    one, [end] = ends(loaded, marked(SYSTEM), QUESTION)
    other, [other_end] = ends(loaded, marked(SYSTEM), FOLLOW_UP, ANSWER, QUESTION)

    assert one[:end] == other[:other_end]


@pytest.mark.parametrize("ended_by_itself", [True, False])
def test_a_prefix_of_a_later_turn_is_counted_in_its_new_tokens(loaded, ended_by_itself):
    answer = loaded.tokenizer(ANSWER["content"], add_special_tokens=False)["input_ids"]
    before = [*rendered(loaded, QUESTION), *answer, *([2] if ended_by_itself else [])]

    ids, [end] = ends(loaded, marked(FOLLOW_UP), QUESTION, before=before)

    assert loaded.tokenizer.decode(ids[:end]).endswith(f"{FOLLOW_UP['content']}<|im_end|>\n")
    assert loaded.tokenizer.decode(ids[end:]).startswith("<|im_start|>user")


@pytest.mark.parametrize("request_", [prefill_pb2.TokenizeRequest(text="a"), chat(QUESTION)])
def test_an_input_without_marks_has_no_prefixes(loaded, request_):
    assert prefix_ends(loaded, request_, tokenize(loaded, request_)) == []


PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [PLAIN, PLAIN + "{% if add_generation_prompt %}Answer:{% else %}The end.{% endif %}"],
    ids=["joins", "marks_the_end"],
)
def test_what_the_template_or_the_tokenizer_joins_with_the_rest_belongs_to_the_rest(
    loaded, template
):
    odd = with_template(loaded, template)

    ids, [end] = ends(odd, marked(SYSTEM), JOINED)

    # Three line breaks become one token with the one that ends the message.
    assert odd.tokenizer.decode(ids[:end]) == SYSTEM["content"]
    assert odd.tokenizer.decode(ids[end:]).startswith("\n\n")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} messages: " + PLAIN,
        "{% if messages | length < 2 %}{{ raise_exception('ask something') }}{% endif %}" + PLAIN,
        "{% for m in messages if m.role != 'system' %}[{% if loop.first %}"
        "{{ messages[0].content }}{% endif %}{{ m.content }}]{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}\n{% endfor %}",
    ],
    ids=["counts", "refuses", "folds", "reverses"],
)
def test_a_prefix_that_the_template_does_not_allow_is_refused_by_its_index(loaded, template):
    odd = with_template(loaded, template)

    with pytest.raises(InvalidRequestError, match=r"writes messages\[0\] otherwise") as caught:
        ends(odd, marked(SYSTEM), QUESTION)

    assert caught.value.field == "chat.messages[0].cache_breakpoint"


def test_a_message_that_the_template_folds_into_another_is_in_the_prefix_of_that(loaded):
    folds = with_template(
        loaded,
        "{% for m in messages if m.role != 'system' %}[{% if loop.first %}"
        "{{ messages[0].content }}\n{% endif %}{{ m.content }}]{% endfor %}",
    )

    ids, [end] = ends(folds, SYSTEM, marked(QUESTION), ANSWER, FOLLOW_UP)

    # Its question mark and the bracket behind it become one token with the next one's.
    assert QUESTION["content"].rstrip("?") in folds.tokenizer.decode(ids[:end])
    assert ANSWER["content"] not in folds.tokenizer.decode(ids[:end])
