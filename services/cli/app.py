"""The command tree."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from chunkserve_client import ChunkServeError
from services.cli import chat, generate, local, models, servers, sessions
from services.cli.output import print_error

_CLIENT = "Ask"
_LOCAL = "Run a cluster on this machine"
_SERVERS = "Run one process, configured by CHUNKSERVE_* variables"


class _Commands(TyperGroup):
    """Turns what the server refuses into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ChunkServeError as error:
            print_error(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Long prompts, prefilled once and kept as compressed sessions.",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(importlib.metadata.version("chunkserve"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("generate", rich_help_panel=_CLIENT)(generate.generate)
app.command("chat", rich_help_panel=_CLIENT)(chat.chat)
app.add_typer(sessions.app, name="sessions", rich_help_panel=_CLIENT)
app.command("models", rich_help_panel=_CLIENT)(models.models)
app.command("count", rich_help_panel=_CLIENT)(models.count)

app.command("up", rich_help_panel=_LOCAL)(local.up)
app.command("down", rich_help_panel=_LOCAL)(local.down)
app.command("status", rich_help_panel=_LOCAL)(local.status)
app.command("demo", rich_help_panel=_LOCAL)(local.demo)

app.command("gateway", rich_help_panel=_SERVERS)(servers.gateway)
app.command("prefill", rich_help_panel=_SERVERS)(servers.prefill)
app.command("decode", rich_help_panel=_SERVERS)(servers.decode)
app.command("compress", rich_help_panel=_SERVERS)(servers.compress)
