"""Prompts of exact lengths, no two alike."""

from __future__ import annotations

from typing import Any

from chunkkv.evaluation.haystack import haystack


class Documents:
    """English prose as token ids.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._num_made = 0

    def next(self, num_tokens: int) -> list[int]:
        """Return ``num_tokens`` tokens of a document that differs from all before it."""
        self._num_made += 1
        # Sentences in a row have fewer tokens than one by one.
        prose = haystack(
            self._tokenizer, num_tokens=2 * num_tokens, num_needles=0, seed=self._num_made
        )
        return self.ids(f"Document {self._num_made}. {prose.text}")[:num_tokens]

    def text(self, num_tokens: int) -> str:
        """Return such a document of about ``num_tokens`` tokens as text."""
        text: str = self._tokenizer.decode(self.next(num_tokens))
        return text

    def question(self) -> list[int]:
        """Return a short turn behind a document."""
        return self.ids("\n\nIn short, the text above says that")

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids
