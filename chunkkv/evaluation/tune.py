"""Finds a policy for a text: the fewest stored bytes at which the model goes on as before.

Quality is fidelity (``chunkkv.evaluation.fidelity``): how often the model, on what was kept, finds
the same next token most likely as on the full cache. Presets come first; then one choice after
another is tried at all kept ratios, the better one is taken, and the next is tried on top of it:
about 30 curves instead of the thousands of all combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from chunkkv.errors import InvalidPolicyError
from chunkkv.evaluation.fidelity import Fidelity, Reference, mean, measure, pieces, reference
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy
from chunkkv.presets import PRESETS

KEEP_RATIOS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)

# In the order in which they are decided; what is tried first wins a tie, and is the cheaper one.
STAGES: Final[Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    "preset": tuple(
        PRESETS[name].choices for name in ("fast", "chunkkv", "snapkv", "durable", "kvzip")
    ),
    "scorer": (
        # The presets that repeat the text leave it a single query.
        {"scorer": "window", "window_size": 16},
        *(
            {"scorer": scorer}
            for scorer in ("key_diff", "expected_attention", "recall", "reconstruction")
        ),
    ),
    "sharing": (
        {"scope": "layer", "spread": "uniform"},
        *({"scope": "head", "spread": "adaptive", "head_floor": floor} for floor in (0.0, 0.2)),
    ),
    # Scorers other than ``window`` have none: nothing is tried.
    "votes": tuple(
        {"vote_power": power, "pool_size": size} for power in (1, 2) for size in (1, 15, 31)
    ),
    "unit": (
        *({"unit": "chunk", "chunk_size": size} for size in (20, 10, 5)),
        {"unit": "sentence", "chunk_size": 40},
        {"unit": "token"},
    ),
    "window": tuple({"window_size": size} for size in (16, 8, 32, 64, 1)),
    "index reuse": (
        *({"scope": "group", "spread": "uniform", "reuse_interval": n} for n in (2, 4)),
        {"scope": "global", "spread": "uniform"},
    ),
    "budget of layers": (
        {"scope": "layer", "spread": "pyramid"},
        {"scope": "layer", "spread": "adaptive"},
        {"scope": "head", "spread": "pyramid"},
    ),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One policy and what was measured of it."""

    policy: CompressionPolicy
    fidelity: Fidelity


