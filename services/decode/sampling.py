"""Logits of one sequence in, one token id out.

Filters have the semantics and the order of transformers' logits processors: minimum length,
temperature, top-k, top-p, min-p. The draw is a pure function of logits, seed and position
(Gumbel-max over counter-based random numbers): the same seed gives the same tokens on any worker,
in any company, and after another worker took over. Knows nothing of models or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chunkserve.v1 import types_pb2
from services.decode.philox import uniforms
from services.runtime.errors import InvalidRequestError

MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the tokens of one answer are chosen.

    Attributes:
        temperature: In ``[0, 2]``; 0 is greedy, and then the next three do not matter.
        top_k: Only the k most likely tokens; 0 is all of them.
        top_p: The smallest set of tokens with this probability, in ``(0, 1]``.
        min_p: Only tokens at least this likely relative to the likeliest, in ``[0, 1]``.
        seed: Names the random numbers; any 64-bit integer.
        max_tokens: Most tokens to generate, at least 1; ``None`` is the server's limit.
        min_tokens: Tokens before one that ends the answer may be chosen.
        ignore_eos: End-of-sequence tokens do not end the answer.
        stop_token_ids: Tokens that end the answer beside the model's own.
        stop: Strings that end the answer, none empty.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Written so that NaN, which no comparison holds for, is refused too.
        _require(
            0 <= self.temperature <= MAX_TEMPERATURE, "temperature", self.temperature, "0 to 2"
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, up to 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), "at most 16 strings")
        _require(all(self.stop), "stop", "an empty string", "strings that are not empty")

    @classmethod
    def from_proto(cls, params: types_pb2.SamplingParams, *, seed: int) -> SamplingSettings:
        """Read a request's parameters; unset fields take the defaults.

        Args:
            params: As the request has them.
            seed: Taken if the request names none.

        Raises:
            InvalidRequestError: A field is out of range.
        """
        if params.HasField("top_k"):
            _require(params.top_k >= 1, "top_k", params.top_k, "at least 1")
        return cls(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            min_p=params.min_p,
            seed=params.seed if params.HasField("seed") else seed,
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            stop_token_ids=frozenset(params.stop_token_ids),
            stop=tuple(params.stop),
        )

    def ending_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end the answer."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


def sample(
    logits: torch.Tensor,
    settings: SamplingSettings,
    *,
    position: int,
    forbidden_token_ids: Sequence[int] = (),
) -> int:
    """Choose a token.

    Args:
        logits: ``(vocab_size,)``, any float dtype.
        settings: How to choose.
        position: Position of the chosen token in the conversation; picks the random numbers.
        forbidden_token_ids: Never chosen.

    Raises:
        ValueError: No token is left, because the logits are NaN or all are forbidden.
    """
    logits = logits.float()
    if forbidden_token_ids:
        logits = logits.index_fill(
            0, torch.tensor(forbidden_token_ids, device=logits.device), float("-inf")
        )
    if settings.temperature > 0:
        logits = warp(logits, settings)
        logits = logits + _gumbel(logits, settings.seed, position)
    token_id = int(logits.argmax())
    if not bool(logits[token_id].isfinite()):
        raise ValueError(f"no token can be chosen: the best logit is {float(logits[token_id])}")
    return token_id


def warp(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Apply temperature, top-k, top-p and min-p; tokens that fall out get ``-inf``.

    Args:
        logits: ``(vocab_size,)`` float32.
        settings: With a temperature above 0.
    """
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        kth_best = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < kth_best, float("-inf"))
    if settings.top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits, settings.top_p), float("-inf"))
    if settings.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        is_unlikely = probabilities < settings.min_p * probabilities.max()
        logits = logits.masked_fill(is_unlikely, float("-inf"))
    return logits


def _outside_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    ascending = logits.sort()
    is_outside = ascending.values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    is_outside[-1] = False  # the likeliest token stays, however small top_p is
    return torch.empty_like(is_outside).scatter_(0, ascending.indices, is_outside)


def _gumbel(logits: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """Return the noise that makes the argmax a draw from softmax(logits), float64.

    Number ``i`` belongs to token ``i``: filters and the rest of the batch do not move it.
    """
    uniform = uniforms(logits.shape[-1], seed=seed, position=position, device=logits.device)
    return -(-uniform.log()).log()


def _require(is_valid: bool, name: str, value: object, allowed: str) -> None:
    if not is_valid:
        raise InvalidRequestError(
            f"sampling.{name} is {value}; send {allowed}", field=f"sampling.{name}"
        )
