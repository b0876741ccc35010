"""Small samples for a tiny model that reads bytes."""

from __future__ import annotations

from chunkkv.evaluation.tasks import Question, Sample

TEXT = (
    "The ferry leaves at seven. The keeper of the lighthouse drinks tea. Rain fell on the old town "
    "for nine days, and nobody crossed the square. "
)


def sample(index: int = 0, *, num_questions: int = 2, task: str = "tiny") -> Sample:
    """Return a sample whose questions are of different lengths."""
    questions = tuple(
        Question(
            text=f"Question {'again ' * number}{number}?",
            answers=("abc", "e"),
            max_new_tokens=3 + number,
            metric="all_found",
            extra={"length": 100 * (1 + index % 2), "depth": number / num_questions},
        )
        for number in range(num_questions)
    )
    return Sample(
        task=task,
        sample_id=f"{task}/{index}",
        context=TEXT[index:] + f"It was number {index}. ",
        questions=questions,
    )
