"""``chunkkv eval fidelity``, ``reuse`` and ``cost``: without a task, on plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.table import Column, Table

from chunkkv.cli.models import (
    CONSOLE,
    Device,
    Dtype,
    KeepRatios,
    ModelId,
    Presets,
    Text,
    Threads,
    load_model,
    read_tokens,
)
from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.cost import Cost, measure_cost
from chunkkv.evaluation.fidelity import Fidelity, mean, measure, pieces, reference
from chunkkv.evaluation.methods import method
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy
from chunkkv.presets import PRESETS
from chunkkv.presets import preset as made_preset
from chunkkv.sentence_ends import sentence_ending_tokens

REUSE: Final[dict[str, dict[str, Any]]] = {
    "N = 1 (a list a layer)": {"scope": "layer"},
    "N = 2": {"scope": "group", "reuse_interval": 2},
    "N = 4": {"scope": "group", "reuse_interval": 4},
    "N = 8": {"scope": "group", "reuse_interval": 8},
    "global (one list)": {"scope": "global"},
}

ContextTokens = Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")]
Continuation = Annotated[int, typer.Option(min=1, help="Tokens read after them.")]
NumTexts = Annotated[int, typer.Option(min=1, help="Pieces of the text, at most.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write, too.")]


def fidelity(
    model: ModelId,
    text: Text,
    preset: Presets = None,
    keep_ratio: KeepRatios = None,
    context_tokens: ContextTokens = 1000,
    continuation_tokens: Continuation = 64,
    num_texts: NumTexts = 4,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Compare next tokens, attention and the cache itself with the full cache's."""
    methods = [method(name) for name in preset or PRESETS]
    policies = {
        (each.name, ratio): each.policy(ratio, context_tokens)
        for each in methods
        for ratio in keep_ratio or (0.1, 0.3)
    }
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, threads=threads)
    measured = measured_on(
        loaded,
        read_tokens(tokenizer, text),
        list(policies.values()),
        sentence_ends=sentence_ending_tokens(tokenizer),
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        num_texts=num_texts,
    )
    table = Table(Column("method", overflow="fold"), "kept", *_HEADINGS)
    for (name, ratio), found in zip(policies, measured, strict=True):
        table.add_row(name, f"{ratio:.3g}", *_cells(found))
    CONSOLE.print(table)
    _save(
        out,
        [
            {"method": name, "keep_ratio": ratio, **asdict(found)}
            for (name, ratio), found in zip(policies, measured, strict=True)
        ],
    )


def reuse(
    model: ModelId,
    text: Text,
    preset: Annotated[str, typer.Option(help="Method whose lists are shared.")] = "chunkkv",
    keep_ratio: Annotated[float, typer.Option(help="Fraction kept.")] = 0.1,
    context_tokens: ContextTokens = 1000,
    continuation_tokens: Continuation = 64,
    num_texts: NumTexts = 4,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Compare lists of positions that 1, 2, 4, 8 or all layers share."""
    base = made_preset(preset, keep_ratio=keep_ratio, num_tokens=context_tokens)
    base = replace(base, spread="uniform")
    policies = [replace(base, **changes) for changes in REUSE.values()]
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, threads=threads)
    ids, ends = read_tokens(tokenizer, text), sentence_ending_tokens(tokenizer)
    measured = measured_on(
        loaded,
        ids,
        policies,
        sentence_ends=ends,
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        num_texts=num_texts,
    )
    # How alike layers choose is seen where each chooses for itself.
    costs = measure_cost(loaded, ids[:context_tokens], policies, sentence_ends=ends)
    table = Table("lists", "agreement", "KL", "attention cosine", "Jaccard", "select ms")
    rows = []
    for name, found, cost in zip(REUSE, measured, costs, strict=True):
        table.add_row(
            name,
            f"{found.agreement:.3f}",
            f"{found.kl_divergence:.3f}",
            f"{found.attention_cosine:.3f}",
            f"{found.layer_jaccard:.2f}",
            f"{cost.select_ms:.1f}",
        )
        rows.append({"lists": name, **asdict(found), "select_ms": cost.select_ms})
    CONSOLE.print(table)
    _save(out, rows)


def cost(
    model: ModelId,
    text: Text,
    preset: Presets = None,
    keep_ratio: Annotated[float, typer.Option(help="Fraction kept.")] = 0.1,
    context_tokens: ContextTokens = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Timings; the median counts.")] = 3,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Show bytes in each precision, and time beside the prefill's."""
    methods = [method(name) for name in preset or PRESETS]
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, threads=threads)
    ids = read_tokens(tokenizer, text)[:context_tokens]
    if len(ids) < context_tokens:
        raise InvalidInputError(
            f"{text} has {len(ids)} tokens; give a longer text, or --context-tokens {len(ids)}"
        )
    policies = [each.policy(keep_ratio, context_tokens) for each in methods]
    costs = measure_cost(
        loaded,
        ids,
        policies,
        repeats=repeats,
        sentence_ends=sentence_ending_tokens(tokenizer),
    )
    table = Table(
        Column("method", overflow="fold"),
        *costs[0].stored_bytes,
        "observe ms",
        "select ms",
        "of prefill",
    )
    for each, found in zip(methods, costs, strict=True):
        shares = (f"{size / found.full_bytes:.3f}" for size in found.stored_bytes.values())
        table.add_row(each.name, *shares, *_times(found))
    CONSOLE.print(table)
    CONSOLE.print(
        f"bytes: share of the full cache's {costs[0].full_bytes / 1e6:.1f} MB; "
        f"prefill of {context_tokens} tokens: {costs[0].prefill_ms:.0f} ms"
    )
    _save(out, [{"method": m.name, **asdict(c)} for m, c in zip(methods, costs, strict=True)])


def measured_on(
    model: Any,
    token_ids: Sequence[int],
    policies: Sequence[CompressionPolicy],
    *,
    context_tokens: int,
    continuation_tokens: int,
    num_texts: int,
    sentence_ends: torch.Tensor | None = None,
) -> list[Fidelity]:
    """Return each policy's fidelity, averaged over pieces of a text."""
    fingerprint = model_fingerprint(model)
    by_text = []
    size = context_tokens + continuation_tokens
    for piece in pieces(token_ids, size=size, num_pieces=num_texts):
        read = reference(
            model,
            piece,
            num_continuation=continuation_tokens,
            policies=policies,
            fingerprint=fingerprint,
            sentence_ends=sentence_ends,
        )
        by_text.append(measure(model, read, policies))
    return [mean(of_policy) for of_policy in zip(*by_text, strict=True)]


_HEADINGS: Final = ("stored", "agreement", "KL", "attention cosine", "L1", "Jaccard")


def _cells(found: Fidelity) -> tuple[str, ...]:
    return (
        f"{found.stored_share:.3f}",
        f"{found.agreement:.3f}",
        f"{found.kl_divergence:.3f}",
        f"{found.attention_cosine:.3f}",
        f"{found.l1_loss:.3f}",
        f"{found.layer_jaccard:.2f}",
    )


def _times(found: Cost) -> tuple[str, str, str]:
    return (
        f"{found.observe_ms:.0f}",
        f"{found.select_ms:.0f}",
        f"{found.share_of_prefill:.0%}",
    )


def _save(out: Path | None, rows: Any) -> None:
    if out is not None:
        out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
