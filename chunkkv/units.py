"""Units: which neighbouring tokens are kept or dropped together."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Units:
    """A span cut into units, as a grid of one row of slots for each unit.

    Attributes:
        slots: ``(seq_len,)`` int64: where in the flattened grid each token stands, ascending.
        num_units: Rows of the grid.
        unit_tokens: Slots in a row: tokens of a unit at most.
        by_mean: Units are as good as their average token, because their sizes differ.
    """

    slots: torch.Tensor
    num_units: int
    unit_tokens: int
    by_mean: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the grid: ``(num_units, unit_tokens)``."""
        return self.num_units, self.unit_tokens

    def grid(self, values: torch.Tensor) -> torch.Tensor:
        """Return values ``(rows, seq_len)`` as ``(rows, num_units, unit_tokens)``, 0 in gaps."""
        size = self.num_units * self.unit_tokens
        grid = values.new_zeros(values.shape[0], size)
        if self.by_mean:
            grid[:, self.slots] = values
        else:  # gaps at the end only: a copy, which is faster than a scatter
            grid[:, : values.shape[1]] = values
        return grid.view(values.shape[0], *self.shape)

    def tokens(self, grid: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``(rows, seq_len)`` of a grid."""
        flat = grid.flatten(1)
        # A view where gaps are at the end only.
        return flat[:, self.slots] if self.by_mean else flat[:, : len(self.slots)]


def chunks(seq_len: int, unit_tokens: int, device: torch.device) -> Units:
    """Return chunks of ``unit_tokens`` tokens; the last one may have fewer."""
    # One chunk holds everything; its size must not cost memory.
    unit_tokens = min(unit_tokens, seq_len)
    return Units(torch.arange(seq_len, device=device), -(-seq_len // unit_tokens), unit_tokens)


def sentences(ends: torch.Tensor, unit_tokens: int) -> Units:
    """Return sentences; one of more than ``unit_tokens`` tokens makes several units.

    Args:
        ends: ``(seq_len,)`` bool: the token ends a sentence.
        unit_tokens: Tokens of a unit at most.
    """
    seq_len = ends.shape[0]
    unit_tokens = min(unit_tokens, seq_len)
    order = torch.arange(seq_len, device=ends.device)
    starts = torch.ones_like(ends)
    starts[1:] = ends[:-1]
    first = torch.where(starts, order, 0).cummax(dim=0).values  # of each token's sentence
    inside = (order - first) % unit_tokens
    unit = (inside == 0).cumsum(dim=0) - 1
    unit_tokens = int(inside.max()) + 1  # of the longest one: gaps cost memory
    return Units(unit * unit_tokens + inside, int(unit[-1]) + 1, unit_tokens, by_mean=True)
