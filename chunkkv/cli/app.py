"""The command tree."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from chunkkv.cli import measures, tables, tuning
from chunkkv.cli.models import NOTES
from chunkkv.errors import ChunkKVError


class _Commands(TyperGroup):
    """Turns what the library refuses into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ChunkKVError, OSError) as error:
            NOTES.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compressed KV caches: how much survives, and which policy to take.",
)
evaluation = typer.Typer(no_args_is_help=True, help="How much survives compression.")
evaluation.command("run")(tables.run)
evaluation.command("report")(tables.report)
evaluation.command("list")(tables.list_names)
evaluation.command("fidelity")(measures.fidelity)
evaluation.command("reuse")(measures.reuse)
evaluation.command("cost")(measures.cost)
app.add_typer(evaluation, name="eval")
app.command("tune")(tuning.tune)
