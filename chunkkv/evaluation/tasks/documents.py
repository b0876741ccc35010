"""Prose with sentences hidden in it: what the generated tasks have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.haystack import num_tokens_of, prose

SEPARATOR = "\n\n"  # between a document and the question after it


@dataclass(frozen=True, slots=True)
class Document:
    """Prose, and where the hidden sentences stand in it.

    Attributes:
        text: Ends in ``SEPARATOR``.
        depths: Of each hidden sentence: the share of the characters before it, in [0, 1].
    """

    text: str
    depths: tuple[float, ...]


def hide(
    tokenizer: Any,
    rng: random.Random,
    sentences: Sequence[str],
    *,
    num_tokens: int,
    depths: Sequence[float] | None = None,
) -> Document:
    """Return prose with ``sentences`` between its own, in the order given.

    Args:
        tokenizer: Counts.
        rng: Chooses the prose, and the places if ``depths`` does not.
        sentences: Stand in the text word for word.
        num_tokens: Of the whole; met to half a sentence of prose.
        depths: Where each sentence stands: the share of the prose before it, in [0, 1], ascending.
            At 0 and 1 it begins and ends the document.

    Raises:
        InvalidInputError: If so little prose fits that two sentences would stand side by side.
    """
    budget = num_tokens - sum(num_tokens_of(tokenizer, f" {s}") for s in sentences)
    chosen = prose(tokenizer, rng, num_tokens=max(budget, 0))
    sizes = [num_tokens_of(tokenizer, f" {s}") for s in chosen]
    if chosen and sum(sizes) - budget > sizes[-1] / 2:
        del chosen[-1], sizes[-1]
    if len(chosen) <= len(sentences):
        raise InvalidInputError(
            f"{len(sentences)} sentences to hide leave room for {len(chosen)} of prose in "
            f"{num_tokens} tokens; ask for more tokens"
        )
    if depths is None:
        places = sorted(rng.sample(range(1, len(chosen)), len(sentences)))
    else:
        before = list(accumulate(sizes, initial=0))
        places = [
            min(range(len(before)), key=lambda i: abs(before[i] - depth * before[-1]))
            for depth in depths
        ]
    for place, sentence in sorted(zip(places, sentences, strict=True), reverse=True):
        chosen.insert(place, sentence)
    text = " ".join(chosen) + SEPARATOR
    return Document(text, tuple(text.index(sentence) / len(text) for sentence in sentences))


def distinct_numbers(rng: random.Random, count: int, *, num_digits: int) -> list[str]:
    """Return numbers of digits from 1 to 9; a zero in front would be a matter of taste.

    Raises:
        InvalidInputError: If there are not so many.
    """
    if num_digits < 1 or not 0 <= count <= 9**num_digits:
        raise InvalidInputError(f"{count} different numbers of {num_digits} digits do not exist")
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers["".join(rng.choices("123456789", k=num_digits))] = None
    return list(numbers)


def sample_rng(seed: int, index: int, *settings: object) -> random.Random:
    """Return a generator of its own for each sample, so that a sample depends on no other."""
    return random.Random("/".join(map(str, (seed, index, *settings))))
