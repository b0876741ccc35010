"""Keys or values of two neighbouring layers as one: a direction for both, and each one's norms.

Sees rows of numbers; which layers are neighbours says ``SpanShape.merged_pairs``, and where the
result lies ``chunkkv.quantization``.

Source: MiniCache (https://arxiv.org/abs/2405.14366), with its ``t`` of 0.6 and gamma of 0.05. Two
deviations: the range of angles that gamma divides is each KV head's own, and a row that is 0 takes
the other layer's direction, so that both come back exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

# Where on the arc from the shallower to the deeper layer's direction the common one lies.
INTERPOLATION: Final = 0.6
# What part of the range of angles, counted from the largest, is too far apart to be merged.
RETENTION: Final = 0.05

# Below this, directions differ by rounding alone: the arc is a line, and nothing is retained.
_LINE: Final = 1e-5
# Above this, no arc is shorter than the others.
_HALF_TURN: Final = math.pi - 1e-3


@dataclass(frozen=True, slots=True)
class MergedRows:
    """Two layers' rows as one.

    Attributes:
        directions: ``(rows, dim)`` float32, of length 1; 0 where both rows are 0.
        norms: ``(2, rows)`` float32: of the shallower layer's rows and the deeper one's.
        retained: ``(n,)`` int64, ascending: rows that the directions do not stand for.
    """

    directions: torch.Tensor
    norms: torch.Tensor
    retained: torch.Tensor


def merge(first: torch.Tensor, second: torch.Tensor, lengths: Sequence[int]) -> MergedRows:
    """Merge two layers' rows along the arc between their directions (SLERP).

    With the angle ``w`` between the directions ``u`` and ``v``, the common one is
    ``(sin((1 - t) w) u + sin(t w) v) / sin(w)``. Of each KV head, rows with
    ``w > w_max - gamma (w_max - w_min)`` are retained, unless they differ by rounding alone.

    Args:
        first: The shallower layer's, ``(rows, dim)`` float32. Norms of rows that are not finite
            are not finite.
        second: The deeper layer's, likewise.
        lengths: Rows of each KV head.
    """
    norms, one, other, angles = _arcs(first, second)
    return MergedRows(_between(one, other, angles[:, None]), norms, _far(angles, lengths))


def retained_rows(
    first: torch.Tensor, second: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Return what ``merge`` retains, alone."""
    return _far(_arcs(first, second)[-1], lengths)


def restore(directions: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two layers' rows: the directions, however they were rounded, with these norms.

    Args:
        directions: ``(rows, dim)`` float32.
        norms: ``(2, rows)`` float32.
    """
    _, exact = _polar(directions)
    return exact * norms[0, :, None], exact * norms[1, :, None]


def _arcs(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return norms ``(2, rows)``, the directions of both, and the angles ``(rows,)`` between."""
    (first_norms, one), (second_norms, other) = _polar(first), _polar(second)
    one = torch.where(first_norms[:, None] > 0, one, other)
    other = torch.where(second_norms[:, None] > 0, other, one)
    return torch.stack([first_norms, second_norms]), one, other, _angles(one, other)


def _polar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms ``(rows,)`` and the directions of ``x`` ``(rows, dim)``."""
    # Divided by the largest, no square is too large or too small for 32 bits.
    largest = torch.linalg.vector_norm(x, ord=math.inf, dim=1, keepdim=True)
    scaled = torch.where(largest > 0, x / largest, 0.0)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return (norms * largest).squeeze(1), torch.where(norms > 0, scaled / norms, 0.0)


def _angles(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the angle between directions, ``(rows,)``; 0 exactly where they are equal."""
    # The cosine's inverse would tell no angle below 3e-4 from another.
    across = torch.linalg.vector_norm(one - other, dim=1)
    along = torch.linalg.vector_norm(one + other, dim=1)
    return 2 * torch.atan2(across, along)


def _between(one: torch.Tensor, other: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return the common direction; ``angles`` is ``(rows, 1)``."""
    t = INTERPOLATION
    sine = torch.sin(angles)
    of_one = torch.where(angles < _LINE, 1 - t, torch.sin((1 - t) * angles) / sine)
    of_other = torch.where(angles < _LINE, t, torch.sin(t * angles) / sine)
    return torch.where(angles > _HALF_TURN, other, of_one * one + of_other * other)


def _far(angles: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the rows of each head whose angles are among its largest."""
    found, start = [torch.empty(0, dtype=torch.int64)], 0
    for head in torch.split(angles, list(lengths)):
        if len(head):
            low, high = head.aminmax()
            least = (high - RETENTION * (high - low)).clamp(min=_LINE)
            found.append(start + torch.nonzero(head > least).flatten())
        start += len(head)
    return torch.cat(found)
