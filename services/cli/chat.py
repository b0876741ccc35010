"""``chunkserve chat``: a conversation on one session."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from chunkserve_client import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    ChunkServeError,
    Compression,
    GenerateOptions,
    Message,
    SessionNotFound,
    SyncGeneration,
    SyncSession,
)
from services.cli import options
from services.cli.generate import print_answer
from services.cli.output import print_error, print_stats, size

_HELP = """\
/stats    what the last answer cost
/session  the session's tokens and bytes
/help     this list
/exit     leave, as Ctrl-D does; Ctrl-C stops a running answer"""


def chat(
    session: Annotated[
        str | None, typer.Option(help="Session to continue. Left out: a new one.")
    ] = None,
    file: options.File = None,
    system: Annotated[str | None, typer.Option(help="System message to send first.")] = None,
    model: options.ModelName = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
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
    stats: Annotated[bool, typer.Option("--stats", help="Print what each answer cost.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk on a session. Ctrl-C stops a running answer, Ctrl-D ends."""
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
        )
    )
    turn: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": stop,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "compression": compression,
    }
    opening = options.read_file(file) if file is not None else ""
    with options.connect(address, timeout) as client:
        if session is not None:
            handle = client.get_session(session)
        else:
            handle = client.create_session(model=model, compression=compression)
        typer.echo(f"session {handle.session_id}, /help for commands", err=True)
        _Conversation(handle, turn, system=system, opening=opening, has_stats=stats).run()
        typer.echo(
            f"continue with: chunkserve chat --session {handle.session_id}",
            err=True,
        )


class _Conversation:
    """Reads lines and answers them until the input ends."""

    def __init__(
        self,
        session: SyncSession,
        turn: GenerateOptions,
        *,
        system: str | None,
        opening: str,
        has_stats: bool,
    ) -> None:
        self._session = session
        self._turn = turn
        self._system = system
        self._opening = opening
        self._has_stats = has_stats
        self._last: SyncGeneration | None = None
        self._commands: Mapping[str, Callable[[], None]] = {
            "/stats": self._show_stats,
            "/session": self._show_session,
            "/help": lambda: typer.echo(_HELP, err=True),
        }

    def run(self) -> None:
        """Answer line after line.

        Raises:
            SessionNotFound: The session is gone, so that there is nothing to continue.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and arrow keys
        while (line := _read_line()) not in (None, "/exit", "/quit"):
            if not line:
                continue
            try:
                self._dispatch(line)
            except SessionNotFound:
                raise
            except ChunkServeError as error:
                print_error(error)

    def _dispatch(self, line: str) -> None:
        command = self._commands.get(line)
        if command is not None:
            command()
        elif line.startswith("/") and len(line.split()) == 1:
            typer.echo(f"{line} is no command\n{_HELP}", err=True)
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        content = f"{self._opening}\n\n{question}" if self._opening else question
        messages = [Message("user", content)]
        if self._system is not None:
            messages.insert(0, Message("system", self._system))
        turn: GenerateOptions = {**self._turn, "messages": messages}
        self._last = self._session.generate(**turn)
        try:
            with self._last:
                print_answer(self._last)
        except KeyboardInterrupt:
            typer.echo("(stopped: the session is as it was before this turn)", err=True)
            return
        # Only an answered turn is part of the session: until then the opening is sent again.
        self._opening, self._system = "", None
        if self._has_stats:
            self._show_stats()

    def _show_stats(self) -> None:
        if self._last is None:
            typer.echo("nothing was asked yet", err=True)
        else:
            print_stats(self._last.prompt_info, self._last.finish)

    def _show_session(self) -> None:
        info = self._session.refresh()
        typer.echo(
            f"{info.session_id}: {info.num_turns} turns, {info.num_tokens} tokens, "
            f"{info.num_kept_tokens} kept, {size(info.stored_bytes)} stored",
            err=True,
        )


def _read_line() -> str | None:
    """Return the next line without spaces around it, ``None`` at the end of the input."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                typer.echo()
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo("\n(Ctrl-D ends)", err=True)
