"""Questions of different kinds about one document, so that no single trick answers them all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.haystack import THINGS, needle_about
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.documents import distinct_numbers, hide, sample_rng

_PEOPLE = ("Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Henrik")
_ANIMALS = ("cat", "dog", "goat", "horse", "parrot", "rabbit", "tortoise", "donkey")
_PETS = ("Biscuit", "Clover", "Domino", "Hazel", "Juniper", "Marble", "Pepper", "Saffron")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_CLUBS = ("chess club", "rowing club", "choir", "film society", "garden club", "reading circle")


@dataclass(frozen=True, slots=True)
class MixedQuestionsTask:
    """A number, a name, a day, a list of people and a count, all from one document.

    Attributes:
        num_tokens: Of the whole document.
        num_codes: Access codes in the text; one is asked for, and how many there are. 2 to 9.
        num_members: People of the club whose members are asked for, 2 to 4; another club has the
            others.
    """

    num_tokens: int = 1000
    num_codes: int = 3
    num_members: int = 3

    def __post_init__(self) -> None:
        if not (2 <= self.num_codes <= 9 and 2 <= self.num_members <= 4):
            raise InvalidInputError(
                f"num_codes={self.num_codes} is not in [2, 9] or "
                f"num_members={self.num_members} not in [2, 4]"
            )

    @property
    def name(self) -> str:
        return "mixed"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. ``kind`` of a question says which it is."""
        for index in range(num_samples):
            rng = sample_rng(seed, index, self)
            sentences: list[str] = []
            questions = (
                *self._codes(rng, sentences),
                self._pet(rng, sentences),
                self._day(rng, sentences),
                self._members(rng, sentences),
            )
            rng.shuffle(sentences)
            document = hide(tokenizer, rng, sentences, num_tokens=self.num_tokens)
            yield Sample(
                task=self.name,
                sample_id=f"mixed/tokens={self.num_tokens}/codes={self.num_codes}"
                f"/members={self.num_members}/seed={seed}/{index}",
                context=document.text,
                questions=questions,
            )

    # Each adds its facts to ``sentences``; wrong answers of the same kind are among them.

    def _codes(self, rng: random.Random, sentences: list[str]) -> tuple[Question, Question]:
        things = rng.sample(THINGS, self.num_codes)
        answers = distinct_numbers(rng, self.num_codes, num_digits=7)
        needles = list(map(needle_about, things, answers))
        sentences += [needle.sentence for needle in needles]
        return (
            self._question("number", needles[0].question, [needles[0].answer], metric="digits"),
            self._question(
                "count",
                "How many access codes does the text give? Answer with a number.",
                [str(self.num_codes)],
                metric="count",
            ),
        )

    def _pet(self, rng: random.Random, sentences: list[str]) -> Question:
        people, animals, pets = (rng.sample(names, 3) for names in (_PEOPLE, _ANIMALS, _PETS))
        sentences += [
            f"{person} has a {animal} called {pet}."
            for person, animal, pet in zip(people, animals, pets, strict=True)
        ]
        text = f"What is the {animals[0]} of {people[0]} called?"
        return self._question("name", text, pets[:1], wrong=pets[1:])

    def _day(self, rng: random.Random, sentences: list[str]) -> Question:
        things, days = rng.sample(THINGS, 2), rng.sample(_DAYS, 2)
        sentences += [
            f"The {thing} will be painted on {day}."
            for thing, day in zip(things, days, strict=True)
        ]
        text = f"On which day will the {things[0]} be painted?"
        return self._question("day", text, days[:1], wrong=days[1:])

    def _members(self, rng: random.Random, sentences: list[str]) -> Question:
        people, (club, other) = rng.sample(_PEOPLE, 2 * self.num_members), rng.sample(_CLUBS, 2)
        members, others = people[: self.num_members], people[self.num_members :]
        sentences += [f"{person} is a member of the {club}." for person in members]
        sentences += [f"{person} is a member of the {other}." for person in others]
        text = f"Who are the members of the {club}? Answer with their names."
        return self._question("list", text, members, wrong=others)

    def _question(
        self,
        kind: str,
        text: str,
        answers: list[str],
        *,
        metric: str = "all_found",
        wrong: list[str] | None = None,
    ) -> Question:
        return Question(
            text=text,
            answers=tuple(answers),
            max_new_tokens=32,
            metric=metric,
            extra={"length": self.num_tokens, "kind": kind, "wrong": wrong or []},
        )
