"""``chunkkv eval run``, ``report`` and ``list``: tasks x methods x ratios, in a folder."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from chunkkv.cli.models import (
    CONSOLE,
    NOTES,
    Device,
    Dtype,
    KeepRatios,
    ModelId,
    Presets,
    Threads,
    load_model,
)
from chunkkv.errors import InvalidInputError
from chunkkv.evaluation.methods import method
from chunkkv.evaluation.plots import write_plots
from chunkkv.evaluation.records import Results, open_results, read_results
from chunkkv.evaluation.report import write_report
from chunkkv.evaluation.runner import grid
from chunkkv.evaluation.runner import run as run_grid
from chunkkv.evaluation.tasks import TASKS
from chunkkv.fingerprint import model_fingerprint
from chunkkv.presets import PRESETS

KEEP_RATIOS: Final = (0.05, 0.1, 0.2, 0.3, 0.5)


class Question(StrEnum):
    """Whether the question is there when the prompt is compressed."""

    SEEN = "seen"
    UNSEEN = "unseen"
    BOTH = "both"


def run(
    task: Annotated[str, typer.Argument(help="One of `chunkkv eval list`.")],
    model: ModelId,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run goes on in it.")],
    preset: Presets = None,
    keep_ratio: KeepRatios = None,
    question: Annotated[
        Question, typer.Option(help="Seen by the compression, or put afterwards.")
    ] = Question.BOTH,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Length of generated documents; may be given again.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 4,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the task, name=value; may be given again."),
    ] = None,
    batch_mb: Annotated[int, typer.Option(min=1, help="KV of one batch, in MiB.")] = 1024,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Answer a task's questions with every method at every ratio; table, JSON and pictures."""
    methods = [method(name) for name in preset or PRESETS]
    visible = {Question.SEEN: [True], Question.UNSEEN: [False], Question.BOTH: [False, True]}
    cells = grid(methods, keep_ratio or KEEP_RATIOS, visible=visible[question])
    tasks = made_tasks(task, settings or [], tokens or [])
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, threads=threads)
    results = open_results(
        out,
        {
            "model": model_fingerprint(loaded),
            "chat_template": getattr(tokenizer, "chat_template", None),
        },
        {each.name: each.settings for each in methods},
    )
    chosen = [list(each.samples(tokenizer, seed=seed, num_samples=samples)) for each in tasks]
    # Lengths take turns, so that a run that is cut off has some of each.
    turns = itertools.zip_longest(*chosen)
    every = [sample for turn in turns for sample in turn if sample is not None]
    wanted = [cell.key(sample) for sample in every for cell in cells]
    with _progress() as progress:
        bar = progress.add_task(task, total=len(wanted))
        progress.advance(bar, sum(key in results.records for key in wanted))
        try:
            run_grid(
                loaded,
                tokenizer,
                every,
                cells,
                results,
                batch_bytes=batch_mb << 20,
                on_record=lambda record: progress.advance(bar),
            )
        except KeyboardInterrupt:
            progress.stop()
            NOTES.print(
                f"stopped; the same command goes on from {len(results.records)} results in {out}"
            )
            _write(results)
            raise
    _write(results)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
) -> None:
    """Write a run's table, JSON and pictures again."""
    _write(read_results(folder))


def list_names() -> None:
    """Show tasks with their settings, and presets with their papers."""
    table = Table("task", "settings")
    for name, kind in TASKS.items():
        table.add_row(name, ", ".join(field.name for field in fields(kind)))
    CONSOLE.print(table)
    table = Table("preset", "what", "source")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.summary, preset.source)
    CONSOLE.print(table)


def made_tasks(name: str, settings: Sequence[str], lengths: Sequence[int]) -> list[Any]:
    """Return the task, once for each length.

    Raises:
        InvalidInputError: There is no such task, or it has no such setting.
    """
    if name not in TASKS:
        raise InvalidInputError(f"no task {name!r}; there are {', '.join(TASKS)}")
    kind = TASKS[name]
    types = {field.name: str(field.type) for field in fields(kind)}
    given: dict[str, Any] = {}
    for pair in settings:
        key, _, value = pair.partition("=")
        if key not in types:
            raise InvalidInputError(f"{name} has no setting {key!r}; it has {', '.join(types)}")
        given[key] = Path(value) if "Path" in types[key] else _literal(value)
    if lengths and "num_tokens" not in types:
        raise InvalidInputError(f"{name} makes no documents of a length; leave --tokens out")
    try:
        return [
            kind(**given, **({"num_tokens": length} if length else {})) for length in lengths or [0]
        ]
    except TypeError as error:
        raise InvalidInputError(f"{name}: {error}; give it with --set name=value") from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=NOTES,
    )


def _write(results: Results) -> None:
    records = list(results.records.values())
    if not records:
        return
    table = write_report(results.folder, records)
    pictures = write_plots(results.folder, records)
    CONSOLE.print(table, markup=False, highlight=False, soft_wrap=True)
    NOTES.print(f"in {results.folder}: results.json, table.md, {len(pictures)} pictures")
