from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode.philox import philox4x32, random_words, random_words_at, uniforms

# Known answers of the authors' Random123 library (kat_vectors, philox4x32, 10 rounds).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def slow_philox(counter: tuple[int, ...], key: int) -> list[int]:
    """The definition, a counter at a time, in whole numbers of any size."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0 = (key + i * 0x9E3779B9) % 2**32
        k1 = ((key >> 32) + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, answer):
    whole_key = key[0] | key[1] << 32

    words = philox4x32(np.array([counter], dtype=np.uint32).T, whole_key)

    assert tuple(words[:, 0].tolist()) == answer
    assert tuple(slow_philox(counter, whole_key)) == answer


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 40),
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
    indices=st.lists(st.integers(0, 2**34 - 1), max_size=10),
)
def test_words_are_those_of_their_counters(count, seed, position, indices):
    first = random_words(count, seed=seed, position=position)
    some = random_words_at(np.array(indices, dtype=np.int64), seed=seed, position=position)

    def slow_word(i: int) -> int:
        return slow_philox((i // 4, position, 0, 0), seed)[i % 4]

    assert first.tolist() == [slow_word(i) for i in range(count)]
    assert some.tolist() == [slow_word(i) for i in indices]


def test_words_do_not_depend_on_how_many_are_asked_for():
    few = random_words(5, seed=7, position=3)
    many = random_words(49_152, seed=7, position=3)

    assert few.tolist() == many[:5].tolist()


def test_some_words_are_those_of_all():
    indices = np.array([0, 1, 2, 3, 4, 7, 40_001, 49_151, 5])

    some = random_words_at(indices, seed=-7, position=3)

    assert some.tolist() == random_words(49_152, seed=-7, position=3)[indices].tolist()


def test_words_of_another_seed_or_position_are_others():
    words = random_words(1000, seed=7, position=3)

    assert not (words == random_words(1000, seed=8, position=3)).any()
    assert not (words == random_words(1000, seed=7 + 2**40, position=3)).any()
    assert not (words == random_words(1000, seed=7, position=4)).any()


def test_a_negative_seed_is_its_64_bits():
    ours = random_words(8, seed=-1, position=0)

    assert ours.tolist() == random_words(8, seed=2**64 - 1, position=0).tolist()


def test_uniforms_are_the_middles_of_equal_parts():
    words = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)

    assert uniforms(words).tolist() == [2**-33, 3 * 2**-33, 0.5 + 2**-33, 1 - 2**-33]


def test_uniforms_are_even():
    numbers = np.concatenate(
        [uniforms(random_words(4096, seed=1, position=position)) for position in range(50)]
    )

    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    chi_square = float(((counts - 3200) ** 2 / 3200).sum())
    assert chi_square < 116.1  # 63 degrees of freedom: passed once in 20,000 by honest numbers


def test_no_words_are_asked_for():
    assert random_words(0, seed=1, position=1).shape == (0,)
    assert random_words_at(np.array([], dtype=np.int64), seed=1, position=1).shape == (0,)
