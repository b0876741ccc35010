"""What a decode step costs, beside what transformers takes and what the memory allows.

    python -m tests.benchmarks.bench_decode [--batch 1 8 32] [--kv-tokens 820 8192] [--json FILE]

All of it in one run, by turns, because shared machines vary two to three times between runs:

- the bandwidth of sequential reads, which bounds every step: weights and KV are read once;
- a step of the engine's model call with its own attention, and with none;
- a step of transformers with ``DynamicCache`` and its SDPA attention, weights as loaded;
- the engine's own work around the model call, batch 8;
- the choice of a token from made-up logits, by settings and vocabulary, one thread;
- the accuracy and the speed of an answer whose KV is bounded (``max_kv_tokens``).

KV is made up (its contents do not matter to the time); tokens are the model's own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import chunkkv
from services.decode.attention import Reader, Rows, forward, kv_geometry, use_sequences
from services.decode.engine import Engine
from services.decode.geometry import KVGeometry
from services.decode.memory import KVPool
from services.decode.sampling import SamplingSettings, sample
from services.decode.sequence import DecodeTask
from services.decode.sequence_kv import SequenceKV
from services.decode.tail import tail_size_bytes
from services.local.model import ensure_demo_model
from services.models.loader import LoadedModel, load_model
from services.prefill.servicer import kv_bytes_per_token

TAIL_TOKENS = 96
KEEP_RATIO = 0.1
VOCAB_SIZES = (49_152, 151_936)  # of SmolLM2 and Qwen3
SAMPLING = {
    "greedy": SamplingSettings(),
    "temperature 1": SamplingSettings(temperature=1.0),
    "temperature 0.3": SamplingSettings(temperature=0.3),
    "0.8, top_k 50": SamplingSettings(temperature=0.8, top_k=50),
    "0.8, top_p 0.95": SamplingSettings(temperature=0.8, top_p=0.95),
    "0.8, top_k 50, top_p 0.95": SamplingSettings(temperature=0.8, top_k=50, top_p=0.95),
    "0.8, min_p 0.05": SamplingSettings(temperature=0.8, min_p=0.05),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured of one batch and length, milliseconds, medians.

    Attributes:
        batch: Sequences.
        kv_tokens: Kept tokens of each.
        ours: Our step.
        no_attention: The same with an attention that reads nothing.
        transformers: ``DynamicCache`` and SDPA; ``None`` if not measured.
        bound: Weights and KV over the measured bandwidth.
    """

    batch: int
    kv_tokens: int
    ours: float
    no_attention: float
    transformers: float | None
    bound: float


@dataclass(slots=True)
class Report:
    """All figures of a run.

    Attributes:
        bandwidth_gb_s: Sequential reads, all threads.
        weights_bytes: That a step reads.
        weights_dtype: Form of our linear layers.
        steps: The table.
        engine_overhead: Engine step over bare model call, batch 8.
        sampling_us: Microseconds a token, by settings, for each of the vocabularies.
        missed: Bars that were not reached.
    """

    bandwidth_gb_s: float = 0.0
    weights_bytes: int = 0
    weights_dtype: str = ""
    steps: list[Step] = field(default_factory=list)
    engine_overhead: float = 0.0
    sampling_us: dict[str, list[float]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)


def main() -> None:
    options = _options()
    report = Report(weights_dtype=options.weights_dtype)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # until the engine, which wants to be the only one, was measured
    path = str(ensure_demo_model())
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded = load_model(path, dtype="float32", weights_dtype=options.weights_dtype)
    use_sequences(loaded.model)
    report.engine_overhead = engine_overhead(loaded, num_threads=num_threads)
    for name, settings in SAMPLING.items():
        report.sampling_us[name] = [sampling_us(settings, size) for size in VOCAB_SIZES]
    torch.set_num_threads(num_threads)

    report.bandwidth_gb_s = bandwidth_gb_s()
    report.weights_bytes = _weights_bytes(plain)
    print(
        f"{torch.get_num_threads()} threads, sequential reads {report.bandwidth_gb_s:.1f} GB/s, "
        f"weights {report.weights_bytes / 1e6:.0f} MB in float32, ours {options.weights_dtype}\n"
    )
    print(
        f"{'batch':>5} {'KV':>6} {'ours':>9} {'no attn':>9} {'transformers':>13} {'bound':>8} "
        f"{'ours/bound':>11} {'transf./ours':>13}"
    )
    for batch in options.batch:
        for kv_tokens in options.kv_tokens:
            step = measure_step(loaded, plain, batch, kv_tokens, report)
            report.steps.append(step)
            times = f"{step.transformers:9.1f} ms" if step.transformers else f"{'-':>12}"
            ratio = f"{step.transformers / step.ours:12.1f}x" if step.transformers else f"{'-':>13}"
            print(
                f"{batch:5d} {kv_tokens:6d} {step.ours:6.1f} ms {step.no_attention:6.1f} ms "
                f"{times:>13} {step.bound:5.1f} ms {step.ours / step.bound:10.2f}x {ratio}",
                flush=True,
            )
    del plain
    print(f"\nengine step over bare model call, batch 8 x 820: {report.engine_overhead:.3f}")
    print(f"\n{'us to choose a token of':26}" + "".join(f"{size:9,}" for size in VOCAB_SIZES))
    for name, times in report.sampling_us.items():
        print(f"{name:26}" + "".join(f"{time_us:9.0f}" for time_us in times))
    _judge(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    for missed in report.missed:
        print(f"missed: {missed}")
    sys.exit(bool(report.missed))


def bandwidth_gb_s() -> float:
    """Return the bandwidth of sequential reads of memory that no cache holds, all threads."""
    memory = torch.ones(128 << 20)
    return memory.nbytes / _median_s(lambda: memory.sum(), times=7) / 1e9


def measure_step(
    loaded: LoadedModel, plain: Any, batch: int, kv_tokens: int, report: Report
) -> Step:
    """Measure one line of the table; caches of 32 long sequences are large, so one at a time."""
    times = 3 if batch * kv_tokens > 100_000 else 9
    geometry = kv_geometry(loaded.model)
    ours, nothing = _our_step_s(loaded.model, geometry, batch, kv_tokens, times=times)
    kv_bytes = batch * kv_tokens * kv_bytes_per_token(plain)
    gc.collect()
    theirs = _transformers_step_s(plain, batch, kv_tokens, times=min(times, 5))
    gc.collect()
    return Step(
        batch=batch,
        kv_tokens=kv_tokens,
        ours=1000 * ours,
        no_attention=1000 * nothing,
        transformers=1000 * theirs,
        bound=(report.weights_bytes + kv_bytes) / report.bandwidth_gb_s / 1e6,
    )


def _our_step_s(
    model: Any, geometry: KVGeometry, batch: int, kv_tokens: int, *, times: int
) -> tuple[float, float]:
    """Return seconds of a step, and of one whose attention reads nothing."""
    rows = _sequences(geometry, batch, kv_tokens)
    return (
        _median_s(lambda: _step(model, rows), times=times),
        _median_s(lambda: _step(model, rows, _Nothing()), times=times),
    )


class _Nothing:
    """Reads no KV."""

    def attend(self, layer: int, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query


@torch.inference_mode()
def _step(model: Any, rows: list[SequenceKV], reader: Reader | None = None) -> torch.Tensor:
    logits = forward(
        model,
        [100 + index for index in range(len(rows))],
        [kv.num_tokens for kv in rows],
        reader or Rows([(kv, 1) for kv in rows]),
        list(range(len(rows))),
    )
    if reader is None:
        for kv in rows:
            kv.advance(1)
    return logits


@torch.inference_mode()
def _sequences(geometry: KVGeometry, batch: int, kv_tokens: int) -> list[SequenceKV]:
    """Return sequences over one span each, in a pool, as a worker has them."""
    shape = geometry.span_shape([kv_tokens] * len(geometry.layers), num_tokens=kv_tokens)
    span_bytes = chunkkv.CompressedKV.empty(shape).size_bytes
    tail_bytes = tail_size_bytes(geometry, TAIL_TOKENS)
    pool = KVPool(batch * (span_bytes + tail_bytes + 128))
    rows = []
    for _ in range(batch):
        block, tail = pool.allocate(span_bytes), pool.allocate(tail_bytes)
        assert block is not None
        assert tail is not None
        memory = pool.view(block, span_bytes)
        memory.view(torch.float32).fill_(0.01)
        rows.append(
            SequenceKV(
                geometry,
                [chunkkv.CompressedKV(shape, memory)],
                pool.view(tail, tail_bytes),
                capacity=TAIL_TOKENS,
            )
        )
    return rows


@torch.inference_mode()
def _transformers_step_s(model: Any, batch: int, kv_tokens: int, *, times: int) -> float:
    geometry = model.config
    heads, dim = geometry.num_key_value_heads, geometry.hidden_size // geometry.num_attention_heads
    cache = DynamicCache(config=geometry)
    for layer in range(geometry.num_hidden_layers):
        keys = torch.full((batch, heads, kv_tokens, dim), 0.01)
        cache.update(keys, keys.clone(), layer)
    ids = torch.full((batch, 1), 100)
    return _median_s(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True), times)


def engine_overhead(
    loaded: LoadedModel, *, num_threads: int, batch: int = 8, kv_tokens: int = 820
) -> float:
    """Return the time of an engine's step over that of the bare model call, by turns."""
    geometry = kv_geometry(loaded.model)
    ratios = []
    for _ in range(5):
        rows = _sequences(geometry, batch, kv_tokens)
        with ThreadPoolExecutor(1) as own_thread:  # as the engine has one
            bare = own_thread.submit(_bare_step_s, loaded.model, rows, num_threads).result()
        rows = _sequences(geometry, batch, kv_tokens)
        engine = Engine(loaded, num_threads=num_threads)
        ratios.append(asyncio.run(_engine_step_s(engine, rows, TAIL_TOKENS - 2)) / bare)
    return statistics.median(ratios)


def _bare_step_s(model: Any, rows: list[SequenceKV], num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    for _ in range(5):
        _step(model, rows)
    times = TAIL_TOKENS - 10
    return _total_s(lambda: _step(model, rows), times) / times


async def _engine_step_s(engine: Engine, rows: list[SequenceKV], num_tokens: int) -> float:
    """Return seconds a step of an engine that runs all rows at once."""
    generations = []
    for kv in rows:
        task = DecodeTask(
            first_position=kv.num_tokens,
            pending_token_ids=[100],
            sampling=SamplingSettings(ignore_eos=True),
            max_tokens=num_tokens,
        )
        engine._is_running, engine._loop = True, asyncio.get_running_loop()
        generations.append(engine.submit(task, kv, on_released=lambda: None))
    engine.start()

    async def read(generation: Any) -> tuple[float, float]:
        async for _ in generation:
            pass
        return generation.sequence.first_token_at, generation.sequence.last_token_at

    times = await asyncio.gather(*(read(generation) for generation in generations))
    await engine.stop()
    return (max(end for _, end in times) - min(start for start, _ in times)) / (num_tokens - 1)


@torch.inference_mode()
def sampling_us(settings: SamplingSettings, vocab_size: int) -> float:
    """Return the microseconds that a token takes, median."""
    logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    positions = itertools.count()
    return 1e6 * _median_s(lambda: sample(logits, settings, position=next(positions)), times=300)


def _judge(report: Report) -> None:
    """Compare with the bars."""
    steps = {(step.batch, step.kv_tokens): step for step in report.steps}

    def bar(name: str, is_met: bool, seen: float) -> None:
        print(f"{'ok    ' if is_met else 'MISSED'} {name}: {seen:.2f}")
        if not is_met:
            report.missed.append(name)

    print()
    if full := steps.get((8, 8192)):
        assert full.transformers is not None
        ratio = full.transformers / full.ours
        bar("8 x 8,192: DynamicCache / ours, at least 5", ratio >= 5, ratio)
        if kept := steps.get((8, 820)):
            ratio = full.ours / kept.ours
            bar("8 x 8,192 / 8 x 820 (keep_ratio 0.1), ours, at least 2.5", ratio >= 2.5, ratio)
            ratio = full.transformers / kept.ours
            bar("DynamicCache 8 x 8,192 / ours 8 x 820, at least 12", ratio >= 12, ratio)
    if one := steps.get((1, 820)):
        ratio = one.ours / one.bound
        bar("1 x 820: ours / byte bound, at most 1.6", ratio <= 1.6, ratio)
        if eight := steps.get((8, 820)):
            ratio = eight.ours / one.ours
            bar("8 x 820 / 1 x 820, ours, at most 2", ratio <= 2, ratio)
    ratio = report.engine_overhead
    bar("engine step / model call, batch 8, at most 1.05", ratio <= 1.05, ratio)


def _weights_bytes(model: Any) -> int:
    """Return the bytes of float32 weights that a step reads; a tied embedding counts once."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


def _median_s(run: Callable[[], object], times: int = 9) -> float:
    run()
    return statistics.median(_total_s(run, 1) for _ in range(times))


def _total_s(run: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - started


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kv-tokens", type=int, nargs="+", default=[820, 8192])
    parser.add_argument("--weights-dtype", default="auto")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
