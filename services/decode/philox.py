"""Random numbers that are a function of a key and a counter, and of nothing else.

Philox4x32 with ten rounds, in integer tensor operations, so that every device gives the same
bits. There is no generator state: nothing to store with a session, nothing to hand over when
another worker goes on.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from typing import Final

import torch

NUM_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)
_LOW_32: Final = 0xFFFFFFFF


def philox4x32(counters: torch.Tensor, key: int) -> torch.Tensor:
    """Return four random words for each counter.

    Args:
        counters: ``(num_counters, 4)`` int64, each word in ``[0, 2**32)``.
        key: Any integer; its low 64 bits count.

    Returns:
        ``(num_counters, 4)`` int64, each word in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counters.unbind(dim=-1)
    k0, k1 = key & _LOW_32, (key >> 32) & _LOW_32
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW_32, (k1 + _KEY_INCREMENTS[1]) & _LOW_32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniforms(count: int, *, seed: int, position: int, device: torch.device) -> torch.Tensor:
    """Return ``count`` numbers, uniform over ``(0, 1)``, that belong to (seed, position).

    Number ``i`` is word ``i % 4`` of counter ``(i // 4, position, 0, 0)``, so it does not depend
    on ``count``.

    Args:
        count: At least 0.
        seed: Any 64-bit integer.
        position: In ``[0, 2**32)``.
        device: Where the numbers are wanted.

    Returns:
        ``(count,)`` float64, never exactly 0 or 1.
    """
    blocks = torch.arange((count + 3) // 4, device=device)
    return _to_uniforms(_words(blocks, seed, position).flatten()[:count])


def uniforms_at(indices: torch.Tensor, *, seed: int, position: int) -> torch.Tensor:
    """Return some of the numbers that :func:`uniforms` would, at the cost of as many counters.

    Args:
        indices: ``(num_indices,)`` int64, each in ``[0, 2**34)``.
        seed: Any 64-bit integer.
        position: In ``[0, 2**32)``.

    Returns:
        ``(num_indices,)`` float64.
    """
    words = _words(indices // 4, seed, position)
    return _to_uniforms(words.gather(1, (indices % 4).unsqueeze(-1)).squeeze(-1))


def _words(blocks: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    counters = torch.zeros(blocks.shape[0], 4, dtype=torch.int64, device=blocks.device)
    counters[:, 0] = blocks
    counters[:, 1] = position
    return philox4x32(counters, seed)


def _to_uniforms(words: torch.Tensor) -> torch.Tensor:
    return words.double().add_(0.5).mul_(2.0**-32)


def _multiply(words: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and the low 32 bits of a 32 x 32 bit product.

    int64 wraps, which leaves the bits of the unsigned product; the mask undoes the sign that the
    arithmetic shift extends.
    """
    product = words * factor
    return (product >> 32) & _LOW_32, product & _LOW_32
