"""Token ids in, text out, one token at a time.

Text is released as soon as no later token can change it: characters whose bytes are incomplete
and text that may be the beginning of a stop string are held back. The texts in a row are exactly
``tokenizer.decode`` of all tokens, up to a stop string. Only a short window of tokens is decoded
for each new one. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

REPLACEMENT: Final = "\ufffd"  # what decoders write for bytes that are no character (yet)

# Past this many tokens the window is cut down to its last tokens.
_MAX_WINDOW: Final = 16
_KEPT_WINDOW: Final = 6
_NUM_CUTS: Final = 4  # of so many neighbouring cuts one is between characters: they have 4 bytes

# Replacement characters at the end may be the beginning of a character: of one, in byte-level
# decoders; decoders with byte tokens write them for a whole run of bytes until its last character
# is complete. A longer run stays what it is.
_MAX_HELD_RUN: Final = 32
_HELD_OF_LONG_RUN: Final = 3


class Detokenizer:
    """Turns the tokens of one answer into text.

    Attributes:
        matched_stop: The stop string that ended the answer, or empty.

    Args:
        tokenizer: A transformers tokenizer.
        stop: Strings that end the answer, none empty. The one that is complete first ends it, and
            of two that are complete at the same character the longer one: where tokens begin
            and end makes no difference.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.matched_stop = ""
        self._stream = _TextStream(tokenizer)
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""  # certain text that may begin a stop string

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became certain with it."""
        return self._release(self._stream.push(token_id))

    def finish(self) -> str:
        """Return what is still held back. Call once, after the last token."""
        text = self._release(self._stream.finish())
        if not self.matched_stop:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new_text: str) -> str:
        if self.matched_stop:
            return ""
        if not self._stop:
            return new_text
        text = self._held + new_text
        # What is held contains no whole stop string, so a match ends in the new text.
        for end in range(len(self._held) + 1, len(text) + 1):
            for stop in self._stop:
                if text.endswith(stop, 0, end):
                    self.matched_stop, self._held = stop, ""
                    return text[: end - len(stop)]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def _num_held(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), len(self._stop[0]) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _TextStream:
    """Decodes a window over the latest tokens, and moves it on where that changes nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoder(tokenizer)
        self._vocab_size = len(tokenizer)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._window: list[int] = []
        self._num_released = 0  # characters of the window's text that were returned

    def push(self, token_id: int) -> str:
        if token_id in self._special_ids or token_id >= self._vocab_size:
            return ""  # decoders skip it, so it needs no place in the window
        self._window.append(token_id)
        text = self._decode(self._window)
        run = len(text) - len(text.rstrip(REPLACEMENT))
        num_held = run if run <= _MAX_HELD_RUN else _HELD_OF_LONG_RUN
        new_text = self._take(text, len(text) - num_held)
        if len(self._window) > _MAX_WINDOW and num_held < max(run, 1):
            self._shrink(text)
        return new_text

    def finish(self) -> str:
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _take(self, text: str, end: int) -> str:
        new_text = text[self._num_released : end]
        self._num_released = max(self._num_released, end)
        return new_text

    def _shrink(self, text: str) -> None:
        """Drop all but the last tokens, if both parts decode alone to what they are together.

        Then no character lies across the cut. The tail must have text: without it a character
        whose bytes are still to come would look complete. Some decoders strip the space before
        the first token of what they decode.
        """
        for num_kept in range(_KEPT_WINDOW, _KEPT_WINDOW + _NUM_CUTS):
            tail_ids = self._window[-num_kept:]
            head, tail = self._decode(self._window[:-num_kept]), self._decode(tail_ids)
            num_released = self._num_released - (len(text) - len(tail))
            if tail and num_released >= 0 and text in (head + tail, f"{head} {tail}"):
                self._window, self._num_released = tail_ids, num_released
                return


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return ``tokenizer.decode`` without special tokens.

    Of tokenizers that leave decoding to their backend, it is the backend's: transformers' look at
    each id on the way there takes twice as long as decoding.
    """
    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
