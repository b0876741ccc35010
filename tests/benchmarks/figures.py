"""What a benchmark found, and whether it is good enough."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Figure:
    """One number.

    Attributes:
        name: What was measured.
        value: The number.
        unit: Its unit.
        at_most: The bar, if there is one.
    """

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the number is not above its bar."""
        return self.at_most is None or self.value <= self.at_most


def run_parts(
    model: str,
    parts: Mapping[str, Callable[[], list[Figure]]],
    *,
    only: str | None,
    json_file: Path | None,
) -> int:
    """Measure parts of a benchmark and print what they found; return the exit status.

    Args:
        model: Folder of the model.
        parts: What measures each part.
        only: The only part to measure; ``None``: all.
        json_file: Where to write the figures as well.

    Returns:
        1 if a bar was missed, else 0.
    """
    print(f"{os.path.basename(model)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    results: dict[str, list[Figure]] = {}
    for name in [only] if only else parts:
        results[name] = parts[name]()
        print_figures(name, results[name])
    if json_file:
        written = {name: [asdict(f) for f in figures] for name, figures in results.items()}
        json_file.write_text(json.dumps(written, indent=2))
    return 0 if all(f.is_met for figures in results.values() for f in figures) else 1


def spread(name: str, values: Sequence[float], unit: str = "") -> list[Figure]:
    """Return the least, the median and the most of several numbers; nothing of none."""
    if not values:
        return []
    return [
        Figure(f"{name}, minimum", min(values), unit),
        Figure(f"{name}, median", statistics.median(values), unit),
        Figure(f"{name}, maximum", max(values), unit),
    ]


def print_figures(title: str, figures: Sequence[Figure]) -> None:
    """Print a table of figures, each with its bar beside it."""
    print(f"\n{title:60}{'':>12} {'':8}{'at most':>10}")
    for figure in figures:
        bar = ""
        if figure.at_most is not None:
            bar = f"{_plain(figure.at_most):>10} {'' if figure.is_met else ' MISSED'}"
        print(f"{figure.name:60}{_plain(figure.value):>12} {figure.unit:8}{bar}", flush=True)


def tell(text: str) -> None:
    """Say on stderr what is being done, in the place of what was."""
    print(f"\r{text:70}", end="", file=sys.stderr, flush=True)


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"
