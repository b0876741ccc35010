"""Variable tracking: chains of assignments that a question follows back to their value.

Source: RULER (https://arxiv.org/abs/2404.06654), variable tracking. Deviations: prose of our own
between the assignments, a question for every chain (in RULER only for the first), no answer begun
for the model (RULER's gives away how many there are) and no worked example.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.documents import distinct_numbers, hide, sample_rng


@dataclass(frozen=True, slots=True)
class VariableTrackingTask:
    """Chains ``VAR A = 12345``, ``VAR B = VAR A``, ...; all variables of a value are asked for.

    Attributes:
        num_tokens: Of the whole document.
        num_chains: Each has its own value and its own question.
        num_hops: Assignments after the first; a chain has one variable more.
    """

    num_tokens: int = 1000
    num_chains: int = 2
    num_hops: int = 2

    def __post_init__(self) -> None:
        if self.num_chains < 1 or self.num_hops < 0:
            raise InvalidInputError(
                f"num_chains={self.num_chains}, num_hops={self.num_hops}; at least 1 and 0"
            )

    @property
    def name(self) -> str:
        return "variables"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``. ``exact`` wants all variables and none of another chain."""
        for index in range(num_samples):
            rng = sample_rng(seed, index, self)
            chains = self._chains(rng)
            values = distinct_numbers(rng, self.num_chains, num_digits=5)
            sentences = _interleave(
                rng,
                [_assignments(names, value) for names, value in zip(chains, values, strict=True)],
            )
            document = hide(tokenizer, rng, sentences, num_tokens=self.num_tokens)
            yield Sample(
                task=self.name,
                sample_id=f"variables/tokens={self.num_tokens}/chains={self.num_chains}"
                f"/hops={self.num_hops}/seed={seed}/{index}",
                context=document.text,
                questions=tuple(
                    self._question(names, value, [n for c in chains if c != names for n in c])
                    for names, value in zip(chains, values, strict=True)
                ),
            )

    def _chains(self, rng: random.Random) -> list[list[str]]:
        size = self.num_hops + 1
        names: dict[str, None] = {}
        while len(names) < size * self.num_chains:
            names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
        flat = list(names)
        return [flat[i : i + size] for i in range(0, len(flat), size)]

    def _question(self, names: list[str], value: str, wrong: list[str]) -> Question:
        return Question(
            text=f"Find all variables that are assigned the value {value} in the text above, "
            "directly or through another variable. Answer with the names of the variables.",
            answers=tuple(names),
            max_new_tokens=32 + 8 * len(names),
            metric="all_found",
            extra={"length": self.num_tokens, "wrong": wrong},
        )


def _assignments(names: list[str], value: str) -> list[str]:
    pairs = zip(names[1:], names, strict=False)
    return [f"VAR {names[0]} = {value}.", *(f"VAR {new} = VAR {old}." for new, old in pairs)]


def _interleave(rng: random.Random, chains: list[list[str]]) -> list[str]:
    """Return all assignments in a random order that keeps the order of each chain."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    remaining = [iter(chain) for chain in chains]
    return [next(remaining[number]) for number in turns]
