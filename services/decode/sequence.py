"""One answer being generated: which tokens the model sees next, and what its logits become.

An answer that another worker began goes on here as if it had not been interrupted: its tokens so
far are replayed through everything that depends on them. Knows no threads, no queues, and not
which other sequences there are: an engine that steps many of these in one forward pass asks each
for its input and hands each its logits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chunkserve.v1 import types_pb2
from services.decode.detokenizer import Detokenizer
from services.decode.logprobs import token_logprob
from services.decode.sampling import Sampler, SamplingSettings
from services.runtime.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """What is to be generated.

    Attributes:
        first_position: Position of the first pending token in the conversation.
        pending_token_ids: Known tokens that the model has yet to see, at least one.
        sampling: How tokens are chosen.
        max_tokens: Most tokens of the answer, at least 1; the context has room for them.
        num_resumed_tokens: How many of the last pending tokens are the answer's own, because
            another worker streamed them; fewer than are pending.
        prompt_token_ids: The conversation before the answer; it may go on into it. Looked at only
            with a repetition penalty.
    """

    first_position: int
    pending_token_ids: Sequence[int]
    sampling: SamplingSettings
    max_tokens: int
    num_resumed_tokens: int = 0
    prompt_token_ids: Sequence[int] = ()


class DecodeSequence:
    """The state of one answer.

    Attributes:
        token_ids: The answer so far, resumed tokens included.
        finish_reason: Why it ended; ``FINISH_REASON_UNSPECIFIED`` while it has not. A resumed
            answer may have ended before the first step, with its last word lost on the way: then
            the model has yet to see its tokens, as the next turn needs their KV.
        first_token_at: ``time.perf_counter()`` of the first token generated here, in seconds; of
            the start if there is none.
        last_token_at: The same of the latest.

    Args:
        task: What is to be generated.
        tokenizer: The model's.
        eos_token_ids: The model's end-of-sequence tokens.

    Raises:
        InvalidRequestError: There are resumed tokens behind the end of the answer.
    """

    def __init__(self, task: DecodeTask, *, tokenizer: Any, eos_token_ids: frozenset[int]) -> None:
        self.token_ids: list[int] = []
        self.finish_reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self.first_token_at = self.last_token_at = time.perf_counter()
        self._sampling = task.sampling
        self._max_tokens = task.max_tokens
        self._texts: list[str] = []
        self._logprobs: list[types_pb2.TokenLogprob] = []
        self._pending = list(task.pending_token_ids)
        self._num_resumed = task.num_resumed_tokens
        self._answer_position = task.first_position + len(self._pending) - self._num_resumed
        self._ending_token_ids = task.sampling.ending_token_ids(eos_token_ids)
        self._detokenizer = Detokenizer(tokenizer, task.sampling.stop)
        self._sampler = Sampler(
            task.sampling,
            prompt_token_ids=task.prompt_token_ids,
            ending_token_ids=self._ending_token_ids,
        )
        self._resume(self._pending[len(self._pending) - self._num_resumed :])
        if self.is_finished:
            self._pending.pop()  # the model sees no answer's last token

    @property
    def is_finished(self) -> bool:
        """Whether no token follows."""
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def is_done(self) -> bool:
        """Whether no token follows, and the model has seen all but the last."""
        return self.is_finished and not self._pending

    @property
    def matched_stop(self) -> str:
        """The stop string that ended it, or empty."""
        return self._detokenizer.matched_stop

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens that were generated here."""
        return self.token_ids[self._num_resumed :]

    @property
    def answer(self) -> types_pb2.TokenDelta:
        """The whole answer so far; its logprobs are those of the tokens generated here."""
        return types_pb2.TokenDelta(
            text="".join(self._texts), token_ids=self.token_ids, logprobs=self._logprobs
        )

    @property
    def num_pending(self) -> int:
        """Tokens that :meth:`next_input` has yet to return."""
        return len(self._pending)

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
            be seen, or if the answer has ended: then the logits say nothing new.
        """
        if self._pending or self.is_finished:
            return None
        index = len(self.token_ids)
        token_id = self._sampler.choose(logits, position=self._answer_position + index)
        self.last_token_at = time.perf_counter()
        if index == self._num_resumed:
            self.first_token_at = self.last_token_at
        delta = types_pb2.TokenDelta(
            text=self._take(token_id), token_ids=[token_id], first_token_index=index
        )
        if not self.is_finished:
            self._pending = [token_id]
        if self._sampling.logprobs is not None:
            delta.logprobs.append(token_logprob(logits, token_id, self._sampling.logprobs))
            self._logprobs.extend(delta.logprobs)
        return delta

    def _resume(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self.is_finished:
                raise InvalidRequestError(
                    f"num_resumed_tokens is {len(token_ids)}, but the answer ended with token "
                    f"{len(self.token_ids)}; send the tokens of one answer",
                    field="num_resumed_tokens",
                )
            self._take(token_id)  # its text was sent with it

    def _take(self, token_id: int) -> str:
        """Make a token part of the answer; return the text that became certain with it."""
        self.token_ids.append(token_id)
        self._sampler.add(token_id)
        text = self._detokenizer.push(token_id)
        self.finish_reason = self._reason_to_finish(token_id)
        if self.is_finished:
            text += self._detokenizer.finish()
        if self.matched_stop:
            # Also where the end of the answer completed a stop string that was held back.
            self.finish_reason = types_pb2.FINISH_REASON_STOP
        self._texts.append(text)
        return text

    def _reason_to_finish(self, token_id: int) -> types_pb2.FinishReason:
        if self.matched_stop:
            return types_pb2.FINISH_REASON_STOP
        if token_id in self._ending_token_ids:
            return types_pb2.FINISH_REASON_EOS
        if len(self.token_ids) >= self._max_tokens:
            return types_pb2.FINISH_REASON_LENGTH
        return types_pb2.FINISH_REASON_UNSPECIFIED
