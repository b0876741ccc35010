"""Logits of one sequence in, one token id out.

Semantics and order are those of the logits processors in transformers' ``generate``: bias,
repetition penalty, minimum length, temperature, top-k, top-p, min-p. It has no presence and
frequency penalty; as in vLLM, which has the other two in the same order, they come behind the
repetition penalty: that one scales the model's logits and these subtract from the result, so that
what they subtract is in the unit that the caller gave, whatever the other is.

The draw is a pure function of logits, seed and position (Gumbel-max over counter-based random
numbers): the same seed gives the same tokens on any worker, in any company, and after another
worker took over. Knows nothing of models or caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from chunkserve.v1 import types_pb2
from services.decode.penalties import LogitBias, Penalties
from services.decode.philox import uniforms, uniforms_at
from services.runtime.errors import InvalidRequestError

MAX_TEMPERATURE: Final = 2.0
MAX_STOP_STRINGS: Final = 16
MAX_LOGIT_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20

# Below it only the likeliest token has a chance, and the division could overflow.
_MIN_TEMPERATURE: Final = 1e-5

# Buckets of the search for the edge of the nucleus.
_BUCKETS_PER_NAT: Final = 8
_NUM_BUCKETS: Final = 256


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the tokens of one answer are chosen.

    Attributes:
        temperature: In ``[0, 2]``; below 0.00001 greedy, and then the next three do not matter.
        top_k: Only the k most likely tokens; 0 is all of them.
        top_p: The smallest set of tokens with this probability, in ``(0, 1]``.
        min_p: Only tokens at least this likely relative to the likeliest, in ``[0, 1]``.
        seed: Names the random numbers; any 64-bit integer.
        max_tokens: Most tokens to generate, at least 1; ``None`` is the server's limit.
        min_tokens: Tokens before one that ends the answer may be chosen.
        ignore_eos: End-of-sequence tokens do not end the answer.
        stop_token_ids: Tokens that end the answer beside the model's own.
        stop: Strings that end the answer, none empty.
        repetition_penalty: Divides positive and multiplies negative logits of the tokens of
            conversation and answer, in ``[0.1, 10]``; 1 is none.
        presence_penalty: Subtracted from the logits of the answer's tokens, in ``[-2, 2]``.
        frequency_penalty: The same, as often as the token was generated.
        logit_bias: Added to logits, by token id, each in ``[-100, 100]``.
        logprobs: Send log-probabilities, and this many alternatives, in ``[0, 20]``; ``None``
            sends none.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

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
        self._check_penalties()
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, "0 to 20")

    def _check_penalties(self) -> None:
        # Bounded on both sides: what is divided by 1e-40 is no number.
        is_valid = 0.1 <= self.repetition_penalty <= 10
        _require(is_valid, "repetition_penalty", self.repetition_penalty, "0.1 to 10")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            _require(-2 <= penalty <= 2, name, penalty, "-2 to 2")
        num_biases = len(self.logit_bias)
        is_valid = num_biases <= MAX_LOGIT_BIASES
        _require(is_valid, "logit_bias", f"{num_biases} entries", f"at most {MAX_LOGIT_BIASES}")
        for token_id, bias in self.logit_bias.items():
            _require(-100 <= bias <= 100, f"logit_bias[{token_id}]", bias, "-100 to 100")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < _MIN_TEMPERATURE

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
            repetition_penalty=(
                params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
            ),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias),
            logprobs=params.logprobs if params.HasField("logprobs") else None,
        )

    def ending_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end the answer."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids


class Sampler:
    """Chooses the tokens of one answer.

    Keeps what the penalties need of the tokens before: a new token costs the same behind ten
    tokens and behind ten thousand.

    Args:
        settings: How tokens are chosen.
        prompt_token_ids: The conversation before the answer. Looked at only with a repetition
            penalty.
        ending_token_ids: Not chosen before ``settings.min_tokens`` others.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        *,
        prompt_token_ids: Iterable[int] = (),
        ending_token_ids: Iterable[int] = (),
    ) -> None:
        self._settings = settings
        self._bias = LogitBias(settings.logit_bias)
        self._penalties = Penalties(
            repetition=settings.repetition_penalty,
            presence=settings.presence_penalty,
            frequency=settings.frequency_penalty,
            prompt_token_ids=prompt_token_ids,
        )
        self._forbidden = LogitBias(dict.fromkeys(ending_token_ids, float("-inf")))
        self._num_tokens = 0

    def choose(self, logits: torch.Tensor, *, position: int) -> int:
        """Return the next token; :meth:`add` makes it one of the answer.

        Args:
            logits: ``(vocab_size,)`` of the model, any float dtype; left as they are.
            position: Position of the token in the conversation; picks the random numbers.

        Raises:
            ValueError: No token is left, because the logits are NaN or all are forbidden.
        """
        return sample(self.process(logits), self._settings, position=position)

    def add(self, token_id: int) -> None:
        """Take a token of the answer into account, wherever it was chosen."""
        self._num_tokens += 1
        self._penalties.add(token_id)

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with bias, penalties and minimum length.

        Args:
            logits: ``(vocab_size,)``, any float dtype.

        Returns:
            ``(vocab_size,)`` float32; ``logits`` itself if there is nothing to do.
        """
        logits = self._penalties(self._bias(logits.float()))
        if self._num_tokens < self._settings.min_tokens:
            logits = self._forbidden(logits)
        return logits


def sample(logits: torch.Tensor, settings: SamplingSettings, *, position: int) -> int:
    """Choose a token.

    Args:
        logits: ``(vocab_size,)`` float32; ``-inf`` where a token must not be chosen.
        settings: Temperature, filters and seed count.
        position: Position of the chosen token in the conversation; picks the random numbers.

    Raises:
        ValueError: No token is left, because the logits are NaN or all ``-inf``.
    """
    best = _argmax(logits)  # a NaN counts as the largest
    best_logit = float(logits[best])
    if not math.isfinite(best_logit):
        raise ValueError(f"no token can be chosen: the best logit is {best_logit}")
    if settings.is_greedy:
        return best
    return _draw(warp(logits, settings), settings.seed, position)


def warp(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Apply temperature, top-k, top-p and min-p; tokens that fall out get ``-inf``.

    Args:
        logits: ``(vocab_size,)`` float32.
        settings: Not greedy.
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
    """Return which tokens are not in the nucleus: ``(vocab_size,)`` bool.

    As transformers, which adds the probabilities up from the least likely token and drops those
    up to ``1 - top_p``; but only tokens about as likely as the one at the edge are sorted, because
    sorting all takes longer than the rest of sampling together.
    """
    probabilities = logits.softmax(dim=-1).double()
    # From the likeliest token, 0, down; the last bucket has all that is less likely.
    buckets = ((logits.max() - logits) * _BUCKETS_PER_NAT).clamp(max=_NUM_BUCKETS - 1).long()
    masses = buckets.bincount(probabilities, _NUM_BUCKETS)
    masses_from = masses.flip(0).cumsum(dim=0).flip(0)  # of a bucket and all below it
    edge = max(int((masses_from.float() > 1 - top_p).sum()) - 1, 0)

    is_outside = buckets > edge
    token_ids = (buckets == edge).nonzero().squeeze(-1)
    order = logits[token_ids].sort(stable=True, descending=True).indices.flip(0)
    token_ids = token_ids[order]  # of equal ones, the first stays longest
    mass_below = masses[edge + 1 :].sum()
    is_outside_here = (mass_below + probabilities[token_ids].cumsum(dim=0)).float() <= 1 - top_p
    is_outside_here[-1] = False  # the likeliest token stays, however small top_p is
    is_outside[token_ids] = is_outside_here
    return is_outside


def _draw(logits: torch.Tensor, seed: int, position: int) -> int:
    """Draw a token from softmax(logits), by the argmax of the logits with Gumbel noise.

    Number ``i`` belongs to token ``i``: filters and the rest of the batch do not move it, so
    tokens that are out need none.
    """
    is_in = logits > float("-inf")
    vocab_size = logits.shape[-1]
    if int(is_in.sum()) >= vocab_size // 4:  # four neighbours share a counter
        uniform = uniforms(vocab_size, seed=seed, position=position, device=logits.device)
        return _argmax(logits + _gumbel(uniform))
    token_ids = is_in.nonzero().squeeze(-1)
    uniform = uniforms_at(token_ids, seed=seed, position=position)
    return int(token_ids[(logits[token_ids] + _gumbel(uniform)).argmax()])


def _argmax(values: torch.Tensor) -> int:
    """Return the place of the largest of ``(n,)`` values, the first of equal ones."""
    if values.device.type == "cpu":
        return int(values.numpy().argmax())  # with SIMD, 8 times as fast as torch's on a CPU
    return int(values.argmax())


def _gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Turn uniform numbers into Gumbel noise, in place."""
    return uniform.log_().neg_().log_().neg_()


def _require(is_valid: bool, name: str, value: object, allowed: str) -> None:
    if not is_valid:
        raise InvalidRequestError(
            f"sampling.{name} is {value}; send {allowed}", field=f"sampling.{name}"
        )
