"""Needles in English text that ships with Python: documents whose answers are known."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics
from typing import Any

_THINGS = (
    "north door", "east gate", "old safe", "blue locker", "radio room", "garden shed",
    "wine cellar", "tool chest", "boat house", "clock tower", "mail room", "red cabinet",
    "attic trunk", "music hall", "south tunnel", "glass vault", "ice house", "map room",
    "water mill", "stone barn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Needle:
    """A question whose answer stands in one sentence of the document.

    Attributes:
        sentence: As it stands in the document.
        question: What to ask.
        answer: Digits.
    """

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Haystack:
    """A document and the needles in it."""

    text: str
    needles: tuple[Needle, ...]


def make_needle(rng: random.Random, thing: str, *, num_digits: int = 7) -> Needle:
    """Return a needle about ``thing``."""
    answer = "".join(rng.choice("123456789") for _ in range(num_digits))
    return Needle(
        sentence=f"The access code of the {thing} is {answer}.",
        question=f"What is the access code of the {thing}?",
        answer=answer,
    )


def haystack(
    tokenizer: Any, *, num_tokens: int, num_needles: int = 1, seed: int = 0, num_digits: int = 7
) -> Haystack:
    """Return about ``num_tokens`` tokens of prose with needles at random depths.

    The same seed gives the same document.
    """
    rng = random.Random(seed)
    things = rng.sample(_THINGS, num_needles)
    needles = tuple(make_needle(rng, thing, num_digits=num_digits) for thing in things)
    sentences = prose_sentences()
    start = rng.randrange(len(sentences))
    length = 0
    chosen: list[str] = []
    while length < num_tokens:
        sentence = sentences[(start + len(chosen)) % len(sentences)]
        chosen.append(sentence)
        length += len(tokenizer(sentence + " ", add_special_tokens=False)["input_ids"])
    depths = sorted(rng.sample(range(1, len(chosen)), num_needles), reverse=True)
    for depth, needle in zip(depths, needles, strict=True):
        chosen.insert(depth, needle.sentence)
    return Haystack(" ".join(chosen), needles)


def graded(answer: str, generated: str) -> float:
    """Return the share of the answer's digits that were generated, up to the first wrong one."""
    found = re.search(r"\d[\d,]*", generated)
    digits = found.group().replace(",", "") if found else ""
    right = 0
    for expected, seen in zip(answer, digits, strict=False):
        if expected != seen:
            break
        right += 1
    return right / len(answer)


@cache
def prose_sentences() -> tuple[str, ...]:
    """Return sentences of prose: no code, no tables, no markup."""
    paragraphs = (p for topic in sorted(topics) for p in topics[topic].split("\n\n"))
    prose = (
        re.sub(r"[*\"`|]|\s+", lambda m: " " if m.group().isspace() else "", p) for p in paragraphs
    )
    sentences = (s.strip() for p in prose for s in re.split(r"(?<=[.]) (?=[A-Z])", p))
    return tuple(s for s in sentences if re.fullmatch(r"[A-Z][A-Za-z ,;'()-]{40,250}\.", s))
