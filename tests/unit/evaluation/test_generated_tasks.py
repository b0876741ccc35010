"""Documents made from seeds: repeatable, of the length asked for, each answer in them once."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest
from transformers import AutoTokenizer

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.haystack import docstring_sentences, prose_sentences
from chunkkv.evaluation.metrics import METRICS, score
from chunkkv.evaluation.tasks import (
    MixedQuestionsTask,
    MultiKeyTask,
    MultiValueTask,
    NeedleGridTask,
    NeedleTask,
    Sample,
    VariableTrackingTask,
)
from tests.unit.evaluation.words import WordTokenizer

TASKS: list[Any] = [
    NeedleTask(num_tokens=600),
    NeedleTask(num_tokens=600, num_needles=3, num_digits=32),
    NeedleGridTask(lengths=(300, 500), depths=(0.0, 0.5, 1.0)),
    MultiKeyTask(num_tokens=900),
    MultiValueTask(num_tokens=900),
    MultiValueTask(num_tokens=900, num_values=1, num_queries=2),
    VariableTrackingTask(num_tokens=600),
    MixedQuestionsTask(num_tokens=600),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=repr)


def made(task: Any, *, seed: int = 0, count: int = 3, tokenizer: Any = None) -> list[Sample]:
    return list(task.samples(tokenizer or WordTokenizer(), seed=seed, num_samples=count))


@every_task
def test_same_seed_gives_the_same_samples(task: Any):
    assert made(task) == made(task)


@every_task
def test_more_samples_only_add_to_fewer(task: Any):
    assert made(task, count=4)[:2] == made(task, count=2)
    assert made(task, count=0) == []


@every_task
def test_other_seeds_give_other_documents(task: Any):
    documents = [sample.context for seed in range(3) for sample in made(task, seed=seed, count=1)]

    assert len(set(documents)) == 3


@every_task
def test_sample_ids_are_unique_over_seeds_and_tasks(task: Any):
    ids = [sample.sample_id for seed in range(2) for sample in made(task, seed=seed, count=7)]
    others = [s.sample_id for other in TASKS if other != task for s in made(other, count=7)]

    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(others)


@every_task
def test_documents_have_the_tokens_asked_for(task: Any, tokenizer: WordTokenizer):
    for sample in made(task):
        num_tokens = len(tokenizer(sample.context, add_special_tokens=False)["input_ids"])

        assert num_tokens == pytest.approx(sample.questions[0].extra["length"], abs=25)


@every_task
def test_no_sentence_stands_in_a_document_twice(task: Any):
    for sample in made(task):
        sentences = re.split(r"(?<=\.) ", sample.context.strip())

        assert len(set(sentences)) == len(sentences)


@every_task
def test_questions_and_prefix_give_nothing_away(task: Any):
    for sample in made(task):
        for question in sample.questions:
            for answer in question.answers:
                assert not re.search(rf"\b{answer}\b", question.text)
                assert not re.search(rf"\b{answer}\b", sample.answer_prefix)


@every_task
def test_the_answers_are_what_the_metric_wants(task: Any):
    for sample in made(task):
        assert sample.task == task.name
        for question in sample.questions:
            assert question.metric in METRICS
            assert question.max_new_tokens > sum(map(len, question.answers)) / 3
            assert score(question, ", ".join(question.answers)) == {"exact": 1, "graded": 1}


@every_task
def test_context_ends_in_white_space_so_that_questions_can_be_tokenized_alone(task: Any):
    assert all(sample.context.endswith("\n\n") for sample in made(task))


@pytest.mark.parametrize("task", [t for t in TASKS if not isinstance(t, MixedQuestionsTask)])
def test_every_number_asked_for_stands_in_the_text_once(task: Any):
    for sample in made(task):
        for question in sample.questions:
            for answer in question.answers:
                if answer.isdigit():
                    assert sample.context.count(answer) == 1


def test_needles_of_the_headline_table():
    for num_tokens in (1000, 2000):
        [sample] = made(NeedleTask(num_tokens=num_tokens), count=1)

        assert [len(question.answers[0]) for question in sample.questions] == [7] * 10
        assert len({question.text for question in sample.questions}) == 10
        assert {question.metric for question in sample.questions} == {"digits"}


def test_needles_stand_in_prose_and_their_depths_are_told():
    [sample] = made(NeedleTask(num_tokens=600), count=1)
    places = []
    for question in sample.questions:
        place = sample.context.index(question.answers[0]) / len(sample.context)
        places.append(place)

        assert question.extra["depth"] == pytest.approx(place, abs=0.02)
    assert not re.search(r"is \d+\. The access code", sample.context), "two side by side"
    assert max(places) - min(places) > 0.3


def test_grid_puts_the_needle_at_the_depth_of_its_cell():
    task = NeedleGridTask(lengths=(500,), depths=(0.0, 0.25, 0.5, 1.0))

    for sample, depth in zip(made(task, count=4), task.depths, strict=True):
        [question] = sample.questions
        place = sample.context.index("The access code") / len(sample.context)

        assert question.extra == {"length": 500, "depth": depth}
        assert place == pytest.approx(depth, abs=0.08)


def test_grid_goes_through_all_cells_with_one_needle_and_then_over_again():
    task = NeedleGridTask(lengths=(300, 500), depths=(0.0, 1.0))

    cells = [
        (q.extra["length"], q.extra["depth"]) for s in made(task, count=8) for q in s.questions
    ]

    assert task.num_cells == 4
    assert cells[:4] == [(300, 0.0), (300, 1.0), (500, 0.0), (500, 1.0)] == cells[4:]
    first, second = (
        {s.questions[0].answers for s in made(task, count=8)[i : i + 4]} for i in (0, 4)
    )
    assert len(first) == len(second) == 1
    assert first != second


def test_many_keys_share_their_words_and_only_some_are_asked_for():
    [sample] = made(MultiKeyTask(num_tokens=900, num_keys=9, num_questions=2), count=1)
    keys = re.findall(r"code of the (\w+) (\w+) is", sample.context)

    assert len(set(keys)) == 9
    assert len({kind for kind, _ in keys}) == len({place for _, place in keys}) == 3
    assert len(sample.questions) == 2


def test_values_of_other_keys_are_wrong():
    [sample] = made(MultiValueTask(num_tokens=900, num_keys=3, num_values=2), count=1)

    assert sample.task == "multi-value"
    for question in sample.questions:
        assert len(question.answers) == 2
        everything = " ".join([*question.answers, *question.extra["wrong"]])
        assert sorted(everything.split()) == sorted(re.findall(r"\d+", sample.context))
        assert score(question, everything) == {"exact": 0, "graded": 1}


def test_one_question_can_ask_for_several_keys():
    task = MultiValueTask(num_tokens=900, num_keys=5, num_values=1, num_queries=2)

    [sample] = made(task, count=1)

    assert sample.task == "multi-query"
    assert [len(question.answers) for question in sample.questions] == [2, 2, 1]


def test_variables_can_be_followed_back_to_their_value():
    task = VariableTrackingTask(num_tokens=600, num_chains=3, num_hops=2)

    for sample in made(task):
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context):
            values[name] = values.get(source, source)  # in the order of the text

        assert len(values) == 9
        for question in sample.questions:
            [value] = re.findall(r"\d+", question.text)
            assert set(question.answers) == {n for n, v in values.items() if v == value}
            assert set(question.extra["wrong"]) == {n for n, v in values.items() if v != value}


def test_mixed_questions_are_of_five_kinds_and_true():
    [sample] = made(MixedQuestionsTask(num_tokens=600, num_codes=4), count=1)
    questions = {question.extra["kind"]: question for question in sample.questions}

    assert set(questions) == {"number", "count", "name", "day", "list"}
    assert questions["count"].answers == (str(sample.context.count("The access code of")),)
    for name in questions["list"].answers:
        assert re.search(rf"{name} is a member of the", sample.context)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (NeedleTask, {"num_needles": 21}, "num_needles=21"),
        (NeedleGridTask, {"depths": (1.5,)}, r"depths=\(1.5,\)"),
        (NeedleGridTask, {"lengths": ()}, r"lengths=\(\)"),
        (MultiKeyTask, {"num_keys": 3}, "num_questions=4, num_keys=3"),
        (MultiValueTask, {"num_queries": 5}, "num_queries=5"),
        (MultiValueTask, {"num_values": 0}, "num_values=0"),
        (VariableTrackingTask, {"num_chains": 0}, "num_chains=0"),
        (MixedQuestionsTask, {"num_members": 5}, "num_members=5"),
    ],
)
def test_settings_out_of_range_are_refused(task: Any, settings: Any, message: str):
    with pytest.raises(InvalidInputError, match=message):
        task(**settings)


def test_documents_too_short_for_what_they_hide_are_refused():
    with pytest.raises(InvalidInputError, match="10 sentences to hide leave room for"):
        made(NeedleTask(num_tokens=150))


def test_answers_that_cannot_all_differ_are_refused():
    with pytest.raises(InvalidInputError, match="16 different numbers of 1 digits"):
        made(MultiValueTask(num_digits=1))


def test_numbers_without_digits_are_refused(tokenizer):
    task = NeedleTask(num_needles=1, num_digits=0)
    with pytest.raises(InvalidInputError, match="1 different numbers of 0 digits"):
        next(task.samples(tokenizer, seed=0, num_samples=1))


def test_short_numbers_differ_too():
    [sample] = made(MultiValueTask(num_tokens=900, num_digits=2), count=1)

    assert len(set(re.findall(r"\d+", sample.context))) == 16


@pytest.mark.slow
def test_prose_goes_on_in_docstrings_when_the_topics_are_used_up():
    num_words = len(" ".join(prose_sentences()).split())

    [sample] = made(NeedleGridTask(lengths=(num_words + 500,), depths=(0.5,)), count=1)

    assert any(sentence in sample.context for sentence in islice(docstring_sentences(), 200))


@pytest.mark.slow
def test_more_text_than_there_is_is_refused():
    with pytest.raises(InvalidInputError, match="the text that ships with Python has"):
        made(NeedleGridTask(lengths=(10**7,)), count=1)


@pytest.mark.model
def test_lengths_hold_with_a_real_tokenizer(model_path: str):
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    for task in TASKS:
        for sample in made(task, tokenizer=tokenizer, count=2):
            num_tokens = len(tokenizer(sample.context)["input_ids"])
            assert num_tokens == pytest.approx(sample.questions[0].extra["length"], abs=30)
