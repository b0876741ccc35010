"""Logits of one sequence in, one token id out.

Semantics and order are those of the logits processors in transformers' ``generate``: bias,
repetition penalty, minimum length, temperature, top-k, top-p, min-p. It has no presence and
frequency penalty; as in vLLM, which has the other two in the same order, they come behind the
repetition penalty: that one scales the model's logits and these subtract from the result, so that
what they subtract is in the unit that the caller gave, whatever the other is.

The draw is a pure function of logits, seed and position (Gumbel-max over counter-based random
numbers): the same seed gives the same tokens on any worker, in any company, and after another
worker took over. It is made on the CPU, wherever the model runs. Knows nothing of models or caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from chunkserve.v1 import types_pb2
from services.decode.penalties import LogitBias, Penalties
from services.decode.philox import random_words, random_words_at, uniforms
from services.runtime.errors import InvalidRequestError

MAX_TEMPERATURE: Final = 2.0
MAX_STOP_STRINGS: Final = 16
MAX_LOGIT_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20

# Below it only the likeliest token has a chance, and the division could overflow.
_MIN_TEMPERATURE: Final = 1e-5

# A token further behind the best cannot win: more than from the least Gumbel noise of a random word
# to the most, -log(33 log 2) to 33 log 2.
_NOISE_SPAN: Final = math.log(33 * math.log(2)) + 33 * math.log(2) + 0.01
# More than float32 arithmetic is off by in that span.
_ROUNDING: Final = 1e-3


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
    best, best_logit = _best(logits)
    if not math.isfinite(best_logit):
        raise ValueError(f"no token can be chosen: the best logit is {best_logit}")
    if settings.is_greedy:
        return best
    return _draw(*candidates(logits.cpu(), settings), settings.seed, position)


def candidates(
    logits: torch.Tensor, settings: SamplingSettings
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits: ``(vocab_size,)`` float32, on the CPU.
        settings: Not greedy.

    Returns:
        The tokens that stay, ascending, and their logits: ``(num_candidates,)`` each.
    """
    token_ids = np.arange(len(logits), dtype=np.int32)
    warped = (logits / settings.temperature).numpy()
    if 0 < settings.top_k < len(warped):
        kth_best = np.partition(warped, -settings.top_k)[-settings.top_k]
        places = np.flatnonzero(warped >= kth_best)
        token_ids, warped = token_ids[places], warped[places]
    if settings.top_p < 1:
        places = _nucleus(warped, settings.top_p)
        token_ids, warped = token_ids[places], warped[places]
    if settings.min_p > 0:
        probabilities = _softmax(warped)
        places = np.flatnonzero(probabilities >= settings.min_p * probabilities.max())
        token_ids, warped = token_ids[places], warped[places]
    return token_ids, warped


def _nucleus(logits: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Return the places of the tokens in the nucleus, ascending.

    As transformers, which adds the probabilities up from the least likely token and drops those
    up to ``1 - top_p``; but only tokens that might stay are sorted.
    """
    probabilities = _softmax(logits)
    to_drop = np.float32(1 - top_p)
    # Tokens less likely than this do not fill what is to be dropped, not even all together.
    places = np.flatnonzero(probabilities > to_drop / (2 * len(logits)))
    total = probabilities.sum(dtype=np.float64)
    logits, probabilities = logits[places], probabilities[places]

    mass_below = total - probabilities.sum(dtype=np.float64)
    masses = mass_below + np.sort(probabilities).cumsum(dtype=np.float64)
    num_kept = max(int((masses.astype(np.float32) > to_drop).sum()), 1)

    edge = np.partition(logits, -num_kept)[-num_kept]
    is_inside = logits > edge
    num_at_edge = num_kept - np.count_nonzero(is_inside)
    is_inside[np.flatnonzero(logits == edge)[:num_at_edge]] = True  # of equal ones, the first
    return places[np.flatnonzero(is_inside)]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    probabilities: NDArray[np.float32] = torch.from_numpy(logits).softmax(dim=-1).numpy()
    return probabilities


def _draw(
    token_ids: NDArray[np.int32], logits: NDArray[np.float32], seed: int, position: int
) -> int:
    """Draw a token from softmax(logits), by the argmax of the logits with Gumbel noise.

    Word ``i`` belongs to token ``i``: filters and the rest of the batch do not move it, so tokens
    that cannot win need none.
    """
    leads = logits - logits.max()  # over the best, so never more than 0
    is_in_reach = leads >= -_NOISE_SPAN
    end = int(token_ids[-1]) + 1
    if np.count_nonzero(is_in_reach) < end // 4:  # four neighbours share a counter
        places = np.flatnonzero(is_in_reach)
        words = random_words_at(token_ids[places], seed=seed, position=position)
    else:
        words = random_words(end, seed=seed, position=position)
        if len(token_ids) < end:
            words = words[token_ids]
        places = _rivals(leads, words)
        words = words[places]
    return int(token_ids[places[(logits[places] + _gumbel(words)).argmax()]])


def _rivals(leads: NDArray[np.float32], words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the places of the best token and of the few that it may lose against.

    The noise of a uniform number u is at most -log(1 - u), so a token that wins has
    1 - u <= exp(lead - noise of the best); ``~word``, over 2**32, is a little less than 1 - u.
    """
    noise_of_best = float(_gumbel(words[[leads.argmax()]])[0])
    largest = np.exp(leads + (32 * math.log(2) + _ROUNDING - noise_of_best))
    return np.flatnonzero((~words).astype(np.float32) <= largest)


def _best(logits: torch.Tensor) -> tuple[int, float]:
    """Return the likeliest token, the first of equal ones, and its logit; NaN is the largest."""
    if logits.device.type != "cpu":
        best = int(logits.argmax())
        return best, float(logits[best])
    values = logits.numpy()  # with SIMD, 8 times as fast as torch on a CPU
    best = int(values.argmax())
    return best, float(values[best])


def _gumbel(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Turn random words into Gumbel noise."""
    return -np.log(-np.log(uniforms(words)))


def _require(is_valid: bool, name: str, value: object, allowed: str) -> None:
    if not is_valid:
        raise InvalidRequestError(
            f"sampling.{name} is {value}; send {allowed}", field=f"sampling.{name}"
        )
