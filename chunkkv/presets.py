"""Published methods and our own choices, by name: what each of them makes of a policy.

A preset is a policy without a budget. What a policy cannot express of a paper stands in the
preset's ``deviation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from chunkkv.errors import InvalidPolicyError
from chunkkv.policy import CompressionPolicy


@dataclass(frozen=True, slots=True)
class Preset:
    """One named method.

    Attributes:
        summary: What it does, in one line.
        source: The paper, or whose choice it is.
        choices: Fields of ``CompressionPolicy``, without a budget.
        recent_share: Fraction of the budget that goes to the last tokens, where the number of
            tokens is known; 0: ``window_size`` says how many.
        below_one: Fields that are added where not all tokens are kept.
        deviation: From the paper.
    """

    summary: str
    source: str
    choices: Mapping[str, Any]
    recent_share: float = 0.0
    below_one: Mapping[str, Any] = field(default_factory=dict)
    deviation: str = ""


_FIELDS: Final = frozenset(each.name for each in fields(CompressionPolicy))

_SNAPKV: Final = {
    "scorer": "window",
    "unit": "token",
    "scope": "head",
    "window_size": 32,
    "sink_tokens": 0,
    "pool_size": 5,
}
_CHUNKKV: Final = {"scorer": "window", "chunk_size": 10, "window_size": 16, "sink_tokens": 0}

PRESETS: Final[Mapping[str, Preset]] = {
    "fast": Preset(
        "chunks of 10 by the squared attention of the last 16 tokens, averaged over 31 "
        "neighbours, all heads in one ranking: no extra pass, wants the question",
        "ours",
        {
            "scorer": "window",
            "vote_power": 2,
            "pool_size": 31,
            "chunk_size": 10,
            "scope": "head",
            "spread": "adaptive",
            "head_floor": 0.2,
            "window_size": 16,
            "sink_tokens": 4,
        },
    ),
    "durable": Preset(
        "single tokens by the squared attention of a repetition, all heads in one ranking: for "
        "questions to come",
        "ours",
        {
            "scorer": "recall",
            "unit": "token",
            "scope": "head",
            "spread": "adaptive",
            "window_size": 1,
            "sink_tokens": 4,
        },
    ),
    "chunkkv": Preset(
        "chunks of 10 by the attention of the last 16 tokens, one list for a layer",
        "ChunkKV, Algorithm 1 (https://arxiv.org/abs/2502.00299)",
        _CHUNKKV,
        deviation="budgets are exact in tokens",
    ),
    "chunkkv_reuse": Preset(
        "the same, two neighbouring layers share the first one's list",
        "ChunkKV, Algorithm 2 (https://arxiv.org/abs/2502.00299)",
        {**_CHUNKKV, "scope": "group", "reuse_interval": 2},
    ),
    "snapkv": Preset(
        "single tokens by the pooled attention of the last 32 tokens, a list for each head",
        "SnapKV (https://arxiv.org/abs/2404.14469)",
        _SNAPKV,
        deviation="window and pooling of the authors' code; the mean of a KV head's query heads",
    ),
    "pyramidkv": Preset(
        "SnapKV with less budget in each deeper layer",
        "PyramidKV (https://arxiv.org/abs/2406.02069)",
        {**_SNAPKV, "spread": "pyramid"},
    ),
    "h2o": Preset(
        "single tokens by the attention of all tokens, and half the budget for the last ones",
        "H2O (https://arxiv.org/abs/2306.14048)",
        {
            "scorer": "heavy_hitter",
            "unit": "token",
            "scope": "head",
            "window_size": 32,
            "sink_tokens": 0,
        },
        recent_share=0.5,
        deviation=(
            "evicts once, after the prefill, not at every step; where the number of tokens is "
            "not known, the last 32 tokens stand for the recent half"
        ),
    ),
    "streamingllm": Preset(
        "the first 4 and the last tokens",
        "StreamingLLM (https://arxiv.org/abs/2309.17453)",
        {
            "scorer": "recency",
            "unit": "token",
            "scope": "layer",
            "window_size": 1,
            "sink_tokens": 4,
        },
        deviation="keys stay at the positions of the text",
    ),
    "kvzip": Preset(
        "single tokens by the attention of a repetition, all heads in one ranking",
        "KVzip (https://arxiv.org/abs/2505.23416)",
        {
            "scorer": "reconstruction",
            "unit": "token",
            "scope": "head",
            "spread": "adaptive",
            "window_size": 1,
            "sink_tokens": 4,
        },
        deviation="see chunkkv.scoring.reconstruction",
    ),
    "expected_attention": Preset(
        "single tokens by the attention that queries to come would pay",
        "Expected Attention (https://arxiv.org/abs/2510.00636)",
        {
            "scorer": "expected_attention",
            "unit": "token",
            "scope": "head",
            "window_size": 1,
            "sink_tokens": 4,
        },
    ),
    "keydiff": Preset(
        "single tokens whose keys differ most from the average key",
        "KeyDiff (https://arxiv.org/abs/2504.15364)",
        {
            "scorer": "key_diff",
            "unit": "token",
            "scope": "head",
            "window_size": 1,
            "sink_tokens": 0,
        },
    ),
    "minicache": Preset(
        "neighbouring deeper layers stored as one, all tokens or one list of chunks for the model",
        "MiniCache (https://arxiv.org/abs/2405.14366)",
        {"merge_layers": True, "window_size": 16, "sink_tokens": 4},
        # Layers that are merged must keep the same tokens.
        below_one={"scope": "global"},
        deviation="the paper merges and keeps all tokens; below that ours are chosen by chunks",
    ),
}


def preset(
    name: str,
    *,
    keep_ratio: float | None = None,
    max_kept_tokens: int | None = None,
    num_tokens: int | None = None,
    **changes: Any,
) -> CompressionPolicy:
    """Return a named method as a policy.

    Args:
        name: One of ``PRESETS``.
        keep_ratio: As in ``CompressionPolicy``.
        max_kept_tokens: As in ``CompressionPolicy``.
        num_tokens: Tokens of the text, if known, at least 1: what a share of the budget is
            taken of.
        **changes: Fields of ``CompressionPolicy`` that replace the preset's. A scope that all or
            several layers share gives up the preset's spread, unless that is changed too.

    Raises:
        InvalidPolicyError: There is no such preset or field, or a value is out of range.
    """
    if name not in PRESETS:
        raise InvalidPolicyError(f"no preset {name!r}; give one of {', '.join(PRESETS)}")
    if unknown := sorted(set(changes) - _FIELDS):
        raise InvalidPolicyError(
            f"a policy has no field {', '.join(unknown)}; fields are {', '.join(sorted(_FIELDS))}"
        )
    chosen = PRESETS[name]
    budget = {"keep_ratio": keep_ratio, "max_kept_tokens": max_kept_tokens}
    choices = dict(chosen.choices)
    if keep_ratio != 1:
        choices |= chosen.below_one
    if chosen.recent_share:
        kept = max_kept_tokens
        if num_tokens is not None:
            kept = CompressionPolicy(**budget).budget(num_tokens)  # type: ignore[arg-type]
        if kept is not None:
            choices["window_size"] = max(1, int(kept * chosen.recent_share))
    if changes.get("scope") in ("group", "global"):
        choices["spread"] = "uniform"
    return CompressionPolicy(**{**budget, **choices, **changes})
