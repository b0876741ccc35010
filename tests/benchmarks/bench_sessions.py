"""What sessions are worth: turns, shared prefixes and memory pressure through the whole service.

    python -m tests.benchmarks.bench_sessions [--json FILE] [--part PART]

``turns``: time to first token of a second turn behind a long document, on a worker that has the
session, on one that must fetch it, and of transformers over the whole prompt. ``prefix``: many
sessions over one long prefix. ``pressure``: three times as many sessions as the store has room for.
SmolLM2 in float32. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from services.local.model import ensure_demo_model
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, run_parts
from tests.benchmarks.sessions_prefix import measure_prefix
from tests.benchmarks.sessions_pressure import measure_pressure
from tests.benchmarks.sessions_turns import measure_turns


def main() -> int:
    """Measure, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["turns", "prefix", "pressure"], help="only this one")
    parser.add_argument(
        "--tokens",
        type=int,
        help="of the longest document (turns: 8000, prefix: 4000, pressure: 1000)",
    )
    parser.add_argument(
        "--sessions", type=int, help="how many (turns: 5 of each length, prefix: 20, pressure: 100)"
    )
    parser.add_argument(
        "--kept", type=int, default=820, help="max_kept_tokens of turns (%(default)s)"
    )
    parser.add_argument(
        "--precision", default="native", help="of pressure's sessions at first (%(default)s)"
    )
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    model = options.model or str(ensure_demo_model())
    documents = Documents(AutoTokenizer.from_pretrained(model))
    num_tokens, num_sessions = options.tokens, options.sessions
    parts: dict[str, Callable[[], list[Figure]]] = {
        "turns": lambda: measure_turns(
            model,
            documents,
            num_tokens=num_tokens or 8000,
            num_sessions=num_sessions or 5,
            max_kept_tokens=options.kept,
        ),
        "prefix": lambda: measure_prefix(
            model, documents, num_tokens=num_tokens or 4000, num_sessions=num_sessions or 20
        ),
        "pressure": lambda: measure_pressure(
            model,
            documents,
            num_tokens=num_tokens or 1000,
            num_sessions=num_sessions or 100,
            precision=options.precision,
        ),
    }
    return run_parts(model, parts, only=options.part, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
