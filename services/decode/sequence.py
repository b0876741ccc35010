"""One answer being generated: which tokens the model sees next, and what its logits become.

Knows no threads, no queues, and not which other sequences there are: an engine that steps many of
these in one forward pass asks each for its input and hands each its logits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import chunkkv
from chunkserve.v1 import types_pb2
from services.decode.detokenizer import Detokenizer
from services.decode.sampling import SamplingSettings, sample


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """What is to be generated.

    Attributes:
        cache: KV of the conversation so far. The sequence extends it.
        pending_token_ids: Known tokens behind the cache, at least one.
        sampling: How tokens are chosen.
        max_tokens: Most tokens to generate, at least 1; the context has room for them.
    """

    cache: chunkkv.KVCache
    pending_token_ids: Sequence[int]
    sampling: SamplingSettings
    max_tokens: int


class DecodeSequence:
    """The state of one answer.

    Attributes:
        cache: KV of all tokens but those that :meth:`next_input` has yet to return.
        token_ids: Generated so far.
        finish_reason: Why it ended; ``FINISH_REASON_UNSPECIFIED`` while it has not.
        first_token_at: ``time.perf_counter()`` of the first generated token, in seconds.
        last_token_at: The same of the latest.

    Args:
        task: What is to be generated.
        tokenizer: The model's.
        eos_token_ids: The model's end-of-sequence tokens.
    """

    def __init__(self, task: DecodeTask, *, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        self.cache = task.cache
        self.token_ids: list[int] = []
        self.finish_reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.first_token_at = self.last_token_at = 0.0
        self._sampling = task.sampling
        self._max_tokens = task.max_tokens
        self._pending = list(task.pending_token_ids)
        self._first_position = task.cache.get_seq_length() + len(self._pending)
        self._ending_token_ids = task.sampling.ending_token_ids(eos_token_ids)
        self._detokenizer = Detokenizer(tokenizer, task.sampling.stop)

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def matched_stop(self) -> str:
        """The stop string that ended it, or empty."""
        return self._detokenizer.matched_stop

    def next_input(self, max_tokens: int) -> list[int]:
        """Return the tokens that the model must see next, at least one.

        Args:
            max_tokens: As many as one forward pass may take.
        """
        tokens, self._pending = self._pending[:max_tokens], self._pending[max_tokens:]
        return tokens

    def accept(self, logits: torch.Tensor) -> types_pb2.TokenDelta | None:
        """Take the logits behind the last token of :meth:`next_input` and choose the next token.

        Args:
            logits: ``(vocab_size,)``.

        Returns:
            The token and the text that became certain, or ``None`` while known tokens are left to
            be seen: then the logits say nothing new.
        """
        if self._pending:
            return None
        index = len(self.token_ids)
        forbidden = self._ending_token_ids if index < self._sampling.min_tokens else ()
        token_id = sample(
            logits,
            self._sampling,
            position=self._first_position + index,
            forbidden_token_ids=sorted(forbidden),
        )
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.token_ids.append(token_id)
        self._pending = [token_id]
        return types_pb2.TokenDelta(
            text=self._text_of(token_id), token_ids=[token_id], first_token_index=index
        )

    def _text_of(self, token_id: int) -> str:
        text = self._detokenizer.push(token_id)
        self.finish_reason = self._reason_to_finish(token_id)
        if self.is_finished:
            text += self._detokenizer.finish()
        if self.matched_stop:
            # Also where the end of the answer completed a stop string that was held back.
            self.finish_reason = types_pb2.FINISH_REASON_STOP
        return text

    def _reason_to_finish(self, token_id: int) -> types_pb2.FinishReason:
        if self.matched_stop:
            return types_pb2.FINISH_REASON_STOP
        if token_id in self._ending_token_ids:
            return types_pb2.FINISH_REASON_EOS
        if len(self.token_ids) >= self._max_tokens:
            return types_pb2.FINISH_REASON_LENGTH
        return types_pb2.FINISH_REASON_UNSPECIFIED
