"""``chunkserve generate``: one question, one streamed answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chunkserve_client import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Compression,
    Message,
    SyncGeneration,
)
from services.cli import options
from services.cli.output import event_json, print_json, print_stats


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The question. Left out: --file, then stdin.")
    ] = None,
    file: options.File = None,
    session: options.SessionId = None,
    system: Annotated[str | None, typer.Option(help="System message to send first.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send text without a chat template.")] = False,
    model: options.ModelName = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logprobs: options.Logprobs = None,
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
    json: Annotated[
        bool, typer.Option("--json", help="Print events, a line of JSON each.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what it cost on stderr.")] = False,
    request_id: Annotated[str | None, typer.Option(help="Name of the request in logs.")] = None,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask one question and stream the answer."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template that --raw leaves out")
    if logprobs is not None and not json:
        raise typer.BadParameter("--logprobs needs --json, which has a place for them")
    text = input_text(prompt, file)
    messages = [Message("user", text)]
    if system is not None:
        messages.insert(0, Message("system", system))
    with options.connect(address, timeout) as client:
        answer = client.generate(
            session=session,
            text=text if raw else None,
            messages=None if raw else messages,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logprobs=logprobs,
            request_id=request_id,
            compression=options.given(
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
            ),
        )
        _print_events(answer) if json else print_answer(answer)
        if stats:
            print_stats(answer.prompt_info, answer.finish)


def print_answer(answer: SyncGeneration) -> None:
    """Print the text as it comes, and a line break however it ends."""
    try:
        for text in answer:
            typer.echo(text, nl=False)
            sys.stdout.flush()
    finally:
        if answer.text:
            typer.echo()


def input_text(prompt: str | None, file: str | None) -> str:
    """Join the file and the prompt; a question comes after what it is about.

    Raises:
        typer.BadParameter: There is neither, nor a text on stdin; or the file cannot be read.
    """
    if file is None and prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, --file, or text on stdin")
        file = "-"
    parts = [options.read_file(file)] if file is not None else []
    return "\n\n".join([*parts, *([prompt] if prompt is not None else [])])


def _print_events(answer: SyncGeneration) -> None:
    for event in answer.events():
        print_json(event_json(event))
        sys.stdout.flush()
