"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from chunkserve_client import Compression, SyncClient

_COMPRESSION = "Compression (default: the session's, then the server's)"
_SAMPLING = "Sampling"

Address = Annotated[
    str, typer.Option(envvar="CHUNKSERVE_ADDRESS", help="host:port of the gateway.")
]
Timeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds after which a request is given up.")
]
SessionId = Annotated[str | None, typer.Option("--session", help="Session to continue.")]
ModelName = Annotated[str | None, typer.Option(help="Model to ask.")]
File = Annotated[
    str | None, typer.Option("--file", "-f", help="Text to read before the prompt; - is stdin.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens to generate.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None, typer.Option(help="0 to 2; 0 is greedy.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option(help="Repeats a sampled answer.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this string; may be given again.", rich_help_panel=_SAMPLING),
]

RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Above 1 (to 10): fewer of the tokens seen so far.", rich_help_panel=_SAMPLING
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(help="-2 to 2; above 0: fewer tokens again.", rich_help_panel=_SAMPLING),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(help="-2 to 2; the same, each time anew.", rich_help_panel=_SAMPLING),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="Log-probabilities, and 0 to 20 alternatives to each token; with --json.",
        rich_help_panel=_SAMPLING,
    ),
]

KeepRatio = Annotated[
    float | None,
    typer.Option(help="Fraction of tokens kept, above 0, up to 1.", rich_help_panel=_COMPRESSION),
]
MaxKeptTokens = Annotated[
    int | None,
    typer.Option(help="Tokens kept at most, instead.", rich_help_panel=_COMPRESSION),
]
Scorer = Annotated[
    str | None,
    typer.Option(
        help="window, recall, reconstruction, key_diff, heavy_hitter, recency, "
        "expected_attention or key_norm",
        rich_help_panel=_COMPRESSION,
    ),
]
PrefixScorer = Annotated[
    str | None,
    typer.Option(help="The same, of prefixes that are shared.", rich_help_panel=_COMPRESSION),
]
Precision = Annotated[
    str | None,
    typer.Option(help="native, fp8, int8 or int4", rich_help_panel=_COMPRESSION),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A named method, which the other options change: fast, durable, chunkkv, snapkv, ...",
        rich_help_panel=_COMPRESSION,
    ),
]
PrefixPreset = Annotated[
    str | None,
    typer.Option(help="The same, of prefixes that are shared.", rich_help_panel=_COMPRESSION),
]
Unit = Annotated[
    str | None,
    typer.Option(help="chunk, token or sentence", rich_help_panel=_COMPRESSION),
]
Scope = Annotated[
    str | None,
    typer.Option(help="head, layer, group or global", rich_help_panel=_COMPRESSION),
]
Spread = Annotated[
    str | None,
    typer.Option(
        help="uniform, pyramid or adaptive: how the budget is shared out between lists.",
        rich_help_panel=_COMPRESSION,
    ),
]
ChunkSize = Annotated[
    int | None, typer.Option(help="Tokens in a chunk.", rich_help_panel=_COMPRESSION)
]
WindowSize = Annotated[
    int | None,
    typer.Option(help="Trailing tokens that are always kept.", rich_help_panel=_COMPRESSION),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(help="Leading tokens that are always kept.", rich_help_panel=_COMPRESSION),
]
ReuseInterval = Annotated[
    int | None,
    typer.Option(help="Layers that share a list in scope group.", rich_help_panel=_COMPRESSION),
]
VotePower = Annotated[
    int | None,
    typer.Option(
        help="What window attention is raised to before it is averaged, 1 to 8.",
        rich_help_panel=_COMPRESSION,
    ),
]
PoolSize = Annotated[
    int | None,
    typer.Option(
        help="Tokens that window scores are averaged over, odd.", rich_help_panel=_COMPRESSION
    ),
]
HeadFloor = Annotated[
    float | None,
    typer.Option(
        help="0 to 1: share that every list gets before an adaptive ranking.",
        rich_help_panel=_COMPRESSION,
    ),
]
Gating = Annotated[
    float | None,
    typer.Option(
        help="0 to 1: of units whose scores have less entropy, only the best tokens are kept.",
        rich_help_panel=_COMPRESSION,
    ),
]
MergeLayers = Annotated[
    bool | None,
    typer.Option(help="Store neighbouring deep layers as one.", rich_help_panel=_COMPRESSION),
]
MaxKvTokens = Annotated[
    int | None,
    typer.Option(
        help="KV tokens kept at most while answering, the prompt's included.",
        rich_help_panel=_COMPRESSION,
    ),
]


def connect(address: str, timeout_s: float) -> SyncClient:
    """Return a client of the gateway at ``address``."""
    return SyncClient(address, timeout_s=timeout_s)


def given(compression: Compression) -> Compression | None:
    """Return ``None`` for a policy of which nothing was given."""
    return None if compression == Compression() else compression


def read_file(path: str) -> str:
    """Return the text of a file, or of stdin for ``-``.

    Raises:
        typer.BadParameter: It cannot be read, or is not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--file") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path}: not UTF-8 text", param_hint="--file") from error
