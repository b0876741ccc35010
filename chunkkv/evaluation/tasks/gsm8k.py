"""GSM8K: problems of grade school arithmetic after worked examples; the examples are compressed.

Source: https://arxiv.org/abs/2110.14168, data from https://github.com/openai/grade-school-math.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chunkkv.errors import DatasetError, InvalidInputError
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.files import Record, drawn, read_jsonl
from chunkkv.evaluation.tasks.gsm8k_examples import WORKED

_SOURCE: Final = (
    "https://github.com/openai/grade-school-math (grade_school_math/data: train.jsonl, test.jsonl)"
)
_INSTRUCTION: Final = "Solve the last problem step by step, like the problems before it.\n\n"


@dataclass(frozen=True, slots=True)
class GSM8KTask:
    """Problems from a file of lines ``{"question": ..., "answer": "steps\\n#### 42"}``.

    Attributes:
        test_file: Whose problems are asked.
        train_file: Whose first problems of a shuffle are the examples; our own eight if None.
        num_shots: Examples: at most 8 without ``train_file``, as many as fit with it (many-shot).
        questions_per_sample: Problems asked of one prefill of the examples, which are the same for
            all. ``num_samples`` counts prefills.
        as_chat: See ``Sample``.
    """

    test_file: Path
    train_file: Path | None = None
    num_shots: int = 8
    questions_per_sample: int = 1
    as_chat: bool = True

    def __post_init__(self) -> None:
        if self.questions_per_sample < 1 or self.num_shots < 1:
            raise InvalidInputError(
                f"num_shots={self.num_shots}, questions_per_sample={self.questions_per_sample}; "
                "both are at least 1"
            )
        if self.train_file is None and self.num_shots > len(WORKED):
            raise InvalidInputError(
                f"num_shots={self.num_shots}; without train_file there are {len(WORKED)} examples"
            )

    @property
    def name(self) -> str:
        return "gsm8k"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. The same seed also chooses the examples."""
        size = self.questions_per_sample
        records = drawn(_problems(self.test_file), seed=seed, count=num_samples * size)
        context = _INSTRUCTION + "".join(
            f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in self._shots(seed)
        )
        for first in range(0, len(records), size):
            group = records[first : first + size]
            yield Sample(
                task=self.name,
                sample_id=f"gsm8k/{self.test_file.stem}/shots={self.num_shots}"
                f"/{'own' if self.train_file is None else self.train_file.stem}/seed={seed}"
                f"/{'+'.join(str(index) for index, _ in group)}",
                context=context,
                questions=tuple(_question(index, record) for index, record in group),
                as_chat=self.as_chat,
            )

    def _shots(self, seed: int) -> Sequence[tuple[str, str]]:
        if self.train_file is None:
            return WORKED[: self.num_shots]
        problems = _problems(self.train_file)
        if self.num_shots > len(problems):
            raise InvalidInputError(
                f"num_shots={self.num_shots}; {self.train_file} has {len(problems)}"
            )
        shots = drawn(problems, seed=seed, count=self.num_shots)
        return [(record["question"].strip(), _worked(record["answer"])) for _, record in shots]


def _problems(path: Path) -> list[Record]:
    records = read_jsonl(path, {"question": str, "answer": str}, source=_SOURCE)
    for number, record in enumerate(records, 1):
        if not re.search(r"#### *-?\d[\d,.]*\s*$", record["answer"]):
            raise DatasetError(f"{path}, record {number}: the answer does not end in '#### number'")
    return records


def _question(index: int, record: Record) -> Question:
    answer = record["answer"].rpartition("####")[2].strip().rstrip(".")
    return Question(
        text=f"Question: {record['question'].strip()}\nAnswer:",
        answers=(answer,),
        max_new_tokens=256,
        metric="final_number",
        extra={"record": index},
    )


def _worked(answer: str) -> str:
    """Return an answer of the file in the form of our examples, without calculator marks."""
    steps, _, number = re.sub(r"<<.*?>>", "", answer).rpartition("####")
    return f"{' '.join(steps.split())} The answer is {number.strip()}."
