"""The demo: a long document, two questions on two workers, and what was saved.

Everything is real: the model, the store, Ray, four kinds of processes. Ends with exit code 0 and
leaves nothing running, also after Ctrl-C (exit code 130).
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from chunkkv.evaluation.haystack import prose_sentences
from chunkserve_client import Compression, Finish, PromptInfo, SyncClient, SyncSession, TokenDelta
from services.local.cluster import ClusterError, ClusterOptions, LocalCluster
from services.local.model import ModelFetchError, ensure_demo_model
from services.store.embedded import EmbeddedStoreError

MIN_TOKENS: Final = 6000

_CHARACTERS: Final = 30_500

# Facts far from one another, by depth: the second question asks for one that the first did not.
_FACTS: Final = {
    0.2: "The ferry to Tarbert island leaves at 7:45 from the harbour of Oban.",
    0.35: "The access code of the north door is 4718, and it was last changed in March 2009.",
    0.45: "The telephone number of Dr. Lindqvist is 5539, and her office is in the Orange Tower.",
    0.62: "The lighthouse of Skagen was built in 1858 by the architect Niels Bergmann.",
}
# Both questions are about one document, and the second is yet to come when it is compressed.
_COMPRESSION: Final = Compression(preset="durable", keep_ratio=0.2)
_MAX_TOKENS: Final = 40


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the answer that stands in the document."""

    text: str
    right_answer: str


QUESTIONS: Final = (
    Question("What is the access code of the north door?", "4718"),
    Question("What is the telephone number of Dr. Lindqvist?", "5539"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as the client saw it.

    Attributes:
        text: The answer.
        info: What was done with the prompt.
        finish: How it ended.
        first_token_s: Seconds from sending to the first token.
    """

    text: str
    info: PromptInfo
    finish: Finish
    first_token_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, after the first."""
        return (self.finish.num_generated_tokens - 1) / max(self.finish.decode_ms, 1e-3) * 1000


def document() -> str:
    """Return English prose of more than 6,000 tokens: Python's own documentation, and our facts."""
    chosen: list[str] = []
    for sentence in prose_sentences():
        chosen.append(sentence)
        if sum(map(len, chosen)) + len(chosen) > _CHARACTERS:
            break
    length = len(chosen)
    for depth in sorted(_FACTS, reverse=True):
        chosen.insert(int(length * depth), _FACTS[depth])
    return " ".join(chosen)


def run(console: Console) -> None:
    """Run the demo; raise what goes wrong."""
    console.rule("[bold]ChunkServe demo")
    with _Progress(console, "looking for the demo model") as say:
        model = ensure_demo_model(say)
    with tempfile.TemporaryDirectory(prefix="chunkserve-demo-") as directory:
        options = ClusterOptions(
            directory=Path(directory), model=str(model), port=0, num_decode_workers=2
        )
        cluster = LocalCluster(options)
        try:
            with _Progress(console, "starting the cluster") as say:
                cluster.say = say
                cluster.start()
            console.print(f"cluster ready: 1 prefill worker, 2 decode workers, {cluster.address}")
            with SyncClient(cluster.address) as client:
                turns = _converse(console, client)
        finally:
            # Whatever comes now, cleaning up goes on to its end.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            with _Progress(console, "stopping the cluster"):
                cluster.stop()
    console.print(_table(*turns))


def _converse(console: Console, client: SyncClient) -> tuple[Turn, Turn]:
    text = document()
    console.print(f"\nThe document: {len(text):,} characters of Python's documentation.")
    console.print(f"It begins: [italic]{text[:150]} ...[/]")
    for depth, fact in _FACTS.items():
        console.print(f"At {depth:.0%} it says: [italic]{fact}[/]")
    session = client.create_session(compression=_COMPRESSION)
    first = _ask(console, session, QUESTIONS[0], before=text + "\n\n")
    second = _ask(console, session, QUESTIONS[1], avoid_worker=first.info.decode_worker)
    if first.info.num_prompt_tokens < MIN_TOKENS:
        raise ClusterError(f"the document has only {first.info.num_prompt_tokens} tokens")
    if second.info.decode_worker == first.info.decode_worker:
        raise ClusterError("both questions were answered by the same decode worker")
    return first, second


def _ask(
    console: Console,
    session: SyncSession,
    question: Question,
    *,
    before: str = "",
    avoid_worker: str = "",
) -> Turn:
    console.print(f"\n[bold]Question:[/] {question.text}")
    started = time.perf_counter()
    first_token_s = 0.0
    stream = session.generate(
        before + question.text, max_tokens=_MAX_TOKENS, avoid_worker=avoid_worker
    )
    events = stream.events()
    with _Progress(console, "computing, compressing, storing, fetching"):
        for event in events:
            if isinstance(event, TokenDelta):
                first_token_s = time.perf_counter() - started
                break
    console.print("[bold]Answer:[/]   ", end="")
    while not isinstance(event, Finish):
        if isinstance(event, TokenDelta):
            console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
        event = next(events)
    info = stream.prompt_info
    assert info is not None  # the first event of every stream
    mark = "[green]right[/]" if question.right_answer in stream.text else "[red]wrong[/]"
    console.print(f"\n[bold]Right is:[/] {question.right_answer} ({mark}), by {info.decode_worker}")
    return Turn(stream.text, info, event, first_token_s)


def _table(first: Turn, second: Turn) -> Table:
    table = Table(title="What was saved", title_justify="left")
    table.add_column("")
    table.add_column("turn 1", justify="right")
    table.add_column("turn 2", justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    turns = (first, second)
    row("prompt tokens", *(f"{t.info.num_prompt_tokens:,}" for t in turns))
    row("  of them reused", *(f"{t.info.num_reused_tokens:,}" for t in turns))
    row("  of them computed", *(f"{t.info.num_prefilled_tokens:,}" for t in turns))
    row("kept tokens", *(f"{t.info.num_kept_tokens:,}" for t in turns))
    row("KV bytes, full", *(_mb(t.info.full_kv_bytes) for t in turns))
    row("KV bytes, stored", *(_mb(t.info.stored_bytes) for t in turns))
    row("prefill seconds", *(f"{t.info.prefill_ms / 1000:.2f}" for t in turns))
    row("compression milliseconds", *(f"{t.info.compression_ms:.0f}" for t in turns))
    row("bytes fetched by the decode worker", *(_mb(t.info.fetched_bytes) for t in turns))
    row("fetch milliseconds", *(f"{t.info.fetch_ms:.0f}" for t in turns))
    row("time to first token, seconds", *(f"{t.first_token_s:.2f}" for t in turns))
    row("tokens per second", *(f"{t.tokens_per_s:.1f}" for t in turns))
    row("decode worker", *(t.info.decode_worker.rpartition("-")[2] for t in turns))
    return table


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


class _Progress:
    """A line that shows what is being done, and for how long."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(what)

    def __enter__(self) -> Any:
        if not self._console.is_terminal:
            self._console.print(f"{self._what} ...")
        self._progress.start()
        return self._say

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def _say(self, text: str) -> None:
        self._console.print(f"  {text}")
        self._progress.update(self._task, description=f"{self._what}: {text}")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo and return an exit code."""
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run(console)
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return 130
    except (ClusterError, EmbeddedStoreError, ModelFetchError) as error:
        console.print(f"\n[red]error:[/] {error}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
