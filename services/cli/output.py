"""How the commands print: errors, tables, JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table

from chunkserve_client import (
    AlreadyExists,
    ChunkServeError,
    Compression,
    DataLoss,
    DeadlineExceeded,
    Finish,
    InternalError,
    Mismatch,
    NotFound,
    Overloaded,
    PromptInfo,
    SessionBusy,
    SessionNotFound,
    Unavailable,
)

_PIPE_WIDTH: Final = 200  # columns of a table that goes into a file or another program

_HINTS: Final[Mapping[type[ChunkServeError], str]] = {
    SessionNotFound: "`chunkserve sessions list` shows those that exist",
    NotFound: "`chunkserve models` shows what can be asked",
    AlreadyExists: "choose another name, or delete it first",
    SessionBusy: "try again when its other turn has ended",
    Mismatch: "create a new session for this model",
    DataLoss: "delete the session and start a new one",
    Overloaded: "try again later",
    Unavailable: "try again",
    DeadlineExceeded: "allow more with --timeout",
    InternalError: "the server's log says more",
}
_NO_GATEWAY: Final = "is a gateway running there? Name another with --address"


def print_error(error: ChunkServeError) -> None:
    """Print one line on stderr: what went wrong, its reason, and what to do."""
    parts = [error.message]
    if error.reason:
        parts.append(f"[{error.reason}]")
    if hint := _hint(error):
        parts.append(f"- {hint}")
    if error.request_id and (error.reason or isinstance(error, InternalError)):
        # It reached a server, whose log knows the request.
        parts.append(f"(request {error.request_id})")
    typer.secho("error: ", fg=typer.colors.RED, nl=False, err=True)
    typer.echo(" ".join(" ".join(parts).split()), err=True)


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=_as_json))


def event_json(event: object) -> dict[str, Any]:
    """Return an event of an answer as JSON, its kind included."""
    kinds = {"PromptInfo": "prompt_info", "TokenDelta": "delta", "Finish": "finish"}
    return {"event": kinds[type(event).__name__], **_as_json(event)}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; numbers to the right."""
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        is_number = all(row[i][:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console(is_stderr=False).print(table)


def print_stats(prompt_info: PromptInfo | None, finish: Finish | None) -> None:
    """Print what an answer cost, on stderr."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in [*_prompt_rows(prompt_info), *_finish_rows(finish)]:
        table.add_row(name, value)
    _console(is_stderr=True).print(table, highlight=False)


def size(num_bytes: int) -> str:
    """Return a number of bytes for people."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    if num_bytes < 1024**2:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes / 1024**2:.1f} MiB"


def remaining(until: datetime) -> str:
    """Return the time from now, to the second, for people."""
    left = max(until - datetime.now(UTC), timedelta(0))
    return str(timedelta(seconds=round(left.total_seconds())))


def policy_text(compression: Compression | None) -> str:
    """Return a policy as ``name=value`` pairs."""
    if compression is None:
        return "the server's"
    values = dataclasses.asdict(compression).items()
    return " ".join(f"{name}={value}" for name, value in values if value is not None)


def _hint(error: ChunkServeError) -> str:
    if isinstance(error, Unavailable) and not error.reason:
        return _NO_GATEWAY
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:g} s"
    return next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), "")


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _console(*, is_stderr: bool) -> Console:
    stream = sys.stderr if is_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)


def _prompt_rows(info: PromptInfo | None) -> list[tuple[str, str]]:
    if info is None:
        return []
    kept = info.num_kept_tokens / max(info.num_prompt_tokens, 1)
    return [
        ("prompt", f"{info.num_prompt_tokens} tokens"),
        ("  reused", f"{info.num_reused_tokens} tokens"),
        ("  prefilled", f"{info.num_prefilled_tokens} tokens in {info.prefill_ms:.0f} ms"),
        ("  kept", f"{info.num_kept_tokens} tokens ({kept:.0%})"),
        ("KV cache", f"{size(info.full_kv_bytes)} full, {size(info.stored_bytes)} stored"),
        ("  fetched", f"{size(info.fetched_bytes)} in {info.fetch_ms:.1f} ms"),
        ("tokenize", f"{info.tokenize_ms:.1f} ms"),
        ("compression", f"{info.compression_ms:.1f} ms"),
        ("store", f"{info.store_ms:.1f} ms"),
        ("workers", f"{info.prefill_worker or '-'}, {info.decode_worker or '-'}"),
    ]


def _finish_rows(finish: Finish | None) -> list[tuple[str, str]]:
    if finish is None:
        return []
    rate = ""
    if finish.num_generated_tokens > 1 and finish.decode_ms > 0:
        per_s = (finish.num_generated_tokens - 1) / finish.decode_ms * 1000
        rate = f", {per_s:.1f} tokens/s"
    reason = finish.reason + (f" {finish.matched_stop!r}" if finish.matched_stop else "")
    return [
        ("answer", f"{finish.num_generated_tokens} tokens{rate}, ended by {reason}"),
        ("first token", f"{finish.first_token_ms:.0f} ms after decode began"),
        ("commit", f"{finish.commit_ms:.1f} ms"),
        ("conversation", f"{finish.num_total_tokens} tokens"),
        ("seed", str(finish.seed)),
    ]
