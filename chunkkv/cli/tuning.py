"""``chunkkv tune``: a policy for a model and a kind of text, as a file that services read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from chunkkv.cli.models import (
    CONSOLE,
    NOTES,
    Device,
    Dtype,
    KeepRatios,
    ModelId,
    Text,
    Threads,
    load_model,
    read_tokens,
)
from chunkkv.evaluation.plots import write_curve
from chunkkv.evaluation.tune import KEEP_RATIOS, STAGES, Curve, Tuned
from chunkkv.evaluation.tune import tune as tuned
from chunkkv.policy_file import write_policy
from chunkkv.sentence_ends import sentence_ending_tokens

_BAR_WIDTH: Final = 30


def tune(
    model: ModelId,
    text: Text,
    target: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of next tokens that stay the same.")
    ] = 0.98,
    out: Annotated[Path, typer.Option(help="Policy file to write.")] = Path("policy.json"),
    plot: Annotated[Path | None, typer.Option(help="Picture of the curves to write, too.")] = None,
    keep_ratio: KeepRatios = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are compressed.")] = 1000,
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Tokens read after them.")] = 64,
    num_texts: Annotated[int, typer.Option(min=1, help="Pieces of the text, at most.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Choose a policy: the fewest stored bytes at which the model goes on as on the full cache."""
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, threads=threads)
    outcome = tuned(
        loaded,
        read_tokens(tokenizer, text),
        target=target,
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        num_texts=num_texts,
        keep_ratios=keep_ratio or KEEP_RATIOS,
        stages=STAGES,
        sentence_ends=sentence_ending_tokens(tokenizer),
        on_curve=lambda curve: NOTES.print(_line(curve, target), highlight=False),
    )
    _print(outcome, target)
    write_policy(outcome.chosen.policy, out)
    NOTES.print(f"policy written to {out}")
    if plot is not None:
        write_curve(plot, outcome, target)


def _line(curve: Curve, target: float) -> str:
    share = curve.share_at(target)
    reached = "target not reached" if share is None else f"target at {share:.1%} of the bytes"
    choices = curve.policy.canonical().partition(" ")[2]
    return f"{curve.stage}: {choices}: {reached}"


def _print(outcome: Tuned, target: float) -> None:
    table = Table("kept", "stored", "agreement", "", "KL")
    for point in outcome.best.points:
        found = point.fidelity
        is_chosen = point is outcome.chosen
        bar = "█" * round(found.agreement * _BAR_WIDTH)
        table.add_row(
            f"{point.policy.keep_ratio:.3g}",
            f"{found.stored_share:.3f}",
            f"{found.agreement:.3f}",
            bar + (" ◀ chosen" if is_chosen else ""),
            f"{found.kl_divergence:.3f}",
            style="bold" if is_chosen else "",
        )
    CONSOLE.print(f"chosen: {outcome.chosen.policy.canonical()}", highlight=False)
    CONSOLE.print(table)
    if not outcome.is_reached:
        CONSOLE.print(
            f"no ratio reaches {target:.3g}; the closest is chosen: "
            f"{outcome.chosen.fidelity.agreement:.3f}"
        )
