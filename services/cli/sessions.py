"""``chunkserve sessions``: list, show, create, fork, compress, export, import, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from chunkserve_client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Compression, SessionInfo
from services.cli import options
from services.cli.output import policy_text, print_json, print_table, remaining, size

app = typer.Typer(no_args_is_help=True, help="Stored conversations.")

_Name = Annotated[str, typer.Argument(metavar="SESSION", help="Id of the session.")]
_Ttl = Annotated[float | None, typer.Option(min=1.0, help="Seconds that it lives after each use.")]
_READ_BYTES: Final = 1 << 20


@app.command("list")
def list_sessions(
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List all sessions, oldest first."""
    with options.connect(address, timeout) as client:
        infos = [session.info for session in client.list_sessions()]
    if json:
        print_json(infos)
        return
    columns = ("session", "model", "turns", "tokens", "kept", "stored", "expires in")
    print_table(columns, [_row(info) for info in infos])


@app.command()
def show(
    session: _Name,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show a session and the segments of its KV cache."""
    with options.connect(address, timeout) as client:
        info = client.get_session(session).info
    if json:
        print_json(info)
        return
    typer.echo(
        f"session     {info.session_id}\n"
        f"model       {info.model}\n"
        f"turns       {info.num_turns} (version {info.version})\n"
        f"tokens      {info.num_tokens}, {info.num_kept_tokens} kept\n"
        f"stored      {size(info.stored_bytes)}\n"
        f"policy      {policy_text(info.compression)}\n"
        f"created     {info.create_time:%Y-%m-%d %H:%M:%S} UTC\n"
        f"updated     {info.update_time:%Y-%m-%d %H:%M:%S} UTC\n"
        f"expires in  {remaining(info.expire_time)}"
    )
    if info.segments:
        typer.echo()
        columns = ("segment", "first token", "tokens", "kept", "stored")
        print_table(
            columns,
            [
                (
                    s.segment_id,
                    str(s.first_token),
                    str(s.num_tokens),
                    str(s.num_kept_tokens),
                    size(s.size_bytes),
                )
                for s in info.segments
            ],
        )


@app.command()
def create(
    session: Annotated[
        str | None,
        typer.Argument(metavar="SESSION", help="Its id. Left out: the server makes one."),
    ] = None,
    model: options.ModelName = None,
    ttl: _Ttl = None,
    keep_ratio: options.KeepRatio = None,
    max_kept_tokens: options.MaxKeptTokens = None,
    preset: options.Preset = None,
    scorer: options.Scorer = None,
    unit: options.Unit = None,
    scope: options.Scope = None,
    spread: options.Spread = None,
    chunk_size: options.ChunkSize = None,
    window_size: options.WindowSize = None,
    sink_tokens: options.SinkTokens = None,
    reuse_interval: options.ReuseInterval = None,
    vote_power: options.VotePower = None,
    pool_size: options.PoolSize = None,
    head_floor: options.HeadFloor = None,
    gating: options.Gating = None,
    merge_layers: options.MergeLayers = None,
    max_kv_tokens: options.MaxKvTokens = None,
    precision: options.Precision = None,
    prefix_scorer: options.PrefixScorer = None,
    prefix_preset: options.PrefixPreset = None,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Create an empty session and print its id."""
    compression = options.given(
        Compression(
            keep_ratio=keep_ratio,
            max_kept_tokens=max_kept_tokens,
            preset=preset,
            scorer=scorer,
            unit=unit,
            scope=scope,
            spread=spread,
            chunk_size=chunk_size,
            window_size=window_size,
            sink_tokens=sink_tokens,
            reuse_interval=reuse_interval,
            vote_power=vote_power,
            pool_size=pool_size,
            head_floor=head_floor,
            gating=gating,
            merge_layers=merge_layers,
            max_kv_tokens=max_kv_tokens,
            precision=precision,
            prefix_scorer=prefix_scorer,
            prefix_preset=prefix_preset,
        )
    )
    with options.connect(address, timeout) as client:
        info = client.create_session(session, model=model, compression=compression, ttl_s=ttl).info
    _print_session(info, as_json=json)


@app.command()
def fork(
    session: _Name,
    new_session: Annotated[
        str | None,
        typer.Argument(metavar="NEW", help="Id of the fork. Left out: the server makes one."),
    ] = None,
    ttl: _Ttl = None,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Make a session that continues another one, and print its id."""
    with options.connect(address, timeout) as client:
        _print_session(client.fork_session(session, new_session, ttl_s=ttl).info, as_json=json)


@app.command()
def compress(
    session: _Name,
    keep_ratio: options.KeepRatio = None,
    max_kept_tokens: options.MaxKeptTokens = None,
    precision: options.Precision = None,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Compress a stored session further; what is dropped is gone."""
    compression = Compression(
        keep_ratio=keep_ratio, max_kept_tokens=max_kept_tokens, precision=precision
    )
    with options.connect(address, timeout) as client:
        result = client.compress_session(session, compression)
    if json:
        print_json(result)
        return
    info = result.info
    typer.echo(
        f"{info.session_id}: {result.original_kept_tokens} kept tokens in "
        f"{size(result.original_bytes)} are now {info.num_kept_tokens} in {size(info.stored_bytes)}"
    )


@app.command("export")
def export_session(
    session: _Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Write a session to a file, for a backup or another cluster."""
    # Under another name until it is whole: half an export is none.
    unfinished = output.with_name(f"{output.name}.part")
    try:
        with options.connect(address, timeout) as client, unfinished.open("wb") as file:
            for data in client.export_session(session):
                file.write(data)
        unfinished.replace(output)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from error
    finally:
        unfinished.unlink(missing_ok=True)


@app.command("import")
def import_session(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)
    ],
    session: Annotated[
        str | None, typer.Option("--session", help="Its id. Left out: the exported one.")
    ] = None,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Store a session that was exported, and print its id."""
    with options.connect(address, timeout) as client, path.open("rb") as file:
        chunks = iter(lambda: file.read(_READ_BYTES), b"")
        _print_session(client.import_session(chunks, session).info, as_json=json)


@app.command()
def delete(
    sessions: Annotated[list[str], typer.Argument(metavar="SESSION...", help="Ids.")],
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Delete sessions."""
    with options.connect(address, timeout) as client:
        for session in sessions:
            client.delete_session(session)


def _print_session(info: SessionInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
    else:
        typer.echo(info.session_id)


def _row(info: SessionInfo) -> tuple[str, ...]:
    return (
        info.session_id,
        info.model,
        str(info.num_turns),
        str(info.num_tokens),
        str(info.num_kept_tokens),
        size(info.stored_bytes),
        remaining(info.expire_time),
    )
