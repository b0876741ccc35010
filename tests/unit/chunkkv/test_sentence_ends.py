"""Which tokens of a vocabulary end a sentence."""

from __future__ import annotations

import pytest
import torch
from tiny_model import byte_tokenizer

from chunkkv import sentence_ending_tokens


class Words:
    """A tokenizer of whole words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def __len__(self) -> int:
        return len(self._words)

    def batch_decode(
        self, ids: list[list[int]], *, clean_up_tokenization_spaces: bool
    ) -> list[str]:
        assert not clean_up_tokenization_spaces
        return ["".join(self._words[i] for i in row) for row in ids]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (".", True),
        ("end.", True),
        ("!", True),
        ("why?", True),
        ("\n", True),
        ("\n\n", True),
        (".\n", True),
        ("\n  ", True),
        ('."', True),
        (".\u201d ", True),
        ("?)", True),
        ("\u3002", True),
        ("\u3002\u300d", True),
        ("\u2026", True),
        ("", False),
        (" ", False),
        ('"', False),
        (",", False),
        (".5", False),
        ("end", False),
        ("a.b", False),
        ("<|end|>", False),
    ],
)
def test_a_token_ends_a_sentence_by_its_text(text: str, ends: bool):
    assert sentence_ending_tokens(Words("x", text)).tolist() == [False, ends]


def test_of_bytes_the_marks_and_the_line_break_do():
    tokenizer = byte_tokenizer()

    ends = sentence_ending_tokens(tokenizer)

    assert (ends.dtype, len(ends)) == (torch.bool, len(tokenizer))
    expected = tokenizer(".!?\n")["input_ids"]
    assert sorted(ends.nonzero().flatten().tolist()) == sorted(expected)


@pytest.mark.parametrize("vocab_size", [1, 3, 5])
def test_the_models_vocabulary_may_have_another_size_than_the_tokenizers(vocab_size: int):
    ends = sentence_ending_tokens(Words("a", ".", "?"), vocab_size=vocab_size)

    assert ends.tolist() == [False, True, True, False, False][:vocab_size]
