"""The decode engine as a client sees it: through gateway, workers and store, in real processes.

    python -m tests.benchmarks.bench_decode_service [--json FILE] [--part PART]

``throughput``: 8 sessions of 8,000 tokens, beside transformers' ``generate``. ``streams``: time
between the engine and the client, and what a new session costs the others. ``load``: cancelled
streams, more sessions than fit, mixed lengths. SmolLM2 in float32. Exit code 1 if a bar is missed.
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
from tests.benchmarks.service_load import measure_load
from tests.benchmarks.service_streams import measure_streams
from tests.benchmarks.service_throughput import measure_throughput


def main() -> int:
    """Measure, print tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["throughput", "streams", "load"], help="only this one")
    parser.add_argument(
        "--prompt-tokens", type=int, default=8000, help="of throughput's prompts (%(default)s)"
    )
    parser.add_argument("--model", help="folder or hub id; the demo model if not given")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    model = options.model or str(ensure_demo_model())
    documents = Documents(AutoTokenizer.from_pretrained(model))
    parts: dict[str, Callable[[], list[Figure]]] = {
        "streams": lambda: measure_streams(model, documents),
        "load": lambda: measure_load(model, documents),
        "throughput": lambda: measure_throughput(model, documents, options.prompt_tokens),
    }
    return run_parts(model, parts, only=options.part, json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
