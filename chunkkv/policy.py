"""The compression policy: how much of a KV cache is kept, and how it is chosen.

Knows ranges and integer budgets; sees no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, Literal, get_args

from chunkkv.errors import InvalidPolicyError

Scorer = Literal[
    "window",
    "reconstruction",
    "recall",
    "key_diff",
    "heavy_hitter",
    "recency",
    "expected_attention",
    "key_norm",
]
Unit = Literal["chunk", "token", "sentence"]
Scope = Literal["head", "layer", "group", "global"]
Spread = Literal["uniform", "pyramid", "adaptive"]
Precision = Literal["native", "fp8", "int8", "int4"]

DEFAULT_KEEP_RATIO: Final = 0.3

# A ratio is read as the nearest fraction with at most this denominator, so that 0.8 means 4/5 and
# not 0.8000000119 (its 32-bit neighbour), and budgets are integer arithmetic.
_MAX_DENOMINATOR: Final = 10_000
_LEAST_RATIO: Final = (1 - 2**-24) / _MAX_DENOMINATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPolicy:
    """How much is kept, how it is chosen, and how it is stored.

    The observation window and the sink are inside the budget: a budget smaller than the window
    keeps the last tokens of it, what the window leaves goes to the sink, and only the rest is
    shared out by score.

    Args:
        keep_ratio: Fraction of tokens to keep, in ``(0, 1]``; ``floor(keep_ratio * num_tokens)``,
            at least 1. Exclusive with ``max_kept_tokens``; 0.3 if neither is given.
        max_kept_tokens: Number of tokens to keep at most, at least 1.
        scorer: ``window``: attention of the last ``window_size`` tokens (ChunkKV, SnapKV);
            ``reconstruction``: attention while the model repeats the text (KVzip); ``recall``: the
            same, each piece seeing itself and a sample of the rest, strong votes counted;
            ``key_diff``: how little a key resembles the average one (KeyDiff);
            ``heavy_hitter``: attention of all tokens, accumulated (H2O);
            ``recency``: the later, the higher (StreamingLLM);
            ``expected_attention``: of queries to come, by the statistics of those seen;
            ``key_norm``: the smaller a key's norm, the higher.
        unit: ``chunk``: ``chunk_size`` neighbouring tokens are kept or dropped together
            (ChunkKV); ``token``: each by itself (SnapKV); ``sentence``: the tokens of a sentence,
            of which a longer one than ``chunk_size`` makes several.
        scope: Who shares one list of positions: ``head`` (nobody), ``layer`` (its KV heads),
            ``group`` (``reuse_interval`` neighbouring layers use the first one's list),
            ``global`` (all layers, by the sum of their scores).
        spread: How the budget is shared out between lists: ``uniform`` (equally); ``pyramid``
            (less in each deeper layer: PyramidKV); ``adaptive`` (the units of all lists compete in
            one ranking: AdaKV, KVzip). Other than ``uniform`` needs scope ``head`` or ``layer``.
        chunk_size: Tokens in a chunk, at least 1.
        window_size: Trailing tokens that are kept, and with ``window`` score the others, at least
            1.
        sink_tokens: Leading tokens that are kept, at least 0.
        reuse_interval: Layers that share one list with scope ``group``, at least 1.
        vote_power: With ``window``: what the attention of each query is raised to before it is
            averaged, from 1 (ChunkKV, SnapKV) to 8. The higher, the more one sure query counts
            beside many that look everywhere.
        pool_size: Tokens that the ``window`` scorer's scores are averaged over, odd; 1: none
            (SnapKV takes 5 or 7).
        head_floor: With ``adaptive``: fraction of an equal share that every list is given before
            the ranking, in ``[0, 1]``.
        gating: With chunks and sentences: where the scores in a unit are so concentrated that
            their entropy is below this fraction of its maximum, only the best tokens of the unit
            are kept with it; in ``[0, 1]``, 0: never.
        merge_layers: Store neighbouring layers of the deeper half as one direction with norms of
            their own (MiniCache, ``chunkkv.merging``). Layers that do not keep the same tokens
            stay apart: it needs scope ``group`` or ``global``, or ``keep_ratio`` 1. Worth it only
            for models whose neighbouring layers are alike (``chunkkv/README.md``).
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
    spread: Spread = "uniform"
    chunk_size: int = 20
    window_size: int = 16
    sink_tokens: int = 4
    reuse_interval: int = 2
    vote_power: int = 1
    pool_size: int = 1
    head_floor: float = 0.0
    gating: float = 0.0
    merge_layers: bool = False
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
            if type(value) is not int or not least <= value <= _MOST:
                raise InvalidPolicyError(
                    f"{name} is {value!r}; give an integer of at least {least} and at most {_MOST}"
                )
        if self.vote_power > _MAX_VOTE_POWER:
            raise InvalidPolicyError(
                f"vote_power is {self.vote_power}; give 1 to {_MAX_VOTE_POWER}"
            )
        if self.pool_size % 2 == 0:
            raise InvalidPolicyError(f"pool_size is {self.pool_size}; give an odd number")
        for name in _FRACTIONS:
            value = getattr(self, name)
            # NaN fails the comparison.
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise InvalidPolicyError(f"{name} is {value!r}; give a number from 0 to 1")
        # A text would be true, whatever it says.
        if type(self.merge_layers) is not bool:
            raise InvalidPolicyError(f"merge_layers is {self.merge_layers!r}; give true or false")
        if self.spread != "uniform" and self.scope not in ("head", "layer"):
            raise InvalidPolicyError(
                f"spread is {self.spread!r} and scope {self.scope!r}; "
                "a budget that differs between layers needs scope head or layer"
            )

    def budget(self, num_tokens: int) -> int:
        """Return how many of ``num_tokens`` (at least 1) tokens are kept, exactly."""
        if self.max_kept_tokens is not None:
            return min(self.max_kept_tokens, num_tokens)
        return max(1, math.floor(fraction(self.keep_ratio or 0.0) * num_tokens))

    @property
    def ranked_tokens(self) -> int:
        """Tokens that are kept or dropped together, at most."""
        return 1 if self.unit == "token" else self.chunk_size

    @property
    def num_queries(self) -> int:
        """Trailing tokens whose queries a prefill has to keep, at least 1."""
        return self.window_size if self.scorer == "window" else 1

    def canonical(self) -> str:
        """Return a string that names what this policy chooses.

        Equal for policies that keep the same tokens with the same scores of any prompt and model,
        stored alike, and for no others.
        """
        budget = (
            f"max_kept_tokens={self.max_kept_tokens}"
            if self.max_kept_tokens is not None
            else f"keep_ratio={fraction(self.keep_ratio or 0.0)}"
        )
        scope: str = self.scope
        if scope == "group":
            scope = f"group/{self.reuse_interval}" if self.reuse_interval > 1 else "layer"
        # Names that were given before there was a choice stay what they were.
        return (
            f"{budget} scorer={self.scorer} unit={self.ranked_tokens} scope={scope} "
            f"window={self.window_size} sink={self.sink_tokens}{''.join(self._later_names())}"
        )

    def _later_names(self) -> Iterator[str]:
        if self.unit == "sentence" and self.ranked_tokens > 1:
            yield " cut=sentence"
        if self.spread != "uniform":
            yield f" spread={self.spread}"
        if self.spread == "adaptive" and fraction(self.head_floor) > 0:
            yield f" floor={fraction(self.head_floor)}"
        if self.scorer == "window" and self.vote_power > 1:
            yield f" power={self.vote_power}"
        if self.scorer == "window" and self.pool_size > 1:
            yield f" pool={self.pool_size}"
        if self.ranked_tokens > 1 and fraction(self.gating) > 0:
            yield f" gating={fraction(self.gating)}"
        if self.merge_layers:
            yield " merge=layers"
        if self.precision != "native":
            yield f" precision={self.precision}"


@lru_cache(maxsize=256)
def fraction(ratio: float) -> Fraction:
    """Return what a ratio, floor or gating in ``[0, 1]`` is read as, on either side of the wire."""
    return Fraction(ratio).limit_denominator(_MAX_DENOMINATOR)


_CHOICES: Final[dict[str, Any]] = {
    "scorer": Scorer,
    "unit": Unit,
    "scope": Scope,
    "spread": Spread,
    "precision": Precision,
}
_LEAST: Final = {
    "max_kept_tokens": 1,
    "chunk_size": 1,
    "window_size": 1,
    "sink_tokens": 0,
    "reuse_interval": 1,
    "vote_power": 1,
    "pool_size": 1,
}
# What the wire carries, and tensors of positions count in.
_MOST: Final = 2**31 - 1
_MAX_VOTE_POWER: Final = 8
_FRACTIONS: Final = ("head_floor", "gating")


def _is_ratio(value: object) -> bool:
    if type(value) is int:
        return value == 1
    # NaN and infinities fail the comparison; the 32-bit neighbour of the least fraction passes.
    return isinstance(value, float) and _LEAST_RATIO <= value <= 1
