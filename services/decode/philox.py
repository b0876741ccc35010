"""Random numbers that are a function of a key and a counter, and of nothing else.

Philox4x32 with ten rounds, in numpy and so on the CPU, wherever the model runs. There is no
generator state: nothing to store with a session, nothing to hand over when another worker goes on.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import sys
from typing import Final

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS: Final = (0x9E3779B9, 0xBB67AE85)
_LOW_32: Final = 0xFFFFFFFF

# Which of a 64-bit product's two 32-bit words is which.
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


def philox4x32(counters: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """Return four random words for each counter.

    Args:
        counters: ``(4, num_counters)``: a counter is a column.
        key: Any integer; its low 64 bits count.

    Returns:
        ``(4, num_counters)``: each counter's words in its column.
    """
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None]
    factors, others = counters[::2], counters[1::2]  # (2, num_counters)
    for keys in _key_schedule(key):
        halves = (factors * multipliers).view(np.uint32)  # (2, 2 * num_counters)
        factors, others = halves[::-1, _HIGH::2] ^ others, halves[::-1, _LOW::2]
        factors ^= keys
    return np.stack([factors[0], others[0], factors[1], others[1]])


def random_words(count: int, *, seed: int, position: int) -> NDArray[np.uint32]:
    """Return the first ``count`` random words that belong to (seed, position).

    Word ``i`` is word ``i % 4`` of counter ``(i // 4, position, 0, 0)``, so it does not depend on
    ``count``.

    Args:
        count: At least 0.
        seed: Any 64-bit integer.
        position: In ``[0, 2**32)``.

    Returns:
        ``(count,)``.
    """
    blocks = np.arange((count + 3) // 4)
    words = philox4x32(_counters(blocks, position), seed)
    return np.stack([*words], axis=-1).ravel()[:count]


def random_words_at(
    indices: NDArray[np.integer], *, seed: int, position: int
) -> NDArray[np.uint32]:
    """Return some of the words that :func:`random_words` would, at the cost of as many counters.

    Args:
        indices: ``(num_indices,)``, each in ``[0, 2**34)``.
        seed: Any 64-bit integer.
        position: In ``[0, 2**32)``.

    Returns:
        ``(num_indices,)``.
    """
    words = philox4x32(_counters(indices // 4, position), seed)
    own: NDArray[np.uint32] = words[indices % 4, np.arange(len(indices))]
    return own


def uniforms(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return the words as numbers, uniform over ``[2**-33, 1 - 2**-33]``: never exactly 0 or 1."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def _counters(blocks: NDArray[np.integer], position: int) -> NDArray[np.uint32]:
    counters = np.zeros((4, len(blocks)), dtype=np.uint32)
    counters[0] = blocks
    counters[1] = position
    return counters


def _key_schedule(key: int) -> NDArray[np.uint32]:
    """Return the keys of all rounds: ``(NUM_ROUNDS, 2, 1)``."""
    first = np.array([key & _LOW_32, (key >> 32) & _LOW_32], dtype=np.uint32)
    rounds = np.arange(NUM_ROUNDS, dtype=np.uint32)[:, None]
    return (first + rounds * np.array(_KEY_INCREMENTS, dtype=np.uint32))[..., None]
