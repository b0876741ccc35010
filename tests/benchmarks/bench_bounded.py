"""What it costs to bound the KV of a long answer: a fixed text, token by token, against all its KV.

    python -m tests.benchmarks.bench_bounded [--tokens 4096] [--json FILE]

The first 512 tokens are the prompt and stay whole. The others are the "answer": the model sees them
as if it had generated them, and what is measured is how likely it finds each next one. Without a
bound all KV is kept ("prompt only": what is compressed is the prompt); with ``max_kv_tokens`` the
answer is compressed as it accumulates ("the whole sequence").
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import chunkkv
from chunkkv.evaluation.haystack import prose_sentences
from services.decode.attention import Rows, forward, kv_geometry, use_sequences
from services.decode.limit import KVLimit
from services.decode.sequence_kv import SequenceKV, tail_tokens
from services.decode.tail import tail_size_bytes
from services.local.model import ensure_demo_model
from services.models.loader import LoadedModel, load_model

PROMPT_TOKENS = 512
PIECE_TOKENS = 16

POLICIES = {
    "chunks of 20": chunkkv.CompressionPolicy(chunk_size=20),
    "tokens": chunkkv.CompressionPolicy(unit="token"),
    "tokens of each head": chunkkv.CompressionPolicy(unit="token", scope="head"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured of one bound.

    Attributes:
        name: What the table calls it.
        kept_tokens: Most tokens that were kept.
        kv_bytes: Memory that was set aside for them.
        log_probability: Mean of the text's tokens, natural logarithm.
        agreement: Share of positions whose likeliest token is that of the full cache.
        tokens_per_s: Of the last quarter of the text.
    """

    name: str
    kept_tokens: int
    kv_bytes: int
    log_probability: float
    agreement: float
    tokens_per_s: float


def main() -> None:
    options = _options()
    loaded = load_model(str(ensure_demo_model()), dtype="float32", weights_dtype="auto")
    use_sequences(loaded.model)
    ids = text_tokens(loaded, options.tokens)
    cases: list[tuple[str, KVLimit | None]] = [("all KV kept", None)]
    for bound in (1536, 1024, 768):
        for name, policy in POLICIES.items():
            cases.append((f"{bound}, {name}", KVLimit(bound, policy)))

    print(f"{len(ids)} tokens of prose, the first {PROMPT_TOKENS} kept whole\n")
    print(
        f"{'bound':24} {'kept':>5} {'KV MB':>6} {'log p/token':>12} {'agreement':>10} {'tok/s':>6}"
    )
    runs: list[Run] = []
    likeliest: torch.Tensor | None = None
    for name, limit in cases:
        run, best = measure(loaded, ids, name, limit, likeliest)
        likeliest = best if likeliest is None else likeliest
        runs.append(run)
        print(
            f"{run.name:24} {run.kept_tokens:5d} {run.kv_bytes / 1e6:6.1f} "
            f"{run.log_probability:12.4f} {run.agreement:9.1%} {run.tokens_per_s:6.0f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    passed = [
        run.name
        for run, (_, limit) in zip(runs, cases, strict=True)
        if limit is not None and run.kept_tokens > limit.max_kv_tokens
    ]
    sys.exit(f"bounds were passed: {passed}" if passed else 0)


def text_tokens(loaded: LoadedModel, count: int) -> list[int]:
    """Return tokens of English prose that does not repeat itself."""
    ids: list[int] = []
    for sentence in prose_sentences():
        ids += loaded.tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"]
        if len(ids) >= count:
            break
    return ids[:count]


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    ids: list[int],
    name: str,
    limit: KVLimit | None,
    likeliest: torch.Tensor | None,
) -> tuple[Run, torch.Tensor]:
    """Run the text once; ``likeliest`` is the full cache's choice at every position."""
    geometry = kv_geometry(loaded.model)
    capacity = tail_tokens([PROMPT_TOKENS], new_tokens=len(ids), limit=limit)
    memory = torch.empty(tail_size_bytes(geometry, capacity), dtype=torch.uint8)
    prompt = _feed_prompt(loaded, ids[:PROMPT_TOKENS])
    kv = SequenceKV(geometry, [prompt], memory, capacity=capacity, limit=limit)
    log_probabilities, best, kept, started, timed_from = [], [], 0, 0.0, 0
    for first in range(PROMPT_TOKENS, len(ids) - 1, PIECE_TOKENS):
        if not started and first >= 0.75 * len(ids):
            started, timed_from = time.perf_counter(), first
        piece = ids[first : min(first + PIECE_TOKENS, len(ids) - 1)]
        logits = _feed(loaded, kv, piece)
        wanted = torch.tensor(ids[first + 1 : first + 1 + len(piece)])
        log_probabilities.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        best.append(logits.argmax(-1))
        kept = max(kept, kv.num_kept_tokens)
    seconds = time.perf_counter() - started
    chosen = torch.cat(best)
    return Run(
        name=name,
        kept_tokens=kept,
        kv_bytes=memory.numel() + prompt.size_bytes,
        log_probability=float(torch.cat(log_probabilities).mean()),
        agreement=1.0 if likeliest is None else float((chosen == likeliest).float().mean()),
        tokens_per_s=(len(ids) - 1 - timed_from) / seconds,
    ), chosen


def _feed_prompt(loaded: LoadedModel, ids: list[int]) -> chunkkv.CompressedKV:
    geometry = kv_geometry(loaded.model)
    memory = torch.empty(tail_size_bytes(geometry, len(ids)), dtype=torch.uint8)
    kv = SequenceKV(geometry, [], memory, capacity=len(ids))
    for first in range(0, len(ids), 256):
        _feed(loaded, kv, ids[first : first + 256])
    sealed = kv.seal(fingerprint=loaded.fingerprint)
    assert sealed is not None
    return sealed


def _feed(loaded: LoadedModel, kv: SequenceKV, piece: list[int]) -> torch.Tensor:
    kv.make_room(len(piece))
    positions = range(kv.num_tokens, kv.num_tokens + len(piece))
    rows = Rows([(kv, len(piece))])
    logits = forward(loaded.model, piece, positions, rows, list(range(len(piece))))
    kv.advance(len(piece))
    return logits


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
