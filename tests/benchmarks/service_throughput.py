"""Tokens per second of long sessions through the whole service, beside transformers."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from chunkserve_client import Client, Compression, Session
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.service_stack import ServiceStack, listen

NUM_SESSIONS = 8
NUM_TOKENS = 64
KEEP_RATIOS = (1.0, 0.1)

# Of SmolLM2 in float32 a token takes 46,080 bytes, and its positions.
KV_BYTES_PER_TOKEN = 50_000
TURN_TOKENS = 256  # more than question and answer have


def measure_throughput(model: str, documents: Documents, prompt_tokens: int) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
        prompt_tokens: Tokens of each session's document.
    """
    prompts = [documents.next(prompt_tokens) for _ in range(NUM_SESSIONS)]
    kv_bytes = NUM_SESSIONS * (prompt_tokens + TURN_TOKENS) * KV_BYTES_PER_TOKEN
    figures: list[Figure] = []
    with ServiceStack(model, store_bytes=2 * kv_bytes) as stack:
        for keep_ratio in KEEP_RATIOS:
            with stack.worker(kv_bytes=kv_bytes):
                rate, step_ms = asyncio.run(
                    _through_service(stack, prompts, documents.question(), keep_ratio)
                )
            name = f"service, {NUM_SESSIONS} x {prompt_tokens:,}, keep_ratio {keep_ratio:g}"
            figures += [
                Figure(name, rate, "tok/s"),
                Figure("  median gap between tokens", step_ms, "ms"),
            ]
    rate, step_ms = _transformers(model, [prompt + documents.question() for prompt in prompts])
    name = f"transformers, {NUM_SESSIONS} x {prompt_tokens:,}, DynamicCache, SDPA"
    figures += [Figure(name, rate, "tok/s"), Figure("  median step", step_ms, "ms")]
    of_ours = {f"keep_ratio {r:g}": figures[2 * i].value for i, r in enumerate(KEEP_RATIOS)}
    return figures + [
        Figure(f"service at {name} over transformers", own / rate, "x")
        for name, own in of_ours.items()
    ]


async def _through_service(
    stack: ServiceStack, prompts: Sequence[list[int]], question: list[int], keep_ratio: float
) -> tuple[float, float]:
    """Return tokens per second, and the median of the milliseconds between a stream's tokens."""
    async with stack.client() as client:
        started = time.monotonic()
        sessions = []
        for number, prompt in enumerate(prompts):
            tell(f"keep_ratio {keep_ratio:g}: prefilling {number + 1} of {len(prompts)}")
            sessions.append(await _prefilled(client, prompt, keep_ratio))
        tell(f"keep_ratio {keep_ratio:g}: prefilled in {time.monotonic() - started:.0f} s\n")
        heard = await asyncio.gather(
            *(
                listen(session, question, max_tokens=NUM_TOKENS, ignore_eos=True)
                for session in sessions
            )
        )
    assert all(answer.prompt_info and not answer.prompt_info.fetched_bytes for answer in heard)
    times = sorted(itertools.chain.from_iterable(answer.arrived_ns for answer in heard))
    gaps = itertools.chain.from_iterable(itertools.pairwise(a.arrived_ns) for a in heard)
    return _rate([at / 1e9 for at in times]), statistics.median((b - a) / 1e6 for a, b in gaps)


async def _prefilled(client: Client, prompt: list[int], keep_ratio: float) -> Session:
    session = await client.create_session(compression=Compression(keep_ratio=keep_ratio))
    await listen(session, prompt, max_tokens=1)
    return session


def _rate(times_s: Sequence[float]) -> float:
    """Return tokens per second between the first and the last of tokens, given their times."""
    later = sum(at > times_s[0] for at in times_s)
    return later / (times_s[-1] - times_s[0])


def _transformers(model: str, prompts: Sequence[list[int]]) -> tuple[float, float]:
    """Return tokens per second of a static batch, its prefill apart, and its median step."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    tell("transformers: prefilling")
    steps = _Steps()
    loaded.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        do_sample=False,
        min_new_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
        streamer=steps,
    )
    times = steps.times_s[1:]  # the first is the prompt's
    tell("transformers: done\n")
    gaps_ms = [1000 * (end - start) for start, end in itertools.pairwise(times)]
    return _rate([at for at in times for _ in prompts]), statistics.median(gaps_ms)


class _Steps(BaseStreamer):  # type: ignore[misc]
    """Notes when each step of a batch is done."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass
