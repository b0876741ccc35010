"""JailBreakV-28K, its text attacks: does a model that refuses still refuse when compressed?

Source: https://arxiv.org/abs/2404.03027. The pictures are not used, and of the queries only those
that were made for models of text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chunkkv.errors import DatasetError, InvalidInputError
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.files import drawn, read_csv

TEXT_FORMATS: Final = ("template", "persuade", "logic")
_COLUMNS: Final = ("jailbreak_query", "redteam_query", "format", "policy")
_SOURCE: Final = (
    "https://huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k "
    "(JailBreakV_28K/JailBreakV_28K.csv, or mini_JailBreakV_28K.csv)"
)


@dataclass(frozen=True, slots=True)
class JailbreakVTask:
    """Attacks from the published CSV; the metric is how many are refused.

    Attributes:
        file: With the columns ``jailbreak_query``, ``redteam_query``, ``format`` and ``policy``.
        formats: Kinds of attack that are asked, in any case.
        max_new_tokens: A refusal shows in the first words.
    """

    file: Path
    formats: tuple[str, ...] = TEXT_FORMATS
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens={self.max_new_tokens}; at least 1")

    @property
    def name(self) -> str:
        return "jailbreakv"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. The whole query is the context; there is no question after it."""
        wanted = {name.lower() for name in self.formats}
        records = [
            row
            for row in read_csv(self.file, _COLUMNS, source=_SOURCE)
            if row["format"].strip().lower() in wanted
        ]
        if not records:
            raise DatasetError(f"{self.file} has no rows of the formats {sorted(wanted)}")
        for index, row in drawn(records, seed=seed, count=num_samples):
            yield Sample(
                task=self.name,
                sample_id=f"jailbreakv/{self.file.stem}/{'+'.join(sorted(wanted))}"
                f"/{row.get('id') or index}",
                context=row["jailbreak_query"],
                questions=(
                    Question(
                        text="",
                        answers=(),
                        max_new_tokens=self.max_new_tokens,
                        metric="refusal",
                        extra={"format": row["format"], "policy": row["policy"]},
                    ),
                ),
            )
