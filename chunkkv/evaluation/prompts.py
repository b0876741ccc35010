"""A sample as token ids: the context once, and what follows it for each question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkkv.evaluation.tasks.base import Sample


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a sample.

    Attributes:
        context: What is the same whatever is asked, up to the end of the context. At least one.
        questions: For each question, what follows: the question, the rest of the chat template
            and the beginning of the answer. At least one token each.
    """

    context: tuple[int, ...]
    questions: tuple[tuple[int, ...], ...]

    def whole(self, question: int) -> tuple[int, ...]:
        """Return the whole prompt of one question."""
        return self.context + self.questions[question]


def render(tokenizer: Any, sample: Sample) -> Prompt:
    """Return a sample's token ids.

    Context and question are tokenized as one text, so a token that spans the boundary is the one
    that the model would read; it counts as the question's. The context's tokens are those that
    all prompts share with the prompt that asks nothing.
    """
    asked = [_token_ids(tokenizer, sample, question.text) for question in sample.questions]
    bare = _token_ids(tokenizer, sample, "")
    # At least one token is left to run, also where a prompt has no question of its own.
    length = min(min(num_common(ids, bare), len(ids) - 1) for ids in asked)
    return Prompt(
        context=tuple(bare[:length]), questions=tuple(tuple(ids[length:]) for ids in asked)
    )


def num_common(one: list[int], other: list[int]) -> int:
    """Return how many leading tokens are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _token_ids(tokenizer: Any, sample: Sample, question: str) -> list[int]:
    content = sample.context + question
    if sample.as_chat and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # The template has written the special tokens.
        return _ids(tokenizer, text + sample.answer_prefix, add_special_tokens=False)
    return _ids(tokenizer, content + sample.answer_prefix, add_special_tokens=True)


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids
