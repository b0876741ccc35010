"""A tokenizer whose tokens are words, each with the white space before it."""

from __future__ import annotations

import re
from typing import Any


class WordTokenizer:
    """Gives every new word the next id, so that ids can be decoded again."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        words = re.findall(r"\s*\S+|\s+$", text)
        return {"input_ids": [self._ids.setdefault(word, len(self._ids)) for word in words]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        words = list(self._ids)
        return "".join(words[i] for i in ids)
