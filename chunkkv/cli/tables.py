"""``chunkkv eval run``, ``report`` and ``list``: tasks x methods x ratios, in a folder."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

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
        list[int] | None,
        typer.Option(min=1, help="Length of generated documents; may be given again."),
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
        InvalidInputError: There is no such task, or it takes no lengths.
        typer.BadParameter: It has no such setting, one is missing, or a value does not fit.
    """
    if name not in TASKS:
        raise InvalidInputError(f"no task {name!r}; there are {', '.join(TASKS)}")
    kind = TASKS[name]
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    for pair in settings:
        key, _, value = pair.partition("=")
        if key not in types:
            raise typer.BadParameter(
                f"{name} has no setting {key!r}; it has {', '.join(types)}", param_hint="--set"
            )
        given[key] = _setting(key, value, types[key])
    if lengths and "num_tokens" not in types:
        raise InvalidInputError(f"{name} makes no documents of a length; leave --tokens out")
    if lengths and "num_tokens" in given:
        raise typer.BadParameter("give --tokens or num_tokens, not both", param_hint="--set")
    try:
        return [
            kind(**given, **({"num_tokens": length} if length else {})) for length in lengths or [0]
        ]
    except (TypeError, InvalidInputError) as error:
        raise typer.BadParameter(f"{name}: {error}", param_hint="--set") from error


_MEANT: Final[dict[Any, str]] = {int: "an integer", float: "a number", bool: "true or false"}


def _setting(name: str, text: str, kind: Any) -> Any:
    """Read the value of a setting whose type is ``kind``.

    Raises:
        typer.BadParameter: It is of another type.
    """
    if isinstance(kind, UnionType):  # with None
        if text == "None":
            return None
        [kind] = set(get_args(kind)) - {NoneType}
    if kind in (str, Path) and text:
        return kind(text)
    value = _literal(text)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        items = tuple(value) if isinstance(value, tuple | list) else (value,)
        if all(_is_a(each, item) for each in items):
            return items
        meant = f"{_MEANT.get(item, 'a text')}, or several like (a, b)"
    elif _is_a(value, kind):
        return value
    else:
        meant = _MEANT.get(kind, "a text")
    raise typer.BadParameter(f"{name} is {text!r}; give {meant}", param_hint="--set")


def _is_a(value: Any, kind: type) -> bool:
    # True is an integer to Python.
    return bool(value != "") and (type(value) is kind or (kind is float and type(value) is int))


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
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
