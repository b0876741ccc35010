"""The prefill worker runs what each scorer needs, counts its time, and stops where it may."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, get_args

import pytest
import torch
from tiny_model import load_tiny

import chunkkv
from chunkkv.policy import Scorer
from chunkkv.scoring.reconstruction import REPEATED_TOKENS
from services.prefill import runner as prefill_runner
from services.prefill.runner import PrefillRunner

IDS = [1 + i * 7 % 250 for i in range(60)]
SMALL: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 4, "window_size": 4}


@pytest.mark.parametrize("scorer", get_args(Scorer))
async def test_segments_are_what_the_library_computes(scorer: Any):
    loaded = load_tiny()
    runner = PrefillRunner(loaded, prefill_chunk_tokens=len(IDS), queue_size=0)
    policy = chunkkv.CompressionPolicy(scorer=scorer, **SMALL)

    result = await runner.run(IDS, chunkkv.KVCache(loaded.model.config), policy)

    [expected] = chunkkv.prefill(loaded.model, torch.tensor([IDS]), policy)
    assert result.kv.shape == expected.shape
    assert torch.equal(result.kv.memory, expected.memory)
    runner.close()


@pytest.mark.parametrize(
    ("scorer", "prefill_ms", "compression_ms"),
    [
        ("window", 4000, 0),
        ("reconstruction", 4000, 1000),
        ("key_diff", 4000, 0),
        ("heavy_hitter", 4000, 0),
        ("expected_attention", 4000, 0),
    ],
)
async def test_repetition_is_time_of_compression(
    scorer: Any, prefill_ms: float, compression_ms: float, monkeypatch: pytest.MonkeyPatch
):
    now_s = 0.0

    class Clock:
        """Stands for the module ``time``: only passes of the model take any, a second each."""

        @staticmethod
        def perf_counter() -> float:
            return now_s

    def tick(module: object, arguments: object) -> None:
        nonlocal now_s
        now_s += 1

    loaded = load_tiny()
    loaded.model.base_model.register_forward_pre_hook(tick)
    runner = PrefillRunner(loaded, prefill_chunk_tokens=15, queue_size=0)
    monkeypatch.setattr(prefill_runner, "time", Clock)
    policy = chunkkv.CompressionPolicy(scorer=scorer, **SMALL)

    result = await runner.run(IDS, chunkkv.KVCache(loaded.model.config), policy)

    assert (result.prefill_ms, result.compression_ms) == (prefill_ms, compression_ms)
    runner.close()


async def test_a_cancelled_repetition_ends_before_its_next_piece_and_frees_its_place():
    passes = 0
    arrived, go = threading.Event(), threading.Event()

    def hold_first_piece(module: object, arguments: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            arrived.set()
            assert go.wait(30)

    loaded = load_tiny()
    loaded.model.base_model.register_forward_pre_hook(hold_first_piece)
    ids = (IDS * REPEATED_TOKENS)[: 2 * REPEATED_TOKENS]
    runner = PrefillRunner(loaded, prefill_chunk_tokens=len(ids), queue_size=0)
    policy = chunkkv.CompressionPolicy(scorer="reconstruction", **SMALL)
    task = asyncio.create_task(runner.run(ids, chunkkv.KVCache(loaded.model.config), policy))
    assert await asyncio.to_thread(arrived.wait, 30)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    async with asyncio.timeout(30):
        while runner.num_active:  # noqa: ASYNC110  # a thread ends it
            await asyncio.sleep(0.01)

    assert passes == 2
    runner.close()
