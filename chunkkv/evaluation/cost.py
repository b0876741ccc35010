"""What compression costs: bytes in each precision, and time beside the prefill's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, get_args

import torch

from chunkkv.codec import encode
from chunkkv.compressed import CompressedKV
from chunkkv.compressor import compress
from chunkkv.evaluation.contexts import Context, prefill_context
from chunkkv.policy import CompressionPolicy, Precision, Scorer

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one policy costs on one text.

    Attributes:
        stored_bytes: By precision: keys, values, positions and scores as they are stored.
        full_bytes: Keys and values of the full cache.
        observe_ms: What scoring adds to the prefill: observers, and a repetition if there is one.
        select_ms: Scores that need no forward pass, selection and gathering; median.
        prefill_ms: The prefill alone; median.
    """

    stored_bytes: dict[Precision, int]
    full_bytes: int
    observe_ms: float
    select_ms: float
    prefill_ms: float

    @property
    def share_of_prefill(self) -> float:
        """Time of the compression, as a fraction of the prefill's."""
        return (self.observe_ms + self.select_ms) / self.prefill_ms


def measure_cost(
    model: Any,
    token_ids: Sequence[int],
    policies: Sequence[CompressionPolicy],
    *,
    repeats: int = 3,
    sentence_ends: torch.Tensor | None = None,
) -> list[Cost]:
    """Return what each policy costs on one text.

    Args:
        model: A transformers decoder.
        token_ids: The text.
        policies: What is measured.
        repeats: Times that everything is timed, at least 1; the median counts.
        sentence_ends: As in ``prefill``.
    """

    def prefilled_for(policy: CompressionPolicy) -> Context:
        return prefill_context(model, token_ids, [policy], sentence_ends=sentence_ends)

    bare = CompressionPolicy(scorer="recency", window_size=1)
    by_scorer: dict[Scorer | None, CompressionPolicy] = {None: bare}
    by_scorer.update({policy.scorer: policy for policy in policies})
    prefilled_for(bare)  # first calls pay for more than themselves
    passes = by_turns(
        {scorer: partial(prefilled_for, policy) for scorer, policy in by_scorer.items()}, repeats
    )
    costs = []
    for policy in policies:
        prefilled = prefilled_for(policy).prefilled
        compressing = partial(compress, prefilled, policy)
        span = compressing()[0]
        costs.append(
            Cost(
                stored_bytes={
                    precision: _stored_bytes(span, precision) for precision in get_args(Precision)
                },
                full_bytes=sum(
                    tensor.numel() * tensor.element_size()
                    for layer in prefilled.cache.layers
                    for tensor in (layer.keys, layer.values)
                ),
                observe_ms=max(0.0, passes[policy.scorer] - passes[None]),
                select_ms=by_turns({policy: compressing}, repeats)[policy],
                prefill_ms=passes[None],
            )
        )
    return costs


def _stored_bytes(span: CompressedKV, precision: Precision) -> int:
    changed = CompressedKV(replace(span.shape, precision=precision), span.memory.to("cpu"))
    return sum(map(len, encode(changed, identity="cost").parts))


def by_turns(actions: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, float]:
    """Return the median milliseconds of each action, one after another in each round.

    A machine that is slow for a while is so for all of them.

    Args:
        actions: By name.
        repeats: Rounds, at least 1.
    """
    times: dict[Name, list[float]] = {name: [] for name in actions}
    for _ in range(max(1, repeats)):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(of_name) for name, of_name in times.items()}
