"""The commands for a whole cluster on this machine: up, down, status, demo."""

from __future__ import annotations

import time
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from services.cli.lazy import load

_POLL_S = 0.1

_console = Console(stderr=True)


def up(
    model: Annotated[
        str, typer.Option(help="Model folder or hub id. Empty: the demo model, fetched once.")
    ] = "",
    decode_workers: Annotated[int, typer.Option(min=1, help="Decode workers on Ray.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the gateway; 0: any.")] = 50051,
    redis_url: Annotated[str, typer.Option(help="Store. Empty: an embedded one.")] = "",
) -> None:
    """Start a cluster on this machine and return when it answers."""
    supervisor = load("services.local.supervisor", extra="local")
    cluster = load("services.local.cluster", extra="local")
    directory = supervisor.state_dir()
    state = supervisor.read_state(directory)
    if state is not None and state.is_alive:
        _fail(f"a cluster runs already at {state.address}; stop it with: chunkserve down")
    options = cluster.ClusterOptions(
        directory=directory,
        model=model or _demo_model(),
        port=port,
        num_decode_workers=decode_workers,
        redis_url=redis_url,
    )
    pid = supervisor.launch(options)
    shown = ""
    with _console.status("starting") as status:
        while True:
            has_ended = not supervisor.runs(pid)
            state = supervisor.read_state(directory)
            if state is not None and state.phase == "ready":
                break
            if has_ended:
                is_told = state is not None and state.phase == "failed"
                log = directory / "supervisor.log"
                _fail(state.message if is_told else f"the supervisor ended; see {log}")
            if state is not None and state.message != shown:
                shown = state.message
                status.update(shown)
                _console.print(f"  {shown}")
            time.sleep(_POLL_S)
    typer.echo(f"ready at {state.address}")


def down() -> None:
    """Stop the cluster that `up` started."""
    supervisor = load("services.local.supervisor", extra="local")
    directory = supervisor.state_dir()
    state = supervisor.read_state(directory)
    if state is None or not state.is_alive:
        typer.echo("no cluster runs")
        return
    with _console.status("stopping"):
        supervisor.stop(state, directory)
    typer.echo("stopped")


def status() -> None:
    """Show the cluster that `up` started. Exit code 1 if there is none."""
    supervisor = load("services.local.supervisor", extra="local")
    directory = supervisor.state_dir()
    state = supervisor.read_state(directory)
    if state is None or not state.is_alive:
        typer.echo("no cluster runs; start one with: chunkserve up")
        raise typer.Exit(1)
    typer.echo(f"{state.phase}: {state.message}" if state.message != state.phase else state.phase)
    typer.echo(f"gateway {state.address}, model {state.model}, store {state.redis_url}")
    table = Table("service", "pid", "memory MB", "processes")
    for name, pid in {"supervisor": state.pid, **state.services}.items():
        count, size_bytes = supervisor.usage(pid, with_children=name != "supervisor")
        table.add_row(name, str(pid), f"{size_bytes / 1e6:.0f}", str(count))
    Console().print(table)
    typer.echo(f"logs in {directory}")


def demo() -> None:
    """Start a cluster, send it a long document and two questions, show what was saved, stop."""
    raise SystemExit(load("services.local.demo", extra="local").main())


def _demo_model() -> str:
    model = load("services.local.model", extra="local")
    try:
        with _console.status("looking for the demo model"):
            return str(model.ensure_demo_model(lambda text: _console.print(f"  {text}")))
    except model.ModelFetchError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
