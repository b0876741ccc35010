"""Tuning takes the fewest bytes that reach the target, of what it measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkkv import PRESETS, CompressionPolicy
from chunkkv.evaluation import tune as tuning
from chunkkv.evaluation.fidelity import Fidelity
from chunkkv.evaluation.tune import Curve, Point, tune
from tests.models import VOCAB_SIZE, prompts, tiny_model

STAGES: dict[str, tuple[dict[str, Any], ...]] = {
    "scorer": ({"scorer": "window"}, {"scorer": "key_diff"}),
    "chunk size": ({"chunk_size": 8}, {"chunk_size": 1}),
    "impossible": ({"scope": "global", "spread": "pyramid"},),
}


def curve(*points: tuple[float, float]) -> Curve:
    policy = CompressionPolicy()
    made = tuple(
        Point(policy, Fidelity(0, 1, 0, agreement, 1, share)) for share, agreement in points
    )
    return Curve("stage", policy, made)


def test_bytes_at_the_target_lie_between_the_points_around_it() -> None:
    assert curve((0.1, 0.5), (0.3, 0.9)).share_at(0.7) == pytest.approx(0.2)
    assert curve((0.1, 0.5), (0.3, 0.9)).share_at(0.5) == 0.1
    assert curve((0.1, 0.5), (0.3, 0.9)).share_at(0.95) is None


def test_curves_rank_by_bytes_at_the_target_then_by_agreement() -> None:
    small, large = curve((0.1, 1.0)), curve((0.2, 1.0))
    near, far = curve((0.1, 0.8)), curve((0.1, 0.2))

    assert sorted([far, large, near, small], key=lambda c: c.rank(0.9)) == [small, large, near, far]


def tuned(target: float, stages: Any = STAGES, **options: Any) -> Any:
    ids, _ = prompts(150)
    return tune(
        tiny_model(),
        ids[0].tolist(),
        target=target,
        context_tokens=60,
        continuation_tokens=10,
        num_texts=2,
        keep_ratios=(0.5, 0.2, 1.0),
        stages=stages,
        **options,
    )


def test_smallest_point_that_reaches_the_target_is_chosen() -> None:
    found = tuned(0.9)

    assert found.is_reached
    reaching = [p for p in found.best.points if p.fidelity.agreement >= 0.9]
    smallest = min(point.fidelity.stored_share for point in reaching)
    assert found.chosen.fidelity.stored_share == smallest
    assert found.best.rank(0.9) == min(each.rank(0.9) for each in found.curves)
    assert [point.policy.keep_ratio for point in found.best.points] == [0.2, 0.5, 1.0]


def test_candidates_that_no_policy_can_be_are_left_out() -> None:
    found = tuned(0.9)

    assert {each.stage for each in found.curves} == {"scorer", "chunk size"}


def test_later_stages_build_on_what_earlier_ones_chose() -> None:
    found = tuned(0.9)

    of_scorer = min(
        (each for each in found.curves if each.stage == "scorer"), key=lambda each: each.rank(0.9)
    )
    of_chunks = [each.policy.scorer for each in found.curves if each.stage == "chunk size"]
    assert set(of_chunks) == {of_scorer.policy.scorer}


def test_target_out_of_reach_chooses_the_closest() -> None:
    found = tuned(1.01)

    assert not found.is_reached
    assert found.chosen.fidelity.agreement == max(p.fidelity.agreement for p in found.best.points)


@pytest.mark.parametrize(
    "changes",
    [
        *(PRESETS[name].choices for name in ("fast", "durable", "chunkkv", "snapkv", "kvzip")),
        {**PRESETS["durable"].choices, "unit": "chunk", "chunk_size": 5, "head_floor": 0.2},
        {**PRESETS["durable"].choices, "scorer": "key_diff", "unit": "sentence", "chunk_size": 40},
        {**PRESETS["fast"].choices, "vote_power": 1, "pool_size": 15, "window_size": 32},
        {**PRESETS["chunkkv"].choices, "scorer": "recall", "scope": "global"},
        {**PRESETS["snapkv"].choices, "spread": "pyramid"},
    ],
)
def test_stages_lead_to_the_policy_that_is_best(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = CompressionPolicy(**changes)

    def alike(model: Any, text: Any, policies: Any) -> list[Fidelity]:
        """Measure how many words of the two names are the same."""
        wanted = set(best.canonical().split()[1:])
        found = [set(policy.canonical().split()[1:]) for policy in policies]
        agreements = [len(wanted & names) / len(wanted | names) for names in found]
        return [Fidelity(0, 1, 0, agreement, 1, 0.1) for agreement in agreements]

    monkeypatch.setattr(tuning, "reference", lambda *args, **options: None)
    monkeypatch.setattr(tuning, "measure", alike)
    ends = torch.zeros(VOCAB_SIZE, dtype=torch.bool)

    found = tuned(1.0, tuning.STAGES, sentence_ends=ends)

    assert found.best.policy.canonical().split()[1:] == best.canonical().split()[1:]
    assert len(found.curves) <= 32
    assert len({each.policy.canonical() for each in found.curves}) == len(found.curves)


def test_sentences_are_tried_only_where_their_ends_are_known() -> None:
    stages = {"unit": ({"unit": "token"}, {"unit": "sentence"})}

    without = tuned(0.9, stages)
    ends = torch.arange(VOCAB_SIZE) % 5 == 0
    with_ends = tuned(0.9, stages, sentence_ends=ends)

    assert [each.policy.unit for each in without.curves] == ["token"]
    assert [each.policy.unit for each in with_ends.curves] == ["token", "sentence"]
