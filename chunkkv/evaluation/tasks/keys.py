"""Needles that resemble one another, and questions with several answers.

Source: RULER (https://arxiv.org/abs/2404.06654), the multi-key, multi-value and multi-query
variants of its needle tasks. Deviations: prose of our own, no answer begun for the model, and a
document is asked several questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.haystack import needle_about
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.documents import distinct_numbers, hide, sample_rng
from chunkkv.evaluation.tasks.needle import needle_question

_KINDS = (
    "amber", "brass", "copper", "golden", "green", "grey", "iron", "ivory", "oak", "silver",
)  # fmt: skip
_PLACES = (
    "archive", "cabin", "cabinet", "cellar", "chest", "garage", "kitchen", "office", "shed",
    "vault",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MultiKeyTask:
    """Many needles whose keys share words; some are asked for, the others distract.

    Attributes:
        num_tokens: Of the whole document.
        num_keys: Needles, 1 to 100; keys share adjectives and nouns.
        num_questions: Of the needles asked for, at most ``num_keys``.
        num_digits: Of each answer.
    """

    num_tokens: int = 2000
    num_keys: int = 16
    num_questions: int = 4
    num_digits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.num_questions <= self.num_keys <= len(_KINDS) * len(_PLACES):
            raise InvalidInputError(
                f"num_questions={self.num_questions}, num_keys={self.num_keys}; "
                f"1 <= num_questions <= num_keys <= {len(_KINDS) * len(_PLACES)}"
            )

    @property
    def name(self) -> str:
        return "multi-key"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``."""
        for index in range(num_samples):
            rng = sample_rng(seed, index, self)
            side = math.ceil(math.sqrt(self.num_keys))
            kinds, places = rng.sample(_KINDS, side), rng.sample(_PLACES, side)
            keys = [f"{kind} {place}" for kind in kinds for place in places][: self.num_keys]
            rng.shuffle(keys)
            answers = distinct_numbers(rng, self.num_keys, num_digits=self.num_digits)
            needles = list(map(needle_about, keys, answers))
            document = hide(
                tokenizer, rng, [n.sentence for n in needles], num_tokens=self.num_tokens
            )
            asked = sorted(rng.sample(range(self.num_keys), self.num_questions))
            yield Sample(
                task=self.name,
                sample_id=f"multi-key/tokens={self.num_tokens}/keys={self.num_keys}"
                f"/questions={self.num_questions}/digits={self.num_digits}/seed={seed}/{index}",
                context=document.text,
                questions=tuple(
                    needle_question(needles[i], length=self.num_tokens, depth=document.depths[i])
                    for i in asked
                ),
            )


@dataclass(frozen=True, slots=True)
class MultiValueTask:
    """Several values for every key, far apart; a question asks for all values of its keys.

    Attributes:
        num_tokens: Of the whole document.
        num_keys: 1 to 10.
        num_values: For each key: above 1 it is RULER's multi-value.
        num_queries: Keys in one question: above 1 it is RULER's multi-query. Every key is asked
            for once, so there are ``num_keys / num_queries`` questions, rounded up.
        num_digits: Of each value.
    """

    num_tokens: int = 2000
    num_keys: int = 4
    num_values: int = 4
    num_queries: int = 1
    num_digits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_keys <= len(_PLACES):
            raise InvalidInputError(
                f"num_queries={self.num_queries}, num_keys={self.num_keys}; "
                f"1 <= num_queries <= num_keys <= {len(_PLACES)}"
            )
        if self.num_values < 1:
            raise InvalidInputError(f"num_values={self.num_values}; at least 1")

    @property
    def name(self) -> str:
        return "multi-value" if self.num_queries == 1 else "multi-query"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. ``exact`` wants all values asked for and no other one."""
        for index in range(num_samples):
            rng = sample_rng(seed, index, self)
            keys = rng.sample(_PLACES, self.num_keys)
            values = distinct_numbers(
                rng, self.num_keys * self.num_values, num_digits=self.num_digits
            )
            facts = list(zip(keys * self.num_values, values, strict=True))
            rng.shuffle(facts)
            sentences = [f"One of the access codes of the {key} is {v}." for key, v in facts]
            document = hide(tokenizer, rng, sentences, num_tokens=self.num_tokens)
            groups = [
                keys[i : i + self.num_queries] for i in range(0, self.num_keys, self.num_queries)
            ]
            yield Sample(
                task=self.name,
                sample_id=f"{self.name}/tokens={self.num_tokens}/keys={self.num_keys}"
                f"/values={self.num_values}/queries={self.num_queries}"
                f"/digits={self.num_digits}/seed={seed}/{index}",
                context=document.text,
                questions=tuple(self._question(group, facts) for group in groups),
            )

    def _question(self, keys: list[str], facts: list[tuple[str, str]]) -> Question:
        answers = tuple(value for key, value in facts if key in keys)
        named = " and ".join(f"the {key}" for key in keys)
        return Question(
            text=f"What are all the access codes of {named}? Give only the codes.",
            answers=answers,
            max_new_tokens=32 + len(answers) * (self.num_digits + 3),
            metric="all_found",
            extra={
                "length": self.num_tokens,
                "wrong": [value for key, value in facts if key not in keys],
            },
        )
