"""Needles in a haystack: single numbers in a document, each asked for on its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.haystack import THINGS, Needle, needle_about
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.documents import distinct_numbers, hide, sample_rng


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """Several needles at random depths of one document.

    Attributes:
        num_tokens: Of the whole document.
        num_needles: A document, and so questions; 1 to 20.
        num_digits: Of each answer; published work uses 7 and 32.
    """

    num_tokens: int = 1000
    num_needles: int = 10
    num_digits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.num_needles <= len(THINGS):
            raise InvalidInputError(f"num_needles={self.num_needles} is not in [1, {len(THINGS)}]")

    @property
    def name(self) -> str:
        return "needle"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``."""
        for index in range(num_samples):
            rng = sample_rng(seed, index, self)
            things = rng.sample(THINGS, self.num_needles)
            answers = distinct_numbers(rng, self.num_needles, num_digits=self.num_digits)
            needles = list(map(needle_about, things, answers))
            document = hide(
                tokenizer, rng, [n.sentence for n in needles], num_tokens=self.num_tokens
            )
            yield Sample(
                task=self.name,
                sample_id=f"needle/tokens={self.num_tokens}/needles={self.num_needles}"
                f"/digits={self.num_digits}/seed={seed}/{index}",
                context=document.text,
                questions=tuple(
                    needle_question(needle, length=self.num_tokens, depth=depth)
                    for needle, depth in zip(needles, document.depths, strict=True)
                ),
            )


@dataclass(frozen=True, slots=True)
class NeedleGridTask:
    """One needle at a given depth of a document of a given length: cells of a heat map.

    Attributes:
        lengths: Tokens of the whole document.
        depths: Share of the prose before the needle, in [0, 1].
        num_digits: Of the answer.
    """

    lengths: tuple[int, ...] = (500, 1000, 2000, 4000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_digits: int = 7

    def __post_init__(self) -> None:
        if not (self.lengths and self.depths and all(0 <= depth <= 1 for depth in self.depths)):
            raise InvalidInputError(
                f"lengths={self.lengths}, depths={self.depths}; depths are in [0, 1], none is empty"
            )

    @property
    def name(self) -> str:
        return "needle-grid"

    @property
    def num_cells(self) -> int:
        """How many samples go through the grid once."""
        return len(self.lengths) * len(self.depths)

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. ``length`` and ``depth`` of the questions name the cell."""
        cells = itertools.cycle(itertools.product(self.lengths, self.depths))
        for index, (length, depth) in enumerate(itertools.islice(cells, num_samples)):
            # All cells of a round hide the same needle in prose that begins the same.
            number = index // self.num_cells
            rng = sample_rng(seed, number, self.num_digits)
            [answer] = distinct_numbers(rng, 1, num_digits=self.num_digits)
            needle = needle_about(rng.choice(THINGS), answer)
            document = hide(tokenizer, rng, [needle.sentence], num_tokens=length, depths=[depth])
            yield Sample(
                task=self.name,
                sample_id=f"needle-grid/tokens={length}/depth={depth}"
                f"/digits={self.num_digits}/seed={seed}/{number}",
                context=document.text,
                questions=(needle_question(needle, length=length, depth=depth),),
            )


def needle_question(needle: Needle, *, length: int, depth: float) -> Question:
    """Return the question about a needle, with room for a sentence around its digits."""
    return Question(
        text=needle.question,
        answers=(needle.answer,),
        max_new_tokens=17 + len(needle.answer),
        metric="digits",
        extra={"length": length, "depth": depth},
    )