@dataclass(frozen=True, slots=True)
class Curve:
    """One method at all ratios.

    Attributes:
        stage: What was being decided.
        policy: At the first ratio.
        points: In the order of the ratios.
    """

    stage: str
    policy: CompressionPolicy
    points: tuple[Point, ...]

    def share_at(self, target: float) -> float | None:
        """Return the stored share at which the agreement reaches ``target``, or ``None``.

        Interpolated between the ratios that were measured.
        """
        before: Point | None = None
        for point in self.points:
            now = point.fidelity
            if now.agreement >= target:
                if before is None:
                    return now.stored_share
                then = before.fidelity
                part = (target - then.agreement) / (now.agreement - then.agreement)
                return then.stored_share + part * (now.stored_share - then.stored_share)
            before = point
        return None

    def rank(self, target: float) -> tuple[float, float]:
        """Return what curves are sorted by: the bytes at the target, then the mean agreement."""
        share = self.share_at(target)
        agreement = sum(p.fidelity.agreement for p in self.points) / len(self.points)
        return (float("inf") if share is None else share, -agreement)


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome.

    Attributes:
        curves: All that were measured, in order.
        best: The curve that was chosen.
        chosen: The point of it that was chosen.
        is_reached: Whether its agreement reaches the target.
    """

    curves: tuple[Curve, ...]
    best: Curve
    chosen: Point
    is_reached: bool


@dataclass(slots=True)
class Tuner:
    """Measures policies on pieces of a text, each policy once.

    Attributes:
        model: The model.
        texts: Pieces of the text.
        keep_ratios: Ascending.
        on_curve: Called with each curve.
    """

    model: Any
    texts: Sequence[Reference]
    keep_ratios: Sequence[float] = KEEP_RATIOS
    on_curve: Callable[[Curve], None] = lambda curve: None
    _measured: dict[str, Fidelity] = field(default_factory=dict)

    def curve(self, stage: str, policy: CompressionPolicy) -> Curve:
        """Measure a policy at all ratios."""
        policies = [replace(policy, keep_ratio=ratio) for ratio in self.keep_ratios]
        missing = [p for p in policies if p.canonical() not in self._measured]
        if missing:
            by_text = [measure(self.model, text, missing) for text in self.texts]
            for one, of_texts in zip(missing, zip(*by_text, strict=True), strict=True):
                self._measured[one.canonical()] = mean(of_texts)
        points = tuple(Point(p, self._measured[p.canonical()]) for p in policies)
        made = Curve(stage, policies[0], points)
        self.on_curve(made)
        return made


def tune(
    model: Any,
    token_ids: Sequence[int],
    *,
    target: float,
    context_tokens: int,
    continuation_tokens: int,
    num_texts: int,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    stages: Mapping[str, Sequence[Mapping[str, Any]]] = STAGES,
    on_curve: Callable[[Curve], None] = lambda curve: None,
    sentence_ends: torch.Tensor | None = None,
) -> Tuned:
    """Choose scorer, votes, unit, window, scope, reuse and spread of the budget on a text.

    Args:
        model: A transformers decoder.
        token_ids: The text.
        target: Agreement to reach, in (0, 1].
        context_tokens: Tokens of each piece that are compressed.
        continuation_tokens: Tokens after them that the agreement is counted over.
        num_texts: Pieces at most.
        keep_ratios: Tried of every candidate.
        stages: What is tried, choice by choice.
        on_curve: Called with each curve as it is measured.
        sentence_ends: As in ``prefill``; without it, candidates of unit ``sentence`` are left out.

    Returns:
        The outcome. Where no point reaches the target it is the one that comes closest.

    Raises:
        InvalidInputError: The text is too short.
    """
    stages = {
        stage: [c for c in tried if c.get("unit") != "sentence" or sentence_ends is not None]
        for stage, tried in stages.items()
    }
    candidates = [changes for tried in stages.values() for changes in tried]
    observed = [
        policy
        for policy in (_changed(CompressionPolicy(), changes) for changes in candidates)
        if policy is not None
    ]
    size = context_tokens + continuation_tokens
    fingerprint = model_fingerprint(model)
    texts = [
        reference(
            model,
            piece,
            num_continuation=continuation_tokens,
            policies=[*observed, *_widest(candidates)],
            fingerprint=fingerprint,
            sentence_ends=sentence_ends,
        )
        for piece in pieces(token_ids, size=size, num_pieces=num_texts)
    ]
    tuner = Tuner(model, texts, tuple(sorted(keep_ratios)), on_curve)
    curves: list[Curve] = []
    best: Curve | None = None
    seen: set[str] = set()  # the best is the best of all of them: none is tried again
    for stage, tried in stages.items():
        base = CompressionPolicy(keep_ratio=tuner.keep_ratios[0]) if best is None else best.policy
        for changed in _unseen(base, tried, seen):
            curves.append(tuner.curve(stage, changed))
            if best is None or curves[-1].rank(target) < best.rank(target):
                best = curves[-1]
    assert best is not None  # there are stages
    reaching = [p for p in best.points if p.fidelity.agreement >= target]
    chosen = (
        min(reaching, key=lambda point: point.fidelity.stored_share)
        if reaching
        else max(best.points, key=lambda point: point.fidelity.agreement)
    )
    return Tuned(tuple(curves), best, chosen, bool(reaching))


def _widest(candidates: Sequence[Mapping[str, Any]]) -> Iterator[CompressionPolicy]:
    """Yield the policy whose window the others' fit into."""
    yield CompressionPolicy(
        window_size=max(
            [CompressionPolicy().window_size, *(c.get("window_size", 1) for c in candidates)]
        )
    )


def _unseen(
    base: CompressionPolicy, tried: Sequence[Mapping[str, Any]], seen: set[str]
) -> Iterator[CompressionPolicy]:
    for changes in tried:
        policy = _changed(base, changes)
        if policy is not None and policy.canonical() not in seen:
            seen.add(policy.canonical())
            yield policy


def _changed(base: CompressionPolicy, changes: Mapping[str, Any]) -> CompressionPolicy | None:
    """Return the policy with changes, or ``None`` if it cannot have them beside its others."""
    try:
        return replace(base, **changes)
    except InvalidPolicyError:
        return None
