"""GSM8K from files in its published format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chunkkv.errors import DatasetError, InvalidInputError
from chunkkv.evaluation.metrics import score
from chunkkv.evaluation.tasks import GSM8KTask
from chunkkv.evaluation.tasks.gsm8k_examples import WORKED
from tests.unit.evaluation.words import WordTokenizer


@pytest.fixture
def path(data: Path) -> Path:
    return data / "gsm8k.jsonl"


def samples(task: GSM8KTask, *, seed: int = 0, count: int = 10) -> list[Any]:
    return list(task.samples(WordTokenizer(), seed=seed, num_samples=count))


def test_examples_are_the_context_and_the_problem_is_the_question(path: Path):
    found = samples(GSM8KTask(path))

    assert len(found) == 4
    assert len({sample.context for sample in found}) == 1
    assert found[0].context.count("Question: ") == 8
    assert found[0].context.endswith("The answer is 10.\n\n")
    for sample in found:
        [question] = sample.questions
        assert question.text.startswith("Question: ")
        assert question.text.endswith("\nAnswer:")
        assert question.text not in sample.context


def test_answers_are_the_numbers_after_the_mark(path: Path):
    answers = {q.answers[0]: q for s in samples(GSM8KTask(path)) for q in s.questions}

    assert set(answers) == {"42", "1,200", "13", "-3"}
    assert score(answers["1,200"], "1000 + 200 = 1200. The answer is 1200.")["exact"] == 1
    assert score(answers["-3"], "The answer is -3.")["exact"] == 1


def test_worked_examples_are_right():
    for question, answer in WORKED:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
        compute: dict[str, Any] = {
            "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__,
        }  # fmt: skip

        assert question.endswith("?")
        assert len(steps) >= 2
        for left, sign, right, result in steps:
            assert compute[sign](int(left), int(right)) == int(result)
        assert answer.endswith(f" The answer is {steps[-1][-1]}.")


def test_many_shots_come_from_the_train_file_without_calculator_marks(path: Path):
    task = GSM8KTask(path, train_file=path, num_shots=4)

    [sample] = samples(task, count=1)

    assert "Answer: She has 3*14=42 pens. The answer is 42.\n\n" in sample.context
    assert "<<" not in sample.context
    assert sample.context != samples(task, seed=1, count=1)[0].context


def test_several_problems_can_share_one_prefill(path: Path):
    found = samples(GSM8KTask(path, questions_per_sample=3))

    assert [len(sample.questions) for sample in found] == [3, 1]
    assert len(samples(GSM8KTask(path, questions_per_sample=3), count=1)) == 1


def test_ids_tell_settings_apart(path: Path):
    tasks = [
        GSM8KTask(path),
        GSM8KTask(path, num_shots=4),
        GSM8KTask(path, train_file=path, num_shots=4),
        GSM8KTask(path, questions_per_sample=2),
    ]

    ids = [sample.sample_id for task in tasks for sample in samples(task)]

    assert len(set(ids)) == len(ids)


def test_more_examples_than_there_are_are_refused(path: Path):
    with pytest.raises(InvalidInputError, match="num_shots=9; without train_file there are 8"):
        GSM8KTask(path, num_shots=9)
    with pytest.raises(InvalidInputError, match=r"num_shots=9; .*gsm8k\.jsonl has 4"):
        samples(GSM8KTask(path, train_file=path, num_shots=9))
    with pytest.raises(InvalidInputError, match="questions_per_sample=0"):
        GSM8KTask(path, questions_per_sample=0)


def test_answer_without_its_mark_is_refused(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    lines = [{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "two"}]
    path.write_text("\n".join(map(json.dumps, lines)))

    with pytest.raises(DatasetError, match="record 2: the answer does not end in '#### number'"):
        samples(GSM8KTask(path))


def test_missing_file_says_where_it_comes_from(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"no\.jsonl is not there.*grade-school-math"):
        samples(GSM8KTask(tmp_path / "no.jsonl"))
