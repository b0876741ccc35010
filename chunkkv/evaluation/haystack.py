"""Needles in English text that ships with Python: documents whose answers are known."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from chunkkv.errors import InvalidInputError

THINGS = (
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
    return needle_about(thing, "".join(rng.choice("123456789") for _ in range(num_digits)))


def needle_about(thing: str, answer: str) -> Needle:
    """Return the needle with which the access code of ``thing`` is ``answer``."""
    return Needle(
        sentence=f"The access code of the {thing} is {answer}.",
        question=f"What is the access code of the {thing}?",
        answer=answer,
    )


def haystack(
    tokenizer: Any, *, num_tokens: int, num_needles: int = 1, seed: int = 0, num_digits: int = 7
) -> Haystack:
    """Return about ``num_tokens`` tokens of prose with needles at random depths.

    The same seed gives the same document. Benchmarks quote numbers of these documents, so they
    stay as they are; the needles come on top of the prose, and a sentence can stand there twice.
    """
    rng = random.Random(seed)
    things = rng.sample(THINGS, num_needles)
    needles = tuple(make_needle(rng, thing, num_digits=num_digits) for thing in things)
    sentences = prose_sentences()
    start = rng.randrange(len(sentences))
    length = 0
    chosen: list[str] = []
    while length < num_tokens:
        sentence = sentences[(start + len(chosen)) % len(sentences)]
        chosen.append(sentence)
        length += num_tokens_of(tokenizer, sentence + " ")
    depths = sorted(rng.sample(range(1, len(chosen)), num_needles), reverse=True)
    for depth, needle in zip(depths, needles, strict=True):
        chosen.insert(depth, needle.sentence)
    return Haystack(" ".join(chosen), needles)


def graded(answer: str, generated: str) -> float:
    """Return the share of the answer's digits that were generated, up to the first wrong one."""
    right = 0
    for expected, seen in zip(answer, first_number(generated), strict=False):
        if expected != seen:
            break
        right += 1
    return right / len(answer)


def first_number(text: str) -> str:
    """Return the digits of the first number in a text, without its commas; "" if it has none."""
    found = re.search(r"\d[\d,]*", text)
    return found.group().replace(",", "") if found else ""


def prose(tokenizer: Any, rng: random.Random, *, num_tokens: int) -> list[str]:
    """Return sentences of at least ``num_tokens`` tokens, no sentence twice.

    They run on from a random one of :func:`prose_sentences`; when all of these are used up, the
    docstrings of the standard library follow.

    Raises:
        InvalidInputError: If that is not enough text.
    """
    start = rng.randrange(len(prose_sentences()))
    length = 0
    chosen: dict[str, None] = {}  # keeps the order
    sentences = _sentences_from(start)
    while length < num_tokens:
        sentence = next(sentences, None)
        if sentence is None:
            raise InvalidInputError(
                f"the text that ships with Python has {length} tokens, {num_tokens} are asked for"
            )
        if sentence not in chosen:
            chosen[sentence] = None
            length += num_tokens_of(tokenizer, f" {sentence}")
    return list(chosen)


def num_tokens_of(tokenizer: Any, text: str) -> int:
    """Return how many tokens a text is, without special ones."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def prose_sentences() -> tuple[str, ...]:
    """Return sentences of prose: no code, no tables, no markup. Some stand there twice."""
    return tuple(s for topic in sorted(topics) for s in _sentences(topics[topic]))


@cache
def docstring_sentences() -> tuple[str, ...]:
    """Return sentences from the docstrings of the standard library; takes seconds, once."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found += _sentences(ast.get_docstring(node) or "")
    return tuple(found)


def _sentences_from(start: int) -> Iterator[str]:
    first = prose_sentences()
    yield from first[start:]
    yield from first[:start]
    yield from docstring_sentences()


def _sentences(text: str) -> list[str]:
    """Return those sentences of a text that are prose: letters, commas and the like."""
    plain = (
        re.sub(r"[*\"`|]|\s+", lambda m: " " if m.group().isspace() else "", paragraph)
        for paragraph in text.split("\n\n")
    )
    sentences = (s.strip() for p in plain for s in re.split(r"(?<=[.]) (?=[A-Z])", p))
    return [s for s in sentences if re.fullmatch(r"[A-Z][A-Za-z ,;'()-]{40,250}\.", s)]
