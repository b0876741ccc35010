"""Contexts end where all prompts of a sample still agree."""

from __future__ import annotations

import dataclasses
from typing import Any

from chunkkv.evaluation.prompts import render
from tests.tiny_model import byte_tokenizer
from tests.unit.evaluation.documents import sample

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class PairTokenizer:
    """Two characters that stand together make one token: texts merge across their boundary."""

    chat_template = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, Any]:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return {"input_ids": [hash(pair) for pair in pairs]}


def test_context_and_question_are_the_whole_text() -> None:
    tokenizer, asked = byte_tokenizer(), sample(num_questions=3)

    prompt = render(tokenizer, asked)

    assert tokenizer.decode(prompt.context) == asked.context
    for index, question in enumerate(asked.questions):
        assert tokenizer.decode(prompt.whole(index)) == asked.context + question.text


def test_template_before_the_context_is_compressed_and_the_rest_is_not() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    asked = dataclasses.replace(sample(), answer_prefix="It is")

    prompt = render(tokenizer, asked)

    assert tokenizer.decode(prompt.context) == f"<user>{asked.context}"
    expected = f"{asked.questions[0].text}</user><assistant>It is"
    assert tokenizer.decode(prompt.questions[0]) == expected


def test_token_across_the_boundary_belongs_to_the_question() -> None:
    asked = dataclasses.replace(sample(), context="abc")  # the question begins inside a pair

    prompt = render(PairTokenizer(), asked)

    assert prompt.context == (hash("ab"),)
    assert prompt.questions[0][0] == hash("cQ")


def test_prompt_without_a_question_leaves_one_token_to_run() -> None:
    [question] = sample(num_questions=1).questions
    asked = dataclasses.replace(sample(), questions=(dataclasses.replace(question, text=""),))

    prompt = render(byte_tokenizer(), asked)

    assert len(prompt.questions[0]) == 1
