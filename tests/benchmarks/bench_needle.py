"""Needles: whole chunks against single tokens, scorers with and without the question, 30 % kept.

    python -m tests.benchmarks.bench_needle [--samples 20] [--model PATH] [--json FILE]

Each sample is about 1,200 tokens of English with one seven-digit number in it. It is prefilled
once with its question and once without; every method compresses one of these caches and answers
greedily. Exit code 1 if chunks do not find more numbers than tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkkv
from chunkkv.evaluation.haystack import Haystack, graded, haystack
from chunkkv.policy import Scorer
from services.local.model import ensure_demo_model

NUM_TOKENS = 1150  # of the document; question and template bring it to about 1,200
MAX_NEW_TOKENS = 24
UNSEEING_SCORERS: tuple[Scorer, ...] = ("window", "reconstruction", "recall", "key_diff")


def methods(keep_ratio: float) -> dict[str, chunkkv.CompressionPolicy]:
    """Return what is compared."""

    def policy(**choices: Any) -> chunkkv.CompressionPolicy:
        return chunkkv.CompressionPolicy(keep_ratio=keep_ratio, **choices)

    return {
        "full cache": chunkkv.CompressionPolicy(keep_ratio=1.0),
        "fast": chunkkv.preset("fast", keep_ratio=keep_ratio),
        "chunk 20, layer (ChunkKV)": policy(),
        "chunk 20, layer, fp8": policy(precision="fp8"),
        "chunk 20, layer, int8": policy(precision="int8"),
        "chunk 20, layer, int4": policy(precision="int4"),
        "chunk 10, layer (ChunkKV, paper)": policy(chunk_size=10, sink_tokens=0),
        "chunk 20, head": policy(scope="head"),
        "chunk 20, group of 2 (index reuse)": policy(scope="group"),
        "chunk 20, group of 2, layers merged": policy(scope="group", merge_layers=True),
        "chunk 20, global": policy(scope="global"),
        "token, layer": policy(unit="token"),
        "token, head (SnapKV)": policy(unit="token", scope="head"),
    }


def methods_without_question(keep_ratio: float) -> dict[str, chunkkv.CompressionPolicy]:
    """Return what is compared where the question comes after the compression."""
    return {
        f"unseen question: {scorer}, {scope}": chunkkv.CompressionPolicy(
            keep_ratio=keep_ratio, scorer=scorer, scope=scope
        )
        for scorer in UNSEEING_SCORERS
        for scope in ("layer", "global")
    } | {
        f"unseen question: {name}": chunkkv.preset(name, keep_ratio=keep_ratio)
        for name in ("kvzip", "durable")
    }


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    sample: Haystack,
    seeing: dict[str, chunkkv.CompressionPolicy],
    unseeing: dict[str, chunkkv.CompressionPolicy],
) -> dict[str, str]:
    """Return each method's answer to the sample's question, from one prefill for each kind."""
    text, question = f"{sample.text}\n\n", sample.needles[0].question
    ids = _prompt(tokenizer, text + question)
    window = max(policy.window_size for policy in (*seeing.values(), *unseeing.values()))
    prefilled = chunkkv.run_prefill(model, ids[:, :-1], window_size=window)
    seen = _generated(model, tokenizer, ids, prefilled, seeing)

    before = ids[:, : num_common(ids[0].tolist(), _prompt(tokenizer, text)[0].tolist())]
    prefilled = chunkkv.run_prefill(model, before, window_size=window)
    prefilled = chunkkv.repeat(model, prefilled, before, UNSEEING_SCORERS)
    return seen | _generated(model, tokenizer, ids, prefilled, unseeing)


def num_common(one: list[int], other: list[int]) -> int:
    """Return how many leading tokens are the same."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _prompt(tokenizer: Any, content: str) -> torch.Tensor:
    """Return token ids ``(1, tokens)``."""
    ids: torch.Tensor = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    return ids


def _generated(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    prefilled: chunkkv.Prefilled,
    policies: dict[str, chunkkv.CompressionPolicy],
) -> dict[str, str]:
    kept = [
        [stored_and_opened(kv) for kv in chunkkv.compress(prefilled, policy)]
        for policy in policies.values()
    ]
    # All methods answer as one batch: a decoding step reads the weights once for all of them.
    inputs = chunkkv.generation_inputs(model, kept, [ids[0]] * len(kept))
    out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return dict(zip(policies, texts, strict=True))


def stored_and_opened(kv: chunkkv.CompressedKV) -> chunkkv.CompressedKV:
    """Return a span as a worker gets it from the store."""
    encoded = chunkkv.encode(kv, identity="needle")
    return chunkkv.decode(encoded.header, bytearray(b"".join(encoded.parts)))


def main() -> int:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20, help="needles (%(default)s)")
    parser.add_argument("--keep-ratio", type=float, default=0.3, help="kept (%(default)s)")
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    path = options.model or str(ensure_demo_model())
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    seeing = methods(options.keep_ratio)
    unseeing = methods_without_question(options.keep_ratio)
    grades: dict[str, list[float]] = {name: [] for name in (*seeing, *unseeing)}
    for seed in range(options.samples):
        sample = haystack(tokenizer, num_tokens=NUM_TOKENS, seed=seed)
        for name, answer in answers(model, tokenizer, sample, seeing, unseeing).items():
            grades[name].append(graded(sample.needles[0].answer, answer))
        print(f"\r{seed + 1} of {options.samples}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    results = {
        name: {"exact": sum(g == 1 for g in values), "graded": sum(values) / len(values)}
        for name, values in grades.items()
    }
    print(
        f"{options.samples} needles of 7 digits, about 1,200 tokens, question at the end, "
        f"{options.keep_ratio:.0%} kept, {os.path.basename(path)}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':44}{'exact':>7}{'digits':>8}")
    for name, result in results.items():
        print(f"{name:44}{result['exact']:7d}{result['graded']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    chunks, tokens = results["chunk 20, layer (ChunkKV)"], results["token, head (SnapKV)"]
    return 0 if chunks["exact"] > max(tokens["exact"], results["token, layer"]["exact"]) else 1


if __name__ == "__main__":
    sys.exit(main())
