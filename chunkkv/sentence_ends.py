"""Which tokens of a vocabulary end a sentence: what policies of unit ``sentence`` cut at."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import torch

from chunkkv.errors import InvalidInputError
from chunkkv.policy import CompressionPolicy

_ENDS: Final = (
    ".",
    "!",
    "?",
    "\n",
    "\u2026",
    "\u3002",
    "\uff01",
    "\uff1f",
)  # … and fullwidth 。！？
# May stand between a sentence's last mark and its end: spaces, quotes and brackets that close.
_CLOSING: Final = " \t\u00a0\u3000\"'`*_)]}>\u201d\u2019\u00bb\u203a\u300d\u300f\uff09"


def sentence_ending_tokens(tokenizer: Any, *, vocab_size: int | None = None) -> torch.Tensor:
    """Return which tokens end a sentence by their text.

    Those whose text ends in a full stop, an exclamation or a question mark, or a line break, with
    nothing behind it but spaces and closing quotes and brackets. Each token is looked at by
    itself: an abbreviation's full stop ends a sentence too, and a quote of its own belongs to the
    sentence that follows.

    Args:
        tokenizer: A transformers tokenizer.
        vocab_size: Length of the answer: the model's, which may exceed the tokenizer's. The
            tokenizer's if ``None``.

    Returns:
        ``(vocab_size,)`` bool, on the CPU: what ``prefill`` wants as ``sentence_ends``.
        ``ends[input_ids]`` is what ``compress`` wants as ``Prefilled.sentence_ends``.
    """
    num_known = len(tokenizer) if vocab_size is None else min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode(
        [[token] for token in range(num_known)], clean_up_tokenization_spaces=False
    )
    ends = torch.zeros(len(tokenizer) if vocab_size is None else vocab_size, dtype=torch.bool)
    ends[:num_known] = torch.tensor([_ends_sentence(text) for text in texts], dtype=torch.bool)
    return ends


def ends_of(
    input_ids: torch.Tensor,
    sentence_ends: torch.Tensor | None,
    policies: Collection[CompressionPolicy],
) -> torch.Tensor | None:
    """Return where the sentences of a text end, on the device of the text.

    Args:
        input_ids: ``(batch, seq_len)`` int64.
        sentence_ends: ``(vocab_size,)`` bool, as ``sentence_ending_tokens`` gives it, or ``None``.
        policies: Those that will compress the text.

    Returns:
        ``(batch, seq_len)`` bool; ``None`` if ``sentence_ends`` is.

    Raises:
        InvalidInputError: ``sentence_ends`` is ``None`` and a policy cuts at sentences, or it is no
            bool tensor of one dimension, or shorter than the vocabulary.
    """
    if sentence_ends is None:
        if any(policy.unit == "sentence" for policy in policies):
            raise InvalidInputError(
                "unit is 'sentence', and nothing says which tokens end one; give "
                "sentence_ends=chunkkv.sentence_ending_tokens(tokenizer)"
            )
        return None
    if sentence_ends.dtype != torch.bool or sentence_ends.dim() != 1:
        raise InvalidInputError(
            f"sentence_ends is {tuple(sentence_ends.shape)} {sentence_ends.dtype}; give a bool for "
            "each token of the vocabulary"
        )
    if input_ids.numel() and int(input_ids.max()) >= len(sentence_ends):
        raise InvalidInputError(
            f"sentence_ends knows {len(sentence_ends)} tokens, but the text has token "
            f"{int(input_ids.max())}; give it the model's vocab_size"
        )
    return sentence_ends.to(input_ids.device)[input_ids]


def _ends_sentence(text: str) -> bool:
    return text.rstrip(_CLOSING).endswith(_ENDS)
