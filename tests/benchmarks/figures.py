"""What a benchmark found, and whether it is good enough."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


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
