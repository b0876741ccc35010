"""The compression policy: how much of a KV cache is kept, and how it is chosen.

Knows ranges and integer budgets; sees no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, get_args

from chunkkv.errors import InvalidPolicyError

Scorer = Literal["window", "reconstruction", "key_diff"]
Unit = Literal["chunk", "token"]
Scope = Literal["head", "layer", "group", "global"]
Precision = Literal["native", "fp8", "int8", "int4"]

DEFAULT_KEEP_RATIO: Final = 0.3

# A ratio is read as the nearest fraction with at most this denominator, so that 0.8 means 4/5 and
# not 0.8000000119 (its 32-bit neighbour), and budgets are integer arithmetic.
_MAX_DENOMINATOR: Final = 10_000
_LEAST_RATIO: Final = (1 - 2**-24) / _MAX_DENOMINATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPolicy:
    """How much is kept, and how it is chosen.

    The observation window and the sink are inside the budget: a budget smaller than the window
    keeps the last tokens of it, what the window leaves goes to the sink, and only the rest is
    shared out by score.

    Args:
        keep_ratio: Fraction of tokens to keep, in ``(0, 1]``; ``floor(keep_ratio * num_tokens)``,
            at least 1. Exclusive with ``max_kept_tokens``; 0.3 if neither is given.
        max_kept_tokens: Number of tokens to keep at most, at least 1.
        scorer: ``window``: attention of the last ``window_size`` tokens (ChunkKV, SnapKV);
            ``reconstruction``: attention while the model repeats the text (KVzip); ``key_diff``:
            how little a key resembles the average one (KeyDiff).
        unit: ``chunk``: ``chunk_size`` neighbouring tokens are kept or dropped together
            (ChunkKV); ``token``: each by itself (SnapKV).
        scope: Who shares one list of positions: ``head`` (nobody), ``layer`` (its KV heads),
            ``group`` (``reuse_interval`` neighbouring layers use the first one's list),
            ``global`` (all layers, by the sum of their scores).
        chunk_size: Tokens in a chunk, at least 1.
        window_size: Trailing tokens that are kept, and with ``window`` score the others, at least
            1.
        sink_tokens: Leading tokens that are kept, at least 0.
        reuse_interval: Layers that share one list with scope ``group``, at least 1.
        precision: How kept keys and values are stored (``chunkkv.quantization``); ``native``: as
            the model computed them.

    Raises:
        InvalidPolicyError: A value is out of range, or both budgets are given.

    Source: ChunkKV, Algorithms 1 and 2 (https://arxiv.org/abs/2502.00299); ``keep_ratio`` is what
    the paper calls compression ratio.
    """

    keep_ratio: float | None = None
    max_kept_tokens: int | None = None
    scorer: Scorer = "window"
    unit: Unit = "chunk"
    scope: Scope = "layer"
    chunk_size: int = 20
    window_size: int = 16
    sink_tokens: int = 4
    reuse_interval: int = 2
    precision: Precision = "native"

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.max_kept_tokens is not None:
            raise InvalidPolicyError("keep_ratio and max_kept_tokens are both set; set one of them")
        if self.keep_ratio is None and self.max_kept_tokens is None:
            object.__setattr__(self, "keep_ratio", DEFAULT_KEEP_RATIO)
        if self.keep_ratio is not None and not _is_ratio(self.keep_ratio):
            raise InvalidPolicyError(
                f"keep_ratio is {self.keep_ratio}; give a fraction of at least "
                f"1/{_MAX_DENOMINATOR} and at most 1"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise InvalidPolicyError(
                    f"{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(allowed))}"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name == "max_kept_tokens" and value is None:
                continue
            # True is an integer to Python, and would have a canonical name of its own.
            if type(value) is not int or value < least:
                raise InvalidPolicyError(
                    f"{name} is {value!r}; give an integer of at least {least}"
                )

    def budget(self, num_tokens: int) -> int:
        """Return how many of ``num_tokens`` (at least 1) tokens are kept, exactly."""
        if self.max_kept_tokens is not None:
            return min(self.max_kept_tokens, num_tokens)
        return max(1, math.floor(_fraction(self.keep_ratio or 0.0) * num_tokens))

    @property
    def ranked_tokens(self) -> int:
        """Tokens that are kept or dropped together."""
        return self.chunk_size if self.unit == "chunk" else 1

    def canonical(self) -> str:
        """Return a string that names what this policy chooses.

        Equal for policies that keep the same tokens with the same scores of any prompt and model,
        stored alike, and for no others.
        """
        budget = (
            f"max_kept_tokens={self.max_kept_tokens}"
            if self.max_kept_tokens is not None
            else f"keep_ratio={_fraction(self.keep_ratio or 0.0)}"
        )
        scope: str = self.scope
        if scope == "group":
            scope = f"group/{self.reuse_interval}" if self.reuse_interval > 1 else "layer"
        # Names that were given before there was a choice stay what they were.
        precision = f" precision={self.precision}" if self.precision != "native" else ""
        return (
            f"{budget} scorer={self.scorer} unit={self.ranked_tokens} scope={scope} "
            f"window={self.window_size} sink={self.sink_tokens}{precision}"
        )


_CHOICES: Final[dict[str, Any]] = {
    "scorer": Scorer,
    "unit": Unit,
    "scope": Scope,
    "precision": Precision,
}
_LEAST: Final = {
    "max_kept_tokens": 1,
    "chunk_size": 1,
    "window_size": 1,
    "sink_tokens": 0,
    "reuse_interval": 1,
}


def _is_ratio(value: object) -> bool:
    if type(value) is int:
        return value == 1
    # NaN and infinities fail the comparison; the 32-bit neighbour of the least fraction passes.
    return isinstance(value, float) and _LEAST_RATIO <= value <= 1


def _fraction(ratio: float) -> Fraction:
    return Fraction(ratio).limit_denominator(_MAX_DENOMINATOR)
