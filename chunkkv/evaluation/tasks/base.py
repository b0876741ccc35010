"""What a task gives to whoever runs it: contexts, and the questions asked about each.

Tasks know nothing of models or compression. They get a tokenizer for one thing: to make or cut a
context to a number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a context.

    Attributes:
        text: Asked after the context; "" if the prompt has no separate question.
        answers: References. What several of them mean is the metric's business: the best counts,
            or all are wanted.
        max_new_tokens: Where generation ends at the latest.
        metric: A name in ``metrics.METRICS``.
        extra: What else the metric or a report needs, as JSON values: ``all_classes`` of a
            classification; of generated documents ``length`` (tokens that were asked for) and
            ``depth`` (where the answer stands, in [0, 1]).
    """

    text: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One context, and questions that are all asked of a single prefill of it.

    ``context + question.text`` is the prompt: a runner adds nothing in between. Where they meet,
    the context ends in a line break or a space, so that both can be tokenized on their own.

    Attributes:
        task: For example ``needle`` or ``longbench/qasper``.
        sample_id: The same in every run with the same seed and settings, which are part of it.
        context: The text that is compressed.
        questions: At least one.
        answer_prefix: What the assistant's turn begins with; no part of an answer.
        as_chat: Whether context and question go into one user turn of the model's chat template;
            otherwise the text is what the model reads.
    """

    task: str
    sample_id: str
    context: str
    questions: tuple[Question, ...]
    answer_prefix: str = ""
    as_chat: bool = True


class Task(Protocol):
    """A source of samples. What it is made of (lengths, files) are its dataclass fields."""

    @property
    def name(self) -> str:
        """As in ``Sample.task``."""
        ...

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """Yield at most ``num_samples`` samples, the same ones for the same arguments.

        Generated tasks yield exactly ``num_samples``; a grid (lengths, depths) is gone through
        cell by cell, then once more. Tasks over a file take the first ``num_samples`` records of
        a shuffle with ``seed``, so a larger number only adds to a smaller one.

        Args:
            tokenizer: Called as ``tokenizer(text, add_special_tokens=False)["input_ids"]``, and
                its ``decode(ids, skip_special_tokens=True)`` where a context is cut.
            seed: Of everything that is drawn.
            num_samples: At least 0.

        Raises:
            DatasetError: If a file is missing or is not in the published format.
        """
        ...
